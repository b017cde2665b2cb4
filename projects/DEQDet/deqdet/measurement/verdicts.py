"""Judge whether a detection is right, and if not, what is wrong with it."""

from detectron2.structures import Instances, pairwise_ioa, pairwise_iou

from .duplicates import SAME_OBJECT, count_confident

RIGHT = "right"
VERDICTS = (RIGHT, "double", "class", "box", "nothing")  # see `judge`
NEAR = 0.1  # minimum IoU with an object for a detection to be a bad box, not a detection of nothing


def judge(found: Instances, truth: Instances) -> list[str | None]:
    """Judge whether each confident detection is right, and if not, what is wrong with it.

    In descending order of score, each detection takes the object of its class with the highest IoU among those not yet
    taken, if this IoU is at least SAME_OBJECT, and is then "right". A detection that takes no object is

    - a "double" if its IoU with an object of its class that is taken is at least SAME_OBJECT,
    - of the wrong "class" if this holds for an object of another class,
    - a bad "box" if its IoU with any object is at least NEAR,
    - a detection of "nothing" in all other cases.

    Args:
        found: the detections of an image, best first.
        truth: its true boxes, as read_truth returns them.

    Returns:
        One verdict for each; None for a detection that takes no object and lies in a crowd of its class. By COCO's
        rule, the overlap with a crowd is the intersection divided by the area of the detection.
    """
    sure = found[: count_confident(found)]
    same = sure.pred_classes[:, None] == truth.gt_classes
    # detectron2's IoA divides by the area of the second box.
    inside = pairwise_ioa(truth.gt_boxes, sure.pred_boxes).T.where(same & truth.gt_crowd, 0.0)
    overlaps = pairwise_iou(sure.pred_boxes, truth.gt_boxes).where(~truth.gt_crowd, 0.0)
    free = overlaps.where(same, 0.0)
    verdicts: list[str | None] = []
    for index in range(len(sure)):
        best = int(free[index].argmax()) if len(truth.gt_classes) else None
        if best is not None and free[index, best] >= SAME_OBJECT:
            free[:, best] = 0.0  # taken
            verdicts.append(RIGHT)
        elif (inside[index] >= SAME_OBJECT).any():
            verdicts.append(None)
        elif (overlaps[index][same[index]] >= SAME_OBJECT).any():
            verdicts.append("double")
        elif (overlaps[index] >= SAME_OBJECT).any():
            verdicts.append("class")
        else:
            verdicts.append("box" if (overlaps[index] >= NEAR).any() else "nothing")
    return verdicts
