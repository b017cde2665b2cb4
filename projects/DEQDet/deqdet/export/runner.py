"""Run an exported detector with numpy and onnxruntime alone; this file can be copied out of the package.

    detector = OnnxDetector("model.encoder.onnx")     # or "model.onnx", which takes no rtol and no solver
    found = detector(image, steps=8, rtol=0.01, solver="anderson", threshold=0.5)

An image is an array (H, W, 3) of uint8, RGB. With two graphs, the encoder runs once per image and the other one, f,
once per step: each call chooses its own number of steps, tolerance and solver. A single graph contains both, with a
loop around f whose number of steps is an input; it is faster.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf


@dataclass(frozen=True)
class Found:
    """The detections of one image, best first."""

    boxes: np.ndarray  # (M, 4) float32, xyxy, pixels of the given image
    scores: np.ndarray  # (M,)
    classes: np.ndarray  # (M,) int64
    labels: list[str]  # the name of each class
    steps: int  # number of applications of f
    residual: float  # ||f(y) - y|| / ||f(y)|| of the last one; inf before the first


class OnnxDetector:
    """A detector from one ONNX file, NAME.onnx, or from two, NAME.encoder.onnx and NAME.step.onnx."""

    def __init__(self, path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)):
        """
        Args:
            path: NAME.onnx or NAME.encoder.onnx.
            threads: number of threads of onnxruntime, up to 1024; 0: its own choice.
            providers: onnxruntime's execution providers, for example ["CUDAExecutionProvider"]; each a name, or a name
                and a dict of options. onnxruntime runs on the CPU if a provider is not installed.

        Raises:
            ValueError: an argument is not as described here; or a file is missing, is not an ONNX file, or was not
                written by deqdet-export-model; or the two files are of different detectors.
        """
        _check_arguments(path, threads, providers)
        path = Path(path)
        self.encoder, self.step = _load(path, threads, providers), None
        metadata = self.encoder.get_modelmeta().custom_metadata_map
        if "deqdet" not in metadata or "images" not in [x.name for x in self.encoder.get_inputs()]:
            raise ValueError(f"{path}: give NAME.onnx or NAME.encoder.onnx, as written by deqdet-export-model")
        # The exporter's notes: class names, sizes, pixel format, defaults of steps, rtol and solver.
        self.notes = {}
        for key, value in metadata.items():
            with suppress(json.JSONDecodeError):  # a note of another tool, for example of onnxruntime's quantization
                self.notes[key] = json.loads(value)
        if self.notes["form"] == "two":
            file = path.with_name(f"{path.name.removesuffix('.encoder.onnx')}.step.onnx")
            self.step = _load(file, threads, providers)
            if self.step.get_modelmeta().custom_metadata_map.get("weights") != metadata.get("weights"):
                raise ValueError(f"{path} and {file} are of different detectors: export the detector again")

    def __call__(self, images, *, steps=None, rtol=None, solver=None, threshold: float = 0.5):
        """Detect objects in one image, or in a list of images as one batch.

        Args:
            images: an array (H, W, 3) uint8 RGB, or a list of such arrays; a list is padded to one common size.
            steps: maximum number of applications of f; 0 gives the detections of the initialization layer.
            rtol: an image stops when its relative residual is below this; 0: it never stops early.
            solver: "plain" or "anderson". The defaults of steps, rtol and solver are those of the exported config. A
                single graph accepts only steps, and only if it applies one layer repeatedly.
            threshold: minimum score of a detection, 0 to 1.

        Returns:
            A Found, or a list of them.

        Raises:
            ValueError: an image or an option is not as described here; the message says what is allowed.
        """
        *_, last = self._detect(images, steps, rtol, solver, threshold)
        return last

    def refine(self, images, *, steps=None, rtol=None, solver=None, threshold: float = 0.5) -> Iterator:
        """Detect as in a call, but yield the result after each step, beginning with step 0, the initialization layer.

        Raises:
            ValueError: as in a call, at the first result; or the detector is a single graph, whose steps are hidden.
        """
        if self.step is None:
            raise ValueError("refine() needs two graphs: export with --form two; one graph shows its last step only")
        return self._detect(images, steps, rtol, solver, threshold)

    def _detect(self, images, steps, rtol, solver, threshold) -> Iterator:
        """Yield the results after each step of two graphs, or after the last one of one graph."""
        _check_options(steps, rtol, solver, threshold)
        single = not isinstance(images, list | tuple)
        originals = [images] if single else images
        _check_images(originals)
        batch, sizes = self._prepare(originals)
        scales = [(x.shape[1] / w, x.shape[0] / h) for x, (h, w) in zip(originals, sizes, strict=True)]
        if self.step is None:
            inputs, taken = {"images": batch, "sizes": sizes}, self._steps_of_one_graph(steps, rtol, solver)
            if steps is not None:
                inputs["steps"] = np.array(taken, np.int64)
            boxes, scores, classes, residual = self.encoder.run(None, inputs)
            ends = [(boxes, scores, classes, [taken] * len(batch), residual)]
        else:
            walk = self._walk(batch, sizes, steps, rtol, solver)
            ends = ((*self._best(boxes, scores), taken, residual) for boxes, scores, taken, residual in walk)
        for end in ends:
            rows = zip(*end, originals, scales, strict=True)
            found = [self._found(*row, threshold=threshold) for row in rows]
            yield found[0] if single else found

    def _steps_of_one_graph(self, steps, rtol, solver) -> int:
        """Return the number of steps of a single graph, which is fixed if the graph has no input for it."""
        if rtol or solver not in (None, "plain"):
            raise ValueError(f"rtol {rtol}, solver {solver}: one graph has neither; export with --form two for them")
        if steps is None:
            return self.notes["steps"]
        if "steps" not in [x.name for x in self.encoder.get_overridable_initializers()]:
            raise ValueError(f"steps {steps}: the layers of this detector have different weights; leave steps out")
        return steps

    def _walk(self, batch, sizes, steps, rtol, solver) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield boxes (B, N, 4), scores (B, N, K), steps (B,) and residuals (B,) after each application of f."""
        steps, rtol, solver = (
            self.notes[key] if given is None else given
            for key, given in (("steps", steps), ("rtol", rtol), ("solver", solver))
        )
        iterate, boxes, scores, *levels = self.encoder.run(None, {"images": batch, "sizes": sizes})
        rows, history = np.arange(len(batch)), []
        taken, residual = np.zeros(len(batch), int), np.full(len(batch), np.inf, np.float32)
        yield boxes, scores, taken.copy(), residual.copy()
        for _ in range(steps):
            inputs = {"state": iterate} | {f"level{i}": level for i, level in enumerate(levels)}
            output, change, *read_out = self.step.run(None, inputs)
            usable = np.isfinite(output).all(axis=1)  # any other row keeps its last finite result and stops
            taken[rows] += 1
            boxes, scores, residual = boxes.copy(), scores.copy(), residual.copy()
            for kept, new in zip((boxes, scores, residual), (*read_out, change), strict=True):
                kept[rows[usable]] = new[usable]
            yield boxes, scores, taken.copy(), residual
            size = self.notes["history_size"] if solver == "anderson" else 1
            iterate, history = anderson(
                iterate, output, history, size, self.notes["damping"], self.notes["regularization"]
            )
            going = usable & ~(change < rtol)
            if not going.all():  # rows that have stopped leave the batch
                rows, iterate, levels = rows[going], iterate[going], [level[going] for level in levels]
                history = [(y[going], g[going]) for y, g in history]
            if len(rows) == 0:
                return

    def _prepare(self, images) -> tuple[np.ndarray, np.ndarray]:
        """Resize and pad: (B, 3, H, W) uint8 in the model's channel order, and heights and widths (B, 2) int64."""
        limits = self.notes["min_size"], self.notes["max_size"]
        resized = [resize(x, *target_size(*x.shape[:2], *limits)) for x in images]
        sizes = np.array([x.shape[:2] for x in resized], np.int64)
        unit = self.notes["size_divisibility"]
        height, width = -(-sizes.max(axis=0) // unit) * unit
        batch = np.zeros((len(images), 3, height, width), np.uint8)
        for row, x in zip(batch, resized, strict=True):
            x = x if self.notes["pixel_format"] == "RGB" else x[:, :, ::-1]
            row[:, : x.shape[0], : x.shape[1]] = x.transpose(2, 0, 1)
        return batch, sizes

    def _best(self, boxes, scores) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Select the best pairs of a query and a class: boxes (B, M, 4), descending scores (B, M), classes (B, M)."""
        classes = scores.shape[2]
        flat = scores.reshape(len(scores), -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, : self.notes["max_detections"]]
        boxes = np.take_along_axis(boxes, (best // classes)[..., None], axis=1)
        return boxes, np.take_along_axis(flat, best, axis=1), best % classes

    def _found(self, boxes, scores, classes, steps, residual, image, scale, *, threshold) -> Found:
        """Scale the boxes to the original image, clip them, and drop empty boxes and low scores."""
        height, width = image.shape[:2]
        boxes = boxes * np.array([*scale, *scale], np.float32)
        boxes = boxes.clip(0, np.array([width, height, width, height], np.float32))
        kept = (scores >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        names = self.notes["class_names"]
        labels = [names[i] for i in classes[kept]]
        return Found(boxes[kept], scores[kept], classes[kept], labels, int(steps), float(residual))


def _load(file: Path, threads: int, providers: Sequence[str]) -> onnxruntime.InferenceSession:
    if not file.is_file():
        raise ValueError(f"{file} does not exist: deqdet-export-model writes it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors only: onnxruntime would warn at each load that "steps" has a default, in ONNX an initializer.
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        raise ValueError(f"{file} cannot be loaded as an ONNX file: {' '.join(str(error).split())}") from error


def _check_arguments(path, threads, providers) -> None:
    """Raise a ValueError for an argument of OnnxDetector that onnxruntime would refuse obscurely, or ignore."""
    if not isinstance(path, str | PathLike):
        raise ValueError(f"path must be the name of a file, got {path!r}")
    if not (_is_whole(threads) and 0 <= threads <= 1024):
        raise ValueError(f"threads must be a whole number from 0 to 1024, got {threads!r}")
    known = onnxruntime.get_all_providers()
    given = providers if isinstance(providers, list | tuple) else []
    names = [x[0] if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], dict) else x for x in given]
    if not names or not all(name in known for name in names):
        raise ValueError(f"providers must be a list of some of {', '.join(known)}, got {providers!r}")


def _check_options(steps, rtol, solver, threshold) -> None:
    """Raise a ValueError for an option that is out of range; None means the exported default."""
    if steps is not None and not (_is_whole(steps) and steps >= 0):
        raise ValueError(f"steps must be a whole number of at least 0, got {steps!r}")
    if rtol is not None and not (_is_number(rtol) and 0 <= rtol < np.inf):
        raise ValueError(f"rtol must be a number of at least 0, got {rtol!r}")
    if solver not in (None, "plain", "anderson"):
        raise ValueError(f"solver must be plain or anderson, got {solver!r}")
    if not (_is_number(threshold) and 0 <= threshold <= 1):
        raise ValueError(f"threshold must be a number from 0 to 1, got {threshold!r}")


def _is_whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _check_images(images: Sequence) -> None:
    if not images:
        raise ValueError("images: the list is empty; give at least one image")
    for index, image in enumerate(images):
        given = f"a {type(image).__name__}"
        if isinstance(image, np.ndarray):
            if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8 and image.size:
                continue
            given = f"an array {image.shape} of {image.dtype}"
        raise ValueError(f"image {index} is {given}: it must be an array (H, W, 3) of uint8, RGB, not empty")


def anderson(iterate, output, history, size, damping, regularization):
    """Anderson acceleration (Walker and Ni, SIAM J. Numer. Anal. 2011); with size 1 it is plain iteration.

    With g = f(y) - y of the last iterates, the next iterate is y + damping g - sum_j w_j (dy_j + damping dg_j),
    where w minimises ||g - sum_j w_j dg_j||, and dy, dg are differences of successive y and g.

    Args:
        iterate, output: (B, D) y and f(y).
        history: a list of at most `size` pairs y, g.

    Returns:
        The next iterate (B, D) and the next history.
    """
    change = output - iterate
    plain = output if damping == 1 else iterate + np.float32(damping) * change
    history = [*history, (iterate, change)][-size:]
    if len(history) == 1:
        return plain, history
    dy, dg = (np.diff(np.stack(x, axis=1), axis=1) for x in zip(*history, strict=True))  # (B, j, D)
    norm = np.linalg.norm(dg, axis=2).clip(min=np.finfo(np.float32).tiny)
    unit = dg / norm[:, :, None]
    gram = unit @ unit.transpose(0, 2, 1) + np.float32(regularization) * np.eye(unit.shape[1], dtype=np.float32)
    weights = np.full_like(norm, np.nan)  # stays NaN in rows without a unique solution, which take a plain step
    for i, row in enumerate(gram):
        with suppress(np.linalg.LinAlgError):
            weights[i] = np.linalg.solve(row, unit[i] @ change[i]) / norm[i]
    proposal = plain - (weights[:, :, None] * (dy + np.float32(damping) * dg)).sum(axis=1)
    return np.where(np.isfinite(proposal).all(axis=1, keepdims=True), proposal, plain), history


def target_size(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Return height and width with the short side `shortest`, or less if the long side would exceed `longest`.

    Each side has at least 1 pixel. With `shortest` 0, the size does not change.
    """
    if shortest == 0:
        return height, width
    scale = shortest / min(height, width)
    new = (shortest, scale * width) if height < width else (scale * height, shortest)
    if max(new) > longest:
        new = tuple(side * (longest / max(new)) for side in new)
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 bilinearly, with the arithmetic of Pillow where both sides grow or both shrink."""
    image = _resize_first_axis(image.swapaxes(0, 1), width).swapaxes(0, 1)
    return _resize_first_axis(image, height)


def _resize_first_axis(image: np.ndarray, size: int) -> np.ndarray:
    """Apply a triangle filter, as wide as an output pixel if the image shrinks, in 22-bit fixed-point arithmetic."""
    if size == len(image):
        return image
    scale = len(image) / size
    support = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(int), 0)
    end = np.minimum((center + support + 0.5).astype(int), len(image))
    taps = first[:, None] + np.arange(int(np.ceil(support)) * 2 + 1)  # (size, taps), source pixels
    weight = 1 - np.abs((taps - center[:, None] + 0.5) / support)
    weight = np.where(taps < end[:, None], weight.clip(min=0), 0)
    fixed = (weight / weight.sum(axis=1, keepdims=True) * (1 << 22) + 0.5).astype(np.int32)
    total = np.full((size, *image.shape[1:]), 1 << 21, np.int32)
    for tap, factor in zip(taps.T, fixed.T, strict=True):
        total += image[np.minimum(tap, len(image) - 1)].astype(np.int32) * factor.reshape(-1, 1, 1)
    return (total >> 22).clip(0, 255).astype(np.uint8)
