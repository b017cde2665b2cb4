"""The detections of a Predictor in an image, and their conversion to other formats."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from .data.image_input import ImageLike, to_array
from .errors import UserError
from .extras import how_to_install


@dataclass(frozen=True)
class Detections:
    """The detections of a Predictor in one image."""

    # On the CPU, best first, with pred_boxes (xyxy, pixels of the original image), scores and pred_classes.
    instances: Instances
    class_names: tuple[str, ...]
    steps: int  # applications of f; for a stacked decoder, the layers after the first
    residual: float | None  # ||f(y) - y|| / ||f(y)|| at the last step; None for a detector without an equilibrium
    finite: bool = True  # False: the state became infinite or NaN, and these are the detections of its last finite one

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def labels(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[index] for index in self.instances.pred_classes.tolist()]

    def draw(self, image: ImageLike, *, channels: str = "RGB", enlarge: bool = True) -> np.ndarray:
        """Draw the detections on their image, with names and scores, in one colour per class.

        Args:
            image: the image that was given to the Predictor, or the same in another size.
            channels: the order of an array or tensor, "RGB" or "BGR".
            enlarge: draw small images enlarged, so that the labels can be read.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            UserError: the image cannot be read, or has other proportions than the one in which the objects were found.
        """
        from . import drawing  # It imports matplotlib, and would slow the start of commands that draw nothing.

        picture = to_array(image, channels)
        (height, width), (h, w) = self.instances.image_size, picture.shape[:2]
        if abs(h - height * w / width) > 1 and abs(w - width * h / height) > 1:
            raise UserError(f"these detections are of an image of {width} x {height} pixels, not of {w} x {h}")
        picture = drawing.enlarge(picture) if enlarge else picture
        return drawing.draw_detections(picture, self.instances, self.class_names)

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict]:
        """Convert to COCO's result format: image_id, category_id, bbox (x, y, width, height; pixels), score.

        Args:
            category_ids: the id of each class; by default 1, 2, ... in the order of class_names.

        Raises:
            UserError: the number of ids is not that of the classes.
        """
        ids = range(1, len(self.class_names) + 1) if category_ids is None else category_ids
        if len(ids) != len(self.class_names):
            raise UserError(f"{len(ids)} category_ids for {len(self.class_names)} classes: give one for each")
        records = instances_to_coco_json(self.instances, image_id)
        return [record | {"category_id": ids[record["category_id"]]} for record in records]

    def to_supervision(self):
        """Convert to supervision.Detections, for that library's annotators, trackers and converters.

        Raises:
            UserError: the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(f"to_supervision() needs that package: {how_to_install('supervision')}") from error
        return supervision.Detections(
            xyxy=self.instances.pred_boxes.tensor.numpy().reshape(-1, 4),
            confidence=self.instances.scores.numpy(),
            class_id=self.instances.pred_classes.numpy().astype(int),
            data={"class_name": np.array(self.labels, dtype=str)},
        )
