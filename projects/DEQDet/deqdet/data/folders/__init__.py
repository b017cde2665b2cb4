"""Folders of pictures with labels, as other programs write them: recognised, read into COCO's form, split, written."""

from .found import FolderData, FoundSet
from .read import FORMATS, read_folder
from .splits import complete_splits
from .write import write_coco_folder, write_yolo_folder

__all__ = [
    "FORMATS",
    "FolderData",
    "FoundSet",
    "complete_splits",
    "read_folder",
    "write_coco_folder",
    "write_yolo_folder",
]
