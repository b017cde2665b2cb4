"""A feature pyramid as one table of rows, so that a layer samples all levels with a single gather.

The table is built once for a batch of images. Each step of the iteration only computes the indices and weights of the
rows it reads. A sample is the weighted sum of one bag of rows. torch's embedding_bag computes it, with gradients for
both the table and the weights. On a GPU, where no gradient is recorded, a kernel of kernels.py computes indices,
weights and sums. With the usual settings a bag has 16 rows: in AdaMixer 4 cells in each of 4 levels, in Sparse R-CNN 4
cells around each of the 4 sampling points of a RoIAlign cell.

S: states of each image, B: images, L: levels, C: channels, G: groups of channels.
"""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures import PreparedFeatures, is_traced, to_device

try:
    from . import kernels
except ImportError:  # Triton is missing, or torch 2.5, which cannot register a kernel of Triton
    kernels = None

logger = logging.getLogger(__name__)

# The width in cells of the border around each level. A sample reads two adjacent cells, so that with a border of two
# cells a sample outside the level reads the border alone.
BORDER = 2


@dataclass(frozen=True, eq=False)
class PyramidTable(PreparedFeatures):
    """The cells of all levels, channels last, each level with a border of BORDER cells of zeros around it.

    The border replaces masking: a point outside a level is moved into the border, where it reads 0. Small tensors hold
    the geometry of the levels, one value for each, so that a step handles all levels at once.
    """

    levels: list[Tensor]  # L times (B, C, H_l, W_l), from the backbone
    strides: tuple[int, ...]  # s_l, pixels
    images: Tensor | None  # (b,) int64, the image of each batch row; None: batch row i is image i
    rows: Tensor  # (B, G, cells, C / G)
    # shift + point * scale maps a point (x, y, depth) to level l: x and y to cells, counted from the border's corner,
    # and the depth to the logarithm of the level's weight, up to a term that is the same for all levels.
    scale: Tensor  # (3, L)  1 / s_l, 1 / s_l, log2 s_l
    shift: Tensor  # (3, L)  BORDER - 1/2, BORDER - 1/2, -(log2 s_l)^2 / 2
    size: Tensor  # (L, 2)  W_l, H_l, in cells; int32
    first: Tensor  # ()  0; int32
    last: Tensor  # (2, L)  the index of the second-to-last cell in a line and in a column, border included; int32
    line: Tensor  # (L,)  the table rows from one line of a level to the next; int32
    start: Tensor  # (L, b, G)  the row of the flattened table with a group's channels of cell (0, 0); int32
    corners: Tensor  # (2, 2, L, b, G)  the same for the first two cells of the border's first two lines
    near: Tensor  # (2, 2, 1, 1, 1)  [1, 0], [-1, 1]: the weights of two neighbouring cells, as a + b * fraction
    has_kernels: bool  # whether the kernels of kernels.py can read it
    has_mixing: bool  # whether kernels.mix can take the samples read from it

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
        return (self.strides, self.rows.dtype, self.rows.shape[1]) == (strides, dtype, groups)

    def select(self, rows: Tensor) -> "PyramidTable":
        """Return a view of the table for some of the batch rows; no feature is copied."""
        images = rows if self.images is None else self.images[rows]
        return replace(self, images=images, start=self.start[:, rows], corners=self.corners[..., rows, :])

    def gather(self, index: Tensor, weight: Tensor) -> Tensor:
        """Compute weighted sums of rows of C / G channels.

        Args:
            index: (bags, rows of a bag) int32, rows of the flattened table.
            weight: the same shape.

        Returns:
            (bags, C / G), in the dtype of the table.
        """
        table = self.rows.flatten(0, 2)
        return F.embedding_bag(index, table, mode="sum", per_sample_weights=weight.to(table.dtype))

    @property
    def uses_kernels(self) -> bool:
        """Whether kernels.py computes the samples: on a GPU, where no gradient is recorded."""
        return self.has_kernels and not torch.is_grad_enabled()


@functools.cache
def _kernels_work(device: torch.device) -> bool:
    """Whether the kernels of kernels.py run on this GPU. Triton needs a C compiler to build them at first use."""
    if kernels is None or not torch.cuda.is_available():
        return False
    try:
        kernels.try_all(device)
    except Exception as error:  # see try_all
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        logger.warning("Sampling on the GPU is slow, because Triton does not work on this machine: %s", reason)
        return False
    return True


def build_table(
    features: Sequence[Tensor], strides: Sequence[int], dtype: torch.dtype, groups: int = 1
) -> PyramidTable:
    """Copy a pyramid into a table.

    Args:
        features: for each level (B, C, H_l, W_l); or a table, which is returned unchanged if it fits.
        strides: s_l, the side of a level's cell in pixels.
        dtype: the dtype of the table's rows.
        groups: G, the groups of channels, each of which is sampled at its own points.

    Raises:
        ValueError: the numbers of strides and levels differ.
    """
    strides = tuple(strides)
    if isinstance(features, PyramidTable) and features.fits(strides, dtype, groups):
        return features
    levels = list(features)
    if len(levels) != len(strides):
        raise ValueError(f"{len(levels)} levels of a pyramid need as many strides, got {len(strides)}")
    device, images = levels[0].device, len(levels[0])
    rows, places, cells = [], [], 0
    for level in levels:
        by_group = level.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, G, H, W, C / G)
        padded = F.pad(by_group, (0, 0, *[BORDER] * 4))
        rows.append(padded.flatten(2, 3).to(dtype))
        places.append(cells)
        cells = cells + padded.shape[2] * padded.shape[3]  # not +=: to torch.jit's tracer, sizes are tensors
    sizes, depths = [(x.shape[3], x.shape[2]) for x in levels], [math.log2(s) for s in strides]
    lines = [width + 2 * BORDER for width, _ in sizes]
    inverse, half_squares = [1 / s for s in strides], [-0.5 * d * d for d in depths]
    numbers = [*inverse, *inverse, *depths, *[BORDER - 0.5] * (2 * len(levels)), *half_squares]
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = to_device([*numbers, 1, 0, -1, 1], precise, device)
    scale, shift, near = numbers.split([3 * len(levels)] * 2 + [4])
    last = [side + BORDER for axis in (0, 1) for side in (size[axis] for size in sizes)]
    corners = [place + y * line + x for y in (0, 1) for x in (0, 1) for place, line in zip(places, lines, strict=True)]
    numbers = [*lines, *corners, *last, *(side for size in sizes for side in size), BORDER, 0]
    line, corners, last, size, border, first = to_device(numbers, torch.int32, device).split(
        [len(levels), 4 * len(levels), 2 * len(levels), 2 * len(levels), 1, 1]
    )
    # (B, G): the first row of each image and group.
    begin = torch.arange(0, images * groups * cells, cells, dtype=torch.int32, device=device).view(images, groups)
    corners = corners.view(2, 2, -1, 1, 1) + begin
    # Traced code cannot try the kernels. It builds tables in training alone, where no kernel would read them.
    has_kernels = device.type == "cuda" and dtype != torch.float64 and not is_traced() and _kernels_work(device)
    return PyramidTable(
        levels=levels,
        strides=strides,
        images=None,
        rows=torch.cat(rows, dim=2),
        scale=scale.view(3, -1),
        shift=shift.view(3, -1),
        size=size.view(-1, 2),
        first=first[0],
        last=last.view(2, -1),
        line=line,
        start=corners[0, 0] + (border * (line + 1))[:, None, None],
        corners=corners,
        near=near.view(2, 2, 1, 1, 1),
        has_kernels=has_kernels,
        has_mixing=has_kernels and kernels.can_mix(device, dtype),
    )


def table_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a table that is read without a gradient: autocast's if it is on, else float32 or better."""
    found = features.levels[0] if isinstance(features, PyramidTable) else features[0]
    if torch.is_autocast_enabled(found.device.type):
        return torch.get_autocast_dtype(found.device.type)
    return torch.promote_types(found.dtype, torch.float32)
