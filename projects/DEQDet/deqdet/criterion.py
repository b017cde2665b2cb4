"""The training losses of all supervised predictions (paper, Section 4 and Table 5).

S: named predictions, B: images, R = S * B rows (segment-major), N: queries, K: classes, P: matched pairs.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage

from .matcher import HungarianMatcher, Matches
from .structures import Prediction, Targets

LOG_PERIOD = 20  # iterations, the period of detectron2's writers: a figure costs a host synchronisation


class Criterion(nn.Module):
    """Sigmoid focal loss of all queries; L1 and GIoU losses of the matched ones.

    Each is summed and divided by the number of matched boxes, averaged over the ranks, at least 1.
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
            matcher: pairs queries and boxes.
            num_classes: K.
            focal_weight, l1_weight, giou_weight: lambda of each loss (Table 5).
            focal_alpha, focal_gamma: the focal loss's numbers.
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
        """The matching cost and the loss share their numbers."""
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
        self, predictions: dict[str, Prediction], targets: Targets, image_names: Sequence[str] = ()
    ) -> dict[str, Tensor]:
        """Weighted scalar losses, to be summed: loss_cls_<name>, loss_l1_<name>, loss_giou_<name>.

        All S predictions are computed at once, in float32. Without any box the last two are 0, but still
        connected to the predicted boxes, so that each parameter gets a gradient.

        Args:
            predictions: S by name; logits (B, N, K), boxes (B, N, 4) xyxy, pixels.
            targets: of B images; an image, or all of them, may have no box.
            image_names: file names of the B images, for errors.

        Raises:
            FloatingPointError: logits or boxes are not finite; names the predictions and the images.
            ValueError: a label is not in [0, K), or logits are not of K classes.
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
        losses = sums / _mean_over_ranks(matched, logits.device).clamp(min=1)
        return {
            f"loss_{kind}_{name}": losses[i, s]
            for s, name in enumerate(names)
            for i, kind in enumerate(("cls", "l1", "giou"))
        }

    def _focal_loss(self, logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
        """(R, N, K): the target is one-hot for a matched query, 0 for the others."""
        one_hot = torch.zeros_like(logits)
        one_hot[matches.rows, matches.queries, labels] = 1
        return sigmoid_focal_loss(logits, one_hot, self.focal_alpha, self.focal_gamma, reduction="none")

    def _box_losses(
        self, boxes: Tensor, targets: Targets, matches: Matches, images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(P,) L1 of xyxy divided by width, height, width, height, summed over the four; (P,) 1 - GIoU."""
        matched = boxes[matches.rows, matches.queries]  # (P, 4)
        goal = targets.boxes[images, matches.targets].float()
        sizes = targets.image_sizes[images].float().repeat(1, 2)
        l1 = ((matched - goal) / sizes).abs().sum(1)
        return l1, generalized_box_iou_loss(matched, goal, reduction="none")


def _mean_over_ranks(count: int, device: torch.device) -> Tensor:
    """A scalar. Every rank calls this in every iteration, without any box too: else the others would wait."""
    mean = torch.tensor(float(count), device=device)
    if comm.get_world_size() > 1:
        dist.all_reduce(mean)
        mean /= comm.get_world_size()
    return mean


@torch.no_grad()
def _log_accuracy(logits: Tensor, labels: Tensor, matches: Matches, matched: int) -> None:
    """Put matched_accuracy into the event storage, if one is active: which part of the last prediction's
    matched queries has its box's class on top.
    """
    if matched == 0 or not has_event_storage() or (get_event_storage().iter + 1) % LOG_PERIOD:
        return
    top = logits[matches.rows[-matched:], matches.queries[-matched:]].argmax(1)  # (matched,)
    accuracy = (top == labels[-matched:]).float().mean()
    get_event_storage().put_scalar("matched_accuracy", accuracy.item())
