"""Record the predictions of a run in a file from which it can resume, even if it is killed at any moment."""

import fcntl
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError, describe_os_error

NAME = ".predictions.unfinished"


@dataclass(frozen=True)
class Done:
    """A finished image, or a finished frame of a video."""

    state: list  # of an image, see Source.state; for a frame, its number
    size: tuple[int, int] | None = None  # height and width, pixels; None for an image that was skipped
    detections: tuple[tuple[float, ...], ...] = ()  # best first: class index, score, x, y, width, height; pixels
    fault: str = ""  # why it was skipped
    finite: bool = True  # False: its state became infinite or NaN, see Detections

    def to_line(self) -> bytes:
        """Format as one line of the journal."""
        return json.dumps(vars(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Done":
        """Parse a line that `to_line` wrote.

        Raises:
            ValueError, TypeError, KeyError: the line is incomplete, or has another format.
        """
        if not line.endswith(b"\n"):
            raise ValueError("the line is incomplete")
        fields = json.loads(line)
        size = None if fields["size"] is None else tuple(fields["size"])
        detections = tuple(map(tuple, fields["detections"]))
        return cls(fields["state"], size, detections, fields["fault"], fields["finite"])


class Journal:
    """A file in the output folder with one line for each finished image, in order.

    The first line records the settings on which the results depend. A later run with the same settings resumes after
    the last complete group of images: the images of a group share batches, and the last digits of a detection may
    depend on the other images in the batch. The results are therefore bitwise those of a run without interruption.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, group: int, overwrite: bool):
        """Open the journal of a folder, or create one. Only one process at a time can have it open.

        Args:
            settings: the settings that must not change, as JSON values.
            group: the number of images in a group.
            overwrite: discard an existing journal.

        Raises:
            UserError: another run has the journal open, it has other settings, or the file cannot be written.
        """
        self.path = folder / NAME
        self._group = group
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = self.path.open("a+b")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({describe_os_error(error)}): see --output") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise UserError(f"--output {folder} is in use by another run: wait until it has finished") from error
        except OSError:  # some network file systems have no locks
            pass
        head = json.dumps({"settings": settings}).encode() + b"\n"
        self._file.seek(0)
        lines = [] if overwrite else self._file.readlines()
        if lines and lines[0] != head and lines[0].endswith(b"\n"):
            self._file.close()
            raise UserError(f"{self._describe(lines[0], settings)}: use the same as before, or give --overwrite")
        self.done: list[Done] = []
        for line in lines[1:]:
            try:
                self.done.append(Done.from_line(line))
            except (ValueError, TypeError, KeyError):
                break  # damaged, or cut off by a kill: images from here on are processed again
        self._lengths = [len(head), *(len(line) for line in lines[1 : 1 + len(self.done)])]
        if not lines or lines[0] != head:
            self._file.truncate(0)
            self._write(head)
        self._cut(len(self.done) - len(self.done) % group)

    @property
    def faults(self) -> list[str]:
        """Why images were skipped, one line per image, including those that an earlier run skipped."""
        return [done.fault for done in self.done if done.size is None]

    def keep(self, states: Sequence[list], *, overwrite: bool = False) -> None:
        """Keep the results of these images up to the first image that is different or has changed.

        Args:
            states: the states of all images of this run, in order.
            overwrite: accept that nothing can be kept.

        Raises:
            UserError: nothing can be kept, because the journal is of other images.
        """
        same = 0
        while same < min(len(self.done), len(states)) and self.done[same].state == states[same]:
            same += 1
        same -= same % self._group
        if self.done and not same and not overwrite:
            raise UserError(
                f"{self.path} is from an unfinished run on other images: choose another --output, or give --overwrite"
            )
        self._cut(same)

    def add(self, done: Sequence[Done]) -> None:
        """Append a group of images.

        Raises:
            UserError: the file cannot be written.
        """
        lines = [one.to_line() for one in done]
        self._write(b"".join(lines))
        self._lengths += map(len, lines)
        self.done += done

    def remove(self) -> None:
        """Delete the file once the results have been written."""
        with suppress(OSError):
            self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Close the file, from which a later run can resume."""
        self._file.close()

    def _cut(self, count: int) -> None:
        """Drop all but the first `count` images."""
        self.done = self.done[:count]
        self._lengths = self._lengths[: count + 1]
        self._file.truncate(sum(self._lengths))
        self._file.seek(0, 2)

    def _write(self, content: bytes) -> None:
        try:
            self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({describe_os_error(error)})") from error

    def _describe(self, head: bytes, settings: Mapping[str, object]) -> str:
        try:
            before = json.loads(head)["settings"]
            names = [name for name in settings if before.get(name) != json.loads(json.dumps(settings[name]))]
        except (ValueError, TypeError, KeyError, AttributeError):
            names = []
        return f"{self.path} is from an unfinished run with another {', '.join(names) or 'version'}"


def digest(*values: object) -> str:
    """Return a short hash of the values."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
