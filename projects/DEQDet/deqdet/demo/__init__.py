"""The demo: detections in images, videos and a camera stream, and how an image converges to its equilibrium."""

from .files import find_images, plan_pictures, plan_video
from .images import GIF, PLOT, STRIP, ImageDemo
from .video import open_camera, open_video, run_video

__all__ = [
    "GIF",
    "PLOT",
    "STRIP",
    "ImageDemo",
    "find_images",
    "open_camera",
    "open_video",
    "plan_pictures",
    "plan_video",
    "run_video",
]
