"""Decoders as the config builds them, of small layers; the equilibrium decoder against explicit loops."""

import pytest
import torch
from torch import Tensor

from deqdet.decoders import DECODER_REGISTRY, Supervision, build_decoder, packed_map
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration, Phantom, solve
from deqdet.layers import RefinementLayer
from deqdet.perturbation import Perturbation
from deqdet.structures import QueryState

from helpers.small_decoders import SHAPES, loss, make_problem


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
    decoded = decoder.decode(initial, features).prediction  # TEST_STEPS 4
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
        stopped, one, nine = (x.decode(initial, features).prediction.boxes for x in (early, single, full))
    assert torch.equal(stopped, one)
    assert (nine - one).abs().max() > 1e-3


def test_solvers_by_their_keys(small_decoder):
    key = "MODEL.DEQDET.SOLVER"
    numbers = f"{key}.DAMPING", 0.25, f"{key}.MEMORY", 7, f"{key}.REGULARIZATION", 1e-3, f"{key}.RETURN_BEST", True
    plain, anderson, broyden = (
        small_decoder(f"{key}.NAME", name, *numbers) for name in ("FixedPointIteration", "Anderson", "Broyden")
    )
    assert plain.solver == FixedPointIteration(damping=0.25)
    assert anderson.solver == Anderson(history_size=7, damping=0.25, regularization=1e-3)
    assert broyden.solver == Broyden(history_size=7)
    assert broyden.return_best and not small_decoder().return_best
    assert small_decoder().solver == FixedPointIteration()


@pytest.mark.parametrize("name, key, value, message", [
    ("Newton", "RTOL", 0.0, "SOLVER.NAME is 'Newton': it must be one of FixedPointIteration, Anderson, Broyden"),
    ("Anderson", "RTOL", -1.0, "MODEL.DEQDET.SOLVER.RTOL must not be negative"),
    ("FixedPointIteration", "DAMPING", 1.5, r"\(NAME FixedPointIteration\): damping must lie in \(0, 1\], got 1.5"),
    ("Anderson", "DAMPING", float("nan"), r"SOLVER \(NAME Anderson\): damping must lie in \(0, 1\], got nan"),
    ("Broyden", "MEMORY", -5, r"SOLVER \(NAME Broyden\): history_size of Broyden must be at least 1, got -5"),
    ("Anderson", "REGULARIZATION", -1.0, r"SOLVER \(NAME Anderson\): regularization must be finite and not negative, "),
])  # fmt: skip
def test_bad_solver_keys_are_errors(small_decoder, name, key, value, message):
    with pytest.raises(ValueError, match=message):
        small_decoder("MODEL.DEQDET.SOLVER.NAME", name, f"MODEL.DEQDET.SOLVER.{key}", value)


def pick(state: QueryState, image: int) -> QueryState:
    return QueryState(state.position[image : image + 1], state.content[image : image + 1])


@pytest.mark.parametrize(
    "solver", [None, Anderson(history_size=3), Broyden(history_size=3)], ids=["plain", "anderson", "broyden"]
)
def test_images_that_converge_leave_the_batch(small_decoder, monkeypatch, solver):
    decoder, (initial, features) = small_decoder(), make_problem(images=4)
    sizes, forward = [], decoder.refinement.forward

    def measure(state, levels):
        sizes.append((len(state.content), len(levels[0])))
        return forward(state, levels)

    monkeypatch.setattr(decoder.refinement, "forward", measure)
    with torch.no_grad():
        free = decoder.walk(initial, features, steps=30, rtol=0.0, solver=solver).solution
        rtol = 1.001 * free.residuals[2:12].median().item()  # the images pass it at different steps
        sizes.clear()
        options = {"steps": 30, "rtol": rtol, "solver": solver}
        stopped = decoder.walk(initial, features, **options).solution
        alone = [
            decoder.walk(pick(initial, i), [x[i : i + 1] for x in features], **options).solution
            for i in range(len(initial.content))
        ]
    assert len(set(stopped.steps.tolist())) > 1 and stopped.steps.max() < 30
    assert all(features == queries for queries, features in sizes)
    assert sum(queries for queries, _ in sizes) == sum(int(x.steps) for x in alone) + stopped.steps.sum()
    for i, single in enumerate(alone):
        assert single.steps.item() == stopped.steps[i]
        torch.testing.assert_close(stopped.value[i], single.value[0], rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_best_iterate_of_an_image(small_decoder):
    initial, features = make_problem()
    decoder = small_decoder("MODEL.DEQDET.SOLVER.RETURN_BEST", True)
    prepared = decoder.refinement.prepare(features)
    start = decoder.initialize(initial, prepared)
    found = decoder.walk(initial, features, steps=9).solution
    every = solve(
        packed_map(decoder.refinement, prepared, 6), start.pack(), solver=decoder.solver, max_steps=9, record=range(10)
    )
    best = every.residuals.argmin(dim=0) + 1
    assert (best < 9).any()  # else the last one is best, and the test shows nothing
    for image, step in enumerate(best.tolist()):
        torch.testing.assert_close(found.value[image], every.recorded[step][image], rtol=0, atol=1e-12)


def test_training_does_not_depend_on_the_solver(small_decoder):
    problem = make_problem()
    found = []
    for name in ("FixedPointIteration", "Anderson"):
        decoder = small_decoder("MODEL.DEQDET.SOLVER.NAME", name)
        torch.manual_seed(0)
        found.append(decoder.supervise(*problem))
    for name, prediction in found[0].items():
        assert torch.equal(prediction.logits, found[1][name].logits)


def test_nonfinite_iteration_is_reported(small_decoder):
    decoder = small_decoder()
    initial, features = make_problem()
    with torch.no_grad():
        decoder.refinement.feedforward[0].weight.fill_(float("nan"))
        decoded = decoder.decode(initial, features)
    assert decoded.prediction.boxes.isfinite().all()
    assert not decoded.finite.any()
    assert decoded.steps.tolist() == [1] * len(decoded.steps)
