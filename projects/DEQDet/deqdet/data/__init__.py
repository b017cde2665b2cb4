"""Data sets: checks, registration, generated shapes, augmentation, data loaders and COCO evaluation."""

from .annotations import BOX_FORMATS
from .augmentation import build_augmentation
from .checking import CheckedSet, CheckOptions, check_coco_file
from .evaluation import EVALUATORS, OriginalIdsEvaluator, build_coco_evaluator, import_faster_coco_eval
from .image_headers import PILLOW_LIMIT
from .images import read_image
from .mapper import ImageMapper, build_mapper, build_test_loader, build_validation_loader
from .randomness import mix_seed, random_state_kept, seed_all, seeded
from .registration import (
    check_datasets,
    find_class_names,
    find_entries,
    number_classes,
    prepare_datasets,
    register_shapes,
)
from .report import Report, format_report
from .results import find_results, read_results, read_truth, read_truths
from .shapes import ShapesConfig, generate_shapes
from .train_loader import TrainLoader, build_train_loader

__all__ = [
    "BOX_FORMATS",
    "CheckOptions",
    "CheckedSet",
    "EVALUATORS",
    "ImageMapper",
    "OriginalIdsEvaluator",
    "PILLOW_LIMIT",
    "Report",
    "ShapesConfig",
    "TrainLoader",
    "build_augmentation",
    "build_coco_evaluator",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "build_validation_loader",
    "check_coco_file",
    "check_datasets",
    "find_class_names",
    "find_entries",
    "find_results",
    "format_report",
    "generate_shapes",
    "import_faster_coco_eval",
    "mix_seed",
    "number_classes",
    "prepare_datasets",
    "random_state_kept",
    "read_image",
    "read_results",
    "read_truth",
    "read_truths",
    "register_shapes",
    "seed_all",
    "seeded",
]

register_shapes("shapes_train", ShapesConfig(num_images=6000, seed=1))
register_shapes("shapes_val", ShapesConfig(num_images=400, seed=2))
