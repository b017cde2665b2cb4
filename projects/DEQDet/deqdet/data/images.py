"""The reader of image files that training, evaluation, the Predictor and the demo share."""

import os
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError, describe_os_error, one_line

# The usual suffixes of formats that Pillow reads.
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jfif", ".jpe", ".avif", ".jp2",
)  # fmt: skip


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image format, in any case, and the file is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read the first image in a file with Pillow, and turn it upright according to its EXIF data.

    Transparent parts become white, and 16-bit pixels are scaled to 8 bits.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: the file cannot be read as an image; names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about broken metadata and large images
            with Image.open(path) as image:
                image.load()
                return np.array(to_rgb(turn_upright(image)))
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image, or of a format that Pillow cannot read") from error
    except Exception as error:  # Pillow's decoders raise errors of many types on broken files
        reason = describe_os_error(error) if isinstance(error, OSError) else one_line(error)
        raise UserError(f"{path}: cannot be read as an image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Raises:
        ValueError: its pixels have more than 16 bits.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels have more than 16 bits (mode {image.mode}): convert it to 8 or 16 bits")
        # Divide by 257 and round, since 65535 = 257 * 255.
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("RGB")


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror an image according to the orientation in its EXIF data, if it has any."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data, which image viewers ignore too
        return image
