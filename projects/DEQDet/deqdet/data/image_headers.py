"""Reads the header of every image of a data set, in parallel: is it there, is it whole, how large is it?

A header takes about a tenth of a millisecond, decoding the pixels a hundred times that. Pixels are decoded only where
the header leaves a doubt: a JPEG or PNG file that does not end as it should, and the formats that have no such end.
"""

import hashlib
import os
import stat
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from ..errors import UserError, describe_os_error, one_line
from .images import read_image

MISSING = "is missing"  # how the problem of a file that is not there begins
PILLOW_LIMIT = 178_956_970  # pixels: Pillow refuses to open larger images
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on, width and height are exchanged
_CHUNK = 64  # images that one task of the pool reads
_PART = 4096  # bytes at the beginning, in the middle and at the end of a file from which its fingerprint is made
_END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image file without its pixels."""

    width: int = 0  # pixels, upright as EXIF says; 0 if the file has a problem that hides it
    height: int = 0
    orientation: int = 1  # EXIF's; 1 is upright
    problem: str = ""  # why the file cannot be used, for example "is missing"; "" if it can
    fingerprint: str = ""  # the same for files of the same size whose beginning, middle and end are the same


@dataclass(frozen=True)
class Stamp:
    """What changes when a file is replaced; (-1, -1) for a missing one."""

    size: int  # bytes
    modified: int  # nanoseconds


def read_stamps(paths: Sequence[str]) -> list[Stamp]:
    """Size and time of modification of each file, which is quick because no file is opened."""
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_workers()) as pool:
        return [stamp for part in pool.map(_read_chunk_of_stamps, chunks) for stamp in part]


def read_headers(
    paths: Sequence[str], title: str, known: Mapping[str, tuple[Stamp, ImageHeader]], stamps: Sequence[Stamp]
) -> list[ImageHeader]:
    """Read the headers of image files in parallel, with a progress bar where that takes more than a second.

    Args:
        paths: the files. A name that is no plain file (a folder, a FIFO) is not opened, so that nothing can hang.
        title: of the progress bar.
        known: headers that were read before, by path; they are used where the stamp is the same.
        stamps: the current stamp of each path.

    Returns:
        A header for each path.
    """
    new = [
        path
        for path, stamp in zip(paths, stamps, strict=True)
        if path not in known or known[path][0] != stamp or stamp.size < 0
    ]
    read: dict[str, ImageHeader] = {}
    chunks = [new[i : i + _CHUNK] for i in range(0, len(new), _CHUNK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(_workers()) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of broken metadata and of large images
        with tqdm(total=len(new), desc=title, unit="image", delay=1, disable=None, leave=False) as bar:
            for chunk, headers in zip(chunks, pool.map(_read_chunk, chunks), strict=True):
                read.update(zip(chunk, headers, strict=True))
                bar.update(len(chunk))
    return [read[path] if path in read else known[path][1] for path in paths]


def read_header(path: str) -> ImageHeader:
    """Read one image's header; whatever is wrong with the file becomes the header's `problem`."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        hint = "; its name has backslashes, which are not folder separators here" if "\\" in path else ""
        return ImageHeader(problem=f"{MISSING}: {path} does not exist{hint}")
    except (OSError, ValueError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else one_line(error)
        return ImageHeader(problem=f"cannot be opened: {reason}")
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO (a named pipe)", stat.S_IFSOCK: "a socket"}
        return ImageHeader(problem=f"is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a file")
    if status.st_size == 0:
        return ImageHeader(problem="is an empty file (0 bytes)")
    try:
        with open(path, "rb") as file:
            header = _read_open(path, file)
            return header if header.problem else replace(header, fingerprint=_take_fingerprint(file, status.st_size))
    except OSError as error:
        return ImageHeader(problem=f"cannot be opened: {describe_os_error(error)}")


def _read_open(path: str, file: BinaryIO) -> ImageHeader:
    try:
        with Image.open(file) as image:
            width, height = image.size
            if width * height > PILLOW_LIMIT:
                return ImageHeader(width, height)  # refused for its size by whoever asked
            whole, has_exif = _inspect_end(image.format or "", file)
            orientation = _read_orientation(image) if whole and has_exif else None
            plain = not (image.mode == "F" or image.mode.startswith("I"))
    except UnidentifiedImageError:
        return ImageHeader(problem=_describe_foreign(file))
    except Image.DecompressionBombError:
        return ImageHeader(problem=f"has more than {PILLOW_LIMIT} pixels, Pillow's own limit")
    except Exception as error:  # Pillow's readers raise errors of many types on broken files
        return ImageHeader(problem=f"is damaged: {one_line(error)}")
    if whole and plain:
        swapped = (orientation or 1) >= 5
        return ImageHeader(height if swapped else width, width if swapped else height, orientation or 1)
    try:  # in doubt, the reader of the training decides
        height, width = read_image(path).shape[:2]
    except UserError as error:
        reason = one_line(error).removeprefix(f"{path}: ").removeprefix("cannot be read as an image: ")
        return ImageHeader(problem=f"is damaged or truncated: {reason}" if not whole else f"is unusable: {reason}")
    return ImageHeader(width, height, orientation or 1)


def _take_fingerprint(file: BinaryIO, size: int) -> str:
    """A digest of a file's size and of three parts of it, which takes little time beside the reading of the header.

    The middle counts because pictures without compression often begin and end with the same black border.
    """
    state = hashlib.blake2b(str(size).encode(), digest_size=8)
    for start in (0, max(0, size // 2 - _PART // 2), max(0, size - _PART)):
        file.seek(start)
        state.update(file.read(_PART))
    return state.hexdigest()


def _inspect_end(kind: str, file: BinaryIO) -> tuple[bool, bool]:
    """Whether a file certainly has its end, and whether it may have EXIF data; (False, _) where that is not known."""
    if kind in ("JPEG", "MPO"):
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip(b"\0\r\n").endswith(_END_OF_JPEG), True
    if kind == "PNG":
        names = _list_png_chunks(file)
        early, _, late = names.partition(b" IDAT")
        text = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        # Metadata behind the pixels are seen only by decoding them.
        whole = names.endswith(b" IEND") and not any(name in late for name in text)
        return whole, any(name in early for name in text)
    return False, True


def _list_png_chunks(file: BinaryIO) -> bytes:
    """The names of a PNG file's chunks, each after a space, without reading their contents."""
    size, at, names = file.seek(0, os.SEEK_END), 8, b""
    while at + 12 <= size:
        file.seek(at)
        head = file.read(8)
        at += 12 + int.from_bytes(head[:4], "big")
        if at > size:
            break
        names += b" " + head[4:]
    return names


def _read_orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(_ORIENTATION)
        return value if value in range(1, 9) else None
    except Exception:  # broken EXIF data, which the reader of the training ignores too
        return None


def _describe_foreign(file: BinaryIO) -> str:
    file.seek(0)
    head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not an image (perhaps the error page of a download)"
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not an image: fetch it with git lfs pull"
    if b"\0" not in head and head.isascii():
        return "is text, not an image"
    return "is not an image, or of a format that Pillow cannot read"


def _read_stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return Stamp(-1, -1)
    return Stamp(status.st_size, status.st_mtime_ns)


def _read_chunk_of_stamps(paths: Sequence[str]) -> list[Stamp]:
    return [_read_stamp(path) for path in paths]


def _read_chunk(paths: Sequence[str]) -> list[ImageHeader]:
    return [read_header(path) for path in paths]


def _workers() -> int:
    return min(32, 4 + (os.cpu_count() or 1))  # threads, which wait for the disk most of the time
