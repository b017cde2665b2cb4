"""The shapes data set, generated from a seed in COCO's format, so that a detector can be trained without a download.

The classes differ only in their outlines: colour, texture, contrast and size are drawn independently of the class. No
rotation makes one outline look like another.
"""

import json
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from iopath.common.file_io import file_lock

CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "hourglass")
JSON_NAME, IMAGES_NAME = "annotations.json", "images"  # in the root
_GENERATOR = "deqdet.data.shapes, drawing 1"  # raise the number when the same parameters give other images
_SUPERSAMPLING, _PLACEMENT_TRIES = 8, 30
# Quality 95, and colour at full resolution: JPEG's usual half resolution would blur edges between colours of the same
# lightness.
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShapesConfig:
    """The parameters that determine a shapes set. Lengths are in pixels, angles in degrees.

    Image i does not depend on num_images, so a larger set begins with the images of a smaller one.
    """

    num_images: int
    seed: int
    image_size: int = 160
    min_size: float = 8.0  # of the longer side of a box
    max_size: float = 80.0
    max_objects: int = 6
    empty_fraction: float = 0.08  # probability of an image without objects
    max_rotation: float = 10.0  # to either side; 180 allows any angle
    max_overlap: float = 0.5  # of two boxes, see box_overlap(); also the largest fraction of a shape that others hide
    min_contrast: float = 48.0  # of 255: the largest difference, over the channels, between a shape and what it covers
    max_contrast: float = 127.0  # above 127, some backgrounds have neither a lighter nor a darker colour that far away
    max_texture: float = 0.35  # amplitude on the background, relative to the contrast; half of that on the shapes
    max_noise: float = 0.2  # standard deviation, relative to the contrast

    def __post_init__(self):
        sizes = 0 < self.min_size <= self.max_size <= self.image_size
        contrasts = 0 < self.min_contrast <= self.max_contrast <= 127
        if not (self.num_images >= 1 and 1 <= self.max_objects <= 8 and sizes and contrasts):
            need = "0 < min_size <= max_size <= image_size and 0 < min_contrast <= max_contrast <= 127"
            raise ValueError(f"need num_images >= 1, max_objects in 1..8, {need}, got {self}")

    def info(self) -> dict:
        """Return the "info" of the annotation file, which identifies a set on disk as that of this config."""
        return {"generator": _GENERATOR, "parameters": asdict(self)}


@dataclass(frozen=True)
class Shape:
    """One drawn object, regardless of others that may cover it."""

    label: int  # index in CLASSES
    box: tuple[float, ...]  # (x, y, w, h), pixels: the bounds of the outline, wholly inside the image
    area: float  # pixels that the outline covers, fractions included


@dataclass(frozen=True)
class Scene:
    """An image and the objects in it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    shapes: tuple[Shape, ...]  # in drawing order: a later one covers an earlier one


def generate_shapes(root: str | os.PathLike, config: ShapesConfig) -> str:
    """Make sure that `root` holds the set that `config` describes, and return the path of its annotation file.

    The set consists of `annotations.json` (boxes xywh in pixels, `area` in covered pixels, category ids from 1 in the
    order of CLASSES) and `images/*.jpg`. For noisy images, JPEG files of quality 95 are half as large as PNG files, and
    are decoded in half the time.

    A set with other parameters, or without some of its images, is drawn again. It is drawn next to `root` and renamed
    when it is complete. If several processes request it at once, one of them draws it and the others wait.

    Raises:
        FileExistsError: `root` holds something else, which is left alone.
    """
    root = Path(os.path.realpath(os.path.expanduser(root)))
    if not _is_complete(root, config):  # also checked before locking, so that a read-only set can be used
        with file_lock(str(root)):
            if not _is_complete(root, config):
                _draw_set(root, config)
    return str(root / JSON_NAME)


def draw_scene(config: ShapesConfig, index: int) -> Scene:
    """Draw image `index` of the set.

    The number of objects is uniform in 1..max_objects, or 0 with the probability empty_fraction. An object for which
    there is no room is left out.
    """
    rng = np.random.default_rng((config.seed, index))
    contrast = _log_uniform(rng, config.min_contrast, config.max_contrast)
    texture, noise = contrast * config.max_texture, contrast * config.max_noise
    canvas = _texture(rng, (config.image_size, config.image_size), texture)  # (H, W, 3)
    canvas += rng.uniform(0, 255, 3).astype(np.float32)
    count = 0 if rng.random() < config.empty_fraction else rng.integers(1, config.max_objects + 1)
    shapes: list[Shape] = []
    owner = np.zeros(canvas.shape[:2], int)  # (H, W): the topmost shape, from 1; 0 is the background
    for _ in range(count):
        placed = _place(rng, config, shapes, owner)
        if placed is None:
            continue
        shape, window, cover = placed
        shapes.append(shape)
        owner[window][cover > 0.5] = len(shapes)
        patch, cover = canvas[window], cover[..., None]
        under = (patch * cover).sum((0, 1)) / cover.sum()
        paint = _contrasting(rng, under, contrast) + _texture(rng, patch.shape[:2], texture / 2)
        patch += cover * (paint - patch)
    canvas += rng.uniform(0, noise) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return Scene(cv2.convertScaleAbs(np.maximum(canvas, 0, out=canvas)), tuple(shapes))


def box_overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Compute the intersection of two boxes xywh divided by the area of the smaller one."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0.0) * max(h, 0.0) / min(a[2] * a[3], b[2] * b[3])


def _polar(radii: np.ndarray | float, angles: np.ndarray) -> np.ndarray:
    """Return points (n, 2), x to the right and y down, at angles in degrees, clockwise from the top."""
    turn = np.deg2rad(angles)
    return np.stack([radii * np.sin(turn), -radii * np.cos(turn)], axis=-1)


_TURN = np.linspace(0, 360, 64, endpoint=False)
_LEFT = _polar(1.0, np.linspace(180, 360, 33))  # half of the unit circle
# Closed contours in any unit, the outer one first. Points inside an odd number of contours are painted.
_OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_polar(1.0, _TURN),),
    "square": (_polar(1.0, np.array([45, 135, 225, 315])),),
    "triangle": (_polar(1.0, np.array([0, 120, 240])),),
    "star": (_polar(np.array([1.0, 0.4] * 5), np.arange(0, 360, 36)),),
    # The corners of a quarter are (1, 3), which is at atan(1 / 3) = 18.435 degrees, (1, 1) and (3, 1); the other
    # quarters are rotated copies.
    "cross": (_polar(np.sqrt([10, 2, 10] * 4), np.add.outer(_TURN[::16], [18.435, 45, 71.565]).ravel()),),
    "ring": (_polar(1.0, _TURN), _polar(0.55, _TURN)),
    "crescent": (np.concatenate([_LEFT, _LEFT[::-1] * (0.3, 1)]),),
    "hourglass": (np.array([[-4, -5], [4, -5], [1, 0], [4, 5], [-4, 5], [-1, 0]]),),
}


def _turned_outline(label: int, rotation: float, size: float) -> tuple[list[np.ndarray], np.ndarray]:
    """Turn and scale the outline of a class.

    Returns:
        Its contours, each (n, 2), shifted so that the smallest coordinates are 0; and their extent (w, h), whose larger
        side is `size`.
    """
    c, s = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    contours = [contour @ np.array([[c, s], [-s, c]]) for contour in _OUTLINES[CLASSES[label]]]
    low, high = contours[0].min(0), contours[0].max(0)
    scale = size / (high - low).max()
    return [(contour - low) * scale for contour in contours], (high - low) * scale


def _coverage(contours: list[np.ndarray]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Find the window (rows, columns) that contours in pixels touch, and the fraction of each pixel that they cover."""
    x0, y0 = np.floor(contours[0].min(0)).astype(int)
    x1, y1 = np.ceil(contours[0].max(0)).astype(int)
    fine = np.zeros(((y1 - y0) * _SUPERSAMPLING, (x1 - x0) * _SUPERSAMPLING), np.uint8)
    # In OpenCV integer coordinates are the centres of pixels; these have 4 fractional bits.
    fixed = [np.rint(((c - (x0, y0)) * _SUPERSAMPLING - 0.5) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(fine, fixed, 255, lineType=cv2.LINE_8, shift=4)
    cover = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return (slice(y0, y1), slice(x0, x1)), cover


def _place(
    rng: np.random.Generator, config: ShapesConfig, shapes: list[Shape], owner: np.ndarray
) -> tuple[Shape, tuple[slice, slice], np.ndarray] | None:
    """Place a new shape so that none is hidden too much; return shape, window and coverage, or None without room."""
    label = int(rng.integers(len(CLASSES)))
    rotation = rng.uniform(-config.max_rotation, config.max_rotation)
    contours, extent = _turned_outline(label, rotation, _log_uniform(rng, config.min_size, config.max_size))
    for _ in range(_PLACEMENT_TRIES):
        corner = rng.uniform(0, config.image_size - extent)
        box = (*corner.tolist(), *extent.tolist())
        if any(box_overlap(box, other.box) > config.max_overlap for other in shapes):
            continue
        window, cover = _coverage([contour + corner for contour in contours])
        after = owner.copy()
        after[window][cover > 0.5] = 0
        left = np.bincount(after.ravel(), minlength=len(shapes) + 1)[1:]
        if all(left >= [(1 - config.max_overlap) * other.area for other in shapes]):
            return Shape(label, box, float(cover.sum())), window, cover
    return None


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number whose logarithm is uniform."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _texture(rng: np.random.Generator, size: tuple[int, int], amplitude: float) -> np.ndarray:
    """Draw blobs, waves or a ramp, (*size, 3) float32 around 0, with a random amplitude up to `amplitude`."""
    kind, amplitude = rng.integers(3), rng.uniform(0, amplitude)
    grain = _log_uniform(rng, 4, 60)  # pixels
    if kind == 0:
        cells = rng.uniform(-amplitude, amplitude, (*(2 + int(n / grain) for n in size), 3))
        return cv2.resize(cells.astype(np.float32), size[::-1])
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.ogrid[: size[0], : size[1]]
    along = (math.cos(angle) * x + math.sin(angle) * y).astype(np.float32)  # (*size)
    field = np.sin(2 * math.pi / grain * along) if kind == 1 else (along - along.mean()) / max(size)
    return field[..., None] * rng.uniform(-amplitude, amplitude, 3).astype(np.float32)


def _contrasting(rng: np.random.Generator, under: np.ndarray, contrast: float) -> np.ndarray:
    """Draw a colour (3,) in 0..255 that differs from `under` by `contrast` in one channel and at least half in all."""
    step = rng.choice((-1, 1), 3) * rng.permuted((1.0, *rng.uniform(0.5, 1, 2))) * contrast
    colour = (under := np.clip(under, 0, 255)) + step
    return np.where((colour < 0) | (colour > 255), under - step, colour).astype(np.float32)


def _read_info(root: Path) -> dict | None:
    """Read the "info" of a set that this module wrote, in any version; None if `root` holds no such set."""
    try:
        info = json.loads((root / JSON_NAME).read_text())["info"]
        return info if info["generator"].startswith(_GENERATOR.split(",")[0]) else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_complete(root: Path, config: ShapesConfig) -> bool:
    """Return whether `root` holds the set of this config with all its images."""
    images = root / IMAGES_NAME
    return _read_info(root) == config.info() and len(list(images.glob("*.jpg"))) == config.num_images


def _draw_set(root: Path, config: ShapesConfig) -> None:
    """Draw the set next to `root`, then move it there, where it replaces only a set that this module wrote."""
    if root.exists() and _read_info(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} holds no shapes set with a readable {JSON_NAME}: choose another place")
    logger.info("Drawing %d images into %s", config.num_images, root)
    partial = root.with_name(f".{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an interrupted run: this process holds the lock
    (partial / IMAGES_NAME).mkdir(parents=True)
    size, images, annotations = {"height": config.image_size, "width": config.image_size}, [], []
    for image_id in range(1, config.num_images + 1):
        scene, name = draw_scene(config, image_id - 1), f"{image_id:06d}.jpg"
        _, coded = cv2.imencode(".jpg", scene.image[..., ::-1], _JPEG)
        (partial / IMAGES_NAME / name).write_bytes(coded)  # unlike imwrite, this raises if the disk is full
        images.append({"id": image_id, "file_name": name} | size)
        for shape in scene.shapes:
            record = {"id": len(annotations) + 1, "image_id": image_id, "category_id": shape.label + 1}
            record |= {"bbox": [round(v, 2) for v in shape.box], "area": round(shape.area, 2), "iscrowd": 0}
            annotations.append(record)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASSES)]
    whole = {"info": config.info(), "images": images, "annotations": annotations, "categories": categories}
    (partial / JSON_NAME).write_text(json.dumps(whole))
    shutil.rmtree(root, ignore_errors=True)
    os.replace(partial, root)
