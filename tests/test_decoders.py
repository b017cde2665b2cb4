"""Decoders of a layer that can be followed by hand; of small AdaMixer layers, against explicit loops."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec

from deqdet.decoders import EquilibriumDecoder, Supervision, build_decoder
from deqdet.equilibrium import FixedPointIteration, Phantom
from deqdet.layers import RefinementLayer
from deqdet.perturbation import Perturbation
from deqdet.structures import Prediction, QueryState


class ToyLayer(RefinementLayer):
    """q <- a q + b + c cx + x, cx <- cx + d; contents of one channel; x, a number an image, is the feature.

    Unlike a real layer it reads the position as it is given, so that it shows what the decoder detaches.
    """

    def __init__(self, a: float, b: float, c: float, d: float):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([a, b, c, d], dtype=torch.float64))
        self.calls: list[bool] = []  # of each: are gradients recorded?

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        self.calls.append(torch.is_grad_enabled())
        a, b, c, d = self.numbers
        x = features[0].repeat(len(state.content) // len(features[0]), 1, 1)  # segment-major
        content = a * state.content + b + c * state.position[..., :1] + x
        cx, rest = state.position.split([1, 3], dim=2)
        return QueryState(torch.cat([cx + d, rest], dim=2), content)

    def predict(self, state: QueryState) -> Prediction:
        """The state itself."""
        return Prediction(state.content, state.position)


@dataclass(frozen=True)
class Push:
    """In the place of a Perturbation: 8 on every content, 1000 on every cx."""

    kind: str

    def __call__(self, state: QueryState) -> QueryState:
        return QueryState(state.position + state.position.new_tensor([1000.0, 0, 0, 0]), state.content + 8)


INITIAL = QueryState(
    torch.tensor([10.0, 20.0, 5.0, 0.0], dtype=torch.float64).expand(2, 1, 4),
    torch.zeros(2, 1, 1, dtype=torch.float64),
)
FEATURES = [torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)]  # x of the two images


def toy_decoder(
    *, use_init=True, coupling=0.0, extra=2, steps=2, damping=1.0, kind="none", checkpointed=False
) -> EquilibriumDecoder:
    """g: q = 4 + x and cx + 100; f: q / 2 + 1 + coupling cx + x and cx + 1; Omega = {1, 3, 4}; k = steps."""
    return EquilibriumDecoder(
        initialization=ToyLayer(0.0, 4.0, 0.0, 100.0) if use_init else None,
        refinement=ToyLayer(0.5, 1.0, coupling, 1.0),
        solver=FixedPointIteration(),
        test_steps=3,
        supervision=Supervision(train_steps=4, extra=extra, count=1, interval=3),
        estimator=Phantom(steps=steps, damping=damping),
        perturbation=Push(kind),
        checkpoint_segments=checkpointed,
    )


def read(prediction: Prediction, image: int = 0) -> tuple[float, float]:
    """(q, cx)"""
    return prediction.logits[image].item(), prediction.boxes[image, 0, 0].item()


def gradients(value: Tensor, *inputs: Tensor) -> list[list[float] | None]:
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [None if x is None else x.flatten().tolist() for x in found]


# Supervision


@pytest.mark.parametrize(
    "train_steps, count, interval, expected",
    [
        (20, 4, 3, [1, 3, 6, 9, 12, 20]),
        (20, 0, 3, [1, 20]),
        (6, 1, 3, [1, 3, 6]),
        (12, 4, 3, [1, 3, 6, 9, 12]),
        (5, 2, 1, [1, 2, 5]),
        (1, 0, 1, [1]),
        (1, 1, 1, [1]),
    ],
)
def test_omega(train_steps, count, interval, expected):
    assert Supervision(train_steps=train_steps, extra=2, count=count, interval=interval).steps == expected


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"train_steps": 0, "count": 0}, "TRAIN_STEPS"),
        ({"interval": 0}, "SUPERVISION_INTERVAL"),
        ({"extra": -1}, "EXTRA_SUPERVISION"),
        ({"count": -1}, "SUPERVISION_COUNT"),
        ({"train_steps": 11}, r"4 \* 3, beyond TRAIN_STEPS = 11"),
    ],
)
def test_bad_supervision_is_an_error(changed, message):
    with pytest.raises(ValueError, match=message):
        Supervision(**({"train_steps": 20, "extra": 2, "count": 4, "interval": 3} | changed))


# By hand. With x = 0, y_t has q = 2 + 2 / 2^t and cx = 110 + t; with x = 1, q = 4 for ever.


@pytest.mark.parametrize("checkpointed", [False, True])
def test_predictions_by_hand(checkpointed):
    predictions = toy_decoder(checkpointed=checkpointed).supervise(INITIAL, FEATURES)
    # 4 + 1 = 5 leaves g for the image with x = 1: q = 4 + 1 / 2^t.
    assert [(name, *read(x, 0), read(x, 1)[0]) for name, x in predictions.items()] == [
        ("init", 4.0, 110.0, 5.0),
        ("init+1", 3.0, 111.0, 4.5),
        ("init+2", 2.5, 112.0, 4.25),
        ("step1", 2 + 2 / 8, 113.0, 4 + 1 / 8),  # k = 2 more
        ("step3", 2 + 2 / 32, 115.0, 4 + 1 / 32),
        ("step4", 2 + 2 / 64, 116.0, 4 + 1 / 64),
    ]
    assert predictions["step3"].boxes[1, 0].tolist() == [115.0, 20.0, 5.0, 0.0]


def test_predictions_with_one_gradient_step_and_damping():
    predictions = toy_decoder(steps=1, damping=0.5).supervise(INITIAL, FEATURES)
    assert read(predictions["step3"]) == (0.5 * (2 + 2 / 8) + 0.5 * (2 + 2 / 16), 113.5)


def test_predictions_without_an_initialization_layer():
    """From q = 0: q = 2 - 2 / 2^t; cx = 10 + t."""
    predictions = toy_decoder(use_init=False).supervise(INITIAL, FEATURES)
    assert [(name, *read(x)) for name, x in predictions.items()] == [
        ("init+1", 1.0, 11.0),
        ("init+2", 1.5, 12.0),
        ("step1", 2 - 2 / 8, 13.0),
        ("step3", 2 - 2 / 32, 15.0),
        ("step4", 2 - 2 / 64, 16.0),
    ]


def test_no_extra_supervision():
    assert list(toy_decoder(extra=0).supervise(INITIAL, FEATURES)) == ["init", "step1", "step3", "step4"]
    with pytest.raises(ValueError, match="EXTRA_SUPERVISION must be at least 1"):
        toy_decoder(extra=0, use_init=False)


def test_decoding_takes_test_steps_without_noise():
    decoder = toy_decoder(kind="multi-step")
    assert read(decoder.decode(INITIAL, FEATURES)) == (2 + 2 / 8, 113.0)
    assert (len(decoder.initialization.calls), len(decoder.refinement.calls)) == (1, 3)
    decoder.test_steps = 5
    assert read(decoder.decode(INITIAL, FEATURES)) == (2 + 2 / 32, 115.0)


@pytest.mark.parametrize("checkpointed, segments, recomputed", [(False, 2, 0), (True, 2 * 3, 2 * 3)])
def test_applications_are_counted(checkpointed, segments, recomputed):
    """h = 2; T = 4 without a graph; k = 2 for all of Omega at once or for each point, then recomputed."""
    decoder = toy_decoder(checkpointed=checkpointed)
    predictions = decoder.supervise(INITIAL, FEATURES)
    assert decoder.refinement.calls == [True] * 2 + [False] * 4 + [True] * segments
    torch.stack([x.logits.sum() for x in predictions.values()]).sum().backward()
    assert len(decoder.refinement.calls) == 2 + 4 + segments + recomputed


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_of_two_steps_by_hand(checkpointed):
    """q'' = a (a q + b + c p) + b + c (p + d), with q and both positions held fast; p'' = (p + d) + d."""
    decoder = toy_decoder(checkpointed=checkpointed, coupling=0.25)
    step = decoder.supervise(INITIAL, FEATURES)["step3"]
    f, g, p, q = decoder.refinement.numbers, decoder.initialization.numbers, 113.0, 4.0
    for cx in (110, 111, 112):
        q = q / 2 + 1 + cx / 4
    a, b, c = 0.5, 1.0, 0.25
    assert step.logits[0].item() == pytest.approx(a * (a * q + b + c * p) + b + c * (p + 1))
    of_content, of_position = gradients(step.logits[0], f, g), gradients(step.boxes[0, 0, 0], f, g)
    assert of_content == [pytest.approx([2 * a * q + b + c * p, a + 1, a * p + (p + 1), 0.0]), None]
    assert of_position == [[0.0, 0.0, 0.0, 1.0], None]


def test_gradient_of_one_step_by_hand():
    """q' = a q + b + c p: JFB."""
    decoder = toy_decoder(steps=1, coupling=0.25)
    step = decoder.supervise(INITIAL, FEATURES)["step1"]
    q = 4 / 2 + 1 + 110 / 4
    found = gradients(step.logits[0], decoder.refinement.numbers, decoder.initialization.numbers)
    assert found == [pytest.approx([q, 1.0, 111.0, 0.0]), None]


def test_gradient_of_the_extra_supervision_by_hand():
    """q_2 = a (a b_g + b + c p_0) + b + c p_1 reaches g along the content, but not along the positions."""
    decoder = toy_decoder(coupling=0.25)
    predictions = decoder.supervise(INITIAL, FEATURES)
    f, g = decoder.refinement.numbers, decoder.initialization.numbers
    a, b, c, q0, p0, p1 = 0.5, 1.0, 0.25, 4.0, 110.0, 111.0
    q1 = a * q0 + b + c * p0
    expected = [pytest.approx([q1 + a * q0, a + 1, a * p0 + p1, 0.0]), [0.0, a * a, a * a * 10.0, 0.0]]
    assert gradients(predictions["init+2"].logits[0], f, g) == expected
    assert gradients(predictions["init+2"].boxes[0, 0, 0], f, g) == [[0.0, 0.0, 0.0, 1.0], None]
    assert gradients(predictions["init"].boxes[0, 0, 0], f, g) == [None, [0.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("use_init, first, second", [(True, "init", "init+1"), (False, "init+1", "init+2")])
def test_only_the_first_refinement_moves_the_initial_position(use_init, first, second):
    decoder = toy_decoder(use_init=use_init)
    initial = QueryState(INITIAL.position.clone().requires_grad_(), INITIAL.content.clone().requires_grad_())
    predictions = decoder.supervise(initial, FEATURES)
    assert gradients(predictions[first].boxes[0, 0, 0], initial.position) == [[1.0] + [0.0] * 7]
    assert gradients(predictions[second].boxes[0, 0, 0], initial.position) == [None]
    for name in ("step1", "step3", "step4"):
        assert gradients(predictions[name].logits[0], initial.position, initial.content) == [None, None]
    # The content does come through: a = 0.5 at each application of f, and 0 at g's.
    content = gradients(predictions["init+2"].logits[0], initial.content)
    assert content == [[0.0, 0.0]] if use_init else content == [[0.25, 0.0]]


# Perturbation: Push adds 8 to q and 1000 to cx. Clean: q = 4, 3, 2.5, 2.25, 2.125; cx = 110 + t.


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "kind, points",
    [
        ("none", [(3.0, 111.0), (2.25, 113.0), (2.125, 114.0)]),
        ("zero-step", [(11.0, 1111.0), (10.25, 1113.0), (10.125, 1114.0)]),
        ("one-step", [(7.0, 1111.0), (6.25, 1113.0), (6.125, 1114.0)]),  # (q + 8) / 2 + 1 of the clean q
        ("multi-step", [(7.0, 1111.0), (9.25, 3113.0), (9.625, 4114.0)]),  # 4, 7, 8.5, 9.25, 9.625
    ],
)
def test_noise_by_hand(kind, points, checkpointed):
    predictions = toy_decoder(kind=kind, checkpointed=checkpointed).supervise(INITIAL, FEATURES)
    for t, (q, cx) in zip((1, 3, 4), points, strict=True):
        assert read(predictions[f"step{t}"]) == ((q / 2 + 1) / 2 + 1, cx + 2)  # k = 2 clean applications
    early = [read(predictions[name]) for name in ("init", "init+1", "init+2")]
    assert early == [(4.0, 110.0), (3.0, 111.0), (2.5, 112.0)]  # noise is on the solving path only


def test_an_image_that_overflows_leaves_the_others_alone():
    features = [torch.tensor([0.0, torch.nan], dtype=torch.float64).view(2, 1, 1)]
    predictions = toy_decoder().supervise(INITIAL, features)
    assert read(predictions["step4"], 0) == (2 + 2 / 64, 116.0)
    assert predictions["step4"].logits[1].isnan().all()


# A small AdaMixer decoder, in float64, against loops over its layers.

SHAPES = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]


@pytest.fixture
def small_decoder(small_cfg, stir):
    def build(*overrides) -> EquilibriumDecoder:
        torch.manual_seed(0)
        decoder = build_decoder(small_cfg(*overrides), SHAPES).double()
        stir(decoder)
        return decoder

    return build


def make_problem(images: int = 2) -> tuple[QueryState, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = {"generator": generator, "dtype": torch.float64}
    position = torch.rand(images, 6, 4, **draw) * torch.tensor([96.0, 64.0, 2.0, 2.0])
    initial = QueryState(
        (position + torch.tensor([0.0, 0.0, 3.0, -1.0])).requires_grad_(),
        torch.randn(images, 6, 32, **draw).requires_grad_(),
    )
    return initial, [torch.randn(images, 32, 64 // s, 96 // s, **draw).requires_grad_() for s in (8, 16)]


def refine(layer: RefinementLayer, state: QueryState, features: list[Tensor], times: int) -> QueryState:
    for _ in range(times):
        state = layer(QueryState(state.position.detach(), state.content), features)
    return state


def loss(prediction: Prediction) -> Tensor:
    """Any smooth number of some size."""
    return prediction.logits.sigmoid().square().sum() + (prediction.boxes / 100).sin().sum()


@torch.no_grad()
def test_predictions_against_a_loop(small_decoder):
    decoder = small_decoder()
    initial, features = make_problem()
    predictions = decoder.supervise(initial, features)
    assert list(predictions) == ["init", "init+1", "init+2", "step1", "step2", "step3"]
    start = decoder.initialization(initial, features)
    expected = {"init": decoder.initialization.predict(start)}
    for name, applications in {"init+1": 1, "init+2": 2, "step1": 3, "step2": 4, "step3": 5}.items():
        expected[name] = decoder.refinement.predict(refine(decoder.refinement, start, features, applications))
    for name, prediction in predictions.items():
        torch.testing.assert_close(prediction.logits, expected[name].logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(prediction.boxes, expected[name].boxes, rtol=0, atol=1e-8)
    decoded = decoder.decode(initial, features)  # TEST_STEPS 4
    torch.testing.assert_close(decoded.logits, expected["step2"].logits, rtol=0, atol=1e-10)
    # Far enough from each other that one cannot stand for another.
    assert (expected["step2"].logits - expected["step3"].logits).abs().max() > 1e-6


@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_at_a_point_against_explicit_steps(small_decoder, steps):
    decoder = small_decoder("MODEL.DEQDET.EQUILIBRIUM.GRADIENT_STEPS", steps)
    initial, features = make_problem()
    inputs = [*decoder.refinement.parameters(), *features]
    found = torch.autograd.grad(loss(decoder.supervise(initial, features)["step3"]), inputs)

    def explicit(times: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            point = refine(decoder.refinement, decoder.initialization(initial, features), features, 3)
        state = refine(decoder.refinement, point, features, times)
        return torch.autograd.grad(loss(decoder.refinement.predict(state)), inputs)

    torch.testing.assert_close(found, explicit(steps), rtol=1e-8, atol=1e-10)
    # One step is another gradient than two, not by rounding.
    other = explicit(3 - steps)
    index = [name for name, _ in decoder.refinement.named_parameters()].index("mixing.out.weight")
    assert (found[index] - other[index]).norm() > 1e-2 * found[index].norm()


def test_checkpointed_segments_have_the_same_gradients(small_decoder):
    """Also with noise, which is drawn before the segments and not again when they are recomputed."""
    key = "MODEL.DEQDET.PERTURBATION"
    decoder = small_decoder(f"{key}.KIND", "multi-step", f"{key}.PROBABILITY", 1.0)
    initial, features = make_problem()
    inputs = [*decoder.parameters(), *features, initial.position, initial.content]
    found = []
    for checkpointed, seed in ((False, 1), (True, 1), (True, 2)):
        decoder.checkpoint_segments = checkpointed
        torch.manual_seed(seed)
        predictions = decoder.supervise(initial, features)
        found.append(torch.autograd.grad(sum(loss(x) for x in predictions.values()), inputs))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-10)
    # Another noise is another gradient, of the coarser level.
    assert (found[1][-3] - found[2][-3]).norm() > 1e-3 * found[1][-3].norm()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "zero-step", "one-step", "multi-step"])
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_drawn_noise_reaches_every_point(small_decoder, kind, probability):
    key = "MODEL.DEQDET.PERTURBATION"
    decoder = small_decoder(f"{key}.KIND", kind, f"{key}.PROBABILITY", probability)
    initial, features = make_problem()
    first, second = decoder.supervise(initial, features), decoder.supervise(initial, features)
    noisy = kind != "none" and probability == 1
    for name in first:
        same = torch.equal(first[name].logits, second[name].logits)
        assert same == (not noisy or name.startswith("init"))


@pytest.mark.parametrize("use_init", [True, False])
@pytest.mark.parametrize("extra", [1, 2])
def test_every_parameter_has_a_gradient(small_decoder, use_init, extra):
    key = "MODEL.DEQDET.EQUILIBRIUM"
    decoder = small_decoder(f"{key}.USE_INIT_LAYER", use_init, f"{key}.EXTRA_SUPERVISION", extra)
    assert (decoder.initialization is None) == (not use_init)
    initial, features = make_problem()
    predictions = decoder.supervise(initial, features)
    assert ("init" in predictions) == use_init
    sum(loss(x) for x in predictions.values()).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert initial.content.grad.any() and initial.position.grad.any()
    assert all(feature.grad.any() for feature in features)


def test_layers_have_weights_of_their_own(small_decoder):
    decoder = small_decoder()
    ours, theirs = decoder.initialization.parameters(), decoder.refinement.parameters()
    assert not {id(p) for p in ours} & {id(p) for p in theirs}
    assert not torch.equal(decoder.initialization.mixing.out.weight, decoder.refinement.mixing.out.weight)


def test_the_config_reaches_the_decoder(small_cfg):
    equilibrium, noise = "MODEL.DEQDET.EQUILIBRIUM", "MODEL.DEQDET.PERTURBATION"
    overrides = {
        f"{equilibrium}.TRAIN_STEPS": 17,
        f"{equilibrium}.TEST_STEPS": 23,
        f"{equilibrium}.EXTRA_SUPERVISION": 5,
        f"{equilibrium}.GRADIENT_STEPS": 3,
        f"{equilibrium}.GRADIENT_DAMPING": 0.75,
        f"{equilibrium}.SUPERVISION_COUNT": 4,
        f"{equilibrium}.SUPERVISION_INTERVAL": 2,
        f"{equilibrium}.CHECKPOINT_SEGMENTS": True,
        f"{noise}.KIND": "one-step",
        f"{noise}.PROBABILITY": 0.3,
        f"{noise}.CONTENT_SIZE": 0.6,
        f"{noise}.POSITION_SIZE": 7.0,
    }
    decoder = build_decoder(small_cfg(*[x for pair in overrides.items() for x in pair]), SHAPES)
    assert decoder.test_steps == 23 and decoder.checkpoint_segments
    assert decoder.supervision == Supervision(train_steps=17, extra=5, count=4, interval=2)
    assert decoder.estimator == Phantom(steps=3, damping=0.75)
    assert decoder.perturbation == Perturbation("one-step", 0.3, content_size=0.6, position_size=7.0)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("EQUILIBRIUM.TEST_STEPS", 0, "TEST_STEPS must be at least 1"),
        ("EQUILIBRIUM.TRAIN_STEPS", 1, "beyond TRAIN_STEPS = 1"),
        ("EQUILIBRIUM.GRADIENT_STEPS", 0, "steps must be at least 1"),
        ("EQUILIBRIUM.GRADIENT_DAMPING", 0.0, "damping"),
        ("PERTURBATION.KIND", "two-step", "multi-step, one-step, zero-step, none"),
        ("PERTURBATION.PROBABILITY", 1.5, "got 1.5"),
    ],
)
def test_bad_values_are_errors(small_cfg, key, value, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(small_cfg(f"MODEL.DEQDET.{key}", value), SHAPES)


def test_an_unknown_decoder_is_an_error(small_cfg):
    with pytest.raises(ValueError, match="NoSuchDecoder.*EquilibriumDecoder"):
        build_decoder(small_cfg("MODEL.DEQDET.DECODER", "NoSuchDecoder"), SHAPES)


def test_tolerance_stops_an_image_early(small_decoder):
    """At any tolerance above the first residual, one step is taken and a longer path changes nothing."""
    initial, features = make_problem()
    early = small_decoder("MODEL.DEQDET.SOLVER.RTOL", 1e6, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 9)
    single = small_decoder("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 1)
    full = small_decoder("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 9)
    with torch.no_grad():
        stopped, one, nine = (decoder.decode(initial, features).boxes for decoder in (early, single, full))
    assert torch.equal(stopped, one)
    assert (nine - one).abs().max() > 1e-3


def test_unknown_solver_and_negative_tolerance_are_errors(small_decoder):
    with pytest.raises(ValueError, match="MODEL.DEQDET.SOLVER.NAME is 'Newton'.*FixedPointIteration"):
        small_decoder("MODEL.DEQDET.SOLVER.NAME", "Newton")
    with pytest.raises(ValueError, match="RTOL must not be negative"):
        small_decoder("MODEL.DEQDET.SOLVER.RTOL", -1.0)


def test_nonfinite_iteration_is_reported(small_decoder, caplog):
    decoder = small_decoder()
    initial, features = make_problem()
    with torch.no_grad():
        decoder.refinement.feedforward[0].weight.fill_(float("nan"))
        boxes = decoder.decode(initial, features).boxes
    assert boxes.isfinite().all()
    assert f"non-finite in {len(boxes)} of {len(boxes)} images" in caplog.text
