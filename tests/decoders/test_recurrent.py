"""The recurrent decoder of a layer that can be followed by hand; of small layers, against the other decoders."""

import pytest
import torch

from deqdet.decoders import RecurrentDecoder, build_decoder
from deqdet.structures import QueryState

from helpers.small_decoders import SHAPES, loss, make_problem
from helpers.toy_layer import FEATURES, INITIAL, ToyLayer, gradients, read

RECURRENT = "MODEL.DEQDET.DECODER", "RecurrentDecoder"
LAYERS = pytest.mark.parametrize("layer", ["AdaMixerLayer", "SparseRCNNLayer"])


def toy_decoder(coupling: float = 0.0, num_layers: int = 4) -> RecurrentDecoder:
    """g: q + 4 + x and cx + 100; f: q / 2 + 1 + coupling cx + x and cx + 1."""
    first, other = ToyLayer(1.0, 4.0, 0.0, 100.0), ToyLayer(0.5, 1.0, coupling, 1.0)
    return RecurrentDecoder(initialization=first, refinement=other, num_layers=num_layers)


def test_predictions_by_hand():
    """With x = 0, q = 2 + 2 / 2^t; with x = 1, q = 4 + 1 / 2^t; cx = 110 + t."""
    predictions = toy_decoder().supervise(INITIAL, FEATURES)
    assert [(name, *read(x, 0), read(x, 1)[0]) for name, x in predictions.items()] == [
        ("init", 4.0, 110.0, 5.0),
        ("step1", 3.0, 111.0, 4.5),
        ("step2", 2.5, 112.0, 4.25),
        ("step3", 2.25, 113.0, 4.125),
    ]
    assert predictions["step3"].boxes[1, 0].tolist() == [113.0, 20.0, 5.0, 0.0]


def test_decoding_gives_the_last_steps_prediction():
    decoder = toy_decoder()
    assert read(decoder.decode(INITIAL, FEATURES).prediction) == (2.25, 113.0)
    assert decoder.initialization.calls == [True] and decoder.refinement.calls == [True] * 3


def test_gradients_by_hand():
    """Through all steps: q3 = a (a (a q0 + b + c p0) + b + c p1) + b + c p2, the positions p0, p1, p2 held fast."""
    decoder = toy_decoder(coupling=0.25)
    last = decoder.supervise(INITIAL, FEATURES)["step3"]
    q0, p0, p1, p2 = 4.0, 110.0, 111.0, 112.0
    q1 = q0 / 2 + 1 + p0 / 4
    q2 = q1 / 2 + 1 + p1 / 4
    assert read(last) == (q2 / 2 + 1 + p2 / 4, 113.0)
    f, g = decoder.refinement.numbers, decoder.initialization.numbers
    assert gradients(last.logits[0], f, g) == [
        [q2 + q1 / 2 + q0 / 4, 1 + 1 / 2 + 1 / 4, p2 + p1 / 2 + p0 / 4, 0.0],
        [0.0, 1 / 8, 10 / 8, 0.0],  # a^3 of (q, 1, cx) before g
    ]
    assert gradients(last.boxes[0, 0, 0], f, g) == [[0.0, 0.0, 0.0, 1.0], None]


def test_only_the_first_refinement_moves_the_initial_position():
    initial = QueryState(INITIAL.position.clone().requires_grad_(), INITIAL.content.clone().requires_grad_())
    predictions = toy_decoder(coupling=0.25).supervise(initial, FEATURES)
    assert gradients(predictions["init"].boxes[0, 0, 0], initial.position) == [[1.0] + [0.0] * 7]
    for name in ("step1", "step2", "step3"):
        assert gradients(predictions[name].boxes[0, 0, 0], initial.position) == [None]
    # The content does come through.
    assert gradients(predictions["step3"].logits[0], initial.content) == [[1 / 8, 0.0]]


def test_two_layers_are_enough_and_one_is_an_error(small_cfg):
    assert list(toy_decoder(num_layers=2).supervise(INITIAL, FEATURES)) == ["init", "step1"]
    for count in (1, 0):
        with pytest.raises(ValueError, match=f"NUM_LAYERS of a RecurrentDecoder must be at least 2, got {count}"):
            build_decoder(small_cfg(*RECURRENT, "MODEL.DEQDET.NUM_LAYERS", count), SHAPES)


def test_the_config_gives_two_layers_whatever_their_number(small_cfg):
    points = "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT", 9, "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE", 5
    decoder = build_decoder(small_cfg(*RECURRENT, *points, "MODEL.DEQDET.NUM_LAYERS", 5), SHAPES)
    assert decoder.num_layers == 5
    parameters = dict(decoder.named_parameters())
    assert {name.split(".")[0] for name in parameters} == {"initialization", "refinement"}
    assert len(parameters["initialization.points.offsets.weight"]) == 2 * 9 * 3  # G P 3
    assert len(parameters["refinement.points.offsets.weight"]) == 2 * 5 * 3


@LAYERS
def test_a_stack_of_copies_is_the_same_decoder(small_decoder, layer):
    """The gradient of the shared weights is then the sum of the copies'."""
    keys = "MODEL.DEQDET.REFINEMENT_LAYER", layer, "MODEL.DEQDET.NUM_LAYERS", 4
    recurrent = small_decoder(*RECURRENT, *keys)
    stacked = small_decoder("MODEL.DEQDET.DECODER", "StackedDecoder", *keys)
    first, *others = stacked.layers
    first.load_state_dict(recurrent.initialization.state_dict())
    for other in others:
        other.load_state_dict(recurrent.refinement.state_dict())
    initial, features = make_problem()
    tied, untied = recurrent.supervise(initial, features), stacked.supervise(initial, features)
    assert list(tied) == ["init", "step1", "step2", "step3"]
    for one, other in zip(tied.values(), untied.values(), strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=1e-9)
    for predictions in (tied, untied):
        sum(loss(x) for x in predictions.values()).backward()
    for name, parameter in recurrent.refinement.named_parameters():
        copies = [other.get_parameter(name).grad for other in others]
        torch.testing.assert_close(parameter.grad, sum(copies), rtol=1e-8, atol=1e-10)
        assert all(copy.any() for copy in copies), name


@LAYERS
@torch.no_grad()
def test_a_checkpoint_fits_the_equilibrium_decoder_and_back(small_decoder, layer):
    """T - 1 steps of the one are T_infer = T - 1 steps of the other."""
    keys = "MODEL.DEQDET.REFINEMENT_LAYER", layer
    recurrent = small_decoder(*RECURRENT, *keys, "MODEL.DEQDET.NUM_LAYERS", 4)
    equilibrium = small_decoder(*keys, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 3)
    for parameter in equilibrium.parameters():
        parameter.zero_()
    equilibrium.load_state_dict(recurrent.state_dict(), strict=True)
    problem = make_problem()
    expected, found = recurrent.decode(*problem).prediction, equilibrium.decode(*problem).prediction
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)
    recurrent.load_state_dict(equilibrium.state_dict(), strict=True)
