"""Hungarian matching of queries and ground-truth boxes (paper, Section 4).

S: named predictions, B: images, R = S * B rows (segment-major: all images of the first prediction, then all
of the second, ...), N: queries, K: classes, M: most boxes of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .structures import Prediction, Targets


@dataclass(frozen=True)
class Matches:
    """Pairs of a query and a box of its image, P in all, sorted by row, then by query."""

    rows: Tensor  # (P,) int64, in [0, S * B)
    queries: Tensor  # (P,) int64, in [0, N)
    targets: Tensor  # (P,) int64, in [0, M): an index into Targets, always of a valid box


@dataclass(frozen=True, kw_only=True)
class HungarianMatcher:
    """The pairs of least total cost = focal + L1 - GIoU, weighted (Table 5), for each image and prediction.

    Args:
        focal_weight: of the focal loss that a query would save by having the box's class as its target.
        l1_weight: of the L1 distance of xyxy divided by the image's (width, height, width, height).
        giou_weight: of the negated generalised IoU.
        focal_alpha, focal_gamma: the focal loss's numbers.
    """

    focal_weight: float
    l1_weight: float
    giou_weight: float
    focal_alpha: float
    focal_gamma: float

    @torch.no_grad()
    def __call__(
        self, prediction: Prediction, targets: Targets, names: Sequence[str], image_names: Sequence[str] = ()
    ) -> Matches:
        """Match min(N, valid boxes) queries in each row. Computed in float32; one transfer to the CPU.

        Args:
            prediction: logits (R, N, K), boxes (R, N, 4) xyxy, pixels.
            targets: of B images; an image, or all of them, may have no box.
            names: S names, for errors.
            image_names: file names of the B images, for errors.

        Raises:
            FloatingPointError: a logit or a box is not finite, in an image without boxes too, or a box is so
                large that the cost overflows.
            ValueError: a label is not in [0, K).
        """
        logits, boxes = prediction.logits.float(), prediction.boxes.float()
        num_classes = logits.shape[2]
        cost = self.cost(logits, boxes, targets)
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in (logits, boxes, cost)]).all(0)
        # The checks and the sizes ride along with the cost: one synchronisation in all.
        cost, finite, valid, labels = _to_cpu(cost, finite, targets.valid, targets.labels)
        finite, valid = finite.view(len(names), len(valid)).bool(), valid.bool()
        _check_finite(finite, names, image_names)
        _check_labels(labels, valid, num_classes, image_names)
        return Matches(*_assign(cost.numpy(), valid.numpy()).to(logits.device))

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """(R, N, K), (R, N, 4) xyxy -> (R, N, M) cost of each pair, that of padding included."""
        copies = len(logits) // len(targets.labels)  # S
        labels = targets.labels.clamp(0, logits.shape[2] - 1).repeat(copies, 1)  # (R, M)
        scores = logits.gather(2, labels[:, None].expand(-1, logits.shape[1], -1)).sigmoid()  # (R, N, M)
        target_boxes = targets.boxes.float().repeat(copies, 1, 1)  # (R, M, 4)
        sizes = targets.image_sizes.float().repeat(copies, 2)[:, None]  # (R, 1, 4) w, h, w, h
        return (
            self.focal_weight * focal_cost(scores, self.focal_alpha, self.focal_gamma)
            + self.l1_weight * torch.cdist(boxes / sizes, target_boxes / sizes, p=1)
            - self.giou_weight * pairwise_giou(boxes, target_boxes)
        )


def focal_cost(scores: Tensor, alpha: float, gamma: float, eps: float = 1e-12) -> Tensor:
    """Scores in [0, 1], any shape -> focal loss as a positive less focal loss as a negative."""
    positive = -alpha * (1 - scores) ** gamma * (scores + eps).log()
    negative = -(1 - alpha) * scores**gamma * (1 - scores + eps).log()
    return positive - negative


def pairwise_giou(boxes: Tensor, others: Tensor, min_area: float = 1e-6) -> Tensor:
    """(R, N, 4), (R, M, 4) xyxy -> (R, N, M) generalised IoU, in [-1, 1].

    Args:
        min_area: the floor of the denominators, square pixels: two boxes of no area have a GIoU too.
    """
    boxes, others = boxes[:, :, None], others[:, None]  # (R, N, 1, 4), (R, 1, M, 4)
    low, high = torch.maximum(boxes, others), torch.minimum(boxes, others)
    overlap = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(-1)
    hull = (low[..., 2:] - high[..., :2]).prod(-1)  # the smallest box around both
    union = _area(boxes) + _area(others) - overlap
    return overlap / union.clamp(min=min_area) - (hull - union) / hull.clamp(min=min_area)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _to_cpu(*tensors: Tensor) -> list[Tensor]:
    """The same values on the CPU, as float32, moved in one piece."""
    flat = torch.cat([x.flatten().float() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _assign(cost: np.ndarray, valid: np.ndarray) -> Tensor:
    """(R, N, M) finite cost, (B, M) bool -> (3, P) rows, queries, targets."""
    pairs = []
    for row, row_cost in enumerate(cost):
        columns = valid[row % len(valid)].nonzero()[0]
        queries, chosen = linear_sum_assignment(row_cost[:, columns])
        pairs.append(np.stack([np.full_like(queries, row), queries, columns[chosen]]))
    return torch.from_numpy(np.concatenate(pairs, axis=1).astype(np.int64))


def _check_finite(finite: Tensor, names: Sequence[str], image_names: Sequence[str]) -> None:
    """finite: (S, B) bool."""
    faults = []
    for name, row in zip(names, finite, strict=True):
        images = [_describe(image, image_names) for image in (~row).nonzero().flatten().tolist()]
        if images:
            faults.append(f"{name} ({', '.join(images)})")
    if faults:
        raise FloatingPointError(f"Non-finite logits, boxes or matching cost in {'; '.join(faults)}.")


def _check_labels(labels: Tensor, valid: Tensor, num_classes: int, image_names: Sequence[str]) -> None:
    """labels, valid: (B, M)."""
    unknown = valid & ((labels < 0) | (labels >= num_classes))
    for image, box in unknown.nonzero().tolist():
        raise ValueError(
            f"Label {int(labels[image, box])} of {_describe(image, image_names)} is not in "
            f"[0, {num_classes}). Does MODEL.DEQDET.NUM_CLASSES agree with the data set?"
        )


def _describe(image: int, image_names: Sequence[str]) -> str:
    return f"image {image}: {image_names[image]}" if image_names and image_names[image] else f"image {image}"
