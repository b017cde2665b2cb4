"""The demo on image files. A file that cannot be processed does not stop the others."""

import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data import read_image
from ..detections import Detections
from ..errors import UserError, describe_os_error, one_line, plural
from ..predictor import Predictor
from .animation import GIF_SIDE, PANEL_SIDE, build_scene, write_gif, write_strip
from .detection import detect
from .files import beside
from .refinement import plot_convergence, trace_refinement
from .video import Window

GIF, STRIP, PLOT = "_refinement.gif", "_strip.png", "_convergence.png"  # endings, see files.beside


@dataclass
class ImageDemo:
    """Runs on image files. A file that cannot be processed is reported on stderr and counted in `faults`."""

    predictor: Predictor
    options: Mapping[str, Any] = field(default_factory=dict)  # steps, rtol and solver, as in a Predictor's call
    faults: int = field(default=0, init=False)

    def write(self, sources: Sequence[Path], pictures: Sequence[Path], extras: Sequence[str] = ()) -> None:
        """Write a picture of each image, and print a line.

        Args:
            pictures: the path of each source's picture.
            extras: GIF, STRIP, PLOT: what to write beside each picture.
        """
        targets = dict(zip(sources, pictures, strict=True))
        for source, image, found, line in self._detect(sources):
            picture = targets[source]
            try:
                replaced = " (replaced)" if picture.exists() else ""
                _save(found.draw(image), picture)
                self._write_extras(source, image, picture, extras)
            except (OSError, ValueError, OverflowError, RuntimeError, struct.error) as error:
                reason = describe_os_error(error) if isinstance(error, OSError) else error
                self.report(f"{getattr(error, 'filename', None) or picture}: cannot be written: {reason}")
                continue
            names = ", ".join([str(picture) + replaced, *(beside(picture, ending).name for ending in extras)])
            tqdm.write(f"{line} -> {names}")

    def show(self, sources: Sequence[Path]) -> None:
        """Show each image in a window until a key is pressed; Esc quits. UserError: see Window."""
        window = Window("DEQDet")
        for _, image, found, line in self._detect(sources):
            tqdm.write(line)
            if not window.show(found.draw(image), wait=True):
                break

    def report(self, fault: object) -> None:
        """Count a fault, and print it in one line."""
        self.faults += 1
        tqdm.write(f"error: {one_line(fault)}", file=sys.stderr)

    def _detect(self, sources: Sequence[Path]) -> Iterator[tuple[Path, np.ndarray, Detections, str]]:
        """Yield the images (H, W, 3) uint8 RGB that can be processed, with their detections and the line to print."""
        for source in tqdm(sources, desc="images", disable=None if len(sources) > 1 else True):
            try:
                image = read_image(source)
                found, seconds = detect(self.predictor, image, str(source), self.options)
            except UserError as error:  # the message names the file
                self.report(error)
                continue
            counts = f"{plural(len(found), 'detection')}, {plural(found.steps, 'step')}"
            yield source, image, found, f"{source}: {counts}, {seconds:.2f} s"

    def _write_extras(self, source: Path, image: np.ndarray, picture: Path, extras: Sequence[str]) -> None:
        if not extras:
            return
        names, threshold, decoder = self.predictor.class_names, self.predictor.threshold, self.predictor.model.decoder
        steps, rtol, solver = decoder.options(**self.options)
        walk = self.predictor.walk(
            image, steps=steps, rtol=rtol, solver=solver, record=range(steps + 1), record_iterates=True
        )
        refinement = trace_refinement(walk, threshold)
        for ending, side, write in ((GIF, GIF_SIDE, write_gif), (STRIP, PANEL_SIDE, write_strip)):
            if ending in extras:
                write(build_scene(image, refinement, names, threshold, side), beside(picture, ending))
        if PLOT in extras:
            title = f"{os.fsencode(source.name).decode(errors='replace')}, {type(solver).__name__}"
            plot_convergence(refinement, title, rtol).savefig(beside(picture, PLOT), dpi=120)


def _save(picture: np.ndarray, path: Path) -> None:
    options = {"quality": 92, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(picture).save(path, **options)
