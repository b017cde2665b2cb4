"""Detections of many images or of a video as files: COCO's JSON, YOLO's txt, CSV.

- `sources`: the images, in their order and with their ids.
- `journal`: what has been done so far, so that an interrupted run goes on.
- `run`: the loop from the one to the other.
- `formats`: the files that are written at the end.
- `leftovers`: the files of an earlier run that are deleted then.
"""

from .formats import FORMATS, MAIN, OutputFiles
from .journal import Done, Journal, digest
from .run import BATCHES, check_video, predict_images, predict_video
from .sources import Source, list_sources, read_image_info, read_list

__all__ = [
    "BATCHES",
    "Done",
    "FORMATS",
    "Journal",
    "MAIN",
    "OutputFiles",
    "Source",
    "check_video",
    "digest",
    "list_sources",
    "predict_images",
    "predict_video",
    "read_image_info",
    "read_list",
]
