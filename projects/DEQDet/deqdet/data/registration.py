"""Registers data sets by name: those of DATASETS.REGISTER and the generated shapes, beside detectron2's own.

A box without area is no error, because real data has such boxes. In training detectron2's mapper drops it; COCO's
evaluation counts it as an object that no detection can match. register_datasets() logs how many there are.
"""

import json
import logging
import math
import os
import re

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils.file_io import PathManager

from .shapes import CLASSES, IMAGES_NAME, JSON_NAME, ShapesConfig, generate_shapes

logger = logging.getLogger(__name__)

_FORM = "[[name, json file, image root], ...]"
_CORRECT_ROOT = "correct the image root, the entry's third string"


def prepare_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Register the sets of DATASETS.REGISTER, and draw the shapes sets that DATASETS.TEST and TRAIN name.

    Every process must call it before it builds loaders and evaluators, because COCOEvaluator reads the annotation file
    when it is constructed. Names such as "shapes_seed3_200" (200 images from seed 3) and "shapes_free_seed3_200" (the
    same with shapes turned by any angle) need no registration.

    Args:
        cfg: the whole config.
        eval_only: leave out the sets of DATASETS.TRAIN.

    Raises:
        ValueError, OSError: see register_datasets().
        FileExistsError: see generate_shapes().
    """
    register_datasets(cfg)
    for name in cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        parts = re.fullmatch(r"shapes_(free_)?seed(\d+)_(\d+)", name)
        if parts and name not in DatasetCatalog:
            turn = {"max_rotation": 180.0} if parts[1] else {}
            register_shapes(name, ShapesConfig(seed=int(parts[2]), num_images=int(parts[3]), **turn))
        config = MetadataCatalog.get(name).get("shapes_config")
        if config is not None:
            generate_shapes(os.path.dirname(MetadataCatalog.get(name).json_file), config)


def register_shapes(name: str, config: ShapesConfig, root: str | os.PathLike | None = None) -> None:
    """Register a shapes set, which is drawn when it is first loaded. Registering the same set again does nothing.

    Args:
        name: the name for DATASETS.TRAIN and TEST.
        config: what to draw.
        root: the directory to draw it into; by default shapes/<name> in $DETECTRON2_DATASETS, or in "datasets" if that
            variable is not set.

    Raises:
        ValueError: the name stands for another data set.
    """
    if root is None:
        root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes", name)
    root = os.path.abspath(os.path.expanduser(root))
    json_file, image_root = os.path.join(root, JSON_NAME), os.path.join(root, IMAGES_NAME)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if (known.get("json_file"), known.get("shapes_config")) != (json_file, config):
            raise ValueError(f"the name {name!r} is taken by another data set: choose another name")
        return
    DatasetCatalog.register(name, lambda: load_coco_json(generate_shapes(root, config), image_root, name))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(CLASSES),
        shapes_config=config,
    )


def register_datasets(cfg: CfgNode) -> None:
    """Register every [name, json file, image root] of DATASETS.REGISTER as a COCO-format data set.

    Relative paths start at the working directory. Registering the same again does nothing.

    Raises:
        ValueError: an entry, its file or a record in the file is invalid, or another data set has the name.
        OSError: a file or directory is missing or cannot be read.
    """
    for index, entry in enumerate(cfg.DATASETS.REGISTER):
        where = f"DATASETS.REGISTER[{index}]"
        triple = isinstance(entry, list | tuple) and len(entry) == 3
        if not triple or not all(isinstance(part, str) and part for part in entry):
            raise ValueError(f"{where} is {entry!r}: it must be three strings, as in {_FORM}")
        name, json_file, image_root = entry
        where = f"{where} ({name!r})"
        if name in DatasetCatalog:
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) != (json_file, image_root):
                raise ValueError(
                    f"{where}: this name is taken by another data set, of {known.get('json_file')} and "
                    f"{known.get('image_root')}: choose another name"
                )
            continue
        thing_classes = _check_coco_file(where, json_file, image_root, evaluated=name in cfg.DATASETS.TEST)
        register_coco_instances(name, {"thing_classes": thing_classes}, json_file, image_root)


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check that the sets of DATASETS.TEST and TRAIN exist and have as many classes as MODEL.DEQDET.NUM_CLASSES says.

    Args:
        cfg: the whole config.
        eval_only: leave out the sets of DATASETS.TRAIN.

    Raises:
        ValueError: a set has another number of classes, or there is no set to train on (with eval_only: to evaluate
        on). FileNotFoundError: an annotation file is missing. KeyError: a data set is not registered.
    """
    needed = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(f"DATASETS.{needed} is empty: name a built-in data set or one of DATASETS.REGISTER")
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            json_file = MetadataCatalog.get(name).get("json_file")
            if json_file and not PathManager.isfile(json_file):
                raise FileNotFoundError(
                    f"{name!r} of DATASETS.{key} is not there: its {json_file} does not exist. Set the environment "
                    "variable DETECTRON2_DATASETS to the folder that holds the built-in data sets"
                )
            if MetadataCatalog.get(name).get("thing_classes") is None:
                DatasetCatalog.get(name)  # some sets know their classes only once loaded
            classes = MetadataCatalog.get(name).get("thing_classes", ())
            expected = cfg.MODEL.DEQDET.NUM_CLASSES
            if len(classes) != expected:
                shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise ValueError(
                    f"{name!r} of DATASETS.{key} has {len(classes)} categories ({shown}), but the model has "
                    f"{expected}: set MODEL.DEQDET.NUM_CLASSES to {len(classes)}, or change DATASETS.{key}"
                )


def find_class_names(cfg: CfgNode) -> list[str]:
    """The names of the model's K classes, from the first set of DATASETS.TEST; its images need not be there.

    Where that set is unknown, has no names or another number of them, the names are "class 0", "class 1", ..., and a
    warning says why.
    """
    count = cfg.MODEL.DEQDET.NUM_CLASSES
    numbered = [f"class {i}" for i in range(count)]
    if not cfg.DATASETS.TEST:
        return numbered
    name, reason = cfg.DATASETS.TEST[0], "it has none"
    if name not in DatasetCatalog:
        own = cfg.clone()
        own.defrost()
        own.DATASETS.TEST = (name,)
        own.DATASETS.REGISTER = [entry for entry in cfg.DATASETS.REGISTER if list(entry[:1]) == [name]]
        try:
            prepare_datasets(own, eval_only=True)
        except (KeyError, ValueError, OSError) as error:
            reason = str(error)
    names = MetadataCatalog.get(name).get("thing_classes", [])
    if len(names) == count:
        return list(names)
    if names:
        reason = f"it has {len(names)}, but the model has {count}"
    logger.warning("No class names from %s of DATASETS.TEST: %s. The classes are numbered.", name, reason)
    return numbered


def _check_coco_file(where: str, json_file: str, image_root: str, *, evaluated: bool) -> list[str]:
    """Check a COCO-format file and that its first image is in its place, and return the class names by id."""
    where = f"{where}: {json_file}"
    whole = _read_json(where, json_file)
    if not PathManager.isdir(image_root):
        raise NotADirectoryError(f"{where}: its image root {image_root} is not a directory: {_CORRECT_ROOT}")
    _check_records(where, "category", whole["categories"], ("id", "name"))
    _check_records(where, "image", whole["images"], ("id", "file_name", "height", "width"))
    # COCOeval reads area and iscrowd of every annotation; training needs neither.
    keys = ("id", "image_id", "category_id", "bbox") + (("area", "iscrowd") if evaluated else ())
    _check_records(where, "annotation", whole["annotations"], keys)
    for image in whole["images"][:1]:
        path = os.path.join(image_root, image["file_name"])
        if not PathManager.isfile(path):
            raise FileNotFoundError(f"{where}: its first image {path} does not exist: {_CORRECT_ROOT}")
    _check_annotations(where, whole)
    return [category["name"] for category in sorted(whole["categories"], key=lambda c: c["id"])]


def _read_json(where: str, json_file: str) -> dict:
    try:
        with PathManager.open(json_file) as file:
            whole = json.load(file)
    except OSError as error:
        raise type(error)(
            f"{where} cannot be read ({error.strerror}): give the path of a COCO-format file, absolute or "
            f"relative to {os.getcwd()}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}): a COCO-format file is needed") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            raise ValueError(f'{where} has no list "{key}", which a COCO-format file needs')
    return whole


def _check_records(where: str, kind: str, records: list, keys: tuple[str, ...]) -> None:
    """Raise ValueError unless every record is a dict that has the keys, and no two have the same id."""
    ids = set()
    for index, record in enumerate(records):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            label = record.get("id", f"number {index}") if isinstance(record, dict) else f"number {index}"
            raise ValueError(f"{where}: {kind} {label} has no {', '.join(missing)}: add it to the file")
        if record["id"] in ids:
            raise ValueError(f"{where}: {kind} id {record['id']} occurs twice: give each {kind} its own")
        ids.add(record["id"])


def _check_annotations(where: str, whole: dict) -> None:
    """Check the box, the image and the category of every annotation, and warn of boxes without area."""
    images, categories = ({record["id"] for record in whole[key]} for key in ("images", "categories"))
    flat = []
    for annotation in whole["annotations"]:
        at, box = f"{where}: annotation {annotation['id']}", annotation["bbox"]
        if annotation["image_id"] not in images:
            raise ValueError(f'{at} has image_id {annotation["image_id"]}, which "images" lacks')
        if annotation["category_id"] not in categories:
            raise ValueError(f'{at} has category_id {annotation["category_id"]}, which "categories" lacks')
        if not isinstance(box, list) or len(box) != 4 or not all(_is_finite(value) for value in box):
            raise ValueError(f"{at} has bbox {box!r}: it must be four finite numbers (x, y, width, height)")
        if not (box[2] > 0 and box[3] > 0):
            flat.append(annotation["id"])
    if flat:
        logger.warning(
            "%s: %d of %d boxes have no area (annotation %s): training skips them; evaluation counts each as "
            "an object that was not found",
            where,
            len(flat),
            len(whole["annotations"]),
            ", ".join(map(str, flat[:5])) + (", ..." if len(flat) > 5 else ""),
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
