"""The demo on a video file or a camera, and the window that shows pictures."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..predictor import Predictor
from .detection import detect

DEFAULT_FPS = 25.0  # if a file or camera does not report it
COMPLETE = 0.9  # minimum share of readable frames, since the number that a file announces is an estimate
ESCAPE = 27


@dataclass(frozen=True)
class Video:
    """A video file or a camera, opened by `open_video` or `open_camera`."""

    capture: cv2.VideoCapture
    name: str
    live: bool  # from a camera

    @property
    def fps(self) -> float:
        """Frames per second."""
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        return fps if 0 < fps < 1000 else DEFAULT_FPS

    @property
    def length(self) -> int | None:
        """The number of frames that the file announces; None for a camera, or if the file does not say."""
        count = int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return count if count > 0 and not self.live else None

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames (H, W, 3) uint8 RGB until there are no more."""
        while (frame := self.capture.read()[1]) is not None:
            yield np.ascontiguousarray(frame[:, :, ::-1])

    def check_complete(self, count: int) -> None:
        """Check that about as many frames were read as the file announces.

        Raises:
            UserError: no frame was read, or the video breaks off early.
        """
        if not count:
            raise UserError(f"{self.name}: no frame can be read")
        if self.length is not None and count < COMPLETE * self.length:
            raise UserError(f"{self.name} breaks off: {count} of its {self.length} frames can be read")


def open_video(path: Path) -> Video:
    """Open a video file. UserError if it is missing or not a video."""
    if not path.is_file():
        raise UserError(f"--video-input {path} {'is not a file' if path.exists() else 'does not exist'}")
    problem = f"--video-input {path} is not a video, or of a format that OpenCV cannot read"
    return Video(_open(cv2.VideoCapture, str(path), problem=problem), str(path), live=False)


def open_camera(index: int) -> Video:
    """Open a camera. UserError if there is none."""
    problem = f"--webcam {index}: this camera cannot be opened: give the number of another one"
    return Video(_open(cv2.VideoCapture, index, problem=problem), f"camera {index}", live=True)


class VideoFile:
    """Writes frames with the codec mp4v. The first frame opens the file, and all others must have its size."""

    def __init__(self, path: Path, fps: float, live: bool):
        """
        Args:
            live: keep real time by repeating frames that arrive more slowly than fps.
        """
        self.path, self.fps, self.live = path, fps, live
        self._writer: cv2.VideoWriter | None = None
        self._start, self._written = 0.0, 0

    def write(self, frame: np.ndarray) -> bool:
        """Write a frame (H, W, 3) uint8 RGB, and return True to continue. UserError if the file cannot be opened."""
        if self._writer is None:
            height, width = frame.shape[:2]
            problem = f"--output {self.path}: cannot write this video (codec mp4v, {width} x {height} px)"
            advice = "make sure that its folder is writable and that its name ends in .mp4"
            target = str(self.path), cv2.VideoWriter_fourcc(*"mp4v"), self.fps, (width, height)
            self._writer = _open(cv2.VideoWriter, *target, problem=f"{problem}: {advice}")
            self._start = time.perf_counter()
        due = round(self.fps * (time.perf_counter() - self._start)) - self._written if self.live else 1
        for _ in range(max(1, due)):
            self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
            self._written += 1
        return True

    def close(self) -> None:
        """Finish the file, if there is one."""
        if self._writer is not None:
            self._writer.release()


class Window:
    """A window that shows one picture at a time."""

    def __init__(self, name: str):
        """Open the window. UserError if there is no display, or if OpenCV was built without windows."""
        self.name = name
        # Without a display, OpenCV may end the whole process.
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            raise UserError("no window can be opened, since there is no display: give --output")
        try:
            cv2.namedWindow(name, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            reason = "this OpenCV was built without them (opencv-python-headless)"
            raise UserError(f"no window can be opened, since {reason}: give --output") from error

    def show(self, picture: np.ndarray, *, wait: bool) -> bool:
        """Show a picture (H, W, 3) uint8 RGB; with `wait`, until a key is pressed. Return False after Esc."""
        cv2.imshow(self.name, picture[:, :, ::-1])
        return cv2.waitKey(0 if wait else 1) != ESCAPE


def run_video(predictor: Predictor, video: Video, output: Path | None, options: Mapping[str, Any] = {}) -> None:
    """Run the detector on every frame, write a video or show it in a window, and print a summary line.

    Esc in the window ends the loop, and so does Ctrl-C while a camera is recorded.

    Args:
        options: steps, rtol and solver, as in a Predictor's call.

    Raises:
        UserError: see Window and VideoFile; or the video breaks off.
    """
    target = "" if output is None else f" -> {output}{' (replaced)' if output.exists() else ''}"
    file = None if output is None else VideoFile(output, video.fps, video.live)
    give = partial(Window(video.name).show, wait=False) if file is None else file.write
    figures: list[tuple[int, int, float]] = []
    going = True
    try:
        for frame in tqdm(video.frames(), total=video.length, desc=video.name, unit=" frames", disable=None):
            found, seconds = detect(predictor, frame, video.name, options)
            figures.append((len(found), found.steps, seconds))
            going = give(found.draw(frame, enlarge=False))
            if not going:
                break
    except KeyboardInterrupt:
        if not video.live:
            raise
    finally:
        video.capture.release()
        if file is not None:
            file.close()
    if not figures:
        raise UserError(f"{video.name}: no frame can be read")
    detections, steps, seconds = np.mean(figures, axis=0)
    averages = f"on average {detections:.1f} detections, {steps:.1f} steps, {seconds:.2f} s"
    print(f"{video.name}: {len(figures)} frames; {averages}{target}")
    if going:
        video.check_complete(len(figures))


def _open(kind: Callable, *args, problem: str) -> Any:
    """Make a cv2.VideoCapture or VideoWriter, without OpenCV's own warnings. UserError with `problem` if it fails."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        opened = kind(*args)
    finally:
        cv2.utils.logging.setLogLevel(before)
    if not opened.isOpened():
        raise UserError(problem)
    return opened
