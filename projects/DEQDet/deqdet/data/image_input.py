"""The kinds of images that the Predictor accepts: a path, a PIL image, an array or a tensor."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError, one_line
from .images import read_image, to_rgb, turn_upright

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


def is_path(image: ImageLike) -> bool:
    """Return whether an image is given as the path of its file."""
    return isinstance(image, str | os.PathLike)


def to_array(image: ImageLike, channels: str) -> np.ndarray:
    """Convert an image of any of these kinds to (H, W, 3) uint8 RGB.

    Args:
        channels: the channel order of an array or tensor, "RGB" or "BGR".

    Raises:
        UserError: the file cannot be read, or the array or tensor has a wrong shape, dtype or range of values.
    """
    if channels not in ("RGB", "BGR"):
        raise UserError(f"channels must be RGB or BGR, got {channels!r}")
    if is_path(image):
        return read_image(os.path.expanduser(image))
    if isinstance(image, Image.Image):
        try:
            return np.array(to_rgb(turn_upright(image)))
        except (ValueError, OSError) as error:
            raise UserError(f"the PIL image cannot be converted to RGB: {one_line(error)}") from error
    if isinstance(image, Tensor):
        return _order(_tensor_to_array(image), channels)
    if isinstance(image, np.ndarray):
        return _order(_check_array(image), channels)
    hint = "; stream() takes iterators of images" if isinstance(image, Iterator) else ""
    raise UserError(f"an image must be a path, a PIL image, an array or a tensor, got a {type(image).__name__}{hint}")


def _tensor_to_array(image: Tensor) -> np.ndarray:
    if image.dim() != 3 or image.shape[0] != 3:
        raise UserError(f"an image tensor must have the shape (3, H, W), got {tuple(image.shape)}")
    image = image.detach().cpu()
    if image.is_floating_point():
        if not (image.numel() and 0 <= float(image.min()) and float(image.max()) <= 1):
            raise UserError("a floating-point image tensor must hold values from 0 to 1; for 0 to 255, give uint8")
        image = (255 * image).round().to(torch.uint8)
    return _check_array(image.permute(1, 2, 0).numpy())


def _check_array(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise UserError(
            f"an image array must be uint8 of the shape (H, W, 3) or (H, W), got {image.dtype} {tuple(image.shape)}"
        )
    return image


def _order(image: np.ndarray, channels: str) -> np.ndarray:
    return image if channels == "RGB" else np.ascontiguousarray(image[:, :, ::-1])
