"""What flows between the modules. B: images, N: queries, C: channels, K: classes, M: most boxes of an image."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detectron2.structures import Instances

# pack() divides cx, cy by the first and z, r by the second number. In pixels, the centers of the boxes would outweigh
# all else in a norm over the whole state, and so in the residual that decides when to stop. Powers of two, so that the
# division and its undoing are exact.
CENTER_UNIT = 1024.0
SCALE_UNIT = 8.0


def packing_units(device: torch.device) -> Tensor:
    """The packing units of a position's four numbers cx, cy, z, r; (4,) float32.

    They are computed on the device itself: a tensor made from Python numbers would be copied there, and the host would
    wait for it.
    """
    return torch.where(torch.arange(4, device=device) < 2, CENTER_UNIT, SCALE_UNIT)


class PreparedFeatures(Sequence[Tensor]):
    """A pyramid with what a refinement layer has computed from it once, for all the steps that read it.

    It is still the sequence of the levels (B, C, H_l, W_l), finest first, so that a layer that did not prepare it can
    read it too.
    """

    @property
    @abstractmethod
    def num_images(self) -> int:
        """B."""

    @abstractmethod
    def select(self, rows: Tensor) -> "PreparedFeatures":
        """The features of some of the images, (b,) int64, in this order."""


Features = Sequence[Tensor]  # the levels of a pyramid, finest first: a list of tensors, or PreparedFeatures


def count_images(features: Features) -> int:
    """B, the images of a pyramid."""
    return features.num_images if isinstance(features, PreparedFeatures) else len(features[0])


def select_images(features: Features, rows: Tensor) -> Features:
    """The features of some of the images, (b,) int64, in this order."""
    return features.select(rows) if isinstance(features, PreparedFeatures) else [level[rows] for level in features]


def to_device(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of Python numbers on a device, without making the host wait for the device as torch.tensor() does."""
    return move(torch.tensor(numbers, dtype=dtype), device)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device; the host does not wait, since the copy starts from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class QueryState:
    """The latent variable y = (p, q) of Eq. 2: where each query looks, and what it knows.

    It holds nothing that can be computed from it: no logits, and no second copy of the boxes.
    """

    position: Tensor  # (B, N, 4)  cx, cy in pixels; z = log2 sqrt(wh); r = log2(h / w)  (Eq. 3)
    content: Tensor  # (B, N, C)

    def detach(self) -> "QueryState":
        """The same values without their graph."""
        return QueryState(self.position.detach(), self.content.detach())

    def detach_position(self) -> "QueryState":
        """The state as one layer hands it to the next: gradients pass along the content only."""
        return QueryState(self.position.detach(), self.content)

    def chunk(self, count: int) -> list["QueryState"]:
        """Split the B rows into `count` states of as many rows each; `cat` is the inverse."""
        return list(map(QueryState, self.position.chunk(count), self.content.chunk(count)))

    @classmethod
    def cat(cls, states: Sequence["QueryState"]) -> "QueryState":
        """Join states along their rows."""
        return cls(torch.cat([x.position for x in states]), torch.cat([x.content for x in states]))

    @classmethod
    def stack(cls, states: Sequence["QueryState"]) -> "QueryState":
        """Join t states of B rows in a new first dimension: (t, B, N, 4) and (t, B, N, C)."""
        return cls(torch.stack([x.position for x in states]), torch.stack([x.content for x in states]))

    def to(self, dtype: torch.dtype) -> "QueryState":
        """The same values in this dtype."""
        if self.position.dtype == self.content.dtype == dtype:
            return self
        return QueryState(self.position.to(dtype), self.content.to(dtype))

    def pack(self, units: Tensor | None = None) -> Tensor:
        """The state as the solvers take it: a flat vector for each row, (B, N * (4 + C)), positions in packing units.

        A stack of t states becomes (t, B, N * (4 + C)).

        CENTER_UNIT and SCALE_UNIT make the four numbers of a position no larger than a content's entries, which a
        LayerNorm keeps near 1. They decide how much a moving box adds to a relative residual, and so what a tolerance
        means: a box that moves by 10 pixels counts as much as a content that changes by 0.01 in one entry. A content
        has many more entries, so that the residual of the whole state is nearly that of the content.

        Args:
            units: what `packing_units` returns, if the caller has kept it.
        """
        units = packing_units(self.position.device).to(self.position.dtype) if units is None else units
        return torch.cat([self.position / units, self.content], dim=-1).flatten(-2)

    @classmethod
    def unpack(cls, flat: Tensor, num_queries: int, units: Tensor | None = None) -> "QueryState":
        """The inverse of `pack`.

        Args:
            flat: (B, num_queries * (4 + C)).
            units: see `pack`.
        """
        units = packing_units(flat.device).to(flat.dtype) if units is None else units
        rows = flat.unflatten(1, (num_queries, -1))
        return cls(rows[..., :4] * units, rows[..., 4:])


@dataclass(frozen=True)
class Prediction:
    """What a layer reads out of a QueryState: a score for each class, and a box, for each query."""

    logits: Tensor  # (B, N, K)  before the sigmoid
    boxes: Tensor  # (B, N, 4)  xyxy, pixels of the padded input


@dataclass(frozen=True)
class Decoded:
    """What a decoder returns at test time."""

    prediction: Prediction
    steps: Tensor  # (B,)  int64, the applications of f after g; for a stack of layers, the layers after the first
    finite: Tensor  # (B,)  bool, False where a state became infinite or NaN
    residual: Tensor | None = None  # (B,)  relative residual of the last iterate; None without an equilibrium
    state: QueryState | None = None  # from which the prediction was read; None where a decoder does not tell it


@dataclass(frozen=True)
class Targets:
    """The ground truth of a batch, padded to its largest number of boxes M, which may be 0."""

    labels: Tensor  # (B, M)  int64; 0 where not valid
    boxes: Tensor  # (B, M, 4)  xyxy, pixels; 0 where not valid
    valid: Tensor  # (B, M)  bool
    image_sizes: Tensor  # (B, 2)  width, height before padding, pixels

    @classmethod
    def from_instances(cls, instances: list[Instances], device: torch.device) -> "Targets":
        """Pad detectron2's Instances, one for each image, with the fields gt_boxes and gt_classes."""
        labels = [x.gt_classes.to(torch.int64) for x in instances]
        boxes = [x.gt_boxes.tensor.to(torch.float32).reshape(-1, 4) for x in instances]
        valid = [torch.ones_like(x, dtype=torch.bool) for x in labels]
        sizes = [(x.image_size[1], x.image_size[0]) for x in instances]
        # Padded where they are, on the host, so that one copy for each field goes to the device.
        return cls(
            labels=move(pad_sequence(labels, batch_first=True), device),
            boxes=move(pad_sequence(boxes, batch_first=True), device),
            valid=move(pad_sequence(valid, batch_first=True), device),
            image_sizes=to_device(sizes, torch.float32, device),
        )
