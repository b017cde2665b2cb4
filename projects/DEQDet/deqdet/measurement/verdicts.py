"""Judge whether a detection is right, and if not, what is wrong with it."""

from torch import Tensor

from detectron2.structures import Instances, pairwise_iou

from .duplicates import CONFIDENT, SAME_OBJECT
from .mistakes import Outcome, judge

RIGHT = "right"
VERDICTS = (RIGHT, "double", "class", "box", "nothing")  # see `name_mistakes`
NEAR = 0.1  # minimum IoU with an object for a detection to be a bad box, not a detection of nothing


def name_mistakes(found: Instances, truth: Instances) -> list[str | None]:
    """Judge whether each confident detection is right, and if not, name what is wrong with it.

    A detection is "right" if `mistakes.judge` matches it with an object of its class. Otherwise it is

    - a "double" if its IoU with an object of its class is at least SAME_OBJECT, since that object is then taken,
    - of the wrong "class" if this holds for an object of another class,
    - a bad "box" if its IoU with any object is at least NEAR,
    - a detection of "nothing" in all other cases.

    Args:
        found: the detections of an image, best first.
        truth: its true boxes, as read_truth returns them.

    Returns:
        One verdict for each; None for a detection that takes no object and lies in a crowd of its class.
    """
    judged = judge(truth, found, CONFIDENT)
    overlaps = pairwise_iou(judged.found.pred_boxes, truth.gt_boxes).where(~truth.gt_crowd, 0.0)
    same = judged.found.pred_classes[:, None] == truth.gt_classes
    return [
        RIGHT if outcome == Outcome.RIGHT else None if outcome == Outcome.IGNORED else _name(iou, of_class)
        for outcome, iou, of_class in zip(judged.found_outcomes, overlaps, same, strict=True)
    ]


def _name(overlaps: Tensor, same: Tensor) -> str:
    """Name the mistake of a detection by its IoU with each object (M,), and whether that is of its class (M,)."""
    if (overlaps[same] >= SAME_OBJECT).any():
        return "double"
    if (overlaps >= SAME_OBJECT).any():
        return "class"
    return "box" if (overlaps >= NEAR).any() else "nothing"
