"""The demo: detections in images, videos and a camera's pictures, and how an image's equilibrium is reached."""

from .destinations import plan_pictures, plan_video
from .images import GIF, PLOT, STRIP, ImageDemo
from .predictor import Detector, build_detector, check_equilibrium, prepare_config
from .sources import find_images
from .video import open_camera, open_video, run_video

__all__ = [
    "GIF",
    "PLOT",
    "STRIP",
    "Detector",
    "ImageDemo",
    "build_detector",
    "check_equilibrium",
    "find_images",
    "open_camera",
    "open_video",
    "plan_pictures",
    "plan_video",
    "prepare_config",
    "run_video",
]
