"""What flows between the modules. B: images, N: queries, C: channels, K: classes, M: most boxes of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detectron2.structures import Instances

# pack() divides cx, cy and z, r by these, so that pixels do not swamp the content in a norm over the whole state.
# Powers of two: the division and its undoing are exact. Numbers, since a new tensor would wait for the device.
CENTER_UNIT = 1024.0
SCALE_UNIT = 8.0


@dataclass(frozen=True)
class QueryState:
    """The latent variable y = (p, q) (Eq. 2): nothing else, no logits, no second copy of the boxes."""

    position: Tensor  # (B, N, 4)  cx, cy in pixels; z = log2 sqrt(wh); r = log2(h / w)  (Eq. 3)
    content: Tensor  # (B, N, C)

    def detach(self) -> "QueryState":
        """The same values, cut from the graph."""
        return QueryState(self.position.detach(), self.content.detach())

    def detach_position(self) -> "QueryState":
        """What a layer receives from another layer: gradients pass along the content only."""
        return QueryState(self.position.detach(), self.content)

    def pack(self) -> Tensor:
        """(B, N * (4 + C)): one flat vector an image, as the solvers take it."""
        center, scale = self.position.split(2, dim=2)
        return torch.cat([center / CENTER_UNIT, scale / SCALE_UNIT, self.content], dim=2).flatten(1)

    @classmethod
    def unpack(cls, flat: Tensor, num_queries: int) -> "QueryState":
        """The inverse of pack().

        Args:
            flat: (B, num_queries * (4 + C)).
        """
        rows = flat.unflatten(1, (num_queries, -1))
        center, scale, content = rows.split([2, 2, rows.shape[2] - 4], dim=2)
        return cls(torch.cat([center * CENTER_UNIT, scale * SCALE_UNIT], dim=2), content)


@dataclass(frozen=True)
class Prediction:
    """A read-out of a QueryState."""

    logits: Tensor  # (B, N, K)  before the sigmoid
    boxes: Tensor  # (B, N, 4)  xyxy, pixels of the padded input


@dataclass(frozen=True)
class Decoded:
    """What a decoder returns at test time."""

    prediction: Prediction
    steps: Tensor  # (B,)  int64, applications of f that each image took; layers after the first without an equilibrium
    finite: Tensor  # (B,)  bool, False where the states became infinite or NaN


@dataclass(frozen=True)
class Targets:
    """The batch's ground truth, padded to its largest number of boxes M, which may be 0."""

    labels: Tensor  # (B, M)  int64; 0 where not valid
    boxes: Tensor  # (B, M, 4)  xyxy, pixels; 0 where not valid
    valid: Tensor  # (B, M)  bool
    image_sizes: Tensor  # (B, 2)  width, height before padding, pixels

    @classmethod
    def from_instances(cls, instances: list[Instances], device: torch.device) -> "Targets":
        """Pad detectron2's Instances (fields gt_boxes, gt_classes), one an image."""
        labels = [x.gt_classes.to(device, torch.int64) for x in instances]
        boxes = [x.gt_boxes.tensor.to(device, torch.float32).reshape(-1, 4) for x in instances]
        valid = [torch.ones_like(x, dtype=torch.bool) for x in labels]
        sizes = [(x.image_size[1], x.image_size[0]) for x in instances]
        return cls(
            labels=pad_sequence(labels, batch_first=True),
            boxes=pad_sequence(boxes, batch_first=True),
            valid=pad_sequence(valid, batch_first=True),
            image_sizes=torch.tensor(sizes, dtype=torch.float32, device=device),
        )
