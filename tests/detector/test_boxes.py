import math

import pytest
import torch
from torch import Tensor

from detectron2.modeling.box_regression import Box2BoxTransform

from deqdet.boxes import (
    BoxGeometry,
    box_sizes,
    decode_boxes,
    embed_position,
    encode_boxes,
    geometry_exponents,
    pairwise_intersection,
    refine_position,
    refine_position_by_deltas,
)
from deqdet.layers.attention import PositionalAttention


def random_positions(*shape):
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(*shape, 4, dtype=torch.float64, generator=generator)
    return position * torch.tensor([300.0, 200.0, 2.0, 1.0]) + torch.tensor([400.0, 300.0, 5.0, 0.0])


def test_encode_and_decode_by_hand():
    # Eq. 3. 32 x 8: z = log2 sqrt 256 = 4, r = log2(8 / 32) = -2. 4 x 64: z = 4, r = 4.
    sizes = torch.tensor([[32.0, 8.0], [4.0, 64.0]])
    boxes = torch.tensor([[10.0, 20.0, 42.0, 28.0], [-2.0, -32.0, 2.0, 32.0]])
    position = torch.tensor([[26.0, 24.0, 4.0, -2.0], [0.0, 0.0, 4.0, 4.0]])
    torch.testing.assert_close(encode_boxes(boxes), position, rtol=0, atol=1e-6)
    torch.testing.assert_close(decode_boxes(position), boxes, rtol=0, atol=1e-5)
    torch.testing.assert_close(box_sizes(position), sizes, rtol=0, atol=1e-5)


def test_round_trip():
    position = random_positions(2, 3, 5)
    boxes = decode_boxes(position)
    assert boxes.shape == position.shape and (boxes[..., 2:] > boxes[..., :2]).all()
    torch.testing.assert_close(encode_boxes(boxes), position, rtol=0, atol=1e-9)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes)), boxes, rtol=0, atol=1e-9)


def test_degenerate_boxes_have_a_code():
    empty, inverted = [5.0, 7.0, 5.0, 7.0], [9.0, 9.0, 1.0, 3.0]
    codes = encode_boxes(torch.tensor([empty, inverted]))
    # Each side counts as 0.001 pixels: z = log2 0.001 = -9.96578, r = 0; the centre stays.
    expected = torch.tensor([[5.0, 7.0, -9.96578, 0.0], [5.0, 6.0, -9.96578, 0.0]])
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-5)
    line = torch.tensor([[0.0, 0.0, 8.0, 0.5]])
    torch.testing.assert_close(encode_boxes(line, min_size=2.0), torch.tensor([[4.0, 0.25, 2.0, -2.0]]))


def test_refine_by_hand():
    # 2^5 = 32 pixels is one unit of d_x and d_y, whatever r is.
    position = torch.tensor([[100.0, 50.0, 5.0, 1.0]])
    delta = torch.tensor([[0.5, -0.25, 1.0, -2.0]])
    assert refine_position(position, delta).tolist() == [[116.0, 42.0, 6.0, -1.0]]
    assert torch.equal(refine_position(position, torch.zeros(1, 4)), position)


def test_refinement_grows_with_the_box():
    position, delta = random_positions(6), torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
    # In an image 4 times as large:
    scale, shift = torch.tensor([4.0, 4.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 2.0, 0.0])
    larger = refine_position(position * scale + shift, delta)
    torch.testing.assert_close(larger, refine_position(position, delta) * scale + shift)


def test_refine_by_deltas_by_hand():
    """In xyxy: the centre moves by dx w / 2, dy h / 2; the sides are multiplied by e^dw, e^dh."""
    # 32 x 8 around (26, 24) moves by (0.5 * 16, -1 * 4) and becomes 64 x 4.
    before = encode_boxes(torch.tensor([[10.0, 20.0, 42.0, 28.0]]))
    after = decode_boxes(refine_position_by_deltas(before, torch.tensor([[0.5, -1.0, math.log(2), -math.log(2)]])))
    torch.testing.assert_close(after, torch.tensor([[2.0, 18.0, 66.0, 22.0]]), rtol=0, atol=1e-4)
    # z = log2 sqrt(32 * 8) = 4 stays, for the area does; r = log2(8 / 32) = -2 becomes log2(4 / 64) = -4.
    assert refine_position_by_deltas(before, torch.zeros(1, 4)).tolist() == before.tolist() == [[26.0, 24.0, 4.0, -2.0]]


@pytest.mark.parametrize("size", [0.5, 4.0])
def test_refine_by_deltas_is_rcnns_transform(size):
    """detectron2's, on corners and in float32, with Sparse R-CNN's numbers."""
    generator = torch.Generator().manual_seed(3)
    position = random_positions(50)
    deltas = size * torch.randn(50, 4, dtype=torch.float64, generator=generator)
    transform = Box2BoxTransform(weights=(2.0, 2.0, 1.0, 1.0), scale_clamp=math.log(100000 / 16))
    expected = transform.apply_deltas(deltas, decode_boxes(position))
    found = decode_boxes(refine_position_by_deltas(position, deltas))
    scale = (expected[:, 2:] - expected[:, :2]).amax(dim=1, keepdim=True)
    assert ((found - expected) / scale.clamp(min=100)).abs().max() < 1e-5
    assert (found - decode_boxes(position)).abs().amax(dim=1).min() > 0.1


def test_one_refinement_by_deltas_enlarges_a_side_6250_times_at_most():
    position = torch.tensor([[100.0, 100.0, 3.0, 0.0]], dtype=torch.float64)  # 8 x 8
    for delta in (math.log(6250), 9.0, 1e4, math.inf):
        widened = refine_position_by_deltas(position, torch.tensor([[0.0, 0.0, delta, 0.0]], dtype=torch.float64))
        assert box_sizes(widened)[0].tolist() == pytest.approx([8 * 6250, 8])
        heightened = refine_position_by_deltas(position, torch.tensor([[0.0, 0.0, 0.0, delta]], dtype=torch.float64))
        assert box_sizes(heightened)[0].tolist() == pytest.approx([8, 8 * 6250])
    # Nothing holds it from shrinking, or from moving.
    small = refine_position_by_deltas(position, torch.tensor([[1e4, 0.0, -20.0, -20.0]], dtype=torch.float64))
    assert box_sizes(small)[0].tolist() == pytest.approx([8 * math.exp(-20)] * 2)
    assert small[0, 0].item() == pytest.approx(100 + 1e4 * 4)


def test_geometry_by_hand():
    """A box of 8 x 2 pixels at (50, 20): z = log2 sqrt(16) = 2, r = log2(2 / 8) = -2."""
    position = torch.tensor([[[50.0, 20.0, 2.0, -2.0]]])
    found = BoxGeometry.of(position, geometry_exponents())
    assert found.corners.tolist() == [[[46.0, 19.0, 54.0, 21.0]]]
    assert found.area.tolist() == [[16.0]]
    assert found.point_scale.tolist() == [[[8.0, 2.0, 1.0]]]
    assert found.delta_scale.tolist() == [[[4.0, 4.0, 1.0, 1.0]]]
    delta = torch.tensor([[[0.5, -0.25, 1.0, 0.5]]])
    moved = refine_position(position, delta, found.delta_scale)
    assert moved.tolist() == refine_position(position, delta).tolist() == [[[52.0, 19.0, 3.0, -1.5]]]


def test_geometry_is_that_of_the_single_functions():
    position = random_positions(3, 40)
    found = BoxGeometry.of(position, geometry_exponents().double())
    torch.testing.assert_close(found.corners, decode_boxes(position))
    torch.testing.assert_close(found.area, box_sizes(position).prod(-1))


def log_iof(boxes: Tensor) -> Tensor:
    """The bias that the attention gets in a head with tau = 1: log(IoF + 1e-7), (B, N, N)."""
    attention = PositionalAttention(dim=8, num_heads=1).to(boxes.dtype)
    torch.nn.init.ones_(attention.iof_scale)
    return attention._overlap_bias(boxes, (boxes[..., 2:] - boxes[..., :2]).prod(-1))[:, 0]


def test_iof_by_hand():
    big, small, within = [0.0, 0.0, 4.0, 4.0], [2.0, 1.0, 5.0, 2.0], [1.0, 1.0, 2.0, 3.0]
    far, point = [10.0, 0.0, 12.0, 9.0], [3.0, 3.0, 3.0, 3.0]
    iof = log_iof(torch.tensor([[big, small, far, point, within]], dtype=torch.float64)).exp() - 1e-7
    expected = [
        [1.0, 2 / 16, 0.0, 0.0, 2 / 16],  # how much of the big one (16) lies in each
        [2 / 3, 1.0, 0.0, 0.0, 0.0],  # small (3) sticks out by a third, and touches `within` at an edge
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],  # a point: 0 / 1e-6, not 0 / 0
        [1.0, 0.0, 0.0, 0.0, 1.0],  # contained
    ]
    torch.testing.assert_close(iof, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-9)


def test_iof_floors_the_area():
    tiny, big = [0.0, 0.0, 1e-4, 1e-4], [-1.0, -1.0, 1.0, 1.0]  # areas 1e-8, 4
    boxes = torch.tensor([[tiny, big]], dtype=torch.float64)
    iof = log_iof(boxes).exp()[0, 0] - 1e-7
    torch.testing.assert_close(iof, torch.tensor([0.01, 0.01], dtype=torch.float64), rtol=0, atol=1e-9)


def test_overlaps_have_the_layout_of_a_bias_that_the_fast_kernels_of_attention_take():
    boxes = decode_boxes(random_positions(2, 50))
    assert pairwise_intersection(boxes).is_contiguous()


def test_iof_of_each_image_alone():
    boxes = decode_boxes(random_positions(3, 4))
    together = log_iof(boxes)
    assert together.shape == (3, 4, 4)
    for image in range(3):
        assert torch.equal(together[image], log_iof(boxes[image : image + 1])[0])


def test_embedding_by_hand():
    # C = 16: four features for each coordinate, with the divisors 1, 1, 100, 100.
    embedded = embed_position(torch.tensor([[[500.0, 1000.0, 3.0, -2.0]]]), 16)
    angles = [v / divisor for v in (0.5, 1.0, 3.0, -2.0) for divisor in (1, 100)]
    expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
    torch.testing.assert_close(embedded, torch.tensor([[expected]]), rtol=0, atol=1e-6)


def test_embedding_is_the_formula_in_a_loop():
    batch, queries, dim = 2, 3, 48
    position = random_positions(batch, queries)
    expected = torch.zeros(batch, queries, dim, dtype=torch.float64)
    for image in range(batch):
        for query in range(queries):
            cx, cy, z, r = position[image, query].tolist()
            for coordinate, v in enumerate((cx / 1000, cy / 1000, z, r)):
                for i in range(dim // 4):
                    angle = v / 10000 ** (2 * math.floor(i / 2) / (dim / 4))
                    feature = math.cos(angle) if i % 2 else math.sin(angle)
                    expected[image, query, coordinate * (dim // 4) + i] = feature
    # The frequencies are float32.
    torch.testing.assert_close(embed_position(position, dim), expected, rtol=0, atol=2e-6)


def test_gradients_by_finite_differences():
    position = random_positions(1, 3).requires_grad_()
    boxes = decode_boxes(position.detach()).requires_grad_()
    delta = torch.linspace(-0.5, 0.5, 12, dtype=torch.float64).view(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(decode_boxes, position)
    assert torch.autograd.gradcheck(encode_boxes, boxes)
    assert torch.autograd.gradcheck(refine_position, (position, delta))
    assert torch.autograd.gradcheck(refine_position_by_deltas, (position, delta))
    assert torch.autograd.gradcheck(log_iof, boxes)
    assert torch.autograd.gradcheck(lambda x: embed_position(x, 16), position)


@pytest.mark.parametrize(
    "boxes",
    [
        [[5.0, 5.0, 5.0, 5.0], [5.0, 5.0, 5.0, 5.0]],  # empty and the same
        [[1.0, 2.0, 1.0, 9.0], [0.0, 3.0, 8.0, 3.0]],  # crossing lines
        [[9.0, 9.0, 1.0, 3.0], [0.0, 0.0, 4.0, 4.0]],  # inverted
    ],
)
def test_gradients_of_degenerate_boxes_are_finite(boxes):
    corners = torch.tensor([boxes], requires_grad=True)
    position = encode_boxes(corners)
    decoded = decode_boxes(position)
    outputs = [log_iof(x) for x in (corners, decoded)]
    for output in (*outputs, decoded, position, embed_position(position, 16)):
        (gradient,) = torch.autograd.grad(output.sum(), corners, retain_graph=True)
        assert output.isfinite().all() and gradient.isfinite().all()
