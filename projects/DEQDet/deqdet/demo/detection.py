"""Run the detector on one image of the demo, and measure the time."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..detections import Detections
from ..errors import UserError
from ..predictor import Predictor


def detect(predictor: Predictor, image: np.ndarray, name: str, options: Mapping[str, Any]) -> tuple[Detections, float]:
    """Run the detector on an image (H, W, 3) uint8 RGB, timed in seconds. A UserError begins with the name."""
    start = time.perf_counter()
    try:
        found = predictor(image, **options)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return found, time.perf_counter() - start
