"""Recognises the format of a folder and reads it."""

from pathlib import Path

from ...errors import UserError
from . import coco, voc, yolo
from .found import FolderData

FORMATS = {
    "coco": (coco.find_coco_files, coco.read_coco_folder, coco.LOOKED_FOR),
    "yolo": (yolo.find_yolo_files, yolo.read_yolo_folder, yolo.LOOKED_FOR),
    "voc": (voc.find_voc_places, voc.read_voc_folder, voc.LOOKED_FOR),
}


def read_folder(folder: Path, form: str = "") -> FolderData:
    """Read the labels of a folder in COCO, YOLO or Pascal VOC format; the images are not decoded.

    Faults are not dropped: boxes outside their image, missing classes and images, and text in place of numbers are
    passed on to the data set check, which reports them.

    Args:
        folder: the folder, or a file data.yaml in it.
        form: a key in FORMATS; "" to recognise the format.

    Raises:
        UserError: the folder is missing, no format or several are recognised, or its files are invalid.
    """
    folder = folder.absolute()
    if folder.suffix in (".yaml", ".yml") and folder.is_file():
        folder, form = folder.parent, form or "yolo"
    if not folder.is_dir():
        raise UserError(f"--data {folder} is not a folder: give the folder of the images and their labels")
    if form:
        find, read, looked_for = FORMATS[form]
        if not find(folder):
            raise UserError(f"--data {folder}: found no {form.upper()} labels: looked for {looked_for}")
        return read(folder)
    found = {name: places for name, (find, _, _) in FORMATS.items() if (places := find(folder))}
    if not found:
        looked = "; ".join(looked_for for _, _, looked_for in FORMATS.values())
        raise UserError(f"--data {folder}: found no labels: looked for {looked}")
    if len(found) > 1:
        shown = " and ".join(f"{name} ({places[0]})" for name, places in found.items())
        raise UserError(f"--data {folder} is ambiguous: it looks like {shown}: choose by --data-format")
    (name,) = found
    return FORMATS[name][1](folder)
