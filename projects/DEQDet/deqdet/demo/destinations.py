"""Where results go: one picture an image, never on another one's or on an input."""

import itertools
import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .sources import IMAGE_SUFFIXES

KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")  # other pictures become .png
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi")


def plan_pictures(sources: Sequence[Path], output: Path, endings: Sequence[str] = ()) -> list[Path]:
    """A path for the picture of each source, and make the folder.

    The names are those of the sources; of several with the same name, later ones get _2, _3, ...

    Args:
        output: a folder, or for a single source a file.
        endings: of the files beside each picture, see `beside`.

    Raises:
        UserError: one file for several sources, a suffix that cannot be written, the folder cannot be made, or an input
            or another file in its folder would be written over.
    """
    _require_suffix(output, IMAGE_SUFFIXES)
    as_file = not output.is_dir() and output.suffix.lower() in IMAGE_SUFFIXES
    if as_file and len(sources) > 1:
        raise UserError(f"--output {output} is one file, but there are {len(sources)} images: give a folder")
    make_folder(output.parent if as_file else output)
    pictures = [output] if as_file else _number(sources, output, endings)
    files = [file for picture in pictures for file in (picture, *(beside(picture, ending) for ending in endings))]
    _spare(files, sources, output, named=as_file)
    return pictures


def plan_video(source: Path | None, output: Path) -> Path:
    """The file that a video is written to, and make its folder.

    Args:
        source: the video that is read; None for a camera.
        output: a file by its suffix, else a folder; there, a camera's videos are webcam.mp4, webcam_2.mp4, ...

    Raises:
        UserError: a suffix that cannot be written, the folder cannot be made, or the source or another file in its
            folder would be written over.
    """
    _require_suffix(output, VIDEO_SUFFIXES)
    as_file = not output.is_dir() and output.suffix.lower() in VIDEO_SUFFIXES
    if as_file:
        make_folder(output.parent)
        file = output
    else:
        make_folder(output)
        file = output / ("webcam.mp4" if source is None else f"{source.stem}.mp4")
        numbers = itertools.count(2)
        while source is None and file.exists():
            file = output / f"webcam_{next(numbers)}.mp4"
    _spare([file], [] if source is None else [source], output, named=as_file)
    return file


def beside(picture: Path, ending: str) -> Path:
    """out/a.jpg with "_strip.png" is out/a_strip.png."""
    return picture.with_name(picture.stem + ending)


def make_folder(folder: Path) -> None:
    """
    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {folder}: {error.strerror}") from error


def _require_suffix(output: Path, suffixes: Sequence[str]) -> None:
    """
    Raises:
        UserError: a new file by its name, but none of `suffixes`.
    """
    kind = mimetypes.guess_type(output.name)[0] or ""
    if kind.startswith(("image/", "video/")) and output.suffix.lower() not in suffixes and not output.is_dir():
        raise UserError(f"--output {output}: give a folder, or a file that ends in one of {', '.join(suffixes)}")


def _spare(files: Sequence[Path], sources: Sequence[Path], output: Path, *, named: bool) -> None:
    """
    Args:
        files: that will be written.
        named: by the user, who then may want to replace what is there.

    Raises:
        UserError: a file is an input; or, not named, it exists in an input's folder, and may be the user's own.
    """
    inputs = {source.resolve() for source in sources}
    folders = {source.parent for source in inputs}
    for file in files:
        target = file.resolve()
        if target in inputs:
            raise UserError(f"--output {output}: the input {file} would be written over: choose another one")
        if not named and target.parent in folders and os.path.exists(file):
            raise UserError(f"--output: {file}, beside the input, would be written over: choose another folder")


def _number(sources: Sequence[Path], folder: Path, endings: Sequence[str]) -> list[Path]:
    taken: set[str] = set()
    own = {source.stem.lower() for source in sources}
    pictures = []
    for source in sources:
        suffix = source.suffix if source.suffix.lower() in KEPT_SUFFIXES else ".png"
        for number in itertools.count(1):
            stem = source.stem if number == 1 else f"{source.stem}_{number}"
            # The stem too, so that the files beside a.jpg and a.png differ; some file systems ignore case.
            names = {name.lower() for name in (stem, stem + suffix, *(stem + ending for ending in endings))}
            if not names & taken and (number == 1 or stem.lower() not in own):
                break
        taken |= names
        pictures.append(folder / (stem + suffix))
    return pictures
