"""RoIAlign from a pyramid's table, without waiting for the device.

detectron2's ROIPooler sorts the boxes by level, for which the host must know how many boxes each level has. Here the
level of a box is a number in a tensor, and one gather reads the samples of all boxes; on a GPU, if possible, one kernel
does all of it.

R: rows of the state, N: queries, M: cells of a region, C: channels.
"""

import math

import torch
from torch import Tensor

from .table import PyramidTable, kernels

# A box of 224 x 224 pixels belongs to level 4, of stride 16 (FPN, CVPR 2017, Eq. 1).
CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4


def pool_regions(table: PyramidTable, boxes: Tensor, side: int, ratio: int) -> Tensor:
    """Pool the features in each box as ROIPooler does with ROIAlignV2.

    A region has side x side cells, and each cell is the mean of ratio x ratio samples, interpolated bilinearly. A
    sample up to one cell beyond the edge of its level reads the edge; farther out it is 0.

    Args:
        table: the table of B images, with one group.
        boxes: (R, N, 4) xyxy, pixels, finite; row r belongs to image r % B.
        side: the number of cells along a side of a region.
        ratio: the number of samples along a side of a cell, at least 1.

    Returns:
        (R, N, M, C), the cells of a region line by line, in the dtype of the table.
    """
    if table.uses_kernels and boxes.dtype == torch.float32 and ratio <= kernels.LARGEST_RATIO:
        numbers = table.scale[0], table.size, table.line, table.start[..., 0].contiguous()
        levels = CANONICAL_SIZE, CANONICAL_LEVEL, round(math.log2(table.strides[0]))
        return kernels.pool(table.rows.flatten(0, 2), boxes.contiguous(), *numbers, side, ratio, *levels)
    level = _level(table, boxes)  # (R, N)
    size = table.size[level]  # (R, N, 2)
    # In units of cells, from the centre of the first one.
    low, high = (boxes * table.scale[0][level][..., None] - 0.5).split(2, dim=2)
    pitch = ((high - low) / side)[..., None, None]  # (R, N, 2, 1, 1)
    cells = torch.arange(side, dtype=boxes.dtype, device=boxes.device)[:, None]
    inner = torch.arange(ratio, dtype=boxes.dtype, device=boxes.device) + 0.5
    # Added in the same order as in torchvision, so that the rounding is nearly the same.
    where = low[..., None, None] + cells * pitch + inner * pitch / ratio  # (R, N, 2, side, ratio)
    last = size[..., None, None] - 1
    inside = (where >= -1) & (where <= size[..., None, None])
    where = where.clamp(min=0).minimum(last)
    lower = where.floor()
    fraction = where - lower
    corner = torch.stack([lower, (lower + 1).minimum(last)], dim=5).flatten(4).int()  # (R, N, 2, side, 2 ratio)
    weight = (torch.stack([1 - fraction, fraction], dim=5) * inside[..., None] / ratio).flatten(4)
    (column, line), (across, down) = corner.unbind(2), weight.unbind(2)  # (R, N, side, 2 ratio) each
    images = table.start[..., 0].t().repeat(len(boxes) // table.num_images, 1)  # (R, L)
    start = images.gather(1, level)[..., None, None]  # (R, N, 1, 1)
    line = start + line * table.line[level][..., None, None]
    index = line[:, :, :, None, :, None] + column[:, :, None, :, None, :]  # (R, N, side, side, 2 ratio, 2 ratio)
    weight = down[:, :, :, None, :, None] * across[:, :, None, :, None, :]
    bags = [x.reshape(-1, (2 * ratio) ** 2) for x in (index, weight)]
    return table.gather(*bags).view(*boxes.shape[:2], side * side, -1)


def _level(table: PyramidTable, boxes: Tensor) -> Tensor:
    """Return the index of the level that each box reads, (R, N) int64: the larger the box, the coarser the level."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(2)
    octave = torch.log2((width * height).sqrt() / CANONICAL_SIZE + 1e-8)
    finest, coarsest = math.log2(table.strides[0]), math.log2(table.strides[-1])
    return ((octave + CANONICAL_LEVEL).floor().clamp(finest, coarsest) - finest).long()
