"""Hungarian matching of queries and ground-truth boxes (Sec. 4, Table 5).

The S supervised predictions of B images are matched at once, as R = S * B rows: first all images of the first
prediction, then all images of the second, and so on. So row r belongs to image r % B.

N: queries, K: classes, M: the largest number of boxes in an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .structures import Prediction, Targets, move


class NonFinitePredictionError(FloatingPointError):
    """Predictions that are infinite or NaN, or so large that their matching cost overflows."""

    def __init__(self, predictions: Sequence[str], images: Sequence[int], image_names: Sequence[str]):
        """
        Args:
            predictions: the names of the predictions.
            images: the indices in the batch of the images in which one of them is not finite.
            image_names: the names of these images.
        """
        self.what = f"Non-finite logits, boxes or matching cost in {', '.join(predictions)}"
        self.images = images
        super().__init__(f"{self.what} ({', '.join(image_names)}).")


@dataclass(frozen=True)
class Matches:
    """P pairs of a query and a ground-truth box of its image, sorted by row and then by query."""

    rows: Tensor  # (P,) int64, in [0, S * B)
    queries: Tensor  # (P,) int64, in [0, N)
    targets: Tensor  # (P,) int64, in [0, M): the index of a valid box in Targets


@dataclass(frozen=True, kw_only=True)
class HungarianMatcher:
    """Finds the one-to-one pairs of queries and boxes with the lowest total cost, for each image of each prediction.

    The cost of a pair is a weighted sum (Table 5) of three terms: the change of the focal loss when the box's class
    becomes the query's target, the L1 distance of the corners, and the negated generalised IoU (GIoU).

    Args:
        focal_weight: the weight of the focal term.
        l1_weight: the weight of the L1 distance of xyxy, divided by the image's (width, height, width, height).
        giou_weight: the weight of the negated GIoU.
        focal_alpha, focal_gamma: alpha and gamma of the focal loss.
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
        """Match the valid boxes of each row's image to queries; if there are more boxes than queries, N of them.

        The cost is computed in float32 on the device of the prediction; the assignment itself runs on the CPU.

        Args:
            prediction: logits (R, N, K), boxes (R, N, 4) xyxy, pixels.
            targets: the boxes of B images. An image, or all of them, may have none.
            names: the S names of the predictions, for error messages.
            image_names: the file names of the B images, for error messages.

        Raises:
            NonFinitePredictionError: a logit or a box is not finite, even in an image without boxes, or a box is so
                large that its cost overflows.
            ValueError: a label is not in [0, K).
        """
        logits, boxes = prediction.logits.float(), prediction.boxes.float()
        num_classes = logits.shape[2]
        cost = self.cost(logits, boxes, targets)
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in (logits, boxes, cost)]).all(0)
        # A single transfer, because the host waits for the device in each one.
        cost, finite, valid, labels = _to_cpu(cost, finite, targets.valid, targets.labels)
        finite, valid = finite.view(len(names), len(valid)).bool(), valid.bool()
        _check_finite(finite, names, image_names)
        _check_labels(labels, valid, num_classes, image_names)
        return Matches(*move(_assign(cost.numpy(), valid.numpy()), logits.device))

    def cost(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
        """Compute the cost of each pair.

        Args:
            logits: (R, N, K).
            boxes: (R, N, 4) xyxy, pixels.
            targets: the boxes of B images.

        Returns:
            (R, N, M). The columns of padded boxes hold meaningless values.
        """
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
    """Compute the change of the focal loss when the target of a score turns from 0 to 1.

    An unmatched query has target 0 for every class, so this change is the cost of matching it.

    Args:
        scores: probabilities in [0, 1], of any shape.
        alpha, gamma: alpha and gamma of the focal loss.
        eps: added inside the logarithms, so that a probability of 0 has a finite loss.

    Returns:
        A tensor of the same shape.
    """
    positive = -alpha * (1 - scores) ** gamma * (scores + eps).log()
    negative = -(1 - alpha) * scores**gamma * (1 - scores + eps).log()
    return positive - negative


def pairwise_giou(boxes: Tensor, others: Tensor, min_area: float = 1e-6) -> Tensor:
    """Compute the generalised IoU (Rezatofighi et al., CVPR 2019) of all pairs of boxes of a row.

    It is the IoU minus the fraction of the hull (the smallest box around both) that neither box covers.

    Args:
        boxes: (R, N, 4) xyxy.
        others: (R, M, 4) xyxy.
        min_area: the smallest denominator, in square pixels, so that boxes without area have a finite GIoU.

    Returns:
        (R, N, M), in [-1, 1].
    """
    boxes, others = boxes[:, :, None], others[:, None]  # (R, N, 1, 4), (R, 1, M, 4)
    low, high = torch.maximum(boxes, others), torch.minimum(boxes, others)
    overlap = (high[..., 2:] - low[..., :2]).clamp(min=0).prod(-1)
    # `low` holds the larger of each pair of coordinates: the intersection begins at low[:2], and the hull ends at
    # low[2:]. With `high` it is the other way round.
    hull = (low[..., 2:] - high[..., :2]).prod(-1)
    union = _area(boxes) + _area(others) - overlap
    return overlap / union.clamp(min=min_area) - (hull - union) / hull.clamp(min=min_area)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def _to_cpu(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to the CPU as float32, all in one transfer."""
    flat = torch.cat([x.flatten().float() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def _assign(cost: np.ndarray, valid: np.ndarray) -> Tensor:
    """Solve the assignment problem of each row.

    Args:
        cost: (R, N, M), finite.
        valid: (B, M) bool, True for boxes and False for padding.

    Returns:
        (3, P) int64, the fields of Matches.
    """
    from scipy.optimize import linear_sum_assignment  # which inference does not need, and which takes 0.5 s to import

    pairs = []
    for row, row_cost in enumerate(cost):
        columns = valid[row % len(valid)].nonzero()[0]
        queries, chosen = linear_sum_assignment(row_cost[:, columns])
        pairs.append(np.stack([np.full_like(queries, row), queries, columns[chosen]]))
    return torch.from_numpy(np.concatenate(pairs, axis=1).astype(np.int64))


def _check_finite(finite: Tensor, names: Sequence[str], image_names: Sequence[str]) -> None:
    """Raise NonFinitePredictionError for the predictions that are not finite, given `finite` (S, B) bool."""
    if not finite.all():
        predictions = [name for name, row in zip(names, finite, strict=True) if not row.all()]
        images = (~finite.all(dim=0)).nonzero().flatten().tolist()
        raise NonFinitePredictionError(predictions, images, [_describe(image, image_names) for image in images])


def _check_labels(labels: Tensor, valid: Tensor, num_classes: int, image_names: Sequence[str]) -> None:
    """Raise ValueError for the first valid label outside [0, K), given `labels` and `valid`, both (B, M)."""
    unknown = valid & ((labels < 0) | (labels >= num_classes))
    for image, box in unknown.nonzero().tolist():
        raise ValueError(
            f"Label {int(labels[image, box])} of {_describe(image, image_names)} is not in "
            f"[0, {num_classes}). Does MODEL.DEQDET.NUM_CLASSES agree with the data set?"
        )


def _describe(image: int, image_names: Sequence[str]) -> str:
    return f"image {image}: {image_names[image]}" if image_names and image_names[image] else f"image {image}"
