"""Folders of labelled images in COCO, YOLO or Pascal VOC format: recognises, reads, splits and writes them."""

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
