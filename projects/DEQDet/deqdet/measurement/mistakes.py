"""Find the ground-truth boxes that a detector missed, and its wrong detections."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from torch import Tensor

from detectron2.structures import Instances, pairwise_ioa, pairwise_iou

LEAST_IOU = 0.5  # of a detection with its ground-truth box, as for AP50
NO_CHOICE = 0.5  # the score threshold if no threshold is better than another


class Outcome(IntEnum):
    """The outcome for a ground-truth box or for a detection."""

    RIGHT = 0  # a matched pair of the same class
    CONFUSED = 1  # a matched pair of different classes
    ALONE = 2  # unmatched: a missed box, or a false detection
    IGNORED = 3  # a crowd, or a detection within one


@dataclass(frozen=True)
class Judgement:
    """The outcomes in one image, for M ground-truth boxes and the D detections whose score reaches the threshold."""

    truth: Instances  # M: gt_boxes (xyxy, pixels), gt_classes, gt_crowd
    found: Instances  # D, best first: pred_boxes (xyxy, pixels), scores, pred_classes
    truth_outcomes: np.ndarray  # (M,)  of Outcome
    found_outcomes: np.ndarray  # (D,)

    @property
    def right(self) -> int:
        """The number of objects that were found."""
        return int((self.found_outcomes == Outcome.RIGHT).sum())

    @property
    def missed(self) -> int:
        """The number of ground-truth boxes without a detection."""
        return int((self.truth_outcomes == Outcome.ALONE).sum())

    @property
    def false(self) -> int:
        """The number of detections without a ground-truth box, including duplicates of another detection."""
        return int((self.found_outcomes == Outcome.ALONE).sum())

    @property
    def confused(self) -> int:
        """The number of objects that were found as another class."""
        return int((self.found_outcomes == Outcome.CONFUSED).sum())

    @property
    def error(self) -> int:
        """The number of mistakes, missed + false + confused: 0 if every object was found and nothing else."""
        return self.missed + self.false + self.confused

    @property
    def doubt(self) -> float:
        """The sum of the scores of all wrong detections, which orders images with the same number of mistakes."""
        wrong = np.isin(self.found_outcomes, (Outcome.ALONE, Outcome.CONFUSED))
        return float(self.found.scores.numpy()[wrong].sum())


def judge(truth: Instances, found: Instances, threshold: float) -> Judgement:
    """Match the ground-truth boxes of an image with its detections.

    The first pass follows COCO's evaluation at an IoU of 0.5: in descending order of score, each detection takes the
    box of its own class with the highest IoU among those that are still free. The second pass matches the remaining
    boxes and detections in the same way regardless of class, so that an object found as another class is one mistake
    and not two. A detection of which at least half lies within a crowd of its class is neither right nor wrong.

    Args:
        truth: M ground-truth boxes on the CPU, see Judgement.
        found: detections in any order; those below the threshold are left out.
        threshold: minimum score of a detection.
    """
    found = found[found.scores >= threshold]
    found = found[found.scores.argsort(descending=True, stable=True)]
    truths = np.where(truth.gt_crowd.numpy(), Outcome.IGNORED, Outcome.ALONE)
    outcomes = np.full(len(found), Outcome.ALONE)
    iou = pairwise_iou(found.pred_boxes, truth.gt_boxes).numpy()  # (D, M)
    same = found.pred_classes[:, None].numpy() == truth.gt_classes[None].numpy()
    _pair(np.where(same, iou, 0.0), truths, outcomes, Outcome.RIGHT)
    crowds = truth.gt_crowd.numpy()
    covered = pairwise_ioa(truth.gt_boxes, found.pred_boxes).numpy().T >= LEAST_IOU  # relative to the detection's area
    outcomes[(outcomes == Outcome.ALONE) & (covered & same & crowds).any(axis=1)] = Outcome.IGNORED
    _pair(iou, truths, outcomes, Outcome.CONFUSED)
    return Judgement(truth, found, truths, outcomes)


def _pair(iou: np.ndarray, truths: np.ndarray, outcomes: np.ndarray, outcome: Outcome) -> None:
    """Assign to each unmatched detection, in order, the unmatched box with the highest IoU, in place."""
    for row in np.nonzero(outcomes == Outcome.ALONE)[0]:
        free = np.where(truths == Outcome.ALONE, iou[row], 0.0)
        if free.size and free.max() >= LEAST_IOU:
            truths[free.argmax()] = outcomes[row] = outcome


def judge_all(truths: Sequence[Instances], found: Sequence[Instances], threshold: float) -> list[Judgement]:
    """Apply `judge` to each image."""
    return [judge(*pair, threshold) for pair in zip(truths, found, strict=True)]


def sort_by_error(judgements: Sequence[Judgement]) -> list[int]:
    """Return the indices of the images, the worst first: sorted by error, then by doubt, then by index."""
    return sorted(range(len(judgements)), key=lambda i: (-judgements[i].error, -judgements[i].doubt, i))


@dataclass(frozen=True)
class Tally:
    """The counts of one class over all images."""

    boxes: int  # ground-truth boxes, without crowds
    right: int
    missed: int
    confused: int  # ground-truth boxes of this class that were found as another class
    false: int  # detections of this class without a ground-truth box, except confused ones


def tally(judgements: Sequence[Judgement], num_classes: int) -> list[Tally]:
    """Count the outcomes of each class."""
    truth = _count([x.truth.gt_classes for x in judgements], [x.truth_outcomes for x in judgements], num_classes)
    found = _count([x.found.pred_classes for x in judgements], [x.found_outcomes for x in judgements], num_classes)
    return [
        Tally(
            boxes=int(of_truth[: Outcome.IGNORED].sum()),
            right=int(of_truth[Outcome.RIGHT]),
            missed=int(of_truth[Outcome.ALONE]),
            confused=int(of_truth[Outcome.CONFUSED]),
            false=int(of_found[Outcome.ALONE]),
        )
        for of_truth, of_found in zip(truth, found, strict=True)
    ]


def _count(labels: Sequence[Tensor], outcomes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Count each outcome of each class over all images; an array (num_classes, number of outcomes)."""
    counts = np.zeros((num_classes, len(Outcome)), dtype=int)
    for of_image, results in zip(labels, outcomes, strict=True):
        np.add.at(counts, (of_image.numpy(), results), 1)
    return counts


def best_threshold(truths: Sequence[Instances], found: Sequence[Instances]) -> float | None:
    """Find the score threshold, in hundredths, with the highest F1 = 2 right / (detections + boxes) over all images.

    Of several best thresholds, the highest is returned; None if no detection is right, since F1 is then 0 everywhere.
    """
    # Detections are matched in descending order of score, so the matches at a threshold are those matches without a
    # threshold whose score reaches it: one judgement is enough for all thresholds.
    judged = judge_all(truths, found, threshold=-np.inf)
    boxes = sum(int((~truth.gt_crowd).sum()) for truth in truths)
    scores = np.concatenate([x.found.scores.numpy() for x in judged] or [np.zeros(0)])
    outcomes = np.concatenate([x.found_outcomes for x in judged] or [np.zeros(0, int)])
    thresholds = np.arange(1, 100) / 100
    right, count = (
        (scores[kept][None] >= thresholds[:, None].astype(scores.dtype)).sum(axis=1)
        for kept in (outcomes == Outcome.RIGHT, outcomes != Outcome.IGNORED)
    )
    f1 = 2 * right / np.maximum(count + boxes, 1)
    return float(thresholds[np.nonzero(f1 == f1.max())[0][-1]]) if f1.max() > 0 else None

