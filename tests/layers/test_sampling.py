import math

import pytest
import torch
from torch import Tensor

from deqdet.layers.sampling import SamplingPoints, sample_pyramid


def ramp(height: int, width: int, stride: int) -> Tensor:
    """Make a level (1, 2, H, W) that holds x and y of the centre of each cell in pixels, (i + 0.5) * stride."""
    x = (torch.arange(width) + 0.5) * stride
    y = (torch.arange(height) + 0.5) * stride
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])[None]


def constant(value: float, stride: int, size: int = 64) -> Tensor:
    return torch.full((1, 1, size // stride, size // stride), value)


def one_point(features: list[Tensor], strides: list[int], x: float, y: float, depth: float) -> list[float]:
    points = torch.tensor([x, y, depth]).view(1, 1, 1, 1, 3)
    return sample_pyramid(features, strides, points).flatten().tolist()


@pytest.mark.parametrize("stride, height, width", [(4, 5, 9), (8, 9, 5), (32, 2, 3)])
@pytest.mark.parametrize("where", [(0.5, 0.5), (0.62, 0.37)])
def test_a_ramp_gives_back_the_point(stride, height, width, where):
    """Between the outermost centres, bilinear interpolation of a linear function is exact."""
    x, y = stride * (0.5 + where[0] * (width - 1)), stride * (0.5 + where[1] * (height - 1))
    sampled = one_point([ramp(height, width, stride)], [stride], x, y, depth=3.0)
    assert sampled == pytest.approx([x, y], rel=1e-5)


def test_a_cell_centre_reads_its_cell():
    feature = torch.arange(12.0).view(1, 1, 3, 4)
    for row in range(3):
        for column in range(4):
            value = one_point([feature], [8], (column + 0.5) * 8, (row + 0.5) * 8, depth=0.0)
            assert value == pytest.approx([4 * row + column], abs=1e-5)


def test_bilinear_weights_by_hand():
    # 3/4 of the way from the centre of column 0 (x = 2) to that of column 1 (x = 6), 1/4 from row 0 to row 1.
    feature = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]])
    expected = 0.75 * (0.25 * 1 + 0.75 * 10) + 0.25 * (0.25 * 100 + 0.75 * 1000)
    assert one_point([feature], [4], 5.0, 3.0, depth=0.0) == pytest.approx([expected])


@pytest.mark.parametrize(
    "x, y, expected",
    [
        (0.0, 8.0, 0.5),  # on the left edge, half a cell from the first centre
        (2.0, 8.0, 0.75),
        (-2.0, 8.0, 0.25),
        (-4.0, 8.0, 0.0),
        (24.0, 8.0, 0.5),
        (12.0, 16.0, 0.5),
        (12.0, 0.0, 0.5),
        (0.0, 0.0, 0.25),
        (24.0, 16.0, 0.25),
        (12.0, 20.0, 0.0),
        (500.0, 8.0, 0.0),
        (12.0, 8.0, 1.0),
    ],
)
def test_zeros_lie_outside(x, y, expected):
    assert one_point([torch.ones(1, 1, 2, 3)], [8], x, y, depth=1.0) == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize(
    "depth, odds",
    [
        (2.0, [1, math.exp(-0.5), math.exp(-2), math.exp(-4.5)]),  # log2 of 4: the level's own depth
        (2.5, [math.exp(-0.125), math.exp(-0.125), math.exp(-1.125), math.exp(-3.125)]),
        (5.0, [math.exp(-4.5), math.exp(-2), math.exp(-0.5), 1]),
        (20.0, [math.exp(-162), math.exp(-144.5), math.exp(-128), math.exp(-112.5)]),
    ],
)
def test_level_weights_by_hand(depth, odds):
    strides = [4, 8, 16, 32]
    for level, stride in enumerate(strides):
        features = [constant(float(s == stride), s) for s in strides]
        weight = one_point(features, strides, 32.0, 32.0, depth)
        assert weight == pytest.approx([odds[level] / sum(odds)], rel=1e-5)


def test_levels_of_a_ramp_agree_whatever_the_depth():
    features = [ramp(64 // s, 96 // s, s) for s in (4, 8, 16, 32)]
    for depth in (-3.0, 2.0, 3.7, 9.0):
        sampled = one_point(features, [4, 8, 16, 32], 41.0, 29.0, depth)
        assert sampled == pytest.approx([41.0, 29.0], rel=1e-5)


def test_each_group_reads_its_own_channels():
    channels = torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 4, 4)
    sampled = sample_pyramid([channels], [4], torch.tensor([8.0, 8.0, 2.0]).expand(1, 1, 3, 1, 3))
    assert sampled[0, 0, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_every_sample_lands_at_its_own_index():
    """Each point, whatever its group, query, image and state, reads its own image and group at its own x, y."""
    segments, images, queries, groups, points = 3, 2, 4, 2, 5
    level = torch.cat([ramp(8, 12, 8)] * groups, dim=1).repeat(images, 1, 1, 1)  # (B, 2 G, H, W): x, y, x, y
    mark = torch.tensor([[1000.0, 2000.0], [3000.0, 4000.0]])  # (image, group)
    level[:, 0::2] += mark[:, :, None, None]
    shape, generator = (segments * images, queries, groups, points, 3), torch.Generator().manual_seed(0)
    where = 4 + torch.rand(shape, generator=generator) * torch.tensor([88.0, 56.0, 6.0])
    sampled = sample_pyramid([level], [8], where)
    expected = where[..., :2].clone()
    for row in range(segments * images):
        expected[row, ..., 0] += mark[row % images][None, :, None]
    torch.testing.assert_close(sampled, expected, rtol=0, atol=2e-3)


def test_segments_equal_separate_calls():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 6, 64 // s, 96 // s, generator=generator) for s in (8, 16)]
    points = torch.rand(6, 3, 2, 4, 3, generator=generator) * torch.tensor([96.0, 64.0, 5.0])
    together = sample_pyramid(features, [8, 16], points)
    for segment, part in enumerate(points.split(2)):
        expected = sample_pyramid(features, [8, 16], part)
        torch.testing.assert_close(together[2 * segment : 2 * segment + 2], expected)
    assert not together[:2].isclose(together[2:4]).any()


def test_gradients_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 2, size, size, generator=generator, dtype=torch.float64) for size in (4, 2)]
    # Away from the lines through the centres of either level's cells, where the derivative jumps.
    points = torch.tensor([[7.0, 9.0, 2.3], [17.0, 13.5, 3.1], [25.0, 3.0, 4.0], [1.0, 1.0, 2.0]]).double()
    inputs = [x.requires_grad_() for x in (*features, points.view(4, 1, 1, 1, 3))]
    assert torch.autograd.gradcheck(lambda a, b, p: sample_pyramid([a, b], [8, 16], p), inputs)


def test_a_level_without_a_stride_is_an_error():
    with pytest.raises(ValueError):
        sample_pyramid([torch.ones(1, 1, 2, 2)] * 2, [4], torch.zeros(1, 1, 1, 1, 3))


def test_points_around_a_box_by_hand():
    sampling = SamplingPoints(dim=4, num_groups=2, num_points=3)
    offsets = torch.arange(18.0).view(2, 3, 3) / 8  # (G, P, 3)
    with torch.no_grad():
        sampling.offsets.bias.copy_(offsets.flatten())
        # w = 8, h = 2: z = log2 sqrt(16) = 2, r = log2(2 / 8) = -2.
        position, scale = torch.tensor([[[50.0, 20.0, 2.0, -2.0]]]), torch.tensor([[[8.0, 2.0, 1.0]]])
        points = sampling(torch.ones(1, 1, 4), position, scale)
    expected = torch.tensor([50.0, 20.0, 2.0]) + offsets * torch.tensor([8.0, 2.0, 1.0])
    torch.testing.assert_close(points, expected[None, None], rtol=0, atol=1e-5)


def test_offsets_depend_on_their_own_query():
    sampling = SamplingPoints(dim=2, num_groups=1, num_points=1)
    with torch.no_grad():
        sampling.offsets.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        sampling.offsets.bias.zero_()
        points = sampling(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 4), torch.ones(1, 2, 3))
    assert points.view(2, 3).tolist() == [[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]]  # boxes of 1 x 1 pixel at 0, 0


@pytest.mark.parametrize(
    "num_points, centers", [(1, [0.0]), (4, [-0.25, 0.25]), (16, [-0.375, -0.125, 0.125, 0.375])]
)
def test_a_square_number_of_points_starts_as_a_grid(num_points, centers):
    sampling = SamplingPoints(dim=8, num_groups=3, num_points=num_points)
    assert not sampling.offsets.weight.any()
    for group in sampling.offsets.bias.view(3, num_points, 3).tolist():
        assert {(dx, dy) for dx, dy, _ in group} == {(x, y) for y in centers for x in centers}
        assert {dz for _, _, dz in group} == {-1.0}


def test_any_other_number_of_points_starts_uniform_over_the_box():
    torch.manual_seed(0)
    sampling = SamplingPoints(dim=8, num_groups=4, num_points=32)
    assert not sampling.offsets.weight.any()
    offsets = sampling.offsets.bias.detach().view(4, 32, 3)
    assert (offsets[..., 2] == -1).all()
    for axis in (0, 1):
        values = offsets[..., axis].flatten().sort().values
        assert -0.5 <= values[0] < -0.45 and 0.45 < values[-1] <= 0.5
        assert len(values.unique()) > 120  # of 128: drawn apart, not one draw for all groups
        # The quartiles of U(-0.5, 0.5); the standard error of each is 0.04.
        assert values[[31, 63, 95]].tolist() == pytest.approx([-0.25, 0.0, 0.25], abs=0.12)
