"""Whether a detection is right, and what is wrong with it otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa, pairwise_iou

from .duplicates import SAME_OBJECT, count_confident

RIGHT = "right"
VERDICTS = (RIGHT, "double", "class", "box", "nothing")  # see `judge`
NEAR = 0.1  # the lowest IoU with an object at which a detection is a bad box, not a detection of nothing


@dataclass(frozen=True)
class Objects:
    """The annotated objects of an image."""

    boxes: Tensor  # (M, 4)  xyxy, pixels
    classes: Tensor  # (M,)
    crowd: Tensor  # (M,)  bool


def read_objects(dataset: str) -> dict[int, Objects]:
    """The objects of each image of a registered data set, by the image's id."""
    return {record["image_id"]: _objects(record.get("annotations", ())) for record in DatasetCatalog.get(dataset)}


def _objects(annotations: Sequence[dict]) -> Objects:
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return Objects(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor([x["category_id"] for x in annotations], dtype=torch.int64),
        crowd=torch.tensor([bool(x.get("iscrowd", 0)) for x in annotations], dtype=torch.bool),
    )


def judge(found: Instances, objects: Objects) -> list[str | None]:
    """Say of each confident detection whether it is right, and what is wrong with it otherwise.

    Best first, each takes the object of its class that it overlaps most among those not yet taken, if their IoU is
    SAME_OBJECT or more, and is "right". A wrong one is a "double" if its IoU with an object of its class that is taken
    is so large, has the wrong "class" if that holds for an object of another class, has a bad "box" if its IoU with any
    object is NEAR or more, and is a detection of "nothing" otherwise.

    Returns:
        One verdict for each; None for a detection that takes no object and lies in a crowd of its class, by COCO's rule
        that the intersection is then divided by the area of the detection.
    """
    sure = found[: count_confident(found)]
    same = sure.pred_classes[:, None] == objects.classes
    # detectron2's IoA divides by the area of the second box.
    inside = pairwise_ioa(Boxes(objects.boxes), sure.pred_boxes).T.where(same & objects.crowd, 0.0)
    overlaps = pairwise_iou(sure.pred_boxes, Boxes(objects.boxes)).where(~objects.crowd, 0.0)
    free = overlaps.where(same, 0.0)
    verdicts: list[str | None] = []
    for index in range(len(sure)):
        best = int(free[index].argmax()) if len(objects.classes) else None
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
