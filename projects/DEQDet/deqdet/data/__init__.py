"""Data sets: registration, the generated shapes, and the augmentation policies for detectron2's DatasetMapper."""

from .augmentation import build_augmentation, build_mapper
from .registration import check_datasets, prepare_datasets, register_datasets, register_shapes
from .shapes import ShapesConfig, generate_shapes

__all__ = [
    "ShapesConfig",
    "build_augmentation",
    "build_mapper",
    "check_datasets",
    "generate_shapes",
    "prepare_datasets",
    "register_datasets",
    "register_shapes",
]

register_shapes("shapes_train", ShapesConfig(num_images=6000, seed=1))
register_shapes("shapes_val", ShapesConfig(num_images=400, seed=2))
