"""Small folders of labelled pictures, written by hand in each format, for the tests of --data."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 100, 40  # of every picture
CLASSES = ("cat", "dog", "emu")
# Corners (left, top, right, bottom) in pixels from the border, by picture. Every edge is one that YOLO's fractions and
# VOC's whole numbers have exactly.
PICTURES = {
    "a": [("cat", (0, 0, 10, 20)), ("dog", (30, 10, 100, 40))],
    "b": [("emu", (50, 4, 70, 24))],
    "c": [],
    "d": [("dog", (20, 8, 60, 38)), ("dog", (5, 5, 15, 35)), ("cat", (80, 10, 90, 30))],
    "e": [("cat", (10, 10, 40, 30))],
}


def draw(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> None:
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def voc_xml(name: str, objects, *, first: int = 1, size=(WIDTH, HEIGHT), extra: str = "") -> str:
    """An XML file; `first` is the number of the first pixel."""
    items = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{box[0] + first}</xmin><ymin>{box[1] + first}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>{extra}</object>"
        for label, box in objects
    )
    shown = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>" if size else ""
    return f"<annotation><filename>{name}.png</filename>{shown}{items}</annotation>"


def write_voc(folder: Path, pictures=PICTURES, images: str = "images", labels: str = "annotations") -> Path:
    for i, (name, objects) in enumerate(pictures.items()):
        draw(folder / images / f"{name}.png", seed=i)
        write(folder / labels / f"{name}.xml", voc_xml(name, objects))
    return folder


def yolo_lines(objects) -> str:
    lines = ""
    for label, (left, top, right, bottom) in objects:
        center = (left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT
        lines += f"{CLASSES.index(label)} {center[0]} {center[1]} {(right - left) / WIDTH} {(bottom - top) / HEIGHT}\n"
    return lines


def write_yolo(folder: Path, pictures=PICTURES, images: str = "images/train", labels: str = "labels/train") -> Path:
    for i, (name, objects) in enumerate(pictures.items()):
        draw(folder / images / f"{name}.png", seed=i)
        write(folder / labels / f"{name}.txt", yolo_lines(objects))
    return folder


def coco_content(pictures=PICTURES, first_id: int = 1) -> dict:
    images = [
        {"id": i, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT} for i, name in enumerate(pictures, 1)
    ]
    boxes = [(i, label, box) for i, objects in enumerate(pictures.values(), 1) for label, box in objects]
    annotations = [
        {
            "id": number, "image_id": i, "category_id": CLASSES.index(label) + first_id, "iscrowd": 0,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]], "area": (box[2] - box[0]) * (box[3] - box[1]),
        }
        for number, (i, label, box) in enumerate(boxes, 1)
    ]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, first_id)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_coco(folder: Path, json_file: str, images: str, pictures=PICTURES, content: dict | None = None) -> Path:
    for i, name in enumerate(pictures):
        draw(folder / images / f"{name}.png", seed=i)
    write(folder / json_file, json.dumps(content or coco_content(pictures)))
    return folder
