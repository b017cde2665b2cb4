"""The demo on image files: one that cannot be done does not keep the others from it."""

import os
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .animation import GIF_SIDE, PANEL_SIDE, build_scene, write_gif, write_strip
from .destinations import beside
from .drawing import draw_detections, enlarge
from .predictor import Detections, Detector
from .refinement import trace_refinement
from .residual_plot import plot_convergence
from .sources import read_image
from .windows import Window

GIF, STRIP, PLOT = "_refinement.gif", "_strip.png", "_convergence.png"  # endings, see destinations.beside


@dataclass
class ImageDemo:
    """Detects in image files; each file that cannot be done has its line on stderr and is counted."""

    detector: Detector
    faults: int = field(default=0, init=False)

    def write(self, sources: Sequence[Path], pictures: Sequence[Path], extras: Sequence[str] = ()) -> None:
        """Write a picture of each image, and print a line.

        Args:
            pictures: where to, one a source.
            extras: GIF, STRIP, PLOT: what to write beside each picture.
        """
        targets = dict(zip(sources, pictures, strict=True))
        for source, image, found in self._detect(sources):
            picture = targets[source]
            try:
                replaced = " (replaced)" if picture.exists() else ""
                _save(draw(image, found, self.detector.class_names), picture)
                self._write_extras(source, image, found, picture, extras)
            except (OSError, ValueError, OverflowError, RuntimeError, struct.error) as error:
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                file = getattr(error, "filename", None) or picture
                self.report(file, f"cannot be written: {reason}")
                continue
            names = ", ".join([str(picture) + replaced, *(beside(picture, ending).name for ending in extras)])
            tqdm.write(f"{describe(source, found)} -> {names}")

    def show(self, sources: Sequence[Path]) -> None:
        """Show each image in a window until a key is pressed; Esc ends it.

        Raises:
            UserError: as Window.
        """
        window = Window("DEQDet")
        for source, image, found in self._detect(sources):
            tqdm.write(describe(source, found))
            if not window.show(draw(image, found, self.detector.class_names), wait=True):
                break

    def report(self, source: Path | str, reason: object) -> None:
        """Count a fault and print its line."""
        self.faults += 1
        tqdm.write(f"error: {source}: {' '.join(str(reason).split())}", file=sys.stderr)

    def _detect(self, sources: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray, Detections]]:
        """The images (H, W, 3) uint8 RGB of those that can be read, with their detections."""
        for source in tqdm(sources, desc="images", disable=None if len(sources) > 1 else True):
            try:
                image = read_image(source)
                found = self.detector(image)
            except ValueError as error:
                self.report(source, error)
                continue
            yield source, image, found

    def _write_extras(
        self, source: Path, image: np.ndarray, found: Detections, picture: Path, extras: Sequence[str]
    ) -> None:
        if not extras:
            return
        model, names, threshold = self.detector.model, self.detector.class_names, self.detector.threshold
        refinement = trace_refinement(model, found.inputs, threshold)
        if GIF in extras:
            write_gif(build_scene(image, refinement, names, threshold, GIF_SIDE), beside(picture, GIF))
        if STRIP in extras:
            write_strip(build_scene(image, refinement, names, threshold, PANEL_SIDE), beside(picture, STRIP))
        if PLOT in extras:
            name = os.fsencode(source.name).decode(errors="replace")
            title = f"{name}, {type(model.decoder.solver).__name__}"
            plot_convergence(refinement, title, model.decoder.rtol).savefig(beside(picture, PLOT), dpi=120)


def draw(image: np.ndarray, found: Detections, class_names: Sequence[str]) -> np.ndarray:
    """The picture with its detections, a small one enlarged; both (H, W, 3) uint8 RGB."""
    return draw_detections(enlarge(image), found.instances, class_names)


def describe(source: Path | str, found: Detections) -> str:
    """The line of one image."""
    count = len(found.instances)
    return (
        f"{source}: {count} detection{'s' if count != 1 else ''}, {found.steps} step{'s' if found.steps != 1 else ''}, "
        f"{found.seconds:.2f} s"
    )


def _save(picture: np.ndarray, path: Path) -> None:
    options = {"quality": 92, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(picture).save(path, **options)
