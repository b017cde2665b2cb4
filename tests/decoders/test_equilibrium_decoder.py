"""The equilibrium decoder of a layer that can be followed by hand."""

from dataclasses import dataclass

import pytest
import torch

from deqdet.decoders import EquilibriumDecoder, Supervision, equilibrium
from deqdet.equilibrium import FixedPointIteration, Phantom, solve
from deqdet.structures import QueryState

from helpers.toy_layer import FEATURES, INITIAL, ToyLayer, gradients, read


@dataclass(frozen=True)
class Push:
    """In the place of a Perturbation: 8 on every content, 1000 on every cx."""

    kind: str

    def __call__(self, state: QueryState) -> QueryState:
        return QueryState(state.position + state.position.new_tensor([1000.0, 0, 0, 0]), state.content + 8)


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
    assert read(decoder.decode(INITIAL, FEATURES).prediction) == (2 + 2 / 8, 113.0)
    assert (len(decoder.initialization.calls), len(decoder.refinement.calls)) == (1, 3)
    decoder.test_steps = 5
    assert read(decoder.decode(INITIAL, FEATURES).prediction) == (2 + 2 / 32, 115.0)


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


def test_the_path_ends_where_it_is_read(monkeypatch):
    """With one-step noise, the clean path is needed up to step T - 1 alone."""
    lengths = []

    def count(*args, max_steps: int, **options):
        lengths.append(max_steps)
        return solve(*args, max_steps=max_steps, **options)

    monkeypatch.setattr(equilibrium, "solve", count)
    for kind in ("none", "zero-step", "one-step", "multi-step"):
        toy_decoder(kind=kind).supervise(INITIAL, FEATURES)
    assert lengths == [4, 4, 3, 4]


def test_an_image_that_overflows_leaves_the_others_alone():
    features = [torch.tensor([0.0, torch.nan], dtype=torch.float64).view(2, 1, 1)]
    predictions = toy_decoder().supervise(INITIAL, features)
    assert read(predictions["step4"], 0) == (2 + 2 / 64, 116.0)
    assert predictions["step4"].logits[1].isnan().all()
