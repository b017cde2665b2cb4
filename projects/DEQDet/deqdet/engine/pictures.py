"""Pictures for TensorBoard: the detections of the model during training (VIS_PERIOD)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.structures import Instances

from ..data import build_mapper, random_state_kept, read_image, read_truth
from ..drawing import draw_detections, enlarge
from .hooks import is_due
from .models import unwrap

COUNT = 4  # images
SCORE = 0.3  # detections with a lower score are not drawn
MOST = 50  # detections drawn per image
LONGEST = 640  # pixels: images with a longer side are shrunk first


def build_pictures(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """Build the hook that VIS_PERIOD asks for; call this on the main process.

    The images are the first ones of the first set in DATASETS.TEST, or in DATASETS.TRAIN if there is no test set.
    """
    name = (cfg.DATASETS.TEST or cfg.DATASETS.TRAIN)[0]
    classes = MetadataCatalog.get(name).thing_classes

    def load() -> list[dict]:
        mapper = build_mapper(cfg, is_train=False)
        records = DatasetCatalog.get(name)[:COUNT]
        return [{**mapper(record), "annotations": record.get("annotations", [])} for record in records]

    return [DetectionPictures(cfg.VIS_PERIOD, model, load, classes)]


class DetectionPictures(HookBase):
    """Puts a picture of each image into the event storage: its boxes on the left, the detections on the right.

    The hook does not affect the training: it changes no random state, statistics or gradients, and runs no collective
    operation. Register it on the main process only, before the writers.
    """

    def __init__(self, period: int, model: nn.Module, load: Callable[[], list[dict]], class_names: Sequence[str]):
        """
        Args:
            period: iterations between pictures; the last iteration always has some.
            model: the model, possibly wrapped in DDP.
            load: returns the images, as a test loader gives them, with "annotations"; called once, when first needed.
            class_names: the labels of the boxes.
        """
        self._period = period
        self._model = unwrap(model)
        self._load = load
        self._class_names = class_names
        self._inputs: list[dict] | None = None

    def after_step(self) -> None:
        if not is_due(self.trainer, [self._period]):
            return
        # detectron2's test-time resize draws a number from NumPy.
        with random_state_kept(next(self._model.parameters()).device):
            if self._inputs is None:
                self._inputs = self._load()
            with inference_context(self._model), torch.no_grad():
                outputs = [self._model([inputs])[0]["instances"].to("cpu") for inputs in self._inputs]
            for inputs, found in zip(self._inputs, outputs, strict=True):
                picture = self._draw(inputs, found[found.scores >= SCORE][:MOST])
                name = Path(inputs["file_name"]).name.encode(errors="backslashreplace").decode()  # may not be UTF-8
                self.trainer.storage.put_image(f"detections/{name}", np.ascontiguousarray(picture.transpose(2, 0, 1)))

    def _draw(self, inputs: dict, found: Instances) -> np.ndarray:
        """Draw an image twice, with its true boxes and with its detections; (H, W, 3) uint8 RGB."""
        image = read_image(inputs["file_name"])
        height, width = image.shape[:2]
        shrink = min(1.0, LONGEST / max(height, width))
        if shrink < 1:
            size = max(1, round(shrink * width)), max(1, round(shrink * height))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return np.concatenate(draw_beside_truth(enlarge(image), inputs, found, self._class_names), axis=1)


def draw_beside_truth(
    image: np.ndarray, record: dict, found: Instances, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image twice, with its true boxes and with its detections.

    Args:
        image: (H, W, 3) uint8 RGB, the record's image, at any size.
        record: in detectron2's format, with "annotations".
        found: detections on the CPU, in pixels of the original image.
        class_names: the labels of the boxes.

    Returns:
        Two pictures (H, W, 3) uint8 RGB.
    """
    truth = read_truth(record)
    true = Instances(truth.image_size, pred_boxes=truth.gt_boxes, pred_classes=truth.gt_classes)
    return draw_detections(image, true, class_names), draw_detections(image, found, class_names)
