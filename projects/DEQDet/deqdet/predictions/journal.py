"""Records what a run has predicted so far, in a file that stays usable when the run is killed at any moment."""

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
    """One image, or one frame of a video, that the run is done with."""

    state: list  # of the image, see Source.state; of a frame its number
    size: tuple[int, int] | None = None  # height and width, pixels; None for an image that was skipped
    detections: tuple[tuple[float, ...], ...] = ()  # best first: class index, score, x, y, width, height; pixels
    fault: str = ""  # why it was skipped

    def to_line(self) -> bytes:
        """One line of the journal."""
        fields = {"state": self.state, "size": self.size, "detections": self.detections, "fault": self.fault}
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Done":
        """Read what `to_line` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is another line, or a part of one.
        """
        if not line.endswith(b"\n"):
            raise ValueError("the line is incomplete")
        fields = json.loads(line)
        size = None if fields["size"] is None else tuple(fields["size"])
        return cls(fields["state"], size, tuple(map(tuple, fields["detections"])), fields["fault"])


class Journal:
    """A file in the output folder with one line for each image that is done, in their order.

    Its first line tells the settings on which results depend. Another run with the same settings goes on behind the
    last whole group of images, because images of a group share batches, and a detection may depend in its last digits
    on what else is in the batch. So the results are the same, bit for bit, as those of a run without interruption.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, group: int, overwrite: bool):
        """Open the journal of a folder, or begin one. One process at a time may have it open.

        Args:
            settings: what must not change; plain values.
            group: the number of images in a group.
            overwrite: forget what is there.

        Raises:
            UserError: another run has it open, or what is there has other settings; or the file cannot be written.
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
            raise UserError(f"--output {folder} is in use by another run: wait for its end") from error
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
                break  # the line that a kill cut off, or damage: from here on it is done again
        self._lengths = [len(head), *(len(line) for line in lines[1 : 1 + len(self.done)])]
        if not lines or lines[0] != head:
            self._file.truncate(0)
            self._write(head)
        self._cut(len(self.done) - len(self.done) % group)

    @property
    def faults(self) -> list[str]:
        """Why images were skipped, one line for each of them that names it; those of an earlier run are among them."""
        return [done.fault for done in self.done if done.size is None]

    def keep(self, states: Sequence[list], *, overwrite: bool = False) -> None:
        """Keep what was done of these images, up to the first one that is another or has changed.

        Args:
            states: of all images of this run, in their order.
            overwrite: do not mind if nothing can be kept.

        Raises:
            UserError: nothing can be kept, since the journal is of other images.
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
        """Write down a group of images.

        Raises:
            UserError: the file cannot be written.
        """
        lines = [one.to_line() for one in done]
        self._write(b"".join(lines))
        self._lengths += map(len, lines)
        self.done += done

    def remove(self) -> None:
        """Delete the file: its run has written its results."""
        with suppress(OSError):
            self.path.unlink()
        self._file.close()

    def close(self) -> None:
        """Leave the file for another run to go on from."""
        self._file.close()

    def _cut(self, count: int) -> None:
        """Forget all but the first `count` images."""
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
    """A short text that changes with any of the values."""
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:16]
