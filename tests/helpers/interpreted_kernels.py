"""Run the kernels for GPUs on a CPU, in Triton's interpreter, and print how far they are from what they stand for.

The interpreter is chosen by TRITON_INTERPRET=1, which must be set before Triton is imported.
"""

import dataclasses
import json
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqdet.layers import kernels
from deqdet.layers.mixing import AdaptiveMixing
from deqdet.layers.regions import _level, pool_regions
from deqdet.layers.sampling import sample_pyramid, sample_table
from deqdet.layers.table import PyramidTable, build_table
from deqdet.measurement.benchmark import _Operations

from helpers.small_layers import CASES


def draw_table(strides: list[int], channels: int, groups: int, dtype: torch.dtype = torch.float32) -> PyramidTable:
    """Of two images of 64 x 96 pixels."""
    sizes = [(-(-64 // s), -(-96 // s)) for s in strides]
    return build_table([torch.randn(2, channels * groups, *size) for size in sizes], strides, dtype, groups)


def draw_points(rows: int, groups: int, reach: float) -> Tensor:
    """(rows, 5, G, 7, 3), some of them `reach` pixels beyond the image."""
    low, size = torch.tensor([-reach, -reach, -3.0]), torch.tensor([96.0 + 2 * reach, 64.0 + 2 * reach, 12.0])
    return torch.rand(rows, 5, groups, 7, 3) * size + low


def sample(table: PyramidTable, points: Tensor) -> Tensor:
    return sample_table(dataclasses.replace(table, has_kernels=True), points)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def samples(strides: list[int], channels: int, groups: int, rows: int, reach: float) -> float:
    table, points = draw_table(strides, channels, groups), draw_points(rows, groups, reach)
    return relative(sample(table, points), sample_pyramid(table.levels, strides, points))


def samples_of_one_image() -> float:
    """As when the other image has converged and left the batch."""
    table, points = draw_table([8, 16], 16, 2), draw_points(1, 2, 9.0)
    levels = [level[1:] for level in table.levels]
    return relative(sample(table.select(torch.tensor([1])), points), sample_pyramid(levels, [8, 16], points))


def samples_in_bfloat16() -> float:
    table, points = draw_table([8, 16], 16, 2, torch.bfloat16), draw_points(2, 2, 9.0)
    return relative(sample(table, points), sample_pyramid(table.levels, [8, 16], points))


def samples_beside_nonfinite_ones() -> float:
    """How far the other samples change when some points become infinite or NaN."""
    table, points = draw_table([8, 16], 16, 2), draw_points(2, 2, 9.0)
    before = sample(table, points)
    others = torch.ones(points.shape[:4], dtype=torch.bool)
    for i, value in enumerate((math.nan, math.inf, -math.inf, 1e30, -1e30)):
        points[0, i, 1, 2, :2] = value
        others[0, i, 1, 2] = False
    return (sample(table, points)[others] - before[others]).abs().max().item()


def regions(side: int, ratio: int, channels: int = 16, rows: int = 2, dtype: torch.dtype = torch.float32) -> float:
    """Of boxes of all levels, some of which reach beyond the image or are outside of it."""
    table = draw_table([4, 8, 16], channels, 1, dtype)
    center, half = torch.rand(rows, 9, 2) * torch.tensor([140.0, 110.0]) - 20, torch.exp(torch.rand(rows, 9, 2) * 6)
    boxes = torch.cat([center - half, center + half], dim=2)
    boxes[0, 0] = torch.tensor([-1e6, -1e6, 1e6, 1e6])
    boxes[0, 1] = torch.tensor([30.0, 20.0, 30.0, 20.0])  # without area
    exact = dataclasses.replace(table, rows=table.rows.float())
    expected = pool_regions(exact, boxes, side, ratio)
    assert len({int(x) for x in _level(table, boxes).flatten()}) == 3
    found = pool_regions(dataclasses.replace(table, has_kernels=True), boxes, side, ratio)
    assert found.dtype == dtype and found.shape == expected.shape
    return relative(found, expected)


def regions_of_one_image() -> float:
    """As when the other image has converged and left the batch."""
    table = draw_table([8, 16], 16, 1)
    boxes = torch.tensor([[[3.0, 5.0, 40.0, 60.0], [20.0, 1.0, 220.0, 180.0]]])
    one = table.select(torch.tensor([1]))
    found = pool_regions(dataclasses.replace(one, has_kernels=True), boxes, 3, 2)
    return relative(found, pool_regions(table, boxes.repeat(2, 1, 1), 3, 2)[1:])


def norms(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> float:
    x = (scale * (torch.randn(shape) + 1)).to(dtype)
    return relative(kernels.norm_relu(x), F.layer_norm(x.float(), shape[-2:]).relu())


def norms_of_nonfinite_rows() -> float:
    """How many numbers differ in kind, or in value, from those of the operations."""
    x = torch.randn(4, 5, 8)
    x[0, 1, 2], x[1, 1, 2], x[2, 1, 2] = math.nan, math.inf, -math.inf
    found, expected = kernels.norm_relu(x), F.layer_norm(x, x.shape[1:]).relu()
    return float((~torch.isclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)).sum())


def mixing_of(points: int, out_points: int, dim: int) -> tuple[AdaptiveMixing, Tensor, Tensor]:
    """A module of 3 groups, with the content of 2 x 5 queries and their samples, in float16.

    The interpreter multiplies matrices in bfloat16 wrongly.
    """
    mixing = AdaptiveMixing(dim=3 * dim, num_groups=3, num_points=points, num_out_points=out_points).half()
    mixing.generator.weight.normal_(std=0.3)
    return mixing, torch.randn(2, 5, 3 * dim).half(), torch.randn(2, 5, 3, points, dim).half()


def mixed(points: int, out_points: int, dim: int) -> float:
    """Against the operations in float32, with the same rounded weights."""
    mixing, content, samples = mixing_of(points, out_points, dim)
    matrices = mixing.generator(content)
    mixing.generator = nn.Identity()
    mixing.out = nn.Identity()
    expected = mixing(matrices.float(), samples.float())
    return relative(kernels.mix(samples, matrices, out_points).flatten(2), expected)


def mixed_nonfinite() -> float:
    """How many queries are NaN that should not be, or the other way round."""
    mixing, content, samples = mixing_of(5, 6, 4)
    samples[0, 0, 0, 0, 0], samples[0, 1, 1, 4, 3], content[1, 2] = math.nan, math.inf, math.nan
    matrices = mixing.generator(content)
    found = kernels.mix(samples, matrices, 6).isnan()
    expected = torch.zeros(2, 5, 3, 1, 1, dtype=torch.bool)
    expected[0, 0, 0] = expected[0, 1, 1] = expected[1, 2] = True
    return float((found != expected).sum())


def products_of_mixing() -> float:
    """How many matrix products of the benchmark's floor have other operands than without the kernel."""
    mixing, content, samples = mixing_of(33, 20, 24)
    table = dataclasses.replace(draw_table([8], 24, 3, torch.float16), has_kernels=True, has_mixing=True)
    found = []
    for given in (None, table):
        with _Operations() as seen:
            mixing(content, samples, given)
        found.append([[(x.shape, x.stride(), x.dtype) for x in args] for _, args, _ in seen.products_seen])
    assert len(found[0]) == 4
    return float(sum(x != y for x, y in zip(*found, strict=True)))


def samples_at_extreme_depths() -> float:
    table, points = draw_table([8, 16], 16, 2), draw_points(2, 2, 9.0)
    points[..., 2] *= 1e4
    points[0, 0, 0, 0, 2] = math.nan
    found, expected = sample(table, points), sample_pyramid(table.levels, [8, 16], points)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any()
    return relative(found.nan_to_num(), expected.nan_to_num())


def layers(name: str, broken: bool = False, dtype: torch.dtype | None = None) -> float:
    """A whole layer with the kernels, and without them; with a dtype under autocast."""
    case = CASES[name]
    layer, state, features = case.make(), case.state(), case.features()
    for parameter in layer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    if broken:
        features[0][0] = math.nan
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        table = layer.prepare(features)
        expected = layer(state, table).content
        kernels_used = dataclasses.replace(table, has_kernels=True, has_mixing=dtype is not None)
        found = layer(state, kernels_used).content
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().any() == broken
    return relative(found.nan_to_num(), expected.nan_to_num())


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    kernels.try_all(torch.device("cpu"))
    found = {
        "four levels": samples([4, 8, 16, 32], channels=16, groups=4, rows=2, reach=9.0),
        "three states of two images": samples([4, 8, 16, 32], channels=16, groups=2, rows=6, reach=60.0),
        "one level": samples([8], channels=64, groups=1, rows=2, reach=9.0),
        "levels of one cell": samples([64, 128], channels=16, groups=1, rows=2, reach=40.0),
        "channels that are no power of two": samples([3, 7, 20], channels=6, groups=3, rows=2, reach=9.0),
        "one image of two": samples_of_one_image(),
        "bfloat16": samples_in_bfloat16(),
        "nonfinite": samples_beside_nonfinite_ones(),
        "regions": regions(3, 2, rows=4),
        "regions of one sample a cell": regions(4, 1),
        "regions of many samples a cell": regions(2, 4),
        "regions of wide rows": regions(1, 2, channels=300),
        "regions of one image": regions_of_one_image(),
        "regions in bfloat16": regions(3, 2, dtype=torch.bfloat16),
        "norms": norms(2, 3, 4, 64, 16),
        "norms of a size that is no power of two": norms(5, 7, 3),
        "norms of large numbers": norms(2, 32, 64, scale=1e4),
        "norms of small numbers": norms(2, 32, 64, scale=1e-3),
        "norms in bfloat16": norms(3, 128, 64, dtype=torch.bfloat16),
        "norms of nonfinite rows": norms_of_nonfinite_rows(),
        "mixing": mixed(64, 128, 64),
        "mixing of sizes that are no powers of two": mixed(33, 20, 24),
        "mixing of sizes below 16": mixed(3, 5, 4),
        "mixing of nonfinite numbers": mixed_nonfinite(),
        "the floor of mixing": products_of_mixing(),
        "extreme depths": samples_at_extreme_depths(),
        "AdaMixer's layer": layers("AdaMixerLayer"),
        "AdaMixer's layer, NaN in an image": layers("AdaMixerLayer", broken=True),
        "AdaMixer's layer in float16": layers("AdaMixerLayer", dtype=torch.float16),
        "Sparse R-CNN's layer": layers("SparseRCNNLayer"),
        "Sparse R-CNN's layer in float16": layers("SparseRCNNLayer", dtype=torch.float16),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
