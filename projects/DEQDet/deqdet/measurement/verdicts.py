"""Whether a detection is right, and what is wrong with it otherwise."""

from detectron2.structures import Instances, pairwise_ioa, pairwise_iou

from .duplicates import SAME_OBJECT, count_confident

RIGHT = "right"
VERDICTS = (RIGHT, "double", "class", "box", "nothing")  # see `judge`
NEAR = 0.1  # the lowest IoU with an object at which a detection is a bad box, not a detection of nothing


def judge(found: Instances, truth: Instances) -> list[str | None]:
    """Say of each confident detection whether it is right, and what is wrong with it otherwise.

    Best first, each takes the object of its class that it overlaps most among those not yet taken, if their IoU is
    SAME_OBJECT or more, and is "right". A wrong one is a "double" if its IoU with an object of its class that is taken
    is so large, has the wrong "class" if that holds for an object of another class, has a bad "box" if its IoU with any
    object is NEAR or more, and is a detection of "nothing" otherwise.

    Args:
        found: the detections of an image, best first.
        truth: its true boxes, as read_truth returns them.

    Returns:
        One verdict for each; None for a detection that takes no object and lies in a crowd of its class, by COCO's rule
        that the intersection is then divided by the area of the detection.
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
