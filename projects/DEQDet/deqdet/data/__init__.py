"""Data sets: registration, the generated shapes, and the augmentation policies for detectron2's DatasetMapper."""

from .augmentation import build_augmentation
from .images import read_image
from .mapper import ImageMapper, build_mapper, build_test_loader
from .registration import check_datasets, find_class_names, prepare_datasets, register_datasets, register_shapes
from .shapes import ShapesConfig, generate_shapes

__all__ = [
    "ImageMapper",
    "ShapesConfig",
    "build_augmentation",
    "build_mapper",
    "build_test_loader",
    "check_datasets",
    "find_class_names",
    "generate_shapes",
    "prepare_datasets",
    "read_image",
    "register_datasets",
    "register_shapes",
]

register_shapes("shapes_train", ShapesConfig(num_images=6000, seed=1))
register_shapes("shapes_val", ShapesConfig(num_images=400, seed=2))
