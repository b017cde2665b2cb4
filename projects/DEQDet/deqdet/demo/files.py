"""Find input files, and choose paths for results that never overwrite an input or an unrelated file beside it."""

import glob
import itertools
import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.images import IMAGE_SUFFIXES, is_image
from ..errors import UserError, describe_os_error

KEPT_SUFFIXES = (".jpg", ".jpeg", ".png")  # pictures of images in other formats are written as .png
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi")


def find_images(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Find files, images directly in folders (by suffix, without hidden files), and matches of globs.

    Returns:
        The files, each once, and a message for each pattern without files.
    """
    files: dict[Path, Path] = {}
    faults = []
    for pattern in patterns:
        try:
            for file in _expand(pattern):
                files.setdefault(file.resolve(), file)
        except OSError as error:
            faults.append(f"{pattern}: {describe_os_error(error)}")
    return list(files.values()), faults


def _expand(pattern: str) -> list[Path]:
    """Return the files that a pattern matches. Raise an OSError if there are none."""
    pattern = os.path.expanduser(pattern)  # Path.expanduser would raise an error for the ~ of an unknown user
    path = Path(pattern)
    if path.is_dir():
        names = sorted(path.iterdir())
        files = [x for x in names if is_image(x.name) and x.is_file()]
        reason = f"no image directly in this folder ({', '.join(IMAGE_SUFFIXES)})"
    elif path.exists() or not glob.has_magic(pattern):
        files, reason = [path] if path.exists() else [], "does not exist"
    else:
        files = [Path(x) for x in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(x)]
        reason = "no file matches"
    if not files:
        raise FileNotFoundError(reason)
    return files


def plan_pictures(sources: Sequence[Path], output: Path, endings: Sequence[str] = ()) -> list[Path]:
    """Choose a path for the picture of each source, and make the folder.

    The names are those of the sources; if several have the same name, later ones get _2, _3, ...

    Args:
        output: a folder, or for a single source a file.
        endings: the endings of the files beside each picture, see `beside`.

    Raises:
        UserError: `output` is one file for several sources or has an unsupported suffix, the folder cannot be created,
            or an input or another file in its folder would be overwritten.
    """
    as_file = _means_file(output, IMAGE_SUFFIXES)
    if as_file and len(sources) > 1:
        raise UserError(f"--output {output} is one file, but there are {len(sources)} images: give a folder")
    pictures = [output] if as_file else _number(sources, output, endings)
    _make_folder(output.parent if as_file else output)
    extras = [beside(picture, ending) for picture in pictures for ending in endings]
    _spare([*pictures, *extras], sources, output, named=as_file)
    return pictures


def plan_texts(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Choose a .txt file in `folder` for each source, and make the folder; the names are unique as in `plan_pictures`.

    Raises:
        UserError: the folder cannot be created.
    """
    _make_folder(folder)
    return [beside(picture, ".txt") for picture in _number(sources, folder, [".txt"])]


def plan_video(source: Path | None, output: Path) -> Path:
    """Choose the file that a video is written to, and make its folder.

    Args:
        source: the video that is read; None for a camera.
        output: a file, by its suffix, or else a folder, in which a camera's videos are webcam.mp4, webcam_2.mp4, ...

    Raises:
        UserError: `output` has an unsupported suffix, the folder cannot be created, or the source or another file in
            its folder would be overwritten.
    """
    as_file = _means_file(output, VIDEO_SUFFIXES)
    file = output if as_file else output / ("webcam.mp4" if source is None else f"{source.stem}.mp4")
    numbers = itertools.count(2)
    while source is None and not as_file and file.exists():
        file = output / f"webcam_{next(numbers)}.mp4"
    _make_folder(file.parent)
    _spare([file], [] if source is None else [source], output, named=as_file)
    return file


def beside(picture: Path, ending: str) -> Path:
    """Return the file beside a picture: out/a_strip.png for out/a.jpg and "_strip.png"."""
    return picture.with_name(picture.stem + ending)


def _means_file(output: Path, suffixes: Sequence[str]) -> bool:
    """Return whether --output is a file, by its suffix, and not a folder. UserError if its format is unsupported."""
    if output.is_dir() or output.suffix.lower() in suffixes:
        return not output.is_dir()
    if (mimetypes.guess_type(output.name)[0] or "").startswith(("image/", "video/")):
        raise UserError(f"--output {output}: give a folder, or a file that ends in one of {', '.join(suffixes)}")
    return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot make the folder {folder}: {describe_os_error(error)}") from error


def _spare(files: Sequence[Path], sources: Sequence[Path], output: Path, *, named: bool) -> None:
    """Refuse to overwrite an input, or an unrelated file in the folder of an input.

    Args:
        named: the user chose the name of the file, and may want to replace an existing one.
    """
    inputs = {source.resolve() for source in sources}
    folders = {source.parent for source in inputs}
    for file in files:
        target = file.resolve()
        if target in inputs:
            raise UserError(f"--output {output}: the input {file} would be overwritten: choose another one")
        if not named and target.parent in folders and os.path.exists(file):
            raise UserError(f"--output: {file}, beside the input, would be overwritten: choose another folder")


def _number(sources: Sequence[Path], folder: Path, endings: Sequence[str]) -> list[Path]:
    """Choose paths that, with the files beside them, are unique even on a case-insensitive file system."""
    taken: set[str] = set()
    own = {source.stem.lower() for source in sources}
    pictures = []
    for source in sources:
        suffix = source.suffix if source.suffix.lower() in KEPT_SUFFIXES else ".png"
        for number in itertools.count(1):
            stem = source.stem if number == 1 else f"{source.stem}_{number}"
            # The stem too, so that the files beside a.jpg and a.png differ.
            names = {name.lower() for name in (stem, stem + suffix, *(stem + ending for ending in endings))}
            if not names & taken and (number == 1 or stem.lower() not in own):
                break
        taken |= names
        pictures.append(folder / (stem + suffix))
    return pictures
