"""The training losses of all supervised predictions (Sec. 4, Table 5).

S: named predictions, B: images, R = S * B: rows in the order of matcher.py, where row r belongs to image r % B,
N: queries, K: classes, P: matched pairs.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage

from .matcher import HungarianMatcher, Matches
from .structures import Prediction, Targets

# The accuracy is logged every so many iterations, the period of detectron2's writers, because logging it makes the host
# wait for the device.
LOG_PERIOD = 20


class Criterion(nn.Module):
    """The sigmoid focal loss of all queries, and the L1 and GIoU losses of the matched ones.

    Each loss is summed over the batch and divided by the number of matched boxes, but at least by 1. In training that
    number is averaged over the ranks, in evaluation mode it is the rank's own.
    """

    @configurable
    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        num_classes: int,
        focal_weight: float,
        l1_weight: float,
        giou_weight: float,
        focal_alpha: float,
        focal_gamma: float,
    ):
        """
        Args:
            matcher: finds the pairs of queries and ground-truth boxes.
            num_classes: K.
            focal_weight, l1_weight, giou_weight: the weight lambda of each loss (Table 5).
            focal_alpha, focal_gamma: alpha and gamma of the focal loss.
        """
        super().__init__()
        self.matcher = matcher
        self.num_classes = num_classes
        self.focal_weight = focal_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Read MODEL.DEQDET.LOSS; the matching cost and the loss have the same weights (Table 5)."""
        deqdet = cfg.MODEL.DEQDET
        loss = deqdet.LOSS
        numbers = {
            "focal_weight": loss.FOCAL_WEIGHT,
            "l1_weight": loss.L1_WEIGHT,
            "giou_weight": loss.GIOU_WEIGHT,
            "focal_alpha": loss.FOCAL_ALPHA,
            "focal_gamma": loss.FOCAL_GAMMA,
        }
        return {"matcher": HungarianMatcher(**numbers), "num_classes": deqdet.NUM_CLASSES, **numbers}

    def forward(
        self,
        predictions: dict[str, Prediction],
        targets: Targets,
        image_names: Sequence[str] = (),
        normalizer: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of all S predictions at once, in float32.

        Args:
            predictions: S predictions by name; logits (B, N, K), boxes (B, N, 4) xyxy, pixels.
            targets: the boxes of B images. An image, or all of them, may have none.
            image_names: the file names of the B images, for error messages.
            normalizer: () the divisor of the sums, `mean_matches` of the whole batch, if the images are only a part of
                it.

        Returns:
            loss_cls_<name>, loss_l1_<name> and loss_giou_<name> for each prediction: weighted scalars, to be summed.
            In a batch without any box the last two are 0, but still connected to the predicted boxes in the graph,
            because DistributedDataParallel requires a gradient for every parameter.

        Raises:
            NonFinitePredictionError: logits or boxes are not finite. The message names the predictions and the images.
            ValueError: a label is not in [0, K), or the logits are not of K classes.
        """
        names = list(predictions)
        logits = torch.cat([x.logits.float() for x in predictions.values()])  # (R, N, K)
        boxes = torch.cat([x.boxes.float() for x in predictions.values()])  # (R, N, 4)
        if logits.shape[2] != self.num_classes:
            raise ValueError(f"Expected logits of {self.num_classes} classes, got {logits.shape[2]}.")
        matches = self.matcher(Prediction(logits, boxes), targets, names, image_names)
        images = matches.rows % len(targets.labels)
        labels = targets.labels[images, matches.targets]  # (P,)
        matched = len(matches.rows) // len(names)  # min(N, boxes) summed over images: the same for each name
        l1, giou = self._box_losses(boxes, targets, matches, images)
        sums = torch.stack(  # (3, S)
            [
                self.focal_weight * self._focal_loss(logits, labels, matches).view(len(names), -1).sum(1),
                self.l1_weight * l1.view(len(names), matched).sum(1),
                self.giou_weight * giou.view(len(names), matched).sum(1),
            ]
        )
        _log_accuracy(logits, labels, matches, matched)
        if normalizer is None:
            # In evaluation mode, ranks may have different numbers of batches: a collective operation would hang.
            normalizer = mean_matches(matched, logits.device) if self.training else max(matched, 1)
        losses = sums / normalizer
        return {
            f"loss_{kind}_{name}": losses[i, s]
            for s, name in enumerate(names)
            for i, kind in enumerate(("cls", "l1", "giou"))
        }

    def _focal_loss(self, logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
        """Compute the focal loss (R, N, K), with target 1 for the class of each matched query and 0 otherwise."""
        one_hot = torch.zeros_like(logits)
        # Assigning the Python number 1 would make the host wait while it is copied to the device.
        one_hot.index_put_((matches.rows, matches.queries, labels), torch.ones_like(labels, dtype=logits.dtype))
        return sigmoid_focal_loss(logits, one_hot, self.focal_alpha, self.focal_gamma, reduction="none")

    def _box_losses(
        self, boxes: Tensor, targets: Targets, matches: Matches, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the losses of the matched pairs.

        Args:
            boxes: (R, N, 4) xyxy, pixels.
            images: (P,) the image of each pair.

        Returns:
            The L1 loss (P,), the sum over x1, y1, x2, y2 divided by the image's width, height, width, height; and the
            GIoU loss (P,), 1 - GIoU.
        """
        matched = boxes[matches.rows, matches.queries]  # (P, 4)
        goal = targets.boxes[images, matches.targets].float()
        sizes = targets.image_sizes[images].float().repeat(1, 2)
        l1 = ((matched - goal) / sizes).abs().sum(1)
        return l1, giou_loss(matched, goal)


def giou_loss(boxes: Tensor, others: Tensor, eps: float = 1e-7) -> Tensor:
    """Compute 1 - GIoU (Rezatofighi et al., CVPR 2019) of pairs of boxes.

    It equals torchvision's generalized_box_iou_loss, which selects the overlapping boxes with a mask and so makes the
    host wait for the device. Here the sides of the intersection are clamped at 0 instead.

    Args:
        boxes, others: (P, 4) xyxy, with x1 <= x2 and y1 <= y2.
        eps: added to the denominators.

    Returns:
        (P,).
    """
    low, high = torch.maximum(boxes, others), torch.minimum(boxes, others)
    # `low` holds the larger of each pair of coordinates: see matcher.pairwise_giou.
    overlap = _area((high[:, 2:] - low[:, :2]).relu())
    hull = _area(low[:, 2:] - high[:, :2])
    union = _area(boxes[:, 2:] - boxes[:, :2]) + _area(others[:, 2:] - others[:, :2]) - overlap
    return 1 - overlap / (union + eps) + (hull - union) / (hull + eps)


def _area(sides: Tensor) -> Tensor:
    """Multiply width and height, (P, 2) to (P,).

    The gradient of Tensor.prod would look for zeros, and so make the host wait for the device.
    """
    return sides[:, 0] * sides[:, 1]


def mean_matches(count: int, device: torch.device) -> Tensor:
    """Return the number of matched boxes of a batch, averaged over the ranks and at least 1, as a scalar tensor.

    This is a collective operation: every rank must call it in every iteration, even without boxes, or the others hang.
    """
    mean = torch.full((), float(count), device=device)
    if comm.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= comm.get_world_size()
    return mean.clamp(min=1)


@torch.no_grad()
def _log_accuracy(logits: Tensor, labels: Tensor, matches: Matches, matched: int) -> None:
    """Log matched_accuracy to the event storage, if one is active.

    It is the fraction of matched queries, in the last prediction, whose most probable class is that of their box.
    """
    if matched == 0 or not has_event_storage() or (get_event_storage().iter + 1) % LOG_PERIOD:
        return
    top = logits[matches.rows[-matched:], matches.queries[-matched:]].argmax(1)  # (matched,)
    accuracy = (top == labels[-matched:]).float().mean()
    get_event_storage().put_scalar("matched_accuracy", accuracy.item())
