"""Decoders as the config builds them, of small layers; the equilibrium decoder against explicit loops."""

import pytest
import torch
from small_decoders import SHAPES, loss, make_problem
from torch import Tensor

from deqdet.decoders import DECODER_REGISTRY, Supervision, build_decoder
from deqdet.equilibrium import Phantom
from deqdet.layers import RefinementLayer
from deqdet.perturbation import Perturbation
from deqdet.structures import QueryState


def refine(layer: RefinementLayer, state: QueryState, features: list[Tensor], times: int) -> QueryState:
    for _ in range(times):
        state = layer(QueryState(state.position.detach(), state.content), features)
    return state


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


@pytest.mark.parametrize("decoder", ["StackedDecoder", "RecurrentDecoder", "EquilibriumDecoder"])
@pytest.mark.parametrize("layer", ["AdaMixerLayer", "SparseRCNNLayer"])
def test_every_decoder_gives_every_parameter_a_gradient(small_decoder, decoder, layer):
    keys = "MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.REFINEMENT_LAYER", layer, "MODEL.DEQDET.NUM_LAYERS", 3
    built = small_decoder(*keys)
    assert type(built).__name__ == decoder and decoder in DECODER_REGISTRY
    initial, features = make_problem()
    sum(loss(x) for x in built.supervise(initial, features).values()).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert initial.content.grad.any() and initial.position.grad.any()
    assert features[0].grad.any()


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
    with pytest.raises(ValueError, match="NoSuchDecoder.*EquilibriumDecoder, RecurrentDecoder, StackedDecoder"):
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
