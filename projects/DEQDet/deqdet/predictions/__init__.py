"""Detections of many images or of a video as files: COCO's JSON, YOLO's txt, CSV.

- `sources`: the images, with their order and ids.
- `journal`: the finished images, from which an interrupted run resumes.
- `run`: the loop that detects and fills the journal.
- `formats`: the output files, written at the end.
- `leftovers`: the deletion of output files of an earlier run.
"""

from .formats import FORMATS, WRITTEN, OutputFiles
from .journal import Done, Journal, digest
from .run import BATCHES, predict_images, predict_video
from .sources import Source, list_sources, read_image_info, read_list

__all__ = [
    "BATCHES",
    "Done",
    "FORMATS",
    "Journal",
    "WRITTEN",
    "OutputFiles",
    "Source",
    "digest",
    "list_sources",
    "predict_images",
    "predict_video",
    "read_image_info",
    "read_list",
]
