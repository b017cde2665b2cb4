"""Image corruptions of increasing strength, computed with torchvision: blur, noise, low contrast, occlusion.

Lengths are relative to the image, so a strength has the same meaning for images of any size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from ..data import seeded

GREY = 0.5  # of the occluding rectangle, relative to the range of pixel values


@dataclass(frozen=True)
class Condition:
    """A corruption with its strength; strength 0 leaves an image clean."""

    corruption: str  # "clean", or a key of CORRUPTIONS
    strength: float

    def __str__(self) -> str:
        return f"{self.corruption} {self.strength:g}" if self.strength else self.corruption


@dataclass(frozen=True)
class Corruption:
    """A type of corruption, with the strengths to measure in increasing order."""

    function: Callable[[Tensor, float], Tensor]  # image (3, H, W) float from 0 to 1, strength -> the same shape
    strengths: tuple[float, ...]
    meaning: str  # what the strength measures


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian whose standard deviation is `sigma` times the short side."""
    short = min(image.shape[1:])
    radius = min(max(1, math.ceil(3 * sigma * short)), short - 1)  # reflection padding must be narrower than the image
    return F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma * short] * 2)


def add_noise(image: Tensor, sigma: float) -> Tensor:
    """Add Gaussian noise to each channel of each pixel, with `sigma` relative to the range of pixel values."""
    return F.gaussian_noise(image, sigma=sigma)


def lower_contrast(image: Tensor, lost: float) -> Tensor:
    """Blend each pixel with the mean grey of the image, which has the weight `lost`."""
    return F.adjust_contrast(image, 1 - lost)


def occlude(image: Tensor, share: float) -> Tensor:
    """Hide a fraction `share` of the image behind a grey rectangle of the same aspect ratio, at a random position."""
    height, width = (max(1, round(side * math.sqrt(share))) for side in image.shape[1:])
    y, x = torch.rand(2).tolist()
    top, left = round(y * (image.shape[1] - height)), round(x * (image.shape[2] - width))
    return F.erase(image, top, left, height, width, torch.full((3, 1, 1), GREY, dtype=image.dtype))


CORRUPTIONS = {
    "blur": Corruption(blur, (0.005, 0.01, 0.015, 0.025), "standard deviation / short side"),
    "noise": Corruption(add_noise, (0.05, 0.1, 0.2, 0.3), "standard deviation / range of the pixels"),
    "contrast": Corruption(lower_contrast, (0.4, 0.6, 0.8, 0.9), "share of the contrast that is lost"),
    "occlusion": Corruption(occlude, (0.1, 0.2, 0.3, 0.4), "share of the area that is hidden"),
}
CLEAN = Condition("clean", 0.0)
# The conditions that run as one batch: all images have the same size, and are few enough even if they are large.
BATCHES = (
    (CLEAN,),
    *(tuple(Condition(name, strength) for strength in kind.strengths) for name, kind in CORRUPTIONS.items()),
)
CONDITIONS = tuple(condition for batch in BATCHES for condition in batch)


def corrupt(image: Tensor, condition: Condition, *, seed: int) -> Tensor:
    """Corrupt one image, and leave the global random generators as they were.

    Args:
        image: (3, H, W) uint8, RGB, on the CPU.
        seed: determines the noise and the position of the rectangle.

    Returns:
        (3, H, W) uint8; the given tensor itself if the condition is clean.
    """
    if not condition.strength:
        return image
    scaled = F.to_dtype(image, torch.float32, scale=True)
    with seeded(seed):
        changed = CORRUPTIONS[condition.corruption].function(scaled, condition.strength)
    return F.to_dtype(changed, torch.uint8, scale=True)
