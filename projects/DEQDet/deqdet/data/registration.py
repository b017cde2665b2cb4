"""Registers data sets by name: those in DATASETS.REGISTER and the generated shapes, in addition to detectron2's own.

Every set in COCO's format that a run uses, also one of detectron2's own, is checked (see checking.py) before it is
registered.
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from .checking import CheckedSet, CheckOptions, check_coco_file, compare_classes
from .coco_file import locate, parse, read_bytes, read_categories
from .findings import BROKEN, Findings
from .shapes import CLASSES, IMAGES_NAME, JSON_NAME, ShapesConfig, generate_shapes
from .shared_images import find_shared_images

logger = logging.getLogger(__name__)

_FORM = "[[name, json file, image root], ...]"


@dataclass(frozen=True)
class ModelClasses:
    """The classes of a model in the order of its outputs; those of data sets are matched to them by name."""

    names: tuple[str, ...] = ()  # empty: not known yet
    source: str = ""  # where they come from, for messages


def prepare_datasets(
    cfg: CfgNode, *, eval_only: bool = False, class_names: Sequence[str] = ()
) -> dict[str, CheckedSet]:
    """Check and register the sets that DATASETS.TRAIN and TEST name, and draw the generated ones among them.

    Every process must call it before it builds loaders and evaluators, because COCOEvaluator reads the annotation file
    in its constructor. A set that this process has already checked is not checked again. Names such as
    "shapes_seed3_200" (200 images from seed 3) and "shapes_free_seed3_200" (the same with shapes rotated by any angle)
    need no registration. For unused sets in DATASETS.REGISTER, only the existence of the annotation file is checked.

    The classes of all sets are matched by name to the model's. These are `class_names`, or else those of the first set
    in DATASETS.TRAIN, ordered by id. In an evaluation, that set is used only if it exists and has
    MODEL.DEQDET.NUM_CLASSES classes; otherwise the first test set decides.

    Args:
        cfg: the whole config.
        eval_only: leave out the sets in DATASETS.TRAIN.
        class_names: the model's class names in the order of its outputs, if they are known.

    Returns:
        The sets that were checked by this call, by name.

    Raises:
        UserError: a set cannot be used, has other classes, or is named twice in DATASETS.TEST.
        FileExistsError: see generate_shapes().
    """
    for name in cfg.DATASETS.TEST:
        if list(cfg.DATASETS.TEST).count(name) > 1:
            raise UserError(f"DATASETS.TEST names {name!r} twice: name each test set once")
    used = cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    for name, (json_file, _, where) in find_entries(cfg).items():
        if name in used or name not in cfg.DATASETS.TRAIN:  # an evaluation does not need the training sets
            locate(where, json_file)
    _draw_shapes(used)
    classes = ModelClasses(tuple(class_names), "the model file") if class_names else ModelClasses()
    if eval_only and not class_names and cfg.DATASETS.TRAIN:
        classes = find_training_classes(cfg)
    return register_sets(cfg, used, classes, eval_only=eval_only)


def register_sets(
    cfg: CfgNode, names: Sequence[str], classes: ModelClasses, *, eval_only: bool = False
) -> dict[str, CheckedSet]:
    """Check sets and register the checked versions, all with the classes and order of `classes` or of the first set.

    Raises:
        UserError: as `prepare_datasets`.
    """
    entries, done = find_entries(cfg), {}
    for name in dict.fromkeys(names):
        key = "TRAIN" if name in cfg.DATASETS.TRAIN and not eval_only else "TEST"
        _forget_conversion(name)
        json_file, image_root, where = entries.get(name) or _find_registered(name, key)
        if not json_file:  # a set that a function of the user loads
            _check_without_file(name, key, classes)
        else:
            drawn = MetadataCatalog.get(name).get("shapes_config") is not None
            options = build_check_options(cfg, name, eval_only=eval_only, ours=drawn, registered=name in entries)
            state = (json_file, image_root, options, classes, _stamp(json_file))
            if MetadataCatalog.get(name).get("checked_as") != state:
                done[name] = checked = check_coco_file(
                    where, json_file, image_root, options, class_names=classes.names, model=classes.source
                )
                if key == "TEST":
                    trained = {other: each for other, each in done.items() if other in cfg.DATASETS.TRAIN}
                    shared = find_shared_images(checked, trained)
                    done[name] = checked = replace(checked, findings=(*checked.findings, *shared))
                _log(where, checked)
                _install(name, checked, (json_file, image_root), state)
        if not classes.names:
            found = tuple(MetadataCatalog.get(name).get("thing_classes", ()))
            classes = ModelClasses(found, f"{name!r} of DATASETS.{key}")
    return done


def register_shapes(name: str, config: ShapesConfig, root: str | os.PathLike | None = None) -> None:
    """Register a shapes set, which is drawn when it is first loaded. Registering the same set again does nothing.

    Args:
        name: the name for DATASETS.TRAIN and TEST.
        config: the parameters of the set.
        root: the directory to draw the set into; by default shapes/<name> in $DETECTRON2_DATASETS, or in "datasets" if
            that variable is not set.

    Raises:
        ValueError: another data set has this name.
    """
    if root is None:
        root = os.path.join(os.getenv("DETECTRON2_DATASETS", "datasets"), "shapes", name)
    root = os.path.abspath(os.path.expanduser(root))
    json_file, image_root = os.path.join(root, JSON_NAME), os.path.join(root, IMAGES_NAME)
    if name in DatasetCatalog:
        if (_find_source(name)[0], MetadataCatalog.get(name).get("shapes_config")) != (json_file, config):
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


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> None:
    """Check that the sets in DATASETS.TEST and TRAIN exist and have MODEL.DEQDET.NUM_CLASSES classes.

    Args:
        cfg: the whole config.
        eval_only: leave out the sets in DATASETS.TRAIN.

    Raises:
        UserError: a set has another number of classes, is not registered or lacks its annotation file, or there is no
            set to train on (with eval_only: to evaluate on).
    """
    needed = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise UserError(f"DATASETS.{needed} is empty: name a built-in data set or one of DATASETS.REGISTER")
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            _find_registered(name, key)
            if MetadataCatalog.get(name).get("thing_classes") is None:
                DatasetCatalog.get(name)  # some loaders set the classes only when called
            classes = MetadataCatalog.get(name).get("thing_classes", ())
            expected = cfg.MODEL.DEQDET.NUM_CLASSES
            if len(classes) != expected:
                shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
                raise UserError(
                    f"{name!r} of DATASETS.{key} has {len(classes)} categories ({shown}), but the model has "
                    f"{expected}: set MODEL.DEQDET.NUM_CLASSES to {len(classes)}, or change DATASETS.{key}"
                )


def find_class_names(cfg: CfgNode) -> list[str]:
    """Return the names of the model's K classes in the order of its outputs, without reading any images.

    They are those of the first set in DATASETS.TRAIN, or else in DATASETS.TEST. If neither is known and has K names,
    they are "class 0", "class 1", ..., and a warning says why.
    """
    count = cfg.MODEL.DEQDET.NUM_CLASSES
    reasons = []
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key][:1]:
            names, reason = find_names_of_set(cfg, name)
            if len(names) == count:
                return list(names)
            if names:
                reason = f"it has {len(names)}, but the model has {count}"
            reasons.append(f"No class names from {name} of DATASETS.{key}: {reason}")
    if reasons:
        logger.warning("%s. The classes are numbered.", reasons[-1])
    return number_classes(count)


def number_classes(count: int) -> list[str]:
    """Return the names of classes that have none: "class 0", "class 1", ..."""
    return [f"class {i}" for i in range(count)]


def find_training_classes(cfg: CfgNode) -> ModelClasses:
    """Return the classes of the first set in DATASETS.TRAIN if it has as many as the model, without reading images."""
    name = cfg.DATASETS.TRAIN[0]
    names, reason = find_names_of_set(cfg, name)
    if len(names) == cfg.MODEL.DEQDET.NUM_CLASSES:
        return ModelClasses(tuple(names), f"{name!r} of DATASETS.TRAIN")
    if not names:
        logger.info("The classes of %s of DATASETS.TRAIN are unknown (%s): the test set's order holds", name, reason)
    return ModelClasses()


def find_names_of_set(cfg: CfgNode, name: str) -> tuple[list[str], str]:
    """Return the class names of a set without reading its images, and the reason if there are none."""
    try:
        if name not in DatasetCatalog:
            _register_seeded_shapes(name)
        entry = None if name in DatasetCatalog else find_entries(cfg).get(name)
        if entry:
            whole = parse(entry[2], read_bytes(entry[2], entry[0]), Findings(), annotated=False)
            return [category.name for category in read_categories(entry[2], whole, Findings())], ""
    except (UserError, ValueError) as error:
        return [], str(error)
    return list(MetadataCatalog.get(name).get("thing_classes", [])), "it has none"


def find_entries(cfg: CfgNode) -> dict[str, tuple[str, str, str]]:
    """Return the entries of DATASETS.REGISTER by name: json file, image root, and what to call the file in messages.

    Raises:
        UserError: an entry is not a triple of strings, or another data set has its name.
    """
    entries: dict[str, tuple[str, str, str]] = {}
    for index, entry in enumerate(cfg.DATASETS.REGISTER):
        where = f"DATASETS.REGISTER[{index}]"
        triple = isinstance(entry, list | tuple) and len(entry) == 3
        if not triple or not all(isinstance(part, str) and part for part in entry):
            raise UserError(f"{where} is {entry!r}: it must be three strings, as in {_FORM}")
        name, json_file, image_root = entry
        known = entries[name][:2] if name in entries else _find_source(name) if name in DatasetCatalog else None
        if known not in (None, (json_file, image_root)):
            raise UserError(
                f"{where} ({name!r}): this name is taken by another data set, of {known[0]} and {known[1]}: choose "
                "another name"
            )
        entries[name] = json_file, image_root, f"{where} ({name!r}): {json_file}"
    return entries


def build_check_options(
    cfg: CfgNode, name: str, *, eval_only: bool, ours: bool = False, registered: bool = True
) -> CheckOptions:
    """Build the options for checking a set from a config.

    Args:
        cfg: the whole config.
        name: the name of the set.
        eval_only: the run is an evaluation.
        ours: this package has drawn the images, so they are not checked.
        registered: the set is in DATASETS.REGISTER, so DATASETS.BOX_FORMAT applies.
    """
    in_training = name in cfg.DATASETS.TRAIN and not eval_only
    return CheckOptions(
        skip_broken=cfg.DATASETS.SKIP_BROKEN,
        allow_outside_root=cfg.DATASETS.ALLOW_OUTSIDE_ROOT,
        max_image_pixels=cfg.INPUT.MAX_IMAGE_PIXELS,
        max_side=min(cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST),
        box_format=cfg.DATASETS.BOX_FORMAT if registered else "xywh" if ours else "check",
        num_queries=cfg.MODEL.DEQDET.NUM_QUERIES,
        check_images=not ours,
        trained=in_training,
        unlabelled_allowed=name in cfg.DATASETS.TEST and not in_training,
    )


def load_records(json_file: str, image_root: str) -> list[dict]:
    """Load the records of a checked set in detectron2's format, sorted by image id, with boxes only."""
    with PathManager.open(json_file) as file:
        whole = json.load(file)
    labels = {number: i for i, number in enumerate(sorted(category["id"] for category in whole["categories"]))}
    records = {}
    for image in sorted(whole["images"], key=lambda image: image["id"]):
        records[image["id"]] = record = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
        }
        if "annotations" in whole:
            record["annotations"] = []
    for annotation in whole.get("annotations", ()):
        records[annotation["image_id"]]["annotations"].append(
            {
                "bbox": annotation["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": labels[annotation["category_id"]],
                "iscrowd": annotation["iscrowd"],
            }
        )
    return list(records.values())


def _draw_shapes(names: Sequence[str]) -> None:
    for name in names:
        if name not in DatasetCatalog:
            _register_seeded_shapes(name)
        config = MetadataCatalog.get(name).get("shapes_config")
        if config is not None:
            generate_shapes(os.path.dirname(_find_source(name)[0]), config)


def _register_seeded_shapes(name: str) -> None:
    parts = re.fullmatch(r"shapes_(free_)?seed(\d+)_(\d+)", name)
    if parts:
        if int(parts[3]) < 1:
            raise UserError(f"the generated set {name} has no images: end its name in their number, at least 1")
        turn = {"max_rotation": 180.0} if parts[1] else {}
        register_shapes(name, ShapesConfig(seed=int(parts[2]), num_images=int(parts[3]), **turn))


def _find_source(name: str) -> tuple[str | None, str | None]:
    """Return the annotation file and image root of a registered set as the user gave them, not a repaired copy."""
    known = MetadataCatalog.get(name)
    return known.get("source") or (known.get("json_file"), known.get("image_root"))


def _find_registered(name: str, key: str) -> tuple[str | None, str | None, str]:
    """Return annotation file, image root and what to call the set; the file is None if it is not in COCO's format.

    Raises:
        UserError: the set is not registered, or its file does not exist.
    """
    if name not in DatasetCatalog:
        close = difflib.get_close_matches(name, list(DatasetCatalog), n=2, cutoff=0.7)
        hint = f"did you mean {' or '.join(close)}?" if close else "add it to DATASETS.REGISTER, as in " + _FORM
        if re.fullmatch(r".+-(train|val|test)", name):
            hint = (
                "if deqdet-train --data has made it, give --config-file OUTPUT_DIR/data/config.yaml of that training, "
                "which registers it (with MODEL.WEIGHTS FILE in place of --model FILE); else " + hint
            )
        raise UserError(f"{name!r} of DATASETS.{key} is not registered: {hint}")
    json_file, image_root = _find_source(name)
    if json_file and not PathManager.isfile(json_file):
        raise UserError(
            f"{name!r} of DATASETS.{key} is not there: its {json_file} does not exist. Set the environment "
            "variable DETECTRON2_DATASETS to the folder that holds the built-in data sets"
        )
    coco = MetadataCatalog.get(name).get("evaluator_type") == "coco" and image_root
    return json_file if coco else None, image_root, f"{name!r}: {json_file}"


def _forget_conversion(name: str) -> None:
    """Forget the COCO file to which an evaluation has converted a set that a user's function loads.

    detectron2 keeps the file's path in the catalog until the process ends. By the next training the file may be gone,
    and the function may return other records.
    """
    known = MetadataCatalog.get(name)
    if (known.get("json_file") or "").endswith(f"{name}_coco_format.json"):
        del known.json_file


def _check_without_file(name: str, key: str, classes: ModelClasses) -> None:
    """Check the classes of a set without a COCO file, whose order cannot be changed.

    Raises:
        UserError: they are not the model's, or are in another order.
    """
    if MetadataCatalog.get(name).get("thing_classes") is None:
        DatasetCatalog.get(name)  # some loaders set the classes only when called
    own, where = list(MetadataCatalog.get(name).get("thing_classes", ())), f"{name!r} of DATASETS.{key}"
    if classes.names and own and compare_classes(where, own, classes.names, classes.source) != sorted(range(len(own))):
        raise UserError(
            f"{where} has the classes of {classes.source} in another order, and no COCO file that could be mapped: "
            f"let its function and its thing_classes use the order {', '.join(classes.names)}"
        )


def _install(name: str, checked: CheckedSet, source: tuple[str, str], state: tuple) -> None:
    """Put a checked set into detectron2's catalogs, replacing any previous entry of this name."""
    fields = MetadataCatalog.get(name).as_dict()
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    for key in ("name", "thing_dataset_id_to_contiguous_id"):  # the second was derived from the original ids
        fields.pop(key, None)
    fields |= {
        "json_file": checked.json_file,
        "image_root": source[1],
        "evaluator_type": "coco",
        "thing_classes": list(checked.class_names),
        "thing_dataset_id_to_contiguous_id": {number: i for i, number in enumerate(checked.category_ids)},
        "source": source,
        "checked_as": state,
    }
    DatasetCatalog.register(name, lambda: load_records(checked.json_file, source[1]))
    MetadataCatalog.get(name).set(**fields)


def _log(where: str, checked: CheckedSet) -> None:
    for finding in checked.findings:
        if finding.level == BROKEN:
            logger.warning("%s: left out, as DATASETS.SKIP_BROKEN says: %s", where, finding.facts())
        else:
            logger.warning("%s: %s", where, finding.line())
    report = checked.report
    if report.num_images_left_out:
        total = report.num_images + report.num_images_left_out
        logger.warning("%s: %d of %d images are used", where, report.num_images, total)


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(PathManager.get_local_path(path))
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
