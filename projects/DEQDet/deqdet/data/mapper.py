"""Maps the records of a data set to the inputs of the model, and builds the test loaders."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T

from ..errors import UserError
from .augmentation import build_augmentation
from .images import read_image


class ImageMapper(DatasetMapper):
    """detectron2's DatasetMapper for boxes, but with the image reader of the Predictor and the demo.

    Thus 16-bit, transparent and palette images have the same pixels in training, evaluation and the demo.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """Read and transform the image of a record, and in training its boxes.

        Args:
            dataset_dict: a record in detectron2's format; it is not modified.

        Returns:
            A copy of the record with "image" (3, H, W) uint8 in the channel order of INPUT.FORMAT, and in training
            "instances".

        Raises:
            UserError: the image cannot be read.
            SizeMismatchError: the image does not have the size that the record states.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"])
        if self.image_format == "BGR":
            image = image[:, :, ::-1]
        detection_utils.check_image_size(record, image)
        inputs = T.AugInput(np.ascontiguousarray(image))
        transforms = self.augmentations(inputs)
        record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._transform_annotations(record, transforms, inputs.image.shape[:2])
        return record


def build_mapper(cfg: CfgNode, is_train: bool) -> ImageMapper:
    """Build the mapper of a config, in training with the augmentations that INPUT.AUGMENTATION names."""
    if not is_train:
        return ImageMapper(cfg, is_train=False)
    return build_box_mapper(cfg, build_augmentation(cfg))


def build_box_mapper(cfg: CfgNode, augmentations: Sequence[T.Augmentation]) -> ImageMapper:
    """Build a mapper that keeps the boxes, as training does, with these augmentations instead of the config's."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.RANDOM_FLIP = "none"  # detectron2 builds its own augmentations first, and does not know "both"
    return ImageMapper(cfg, is_train=True, augmentations=list(augmentations))


def build_test_loader(cfg: CfgNode, dataset: str, limit: int | None = None) -> DataLoader:
    """Build a loader of a registered data set for an evaluation, one image at a time.

    Args:
        limit: load only this many images, the first ones; None for all.
    """
    records = get_detection_dataset_dicts(dataset, filter_empty=False)[:limit]
    mapper = build_mapper(cfg, is_train=False)
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)


def build_validation_loader(cfg: CfgNode, dataset: str) -> DataLoader:
    """Build a loader as `build_test_loader` does, but with the boxes as "instances", for the training losses.

    Raises:
        UserError: the data set has no annotations.
    """
    records = get_detection_dataset_dicts(dataset, filter_empty=False)
    if not all("annotations" in record for record in records):
        raise UserError(f"TEST.VALIDATION_LOSS is True, but {dataset} has no annotations: set it to False")
    resize = detection_utils.build_augmentation(cfg, is_train=False)
    mapper = build_box_mapper(cfg, resize)
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)
