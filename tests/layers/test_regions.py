"""The regions that the Sparse R-CNN layer pools from the pyramid, worked by hand."""

import math

import pytest
import torch
from torch import Tensor

from deqdet.boxes import encode_boxes
from deqdet.layers import SparseRCNNLayer
from deqdet.structures import QueryState

from helpers.small_layers import DIM, SIDE, SPARSE_RCNN, STRIDES, make_sparse_rcnn


def regions_of(layer: SparseRCNNLayer, boxes: Tensor, features: list[Tensor]) -> Tensor:
    """Return the regions (rows, N, M, C) that the dynamic convolution gets for boxes (rows, N, 4) xyxy."""
    seen = []
    handle = layer.dynamic_conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    content = torch.zeros(*boxes.shape[:2], DIM)
    with torch.no_grad():
        layer(QueryState(encode_boxes(boxes), content), features)
    handle.remove()
    return seen[0]


def constant_levels(*values: float, side: int = 256) -> list[Tensor]:
    """Make levels whose cells all have one value, values[l] in level l."""
    return [torch.full((1, DIM, side // s, side // s), v) for v, s in zip(values, STRIDES, strict=True)]


@pytest.mark.parametrize(
    "width, height, level",
    [
        (1, 1, 1.0),
        (111, 111, 1.0),
        (113, 113, 2.0),
        (40, 330, 2.0),  # sqrt(40 * 330) = 115
        (223, 223, 2.0),
        (225, 225, 3.0),
        (500, 500, 3.0),
    ],
)
def test_the_level_of_a_box(width, height, level):
    """224 pixels and more are level 4 (of stride 16); 112 and more level 3; others level 2."""
    box = torch.tensor([[[100.0, 100.0, 100.0 + width, 100.0 + height]]])
    regions = regions_of(make_sparse_rcnn(), box, constant_levels(1.0, 2.0, 3.0, side=640))
    assert (regions - level).abs().max() < 1e-5


def test_cells_go_row_by_row():
    """Channel 0 is the column of a cell, channel 1 the row: a cell centre at x pixels reads x / 4 - 1 / 2."""
    levels = constant_levels(0.0, 0.0, 0.0)
    levels[0][:, 0] = torch.arange(64.0)
    levels[0][:, 1] = torch.arange(64.0)[:, None]
    box = torch.tensor([[[20.0, 40.0, 32.0, 76.0]]])  # cells of 4 x 12 pixels
    (cells,) = regions_of(make_sparse_rcnn(), box, levels)[0]
    columns, rows = [(x / 4 - 0.5) for x in (22, 26, 30)], [(y / 4 - 0.5) for y in (46, 58, 70)]
    expected = [(column, row) for row in rows for column in columns]
    assert [tuple(cell[:2].tolist()) for cell in cells] == [pytest.approx(pair, abs=1e-4) for pair in expected]


def test_regions_beyond_the_edge():
    """A sample outside is 0, but at most half a cell of the level beyond the edge it is the edge's value."""
    features = constant_levels(1.0, 1.0, 1.0)  # 256 x 256 pixels
    boxes = [
        [244.0, 0.0, 292.0, 48.0],  # samples at x = 248, 256 | 264, 272 | 280, 288: up to 258
        [-23.0, 0.0, 1.0, 24.0],  # samples at -21, -17 | -13, -9 | -5, -1: from -2 on
        [300.0, 300.0, 340.0, 340.0],
        [-1e5, -1e5, 1e5, 1e5],  # samples at +-16,667 and farther
        [1e7, 0.0, 1e7 + 64, 64.0],
        [-1e30, 0.0, -1e29, 64.0],
    ]
    regions = regions_of(make_sparse_rcnn(), torch.tensor([boxes]), features)
    seen = [region.mean(dim=1).view(SIDE, SIDE)[0].tolist() for region in regions[0]]
    assert seen[0] == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)
    assert seen[1] == pytest.approx([0.0, 0.0, 0.5], abs=1e-6)
    assert not regions[0, 2:].any()


@torch.no_grad()
@pytest.mark.parametrize("coordinate", range(4))
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_a_box_that_is_not_finite_leaves_the_others_alone(coordinate, value):
    """Not clipped, it would make RoIAlign read outside the features."""
    layer, features, state = make_sparse_rcnn(), SPARSE_RCNN.features(), SPARSE_RCNN.state()
    before = layer(state, features)
    position = state.position.clone()
    position[1, 2, coordinate] = value
    after = layer(QueryState(position, state.content), features)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    # 1e-5: another matrix product of another batch may round otherwise.
    torch.testing.assert_close(after.content[others], before.content[others], rtol=0, atol=1e-5)
    torch.testing.assert_close(after.position[others], before.position[others], rtol=1e-5, atol=1e-3)
    assert after.content.isfinite().all()
