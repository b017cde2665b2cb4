"""The demo on a video file or a camera."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .drawing import draw_detections
from .predictor import Detector
from .windows import Window

DEFAULT_FPS = 25.0  # where a file or camera does not say
COMPLETE = 0.9  # of the frames that a file announces, which is an estimate


@dataclass(frozen=True)
class Video:
    """What `open_video` or `open_camera` opened."""

    capture: cv2.VideoCapture
    name: str
    live: bool  # from a camera

    @property
    def fps(self) -> float:
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        return fps if 0 < fps < 1000 else DEFAULT_FPS

    @property
    def length(self) -> int | None:
        """The frames that the file announces."""
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return count if count > 0 and not self.live else None

    def frames(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, until there are no more."""
        while True:
            there, frame = self.capture.read()
            if not there:
                return
            yield np.ascontiguousarray(frame[:, :, ::-1])


def open_video(path: Path) -> Video:
    """
    Raises:
        UserError: it is missing or no video.
    """
    if not path.is_file():
        raise UserError(f"--video-input {path} {'is not a file' if path.exists() else 'does not exist'}")
    with _quiet_opencv():
        capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UserError(f"--video-input {path} is not a video, or of a format that OpenCV cannot read")
    return Video(capture, str(path), live=False)


def open_camera(index: int) -> Video:
    """
    Raises:
        UserError: there is none.
    """
    with _quiet_opencv():
        capture = cv2.VideoCapture(index)
    if not capture.isOpened():
        raise UserError(f"--webcam {index}: this camera cannot be opened: give the number of another one")
    return Video(capture, f"camera {index}", live=True)


class VideoFile:
    """Writes frames with the codec mp4v; the file is opened with the first one."""

    def __init__(self, path: Path, fps: float, live: bool):
        """
        Args:
            live: keep to the clock, and repeat frames where they come more slowly than fps.
        """
        self.path, self.fps, self.live = path, fps, live
        self._writer: cv2.VideoWriter | None = None
        self._start, self._written = 0.0, 0

    def write(self, frame: np.ndarray) -> bool:
        """
        Args:
            frame: (H, W, 3) uint8 RGB, all of one size.

        Returns:
            True: go on.

        Raises:
            UserError: the file cannot be opened.
        """
        if self._writer is None:
            self._writer, self._start = self._open(frame.shape[1], frame.shape[0]), time.perf_counter()
        due = round(self.fps * (time.perf_counter() - self._start)) - self._written if self.live else 1
        for _ in range(max(1, due)):
            self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
            self._written += 1
        return True

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._writer is not None:
            self._writer.release()

    def _open(self, width: int, height: int) -> cv2.VideoWriter:
        with _quiet_opencv():
            writer = cv2.VideoWriter(str(self.path), cv2.VideoWriter_fourcc(*"mp4v"), self.fps, (width, height))
        if not writer.isOpened():
            raise UserError(
                f"--output {self.path}: cannot write this video (codec mp4v, {width} x {height} px): see that its "
                "folder can be written, and call it .mp4"
            )
        return writer


def run_video(detector: Detector, video: Video, output: Path | None) -> None:
    """Detect in every frame, write a video or show it in a window, and print a line.

    Esc in the window, or Ctrl-C where a camera is recorded, ends it.

    Raises:
        UserError: as Window and VideoFile; or the video breaks off.
    """
    if output is None:
        _run(detector, video, partial(Window(video.name).show, wait=False), "")
        return
    target = f" -> {output}{' (replaced)' if output.exists() else ''}"
    file = VideoFile(output, video.fps, video.live)
    try:
        _run(detector, video, file.write, target)
    finally:
        file.close()


def _run(detector: Detector, video: Video, give: Callable[[np.ndarray], bool], target: str) -> None:
    """
    Args:
        give: takes a picture, and returns whether to go on.
        target: added to the printed line.
    """
    figures: list[tuple[int, int, float]] = []
    going = True
    try:
        for frame in tqdm(video.frames(), total=video.length, desc=video.name, unit=" frames", disable=None):
            try:
                found = detector(frame)
            except ValueError as error:
                raise UserError(f"{video.name}: {error}") from error
            figures.append((len(found.instances), found.steps, found.seconds))
            going = give(draw_detections(frame, found.instances, detector.class_names))
            if not going:
                break
    except KeyboardInterrupt:
        if not video.live:
            raise
    finally:
        video.capture.release()
    if not figures:
        raise UserError(f"{video.name}: no frame can be read")
    detections, steps, seconds = np.mean(figures, axis=0)
    print(
        f"{video.name}: {len(figures)} frames; on average {detections:.1f} detections, {steps:.1f} steps, "
        f"{seconds:.2f} s{target}"
    )
    if going and video.length is not None and len(figures) < COMPLETE * video.length:
        raise UserError(f"{video.name} breaks off: {len(figures)} of its {video.length} frames can be read")


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Without its warnings: our own error says what is wrong."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)
