"""Reads the headers of all images of a data set in parallel: do they exist, are they complete, and how large are they?

Reading a header takes about 0.1 ms, decoding the pixels a hundred times as long. Therefore pixels are decoded only in
cases of doubt: a JPEG or PNG file that lacks its end marker, and all formats without such a marker.
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

MISSING = "is missing"  # the problem of a missing file begins with this
PILLOW_LIMIT = 178_956_970  # pixels: Pillow refuses to open larger images
_ORIENTATION = 0x0112  # the EXIF tag; for values from 5 on, width and height are exchanged
_CHUNK = 64  # images per task of the thread pool
_PART = 4096  # bytes that a fingerprint takes from each of the beginning, the middle and the end of a file
_END_OF_JPEG = b"\xff\xd9"


@dataclass(frozen=True)
class ImageHeader:
    """The properties of an image file that are known without its pixels."""

    width: int = 0  # pixels, after the EXIF rotation; 0 if a problem of the file hides it
    height: int = 0
    orientation: int = 1  # EXIF's; 1 is upright
    problem: str = ""  # why the file cannot be used, for example "is missing"; "" if it can
    fingerprint: str = ""  # equal for files of the same size with the same beginning, middle and end


@dataclass(frozen=True)
class Stamp:
    """The properties that change when a file is replaced; (-1, -1) for a missing file."""

    size: int  # bytes
    modified: int  # nanoseconds


def read_stamps(paths: Sequence[str]) -> list[Stamp]:
    """Return the size and modification time of each file, which is quick because no file is opened."""
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_workers()) as pool:
        return [stamp for part in pool.map(_read_chunk_of_stamps, chunks) for stamp in part]


def read_headers(
    paths: Sequence[str], title: str, known: Mapping[str, tuple[Stamp, ImageHeader]], stamps: Sequence[Stamp]
) -> list[ImageHeader]:
    """Read the headers of image files in parallel, with a progress bar if that takes more than a second.

    Args:
        paths: the files. Anything but a regular file (a folder, a FIFO) is not opened, since that could hang.
        title: the label of the progress bar.
        known: headers that were read earlier, by path; they are reused if the stamp has not changed.
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
        warnings.simplefilter("ignore")  # Pillow's, about broken metadata and large images
        with tqdm(total=len(new), desc=title, unit="image", delay=1, disable=None, leave=False) as bar:
            for chunk, headers in zip(chunks, pool.map(_read_chunk, chunks), strict=True):
                read.update(zip(chunk, headers, strict=True))
                bar.update(len(chunk))
    return [read[path] if path in read else known[path][1] for path in paths]


def read_header(path: str) -> ImageHeader:
    """Read one image's header; any fault of the file becomes the header's `problem`."""
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
                return ImageHeader(width, height)  # the caller refuses it for its size
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
    try:  # in doubt, decode the image as training does
        height, width = read_image(path).shape[:2]
    except UserError as error:
        reason = one_line(error).removeprefix(f"{path}: ").removeprefix("cannot be read as an image: ")
        return ImageHeader(problem=f"is damaged or truncated: {reason}" if not whole else f"is unusable: {reason}")
    return ImageHeader(width, height, orientation or 1)


def _take_fingerprint(file: BinaryIO, size: int) -> str:
    """Return a digest of a file's size and of three parts of it, which is quick compared with reading the header.

    The middle is included because uncompressed images often begin and end with the same black border.
    """
    state = hashlib.blake2b(str(size).encode(), digest_size=8)
    for start in (0, max(0, size // 2 - _PART // 2), max(0, size - _PART)):
        file.seek(start)
        state.update(file.read(_PART))
    return state.hexdigest()


def _inspect_end(kind: str, file: BinaryIO) -> tuple[bool, bool]:
    """Return whether a file is certain to be complete, and whether it may have EXIF data."""
    if kind in ("JPEG", "MPO"):
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        return file.read().rstrip(b"\0\r\n").endswith(_END_OF_JPEG), True
    if kind == "PNG":
        names = _list_png_chunks(file)
        early, _, late = names.partition(b" IDAT")
        text = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        # Pillow sees metadata after the pixels only by decoding these.
        whole = names.endswith(b" IEND") and not any(name in late for name in text)
        return whole, any(name in early for name in text)
    return False, True


def _list_png_chunks(file: BinaryIO) -> bytes:
    """Return the names of a PNG file's chunks, each after a space, without reading their contents."""
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
    except Exception:  # broken EXIF data, which `read_image` ignores too
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
    return min(32, 4 + (os.cpu_count() or 1))  # more threads than cores, since they mostly wait for the disk
