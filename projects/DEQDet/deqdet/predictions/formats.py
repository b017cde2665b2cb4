"""Write the output files of a finished run: COCO results, YOLO labels, CSV."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..atomic import write_text
from ..demo.files import plan_texts
from .journal import Done
from .leftovers import delete_images_file, delete_labels, refuse_foreign_labels

COCO_NAME, IMAGES_NAME, CSV_NAME = "predictions.json", "images.json", "predictions.csv"
LABELS_NAME, CLASSES_NAME = "labels", "classes.txt"
# What each format writes. The existence of the first shows that a run has finished.
WRITTEN = {"coco": (COCO_NAME, IMAGES_NAME), "yolo": (LABELS_NAME, CLASSES_NAME), "csv": (CSV_NAME,)}
_COLUMNS = ("image", "frame", "class_id", "class", "score", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class OutputFiles:
    """The contents of the output files. The lists have one entry for each image or frame, in the same order."""

    folder: Path
    done: Sequence[Done]
    paths: Sequence[Path]  # of the images; for frames, only their names are used, for text files
    names: Sequence[str]  # of the images in the output files; for a frame, that of the video
    frames: Sequence[int | None]  # frame numbers from 1 on; None for an image
    image_ids: Sequence[int | str]
    class_names: Sequence[str]
    category_ids: Sequence[int | str]  # of each class
    images_from: Path | None  # the source of image_ids; None: they were assigned here, and must be written
    overwrite: bool  # whether files of an earlier run in the folder are deleted


def write_coco(output: OutputFiles) -> list[Path]:
    """Write predictions.json in COCO's result format and, if ids were assigned here, images.json, which explains them.

    images.json has COCO's format without annotations, so pycocotools accepts it as the data set of predictions.json.
    """
    results, images = [], []
    for done, name, frame, number in zip(output.done, output.names, output.frames, output.image_ids, strict=True):
        for label, score, *box in done.detections:
            category = output.category_ids[int(label)]
            results.append({"image_id": number, "category_id": category, "bbox": box, "score": score})
        if done.size is not None:
            named = {"file_name": name} if frame is None else {"file_name": f"{name}#{frame}"}
            images.append({"id": number, **named, "width": done.size[1], "height": done.size[0]})
    files = [output.folder / COCO_NAME]
    write_text(json.dumps(results), files[0])
    if output.images_from is None:
        categories = [
            {"id": number, "name": name} for number, name in zip(output.category_ids, output.class_names, strict=True)
        ]
        files.append(output.folder / IMAGES_NAME)
        write_text(json.dumps({"info": {}, "images": images, "categories": categories}), files[1])
    elif output.overwrite:
        delete_images_file(output.folder / IMAGES_NAME, output.images_from)
    return files


def write_yolo(output: OutputFiles) -> list[Path]:
    """Write labels/NAME.txt for each image, one line per detection: class index, cx, cy, w, h (relative), score.

    classes.txt beside that folder lists the class names in the order of the indices. If several images have the same
    name, later ones get _2, _3, ... Skipped images get no file.

    Raises:
        UserError: a file cannot be written or deleted, or one of the label files that exist is not of an earlier run.
    """
    texts = plan_texts(output.paths, output.folder / LABELS_NAME)
    refuse_foreign_labels(texts)
    if output.overwrite:
        written = [path for done, path in zip(output.done, texts, strict=True) if done.size is not None]
        delete_labels(output.folder / LABELS_NAME, written)
    for done, path in zip(output.done, texts, strict=True):
        if done.size is None:
            continue
        height, width = done.size
        lines = [
            f"{int(label)} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f} "
            f"{score:.6f}\n"
            for label, score, x, y, w, h in done.detections
        ]
        write_text("".join(lines), path)
    write_text("".join(f"{name}\n" for name in output.class_names), output.folder / CLASSES_NAME)
    return [output.folder / LABELS_NAME, output.folder / CLASSES_NAME]


def write_csv(output: OutputFiles) -> list[Path]:
    """Write predictions.csv with one line per detection: corners in pixels, and the frame number for a video."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for done, name, frame in zip(output.done, output.names, output.frames, strict=True):
        for label, score, x, y, w, h in done.detections:
            corners = (f"{value:.3f}" for value in (x, y, x + w, y + h))
            index = int(label)
            shown = name.encode(errors="backslashreplace").decode()  # file names may not be UTF-8
            writer.writerow([shown, frame, index, output.class_names[index], f"{score:.6f}", *corners])
    write_text(text.getvalue(), output.folder / CSV_NAME)
    return [output.folder / CSV_NAME]


FORMATS: dict[str, Callable[[OutputFiles], list[Path]]] = {"coco": write_coco, "yolo": write_yolo, "csv": write_csv}
