"""The data that the modules exchange.

B: images, N: queries, C: channels, K: classes, M: the largest number of boxes in an image.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import pad_sequence

from detectron2.structures import Instances

# pack() divides cx, cy by the first number and z, r by the second. In pixels, the centres of the boxes would dominate
# the norm of the whole state, and so the residual that decides when to stop. Division by powers of two is exact.
CENTER_UNIT = 1024.0
SCALE_UNIT = 8.0

# The host memory of copies that CUDA graphs have recorded: every replay reads it again. Releases of torch before its
# allocator of pinned memory knew of graphs would give it to another tensor.
_recorded: list[Tensor] = []


def packing_units(device: torch.device) -> Tensor:
    """Return the packing units of a position's four numbers cx, cy, z, r; (4,) float32.

    They are computed on the device, because the host would have to wait while a tensor of Python numbers is copied.
    """
    return torch.where(torch.arange(4, device=device) < 2, CENTER_UNIT, SCALE_UNIT)


class PreparedFeatures(Sequence[Tensor]):
    """A pyramid with data that a refinement layer has precomputed from it for all steps.

    It still behaves as the sequence of levels (B, C, H_l, W_l), finest first, so that other layers can read it too.
    """

    @property
    @abstractmethod
    def num_images(self) -> int:
        """B."""

    @abstractmethod
    def select(self, rows: Tensor) -> "PreparedFeatures":
        """Return the features of the images with these indices, (b,) int64, in this order."""


Features = Sequence[Tensor]  # the levels of a pyramid, finest first: a list of tensors, or PreparedFeatures


def count_images(features: Features) -> int:
    """Return B, the number of images of a pyramid."""
    return features.num_images if isinstance(features, PreparedFeatures) else len(features[0])


def select_images(features: Features, rows: Tensor) -> Features:
    """Return the features of the images with these indices, (b,) int64, in this order."""
    return features.select(rows) if isinstance(features, PreparedFeatures) else [level[rows] for level in features]


def is_traced() -> bool:
    """Return True while torch.compile, torch.export or torch.jit.trace records the code that calls this function."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def nonfinite_names(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors with an infinite value or NaN, with a single device synchronisation."""
    floating = [(name, x.detach()) for name, x in tensors if x.is_floating_point()]
    if not floating:
        return []
    finite = torch.stack([x.isfinite().all() for _, x in floating])
    return [name for (name, _), good in zip(floating, finite.tolist(), strict=True) if not good]


def to_device(numbers: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a tensor of Python numbers on a device without waiting for the device, as torch.tensor() would."""
    return move(torch.tensor(numbers, dtype=dtype), device)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, from pinned memory, so that the host does not wait for the copy."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    if is_traced() or isinstance(tensor, FakeTensor):  # neither traced nor fake tensors can be pinned
        return tensor.to(device)
    pinned = tensor.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _recorded.append(pinned)
    return pinned.to(device, non_blocking=True)


@dataclass(frozen=True)
class QueryState:
    """The latent variable y = (p, q) of Eq. 2: where each query looks, and what it knows.

    It holds no derived values: no logits, and no second copy of the boxes.
    """

    position: Tensor  # (B, N, 4)  cx, cy in pixels; z = log2 sqrt(wh); r = log2(h / w)  (Eq. 3)
    content: Tensor  # (B, N, C)

    def detach(self) -> "QueryState":
        """The same values without their graph."""
        return QueryState(self.position.detach(), self.content.detach())

    def detach_position(self) -> "QueryState":
        """The state as one layer passes it to the next: gradients flow through the content only."""
        return QueryState(self.position.detach(), self.content)

    def chunk(self, count: int) -> list["QueryState"]:
        """Split the B rows into `count` states of equal size; `cat` is the inverse."""
        return list(map(QueryState, self.position.chunk(count), self.content.chunk(count)))

    @classmethod
    def cat(cls, states: Sequence["QueryState"]) -> "QueryState":
        """Join states along their rows."""
        return cls(torch.cat([x.position for x in states]), torch.cat([x.content for x in states]))

    @classmethod
    def stack(cls, states: Sequence["QueryState"]) -> "QueryState":
        """Stack t states of B rows along a new first dimension: (t, B, N, 4) and (t, B, N, C)."""
        return cls(torch.stack([x.position for x in states]), torch.stack([x.content for x in states]))

    def to(self, dtype: torch.dtype) -> "QueryState":
        """The same values in this dtype."""
        if self.position.dtype == self.content.dtype == dtype:
            return self
        return QueryState(self.position.to(dtype), self.content.to(dtype))

    def pack(self, units: Tensor | None = None) -> Tensor:
        """Flatten each row to the vector that the solvers iterate, (B, N * (4 + C)), with positions in packing units.

        A stack of t states becomes (t, B, N * (4 + C)).

        CENTER_UNIT and SCALE_UNIT bring the four numbers of a position down to the size of a content's entries, which
        a LayerNorm keeps near 1. They determine how much a moving box adds to the relative residual, and so what a
        tolerance means: a box that moves by 10 pixels counts as much as one entry of a content that changes by 0.01.
        Since a content has many more entries, the residual of the whole state is nearly that of the content.

        Args:
            units: the result of `packing_units`, if the caller has kept it.
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
    """The read-out of a QueryState by a layer: for each query a box, and a logit for each class."""

    logits: Tensor  # (B, N, K)  before the sigmoid
    boxes: Tensor  # (B, N, 4)  xyxy, pixels of the padded input


@dataclass(frozen=True)
class Decoded:
    """The result of a decoder at test time."""

    prediction: Prediction
    steps: Tensor  # (B,)  int64, the number of applications of f after g; in a stack, of layers after the first
    finite: Tensor  # (B,)  bool, False where a state became infinite or NaN
    residual: Tensor | None = None  # (B,)  relative residual of the last iterate; None without an equilibrium
    state: QueryState | None = None  # the state behind the prediction; None if the decoder does not return it


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
        # Pad on the host, so that each field needs only one copy to the device.
        return cls(
            labels=move(pad_sequence(labels, batch_first=True), device),
            boxes=move(pad_sequence(boxes, batch_first=True), device),
            valid=move(pad_sequence(valid, batch_first=True), device),
            image_sizes=to_device(sizes, torch.float32, device),
        )
