"""Reads detections in COCO's result format, and true boxes, for the images of a registered data set."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from ..errors import UserError, describe_os_error, one_line
from .coco_file import find_original_ids
from .evaluation import RESULTS_NAME


def read_results(path: str | Path, dataset: str) -> list[Instances]:
    """Read a file of detections such as coco_instances_results.json.

    Args:
        path: a list of {"image_id", "category_id", "bbox" (x, y, width, height; pixels), "score"}, with the ids in the
            user's own annotation file.
        dataset: the name of a registered and checked data set.

    Returns:
        For each record of the set, in order: pred_boxes (xyxy, pixels of the original image), scores and pred_classes
        (in the model's order), sorted by descending score.

    Raises:
        UserError: the file is missing or has another format, or it names an image or a category that the set lacks.
    """
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    if not metadata.get("json_file"):
        raise UserError(f"{dataset} is not in COCO format, so no file of detections can be compared with it")
    images, categories = find_original_ids(json.loads(Path(metadata.json_file).read_bytes()))
    places = {images.get(record["image_id"], record["image_id"]): place for place, record in enumerate(records)}
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    labels = {categories.get(number, number): label for number, label in contiguous.items()}
    rows: list[list[list[float]]] = [[] for _ in records]
    for index, result in enumerate(_read_list(path)):
        place, label, numbers = _read_one(f"{path}: detection {index}", result, places, labels)
        rows[place].append([*numbers, label])
    return [_to_instances(record, found) for record, found in zip(records, rows, strict=True)]


def find_results(output: str | Path, dataset: str) -> Path | None:
    """Return the file of detections that an evaluation wrote into OUTPUT_DIR/inference, or None."""
    folder = Path(output, "inference")
    places = [folder / dataset.replace("/", "_") / RESULTS_NAME, folder / RESULTS_NAME]
    return next((path for path in places if path.is_file()), None)


def read_truth(record: dict) -> Instances:
    """Return a record's true boxes: gt_boxes (xyxy, pixels), gt_classes (in the model's order) and gt_crowd (bool)."""
    annotations = record.get("annotations", ())
    boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in annotations]
    truth = Instances((record["height"], record["width"]))
    truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    truth.gt_classes = torch.tensor([item["category_id"] for item in annotations], dtype=torch.int64)
    truth.gt_crowd = torch.tensor([bool(item.get("iscrowd", 0)) for item in annotations], dtype=torch.bool)
    return truth


def read_truths(dataset: str) -> dict[int, Instances]:
    """Return the true boxes of each image of a registered data set (see `read_truth`), by the image's id."""
    return {record["image_id"]: read_truth(record) for record in DatasetCatalog.get(dataset)}


def _read_list(path: str | Path) -> list:
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({describe_os_error(error)}): give a file of detections") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({one_line(error)}): give a file of detections") from error
    if not isinstance(content, list):
        raise UserError(f"{path} is not a list of detections in COCO result format")
    return content


def _read_one(where: str, result: object, places: dict, labels: dict) -> tuple[int, int, list[float]]:
    """Return the index of the image, the label, and [x, y, width, height, score]."""
    keys = ("image_id", "category_id", "bbox", "score")
    if not isinstance(result, dict) or any(key not in result for key in keys):
        raise UserError(f"{where} lacks one of {', '.join(keys)}")
    for key, table in (("image_id", places), ("category_id", labels)):
        if isinstance(result[key], list | dict) or result[key] not in table:
            raise UserError(
                f"{where} has {key} {result[key]!r}, which the data set lacks: give the data set of these detections"
            )
    try:
        numbers = [float(value) for value in (*result["bbox"], result["score"])]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 5 or not np.isfinite(numbers).all():
        raise UserError(f"{where} has bbox {result['bbox']!r} and score {result['score']!r}: five numbers are needed")
    return places[result["image_id"]], labels[result["category_id"]], numbers


def _to_instances(record: dict, rows: Sequence[Sequence[float]]) -> Instances:
    table = torch.tensor(sorted(rows, key=lambda row: -row[4]), dtype=torch.float64).reshape(-1, 6)
    found = Instances((record["height"], record["width"]))
    found.pred_boxes = Boxes(torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], dim=1).float())
    found.scores = table[:, 4].float()
    found.pred_classes = table[:, 5].long()
    return found
