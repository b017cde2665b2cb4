"""The images on which the detector runs, and their ids."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.coco_file import parse, read_bytes, read_categories, read_images
from ..data.findings import Findings
from ..demo import find_images
from ..errors import UserError, describe_os_error


@dataclass(frozen=True)
class Source:
    """An image on which the detector runs."""

    path: Path
    image_id: int | str
    name: str  # in the output files

    def state(self) -> list:
        """Return path, size in bytes and modification time, which show whether the image has changed."""
        try:
            status = os.stat(self.path)
        except OSError:
            return [str(self.path), None, None]
        return [str(self.path), status.st_size, status.st_mtime_ns]


def list_sources(patterns: Sequence[str]) -> tuple[list[Source], list[str]]:
    """List the images in files, folders and globs, as the demo does; the ids are 1, 2, ... in their order.

    Returns:
        The images, and a message for each pattern without images.
    """
    files, faults = find_images(patterns)
    return [Source(file, index, str(file)) for index, file in enumerate(files, start=1)], faults


def read_list(path: Path) -> list[str]:
    """Read a text file with one path per line, with or without a byte order mark; empty lines are left out.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--input-list {path} cannot be read ({reason})") from error
    if not any(lines):
        raise UserError(f"--input-list {path} is empty: write one path per line")
    return [line for line in lines if line]


def read_image_info(file: Path, folder: Path, class_names: Sequence[str]) -> tuple[list[Source], list[int | str]]:
    """Read the images of a COCO-format file, such as image_info_test-dev2017.json, and its ids of the classes.

    Args:
        file: its "annotations" are not read, and may be missing.
        folder: the folder of the images.
        class_names: the names of the model's classes.

    Returns:
        The images with the order and the ids of the file, and its category id of each of the model's classes.

    Raises:
        UserError: the file cannot be used, or lacks one of the classes.
    """
    where = f"--images-from {file}"
    whole = parse(where, read_bytes(where, str(file)), Findings(), annotated=False)
    images = read_images(where, whole, str(folder), Findings(), allow_outside_root=False)
    ids = {category.name: category.id for category in read_categories(where, whole, Findings())}
    missing = [name for name in class_names if name not in ids]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{where} lacks the model's classes {shown} among its categories: add them, or leave it out")
    return [Source(Path(x.path), x.id, x.file_name) for x in images], [ids[name] for name in class_names]
