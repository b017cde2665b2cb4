"""Which image files a command line means, and what is in them."""

import glob
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, the images directly in directories (by their suffix; no hidden ones), and what globs match.

    Returns:
        The files, each once, and one message for each pattern without any.
    """
    files: dict[Path, Path] = {}
    faults = []
    for pattern in patterns:
        try:
            found = _expand(pattern)
        except OSError as error:
            faults.append(f"{pattern}: {error.strerror or error}")
            continue
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values()), faults


def _expand(pattern: str) -> list[Path]:
    """
    Raises:
        OSError: there is nothing of this name, or no image in it.
    """
    pattern = os.path.expanduser(pattern)  # an unknown user's ~ stays, where Path's raises an error
    path = Path(pattern)
    if path.is_dir():
        names = sorted(path.iterdir())
        files = [x for x in names if x.suffix.lower() in IMAGE_SUFFIXES and x.is_file() and x.name[0] != "."]
        if not files:
            raise FileNotFoundError(f"no image directly in this folder ({', '.join(IMAGE_SUFFIXES)})")
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise FileNotFoundError("does not exist")
    files = [Path(x) for x in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(x)]
    if not files:
        raise FileNotFoundError("no file matches")
    return files


def read_image(path: Path) -> np.ndarray:
    """The first picture of a file, turned upright as its EXIF data say; what is transparent becomes white.

    Returns:
        (H, W, 3) uint8 RGB. 16 bits are scaled to 8.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken metadata, of the size
            with Image.open(path) as image:
                image.load()
                return np.array(_to_rgb(_upright(image)))
    except UnidentifiedImageError as error:
        raise ValueError("not an image, or of a format that Pillow cannot read") from error
    except Exception as error:  # Pillow's decoders raise errors of many types on broken files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"cannot be read as an image: {' '.join(str(reason).split())}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF data, of which no viewer complains either
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """
    Raises:
        ValueError: pixels of more than 16 bits.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its pixels are of more than 16 bits (mode {image.mode}): convert it to 8 or 16 bits")
        # 65535 = 257 * 255; rounded.
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("RGB")
