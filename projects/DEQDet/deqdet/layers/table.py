"""A pyramid as one table of rows, from which a layer reads samples of all levels by a single gather.

The table is made once for a batch of images; the steps of the iteration only compute which of its rows they read, and
with which weights. A sample is then one bag of rows, summed by torch's embedding_bag, whose gradients reach both the
table and the weights. With the usual settings a bag has 16 rows: 4 cells of each of 4 levels in AdaMixer, 4 cells
around each of the 4 points in a cell of RoIAlign in Sparse R-CNN.

S: states of each image, B: images, L: levels, C: channels, G: groups of channels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import PreparedFeatures, to_device


@dataclass(frozen=True, eq=False)
class PyramidTable(PreparedFeatures):
    """The cells of all levels, channels last, each level with a border of one cell of zeros around it.

    The border makes it unnecessary to mask: a cell outside a level is moved to the border, where it reads 0. What is
    known of each level stands in small tensors with a value for each level, so that a step handles all levels at once.
    """

    levels: list[Tensor]  # L times (B, C, H_l, W_l), as the backbone made them
    strides: tuple[int, ...]  # s_l, pixels
    images: Tensor | None  # (b,) int64, the image of each batch row; None: batch row i is image i
    rows: Tensor  # (B, cells, C)
    groups: int  # G; a row of the table is read as G rows of C / G channels
    scale: Tensor  # (L,)  1 / s_l
    depth: Tensor  # (L,)  log2 s_l
    half_square: Tensor  # (L,)  -(log2 s_l)^2 / 2
    size: Tensor  # (L, 2)  W_l, H_l, in cells; int32
    outside: Tensor  # ()  -1, the cell before the first one; int32
    line: Tensor  # (L,)  G times the cells from one line of a level to the next; int32
    column: Tensor  # ()  G; int32
    start: Tensor  # (L, b, G)  where a group's channels of cell (0, 0) lie in the flattened table; int32
    corner: Tensor  # (2,)  0, 1; int32
    shift: Tensor  # ()  -1/2
    near: Tensor  # (2, 2)  [1, 0], [-1, 1]: the weights of two neighbouring cells, as a + b * fraction

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.levels[index] if self.images is None else self.levels[index][self.images]

    @property
    def num_images(self) -> int:
        """b, the batch rows."""
        return self.start.shape[1]

    def fits(self, strides: tuple[int, ...], dtype: torch.dtype, groups: int) -> bool:
        """Whether a layer with these strides and groups, which reads this dtype, can use the table."""
        return (self.strides, self.rows.dtype, self.groups) == (strides, dtype, groups)

    def select(self, rows: Tensor) -> "PyramidTable":
        """The same table for some of the batch rows alone; no feature is copied."""
        images = rows if self.images is None else self.images[rows]
        return replace(self, images=images, start=self.start[:, rows])

    def gather(self, index: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums of rows of C / G channels.

        Args:
            index: (bags, rows of a bag) int32, in the flattened table.
            weight: the same shape.

        Returns:
            (bags, C / G), in the dtype of the table.
        """
        table = self.rows.view(-1, self.rows.shape[2] // self.groups)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table.dtype))


def build_table(
    features: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype, groups: int = 1
) -> PyramidTable:
    """Copy a pyramid into a table.

    Args:
        features: for each level (B, C, H_l, W_l); or a table, which is returned as it is if it fits.
        strides: s_l, the side of a level's cell in pixels.
        dtype: of the table's rows.
        groups: G, the groups of channels that are read at places of their own.

    Raises:
        ValueError: there are not as many strides as levels.
    """
    strides = tuple(strides)
    if isinstance(features, PyramidTable) and features.fits(strides, dtype, groups):
        return features
    levels = list(features)
    if len(levels) != len(strides):
        raise ValueError(f"{len(levels)} levels of a pyramid need as many strides, got {len(strides)}")
    device, images = levels[0].device, len(levels[0])
    padded = [F.pad(level.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(1, 2) for level in levels]
    rows = torch.cat([x.to(dtype) for x in padded], dim=1)
    sizes, starts, cells = [(x.shape[3], x.shape[2]) for x in levels], [], 0
    for width, height in sizes:
        starts.append((cells + width + 3) * groups)  # behind the border's first line and one more cell
        cells += (width + 2) * (height + 2)
    depths = [math.log2(s) for s in strides]
    numbers = [*(1 / s for s in strides), *depths, *(-0.5 * d * d for d in depths), -0.5, 1, 0, -1, 1]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    scale, depth, half_square, shift, near = to_device(numbers, precise, device).split([len(levels)] * 3 + [1, 4])
    lines = [(width + 2) * groups for width, _ in sizes]
    numbers = [*lines, *starts, -1, groups, 0, 1, *(side for size in sizes for side in size)]
    line, start, outside, column, corner, size = to_device(numbers, torch.int32, device).split(
        [len(levels), len(levels), 1, 1, 2, 2 * len(levels)]
    )
    first = torch.arange(0, images * cells * groups, cells * groups, dtype=torch.int32, device=device)  # (B,)
    first = first[:, None] + torch.arange(groups, dtype=torch.int32, device=device)  # (B, G)
    return PyramidTable(
        levels=levels,
        strides=strides,
        images=None,
        rows=rows,
        groups=groups,
        scale=scale,
        depth=depth,
        half_square=half_square,
        size=size.view(-1, 2),
        outside=outside[0],
        line=line,
        column=column[0],
        start=start[:, None, None] + first,
        corner=corner,
        shift=shift[0],
        near=near.view(2, 2),
    )


def table_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a table is read without a gradient: autocast's, or float32, or float64 for such features."""
    found = features.levels[0] if isinstance(features, PyramidTable) else features[0]
    if torch.is_autocast_enabled(found.device.type):
        return torch.get_autocast_dtype(found.device.type)
    return torch.promote_types(found.dtype, torch.float32)
