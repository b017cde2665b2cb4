"""Data sets: registration, the generated shapes, and the augmentation policies for detectron2's DatasetMapper."""

from .augmentation import build_augmentation
from .images import read_image
from .mapper import ImageMapper, build_mapper, build_test_loader
from .randomness import mix_seed, random_state_kept, seed_all, seeded
from .registration import check_datasets, find_class_names, prepare_datasets, register_datasets, register_shapes
from .shapes import ShapesConfig, generate_shapes
from .train_loader import TrainLoader, build_train_loader

__all__ = [
    "ImageMapper",
    "ShapesConfig",
    "TrainLoader",
    "build_augmentation",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "find_class_names",
    "generate_shapes",
    "mix_seed",
    "prepare_datasets",
    "random_state_kept",
    "read_image",
    "register_datasets",
    "register_shapes",
    "seed_all",
    "seeded",
]

register_shapes("shapes_train", ShapesConfig(num_images=6000, seed=1))
register_shapes("shapes_val", ShapesConfig(num_images=400, seed=2))
