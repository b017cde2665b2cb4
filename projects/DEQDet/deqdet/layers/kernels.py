"""GPU kernels in Triton, which ships with torch for Linux: reading a pyramid's table, and adaptive mixing.

Each kernel gives the same result as the PyTorch operations in sampling.py, regions.py or mixing.py, accumulates in
float32, and supports no gradient. A sample and a cell of a region read 16 short rows from scattered addresses, for
which torch's embedding_bag and the gather that torch.compile generates take four to ten times as long
(docs/benchmarks.md). Every kernel keeps its intermediate results in registers, where PyTorch's operations write them to
memory and read them back.

S: states of each image, B: images, L: levels, N: queries, G: groups of channels, P: points, P_out: points after mixing,
C: channels.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

# The most samples along a side of a cell in pool, whose code has four loads for each sample.
LARGEST_RATIO = 4
# The most numbers in a row of norm_relu, which keeps a whole row in registers.
LONGEST_ROW = 2**15
# Numbers that one warp of a gathering kernel computes: 8 adjacent ones for each of its 32 threads, which loads them
# together.
TILE = 256
# The most numbers in the three matrices that a program of mix multiplies, each side rounded up to a power of two. At
# two bytes a number they fill 64 KiB of shared memory, which every GPU with the tensor cores of CAPABILITY has.
LARGEST_MATRICES = 2**15
# The least compute capability for mix. On older GPUs, Triton multiplies without tensor cores, which would be slow.
CAPABILITY = (8, 0)


@triton.jit
def _pool(
    table, boxes, scale, size, line, start, out,
    num_cells, images, queries, channels,
    SIDE: tl.constexpr, RATIO: tl.constexpr, CANONICAL_SIZE: tl.constexpr, CANONICAL_LEVEL: tl.constexpr,
    FINEST: tl.constexpr, COARSEST: tl.constexpr, CELLS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Pool CELLS cells of regions. pool_regions has the formulas, PyramidTable explains the arguments."""
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = tl.arange(0, C)
    exists = cell < num_cells
    mask = exists[:, None] & (channel < channels)[None]
    # The cells are ordered state, image, query, line of the region, column.
    box = cell // (SIDE * SIDE)
    x0, y0 = tl.load(boxes + box * 4, mask=exists, other=0), tl.load(boxes + box * 4 + 1, mask=exists, other=0)
    x1, y1 = tl.load(boxes + box * 4 + 2, mask=exists, other=0), tl.load(boxes + box * 4 + 3, mask=exists, other=0)
    octave = tl.log2(tl.div_rn(tl.sqrt_rn((x1 - x0) * (y1 - y0)), CANONICAL_SIZE * 1.0) + 1e-8)
    level = tl.minimum(tl.maximum(tl.floor(octave + CANONICAL_LEVEL), FINEST), COARSEST) - FINEST
    level = level.to(tl.int32)
    inverse, stride = tl.load(scale + level), tl.load(line + level)
    width, height = tl.load(size + level * 2), tl.load(size + level * 2 + 1)
    begin = tl.load(start + level * images + box // queries % images)
    x0, y0 = x0 * inverse - 0.5, y0 * inverse - 0.5
    across, down = (x1 * inverse - 0.5 - x0) / SIDE, (y1 * inverse - 0.5 - y0) / SIDE
    x0, y0 = x0 + cell % SIDE * across, y0 + cell // SIDE % SIDE * down
    total = tl.zeros((CELLS, C), dtype=tl.float32)
    for i in tl.static_range(RATIO):
        y = y0 + (i + 0.5) * down / RATIO
        inside = (y >= -1) & (y <= height)
        y = tl.minimum(tl.maximum(y, 0), height - 1)
        top = y.to(tl.int32)
        y = y - top
        for j in tl.static_range(RATIO):
            x = x0 + (j + 0.5) * across / RATIO
            share = tl.where(inside & (x >= -1) & (x <= width), 1.0 / (RATIO * RATIO), 0.0)
            x = tl.minimum(tl.maximum(x, 0), width - 1)
            left = x.to(tl.int32)
            x = x - left
            for below in tl.static_range(2):
                for right in tl.static_range(2):
                    factor = share * (y if below else 1 - y) * (x if right else 1 - x)
                    row = tl.minimum(top + below, height - 1) * stride + tl.minimum(left + right, width - 1)
                    row = (begin + row).to(tl.int64)
                    values = tl.load(table + row[:, None] * channels + channel[None], mask=mask, other=0)
                    total += factor[:, None] * values.to(tl.float32)
    tl.store(out + cell.to(tl.int64)[:, None] * channels + channel[None], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _sample(
    table, points, scale, shift, last, line, start, out,
    num_points, images, queries, groups, points_a_group, channels,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Compute the samples at POINTS points. sample_table has the formulas, PyramidTable explains the arguments."""
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
        # Convert before clamping: NaN and infinity become arbitrary integers, which the clamp moves into the table.
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
    """Normalise one row. It has `numbers` numbers; SIZE is the next power of two."""
    place = tl.arange(0, SIZE)
    exists = place < numbers
    begin = tl.program_id(0).to(tl.int64) * numbers
    values = tl.load(x + begin + place, mask=exists, other=0).to(tl.float32)
    tl.store(out + begin + place, _normed(values, exists, numbers).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _normed(values, exists, numbers):
    """Apply LayerNorm and ReLU to a tile of float32 values.

    The tile is larger than the matrix in it. Outside of `exists` it must be 0, and the result is 0 there as well.
    """
    centered = tl.where(exists, values - tl.sum(values) / numbers, 0.0)
    normed = centered / tl.sqrt(tl.sum(centered * centered) / numbers + 1e-5)
    # tl.maximum would turn NaN into 0, and so hide a broken image.
    return tl.where(normed < 0.0, 0.0, normed)


@triton.jit
def _mix(
    samples, matrices, out,
    POINTS: tl.constexpr, OUT_POINTS: tl.constexpr, CHANNELS: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Mix the samples X of one group of one query: S ReLU(LN(X M)), then LN and ReLU again.

    P, Q and C are POINTS, OUT_POINTS and CHANNELS, rounded up to powers of two. The rows and columns beyond are 0, and
    so change neither the products nor the norms.
    """
    row = tl.program_id(0).to(tl.int64)
    point, out_point, channel = tl.arange(0, P), tl.arange(0, Q), tl.arange(0, C)
    is_channel = (channel < CHANNELS)[None]
    x_exists, m_exists = (point < POINTS)[:, None] & is_channel, (channel < CHANNELS)[:, None] & is_channel
    s_exists = (out_point < OUT_POINTS)[:, None] & (point < POINTS)[None]
    exists = (out_point < OUT_POINTS)[:, None] & is_channel
    # Load everything before the first product, so that the loads wait for memory together.
    x = samples + row * (POINTS * CHANNELS) + point[:, None] * CHANNELS + channel[None]
    x = tl.load(x, mask=x_exists, other=0)
    begin = matrices + row * (CHANNELS * CHANNELS + OUT_POINTS * POINTS)
    m = tl.load(begin + channel[:, None] * CHANNELS + channel[None], mask=m_exists, other=0)
    s = begin + CHANNELS * CHANNELS + out_point[:, None] * POINTS + point[None]
    s = tl.load(s, mask=s_exists, other=0)
    mixed = _normed(tl.dot(x, m), x_exists, POINTS * CHANNELS).to(s.dtype)
    mixed = _normed(tl.dot(s, mixed), exists, OUT_POINTS * CHANNELS)
    place = out + row * (OUT_POINTS * CHANNELS) + out_point[:, None] * CHANNELS + channel[None]
    tl.store(place, mixed.to(out.dtype.element_ty), mask=exists)


def _tile(channels: int) -> tuple[int, int]:
    """Return how many sums a program computes at once, and the channels of each, rounded up to a power of two."""
    power = triton.next_power_of_2(channels)
    return max(1, TILE // power), power


def _side(number: int) -> int:
    """Round the side of a matrix up to a power of two of at least 16, as a product on tensor cores needs it."""
    return max(16, 1 << (number - 1).bit_length())


def can_mix(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if a device has the tensor cores that `mix` needs, and they multiply numbers of this dtype."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def fits_mix(points: int, out_points: int, channels: int) -> bool:
    """Return True if the matrices of `mix` are small enough; `channels` are those of a group."""
    p, q, c = _side(points), _side(out_points), _side(channels)
    return p * c + c * c + q * p <= LARGEST_MATRICES


def _on_device(x: Tensor) -> AbstractContextManager:
    """Make the tensor's device the current one, because Triton launches kernels there wherever their tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def try_all(device: torch.device) -> None:
    """Run each kernel once on a device, to find out whether they work there.

    Raises:
        Exception: one of them does not; any exception of Triton, of the compiler it calls, or of the driver.
    """
    x = torch.zeros(1, 1, 1, 1, 16, device=device)
    integers = x[..., :1].int()
    with torch.no_grad():
        # One point, one box and one level; each cell that they read is the first row of the table.
        numbers = x[0, 0, 0, 0, :3, None], x[0, 0, 0, 0, :3, None], integers.view(1, 1).repeat(2, 1), integers.view(1)
        sample(torch.zeros(4, 16, device=device), x[..., :3].contiguous(), *numbers, integers.view(1, 1, 1))
        numbers = x[0, 0, 0, 0, :1], 1 + integers.view(1, 1).repeat(1, 2), integers.view(1), integers.view(1, 1)
        pool(torch.zeros(4, 16, device=device), x[0, 0, 0, :, :4].contiguous(), *numbers, 1, 1, 224, 4, 4)
        norm_relu(x)
        if can_mix(device, torch.bfloat16):
            mix(x.bfloat16(), torch.zeros(1, 1, 16 * 16 + 1, dtype=torch.bfloat16, device=device), 1)


# To find the kernels of an operator, PyTorch reads the code of every function that is called by a plain name here, the
# decorator included. With its module's name the decorator is skipped, which saves 0.3 s at each start.
@torch.library.triton_op("deqdet::pool", mutates_args=())
def pool(
    table: Tensor, boxes: Tensor, scale: Tensor, size: Tensor, line: Tensor, start: Tensor,
    side: int, ratio: int, canonical_size: int, canonical_level: int, finest: int,
) -> Tensor:  # fmt: skip
    """Pool the features in each box, as `pool_regions` does.

    Args:
        table: (rows, C), the flattened table, float32, bfloat16 or float16.
        boxes: (S * B, N, 4) xyxy, pixels, finite; float32.
        scale: (L,), the inverse of each level's stride.
        size, line: the fields of a PyramidTable of L levels.
        start: (L, B) int32, the row of each level's cell (0, 0).
        side, ratio: as for `pool_regions`.
        canonical_size, canonical_level: a box of this size, in pixels, belongs to this level.
        finest: the level that is the first in the table.

    All tensors must be contiguous.

    Returns:
        (S * B, N, side * side, C), in the dtype of the table.
    """
    rows, queries, channels = *boxes.shape[:2], int(table.shape[1])
    number = rows * queries * side**2
    count, power = _tile(channels)
    out = table.new_empty(rows, queries, side**2, channels)
    with _on_device(table):
        wrap_triton(_pool)[(triton.cdiv(number, count),)](
            table, boxes, scale, size, line, start, out,
            number, start.shape[1], queries, channels,
            SIDE=side, RATIO=ratio, CANONICAL_SIZE=canonical_size, CANONICAL_LEVEL=canonical_level,
            FINEST=finest, COARSEST=finest + int(start.shape[0]) - 1, CELLS=count, C=power, num_warps=1,
        )  # fmt: skip
    return out


@torch.library.triton_op("deqdet::sample", mutates_args=())
def sample(
    table: Tensor, points: Tensor, scale: Tensor, shift: Tensor, last: Tensor, line: Tensor, start: Tensor
) -> Tensor:
    """Interpolate all levels at float32 points and weight them by depth, as `sample_table` does.

    Args:
        table: (rows, C / G), the flattened table, float32, bfloat16 or float16.
        points: (S * B, N, G, P, 3), float32.
        scale, shift, last, line: the fields of a PyramidTable of L levels.
        start: (L, B, G) int32, the row of the border's first cell.

    All must be contiguous.

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


@torch.library.triton_op("deqdet::norm_relu", mutates_args=())
def norm_relu(x: Tensor) -> Tensor:
    """Apply a LayerNorm without affine part over the last two dimensions, then ReLU; sums are in float32.

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


@torch.library.triton_op("deqdet::mix", mutates_args=())
def mix(samples: Tensor, matrices: Tensor, out_points: int) -> Tensor:
    """Mix the samples of each query, as AdaptiveMixing does between its two linear layers.

    The first product is rounded to the dtype of the samples after its norm, and not before. This needs a GPU with the
    tensor cores of CAPABILITY.

    Args:
        samples: (B, N, G, P, C / G), contiguous; bfloat16 or float16.
        matrices: (B, N, G (C / G * C / G + P_out P)), contiguous, in the same dtype: for each group M, then S.
        out_points: P_out. `fits_mix` says which sizes are supported.

    Returns:
        (B, N, G, P_out, C / G), in the same dtype.
    """
    points, channels = int(samples.shape[3]), int(samples.shape[4])
    p, q, c = _side(points), _side(out_points), _side(channels)
    out = samples.new_empty(*samples.shape[:3], out_points, channels)
    warps = 4 if max(p, q) * c <= 2**13 else 8  # so that a thread's share of a product fits its registers
    with _on_device(samples):
        wrap_triton(_mix)[(samples.numel() // (points * channels),)](
            samples, matrices, out, POINTS=points, OUT_POINTS=out_points, CHANNELS=channels, P=p, Q=q, C=c,
            num_warps=warps,
        )  # fmt: skip
    return out
