"""The stacked decoder of a layer that can be followed by hand; as the config builds it."""

import pytest
import torch
from torch import Tensor

from deqdet.decoders import StackedDecoder, build_decoder
from deqdet.structures import QueryState

from helpers.small_decoders import SHAPES
from helpers.toy_layer import FEATURES, INITIAL, ToyLayer, gradients, read

STACKED = "MODEL.DEQDET.DECODER", "StackedDecoder"


def toy_decoder(coupling: float = 0.0) -> StackedDecoder:
    """q + 4 + x, cx + 100; then q / 2 + 1 + coupling cx + x, cx + 1; then q / 4 + 2 + coupling cx + x, cx + 10."""
    first, second = ToyLayer(1.0, 4.0, 0.0, 100.0), ToyLayer(0.5, 1.0, coupling, 1.0)
    return StackedDecoder(layers=[first, second, ToyLayer(0.25, 2.0, coupling, 10.0)])


def test_predictions_by_hand():
    predictions = toy_decoder().supervise(INITIAL, FEATURES)
    assert [(name, *read(x, 0), read(x, 1)[0]) for name, x in predictions.items()] == [
        ("layer1", 4.0, 110.0, 5.0),
        ("layer2", 3.0, 111.0, 4.5),
        ("layer3", 2.75, 121.0, 4.125),
    ]
    assert predictions["layer3"].boxes[1, 0].tolist() == [121.0, 20.0, 5.0, 0.0]


def test_decoding_gives_the_last_layers_prediction():
    decoder = toy_decoder()
    assert read(decoder.decode(INITIAL, FEATURES).prediction) == (2.75, 121.0)
    assert [layer.calls for layer in decoder.layers] == [[True]] * 3


def test_gradients_by_hand():
    """q3 = a3 (a2 (a1 q0 + b1 + c1 p0) + b2 + c2 p1) + b3 + c3 p2, with all positions but p0 held fast."""
    decoder = toy_decoder(coupling=0.25)
    last = decoder.supervise(INITIAL, FEATURES)["layer3"]
    assert read(last) == (0.25 * 30.5 + 2 + 0.25 * 111, 121.0)  # q2 = 4 / 2 + 1 + 110 / 4 = 30.5
    numbers = [layer.numbers for layer in decoder.layers]
    assert gradients(last.logits[0], *numbers) == [
        [0.0, 0.25 * 0.5, 0.25 * 0.5 * 10, 0.0],
        [0.25 * 4, 0.25, 0.25 * 110, 0.0],  # d2 moves p2, which is held fast
        [30.5, 1.0, 111.0, 0.0],
    ]
    assert gradients(last.boxes[0, 0, 0], *numbers) == [None, None, [0.0, 0.0, 0.0, 1.0]]


def test_only_the_first_layer_moves_the_initial_position():
    initial = QueryState(INITIAL.position.clone().requires_grad_(), INITIAL.content.clone().requires_grad_())
    predictions = toy_decoder(coupling=0.25).supervise(initial, FEATURES)
    assert gradients(predictions["layer1"].boxes[0, 0, 0], initial.position) == [[1.0] + [0.0] * 7]
    assert gradients(predictions["layer2"].boxes[0, 0, 0], initial.position) == [None]
    assert gradients(predictions["layer3"].boxes[0, 0, 0], initial.position) == [None]
    # The content does come through.
    assert gradients(predictions["layer3"].logits[0], initial.content) == [[0.25 * 0.5, 0.0]]


def test_one_layer_is_enough_and_none_is_an_error(small_cfg):
    decoder = StackedDecoder(layers=[ToyLayer(1.0, 4.0, 0.0, 100.0)])
    assert {name: read(x) for name, x in decoder.supervise(INITIAL, FEATURES).items()} == {"layer1": (4.0, 110.0)}
    for count in (0, -1):
        with pytest.raises(ValueError, match="MODEL.DEQDET.NUM_LAYERS must be at least 1"):
            build_decoder(small_cfg(*STACKED, "MODEL.DEQDET.NUM_LAYERS", count), SHAPES)


def test_the_config_gives_layers_with_weights_of_their_own(small_cfg):
    points = "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT", 9, "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE", 5
    decoder = build_decoder(small_cfg(*STACKED, *points, "MODEL.DEQDET.NUM_LAYERS", 4), SHAPES)
    parameters = dict(decoder.named_parameters())
    assert {name.split(".")[1] for name in parameters} == {"0", "1", "2", "3"}
    assert all(name.startswith("layers.") for name in parameters)
    # G P 3 rows with G = 2: the first layer is an initialization layer.
    rows = [len(parameters[f"layers.{i}.points.offsets.weight"]) for i in range(4)]
    assert rows == [2 * 9 * 3] + [2 * 5 * 3] * 3

    def weight(layer: int) -> Tensor:
        return parameters[f"layers.{layer}.feedforward.0.weight"]

    storages = {weight(i).data_ptr() for i in range(4)}
    assert len(storages) == 4
    assert not any(torch.equal(weight(i), weight(j)) for i in range(4) for j in range(i))
