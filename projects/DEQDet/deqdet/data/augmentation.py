"""The augmentation policies of the paper's training recipes (Table 5), for detectron2's own DatasetMapper."""

from detectron2.config import CfgNode
from detectron2.data import transforms as T


def build_augmentation(cfg: CfgNode) -> list[T.Augmentation]:
    """List the training augmentations: the flips of INPUT.RANDOM_FLIP, then the policy that INPUT.AUGMENTATION names.

    A crop may leave an image without boxes, which training allows. The policies replace INPUT.CROP, which is not read.
    """
    left_right, up_down = T.RandomFlip(), T.RandomFlip(horizontal=False, vertical=True)
    flips = {"none": [], "horizontal": [left_right], "vertical": [up_down], "both": [left_right, up_down]}
    # As in DETR, half of the images are resized and cropped before the final resize.
    crop = [
        T.ResizeShortestEdge(cfg.INPUT.DETR_CROP.RESIZE, sample_style="choice"),
        T.RandomCrop("absolute_range", cfg.INPUT.DETR_CROP.SIZE),
    ]
    policies = {"1x": [], "2x": [T.RandomApply(T.AugmentationList(crop), prob=0.5)]}
    size = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    return [
        *flips[cfg.INPUT.RANDOM_FLIP],
        *policies[cfg.INPUT.AUGMENTATION],
        T.ResizeShortestEdge(*size),
    ]
