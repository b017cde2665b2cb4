"""Kernels for GPUs, in Triton, which comes with torch for Linux: for samples of a pyramid's table, and for mixing.

They compute what the operations of sampling.py, table.py and mixing.py do, with sums in float32, and record no
gradient. A sample reads 16 short rows at places of its own. torch's embedding_bag, and the code that torch.compile
makes of a gather, take four to ten times as long for that (docs/benchmarks.md). The norm reads its numbers once, where
PyTorch's operations write intermediate results and read them again.

S: states of each image, B: images, L: levels, N: queries, G: groups of channels, P: points, C: channels.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

# norm_relu keeps all numbers of a row in registers, so that a row can have at most so many.
LONGEST_ROW = 2**15
# The gathering kernels run on warps of 32 threads. A warp computes so many results, and each thread 8 of them, which
# lie side by side: it reads them in one go.
TILE = 256


@triton.jit
def _sum_rows(table, index, weight, out, num_bags, channels, LENGTH: tl.constexpr, BAGS: tl.constexpr, C: tl.constexpr):
    """BAGS weighted sums of LENGTH rows each; C is the next power of two of the channels."""
    bag = tl.program_id(0) * BAGS + tl.arange(0, BAGS)
    channel = tl.arange(0, C)
    exists = bag < num_bags
    mask = exists[:, None] & (channel < channels)[None]
    total = tl.zeros((BAGS, C), dtype=tl.float32)
    for i in tl.static_range(LENGTH):
        row = tl.load(index + bag * LENGTH + i, mask=exists, other=0).to(tl.int64)
        factor = tl.load(weight + bag * LENGTH + i, mask=exists, other=0).to(tl.float32)
        values = tl.load(table + row[:, None] * channels + channel[None], mask=mask, other=0)
        total += factor[:, None] * values.to(tl.float32)
    tl.store(out + bag.to(tl.int64)[:, None] * channels + channel[None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sample(
    table, points, scale, shift, last, line, start, out,
    num_points, images, queries, groups, points_a_group, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The samples at POINTS points. See sample_table for the formulas, and PyramidTable for what the numbers mean."""
    point = tl.program_id(0) * POINTS + tl.arange(0, POINTS)
    channel = tl.arange(0, C)
    exists = point < num_points
    mask = exists[:, None] & (channel < channels)[None]
    # The points are ordered state, image, query, group, point of the group.
    group = point // points_a_group % groups
    image = point // (points_a_group * groups * queries) % images
    x = tl.load(points + point * 3, mask=exists, other=0)
    y = tl.load(points + point * 3 + 1, mask=exists, other=0)
    depth = tl.load(points + point * 3 + 2, mask=exists, other=0)
    highest = tl.full((POINTS,), float("-inf"), dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        logit = tl.load(shift + 2 * LEVELS + level) + depth * tl.load(scale + 2 * LEVELS + level)
        highest = tl.maximum(highest, logit)
    total = tl.zeros((POINTS, C), dtype=tl.float32)
    whole = tl.zeros((POINTS,), dtype=tl.float32)  # the sum of the levels' weights
    for level in tl.static_range(LEVELS):
        logit = tl.load(shift + 2 * LEVELS + level) + depth * tl.load(scale + 2 * LEVELS + level)
        share = tl.exp(logit - highest)
        whole += share
        across = tl.load(shift + level) + x * tl.load(scale + level)
        down = tl.load(shift + LEVELS + level) + y * tl.load(scale + LEVELS + level)
        left, top = tl.floor(across), tl.floor(down)
        across, down = across - left, down - top
        # To the integers first: of NaN and infinity these are some integer, which is then brought into the table.
        column = tl.minimum(tl.maximum(left.to(tl.int32), 0), tl.load(last + level))
        row = tl.minimum(tl.maximum(top.to(tl.int32), 0), tl.load(last + LEVELS + level))
        width = tl.load(line + level)
        begin = tl.load(start + (level * images + image) * groups + group, mask=exists, other=0)
        first = (begin + row * width + column).to(tl.int64)
        for below in tl.static_range(2):
            for right in tl.static_range(2):
                factor = share * (down if below else 1 - down) * (across if right else 1 - across)
                cell = first + below * width + right
                values = tl.load(table + cell[:, None] * channels + channel[None], mask=mask, other=0)
                total += factor[:, None] * values.to(tl.float32)
    total = total / whole[:, None]
    tl.store(out + point.to(tl.int64)[:, None] * channels + channel[None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_relu(x, out, numbers, SIZE: tl.constexpr):
    """One row of SIZE numbers, of which the first `numbers` exist."""
    place = tl.arange(0, SIZE)
    exists = place < numbers
    begin = tl.program_id(0).to(tl.int64) * numbers
    values = tl.load(x + begin + place, mask=exists, other=0).to(tl.float32)
    centered = tl.where(exists, values - tl.sum(values, 0) / numbers, 0.0)
    normed = centered / tl.sqrt(tl.sum(centered * centered, 0) / numbers + 1e-5)
    # tl.maximum would make 0 of NaN, and so hide a broken image.
    tl.store(out + begin + place, tl.where(normed < 0.0, 0.0, normed).to(out.dtype.element_ty), mask=exists)


def _tile(channels: int) -> tuple[int, int]:
    """How many sums a program computes at once, and the power of two that holds their channels."""
    power = triton.next_power_of_2(channels)
    return max(1, TILE // power), power


def _on_device(x: Tensor) -> AbstractContextManager:
    """Triton starts a kernel on the current device, which need not be the one where its tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def try_all(device: torch.device) -> None:
    """Run each kernel once on a device; what is raised says why they cannot be used there."""
    x = torch.zeros(1, 1, 1, 1, 16, device=device)
    integers = x[..., :1].int()
    with torch.no_grad():
        sum_rows(x.flatten(0, 3), integers.flatten(1), x[..., :1].flatten(1))
        # One point, one level, and a table of which all cells that are read are the first row.
        numbers = x[0, 0, 0, 0, :3, None], x[0, 0, 0, 0, :3, None], integers.view(1, 1).repeat(2, 1), integers.view(1)
        sample(torch.zeros(4, 16, device=device), x[..., :3].contiguous(), *numbers, integers.view(1, 1, 1))
        norm_relu(x)


@triton_op("deqdet::sum_rows", mutates_args=())
def sum_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows, as embedding_bag computes them.

    Args:
        table: (rows, C), contiguous; float32, bfloat16 or float16.
        index: (bags, rows of a bag) int32 or int64, contiguous.
        weight: the same shape, contiguous.

    Returns:
        (bags, C), in the dtype of the table.
    """
    number, length, channels = index.shape[0], int(index.shape[1]), int(table.shape[1])
    bags, power = _tile(channels)
    out = table.new_empty(number, channels)
    with _on_device(table):
        wrap_triton(_sum_rows)[(triton.cdiv(number, bags),)](
            table, index, weight, out, number, channels, LENGTH=length, BAGS=bags, C=power, num_warps=1
        )
    return out


@triton_op("deqdet::sample", mutates_args=())
def sample(
    table: Tensor, points: Tensor, scale: Tensor, shift: Tensor, last: Tensor, line: Tensor, start: Tensor
) -> Tensor:
    """Interpolated samples of all levels, weighted by depth: `sample_table` of float32 points.

    Args:
        table: (rows, C / G), the flattened table, float32, bfloat16 or float16.
        points: (S * B, N, G, P, 3), float32.
        scale, shift, last, line: of a PyramidTable of L levels.
        start: (L, B, G) int32, the row of the border's first cell.

    All are contiguous.

    Returns:
        (S * B, N, G, P, C / G), in the dtype of the table.
    """
    rows, queries, groups, points_a_group = points.shape[:4]
    channels, number = int(table.shape[1]), rows * queries * groups * points_a_group
    count, power = _tile(channels)
    out = table.new_empty(rows, queries, groups, points_a_group, channels)
    with _on_device(table):
        wrap_triton(_sample)[(triton.cdiv(number, count),)](
            table, points, scale, shift, last, line, start, out,
            number, start.shape[1], queries, groups, points_a_group, channels,
            LEVELS=int(start.shape[0]), POINTS=count, C=power, num_warps=1,
        )  # fmt: skip
    return out


@triton_op("deqdet::norm_relu", mutates_args=())
def norm_relu(x: Tensor) -> Tensor:
    """A LayerNorm of the last two dimensions, without affine part, then ReLU, with its sums in float32.

    Args:
        x: (..., P, C), contiguous, with P C at most LONGEST_ROW; float32, bfloat16 or float16.

    Returns:
        The same shape and dtype.
    """
    numbers = int(x.shape[-1]) * int(x.shape[-2])
    size = triton.next_power_of_2(numbers)
    out = torch.empty_like(x)
    warps = min(max(size // 1024, 1), 16)
    with _on_device(x):
        wrap_triton(_norm_relu)[(x.numel() // numbers,)](x, out, numbers, SIZE=size, num_warps=warps)
    return out
