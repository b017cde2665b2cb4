"""Reads the categories and images of a COCO-format file, in any encoding and with ids of any type."""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager

from ..errors import UserError, describe_os_error, one_line
from .findings import REMARK, REPAIRED, Findings

# The key under which a reader of another format stores where a record comes from: for an image the path of its label
# file, for an annotation the place in that file, such as "line 3". Other programs ignore it.
SOURCE = "deqdet_source"
ANY_SUFFIX = ".*"  # ends the file name of an image that a label file without an image should have
LARGEST_ID = 2**53  # beyond it, two ids may be equal in the float64 columns of pycocotools
_RENUMBERED = "these ids are replaced by numbers within the run"


@dataclass(frozen=True)
class Category:
    """A class in the file."""

    id: int | str
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """An image in the file."""

    id: int | str
    file_name: str  # relative to the image root
    width: int | None  # pixels; None if the file does not say
    height: int | None
    path: str
    source: str = ""  # the label file that the record was made from; "" for a record in the user's own COCO file

    @property
    def title(self) -> str:
        """The image's name in messages."""
        return f"image {self.file_name}" + (f" (labels in {self.source})" if self.source else "")


def locate(where: str, json_file: str) -> str:
    """Return the local path of an annotation file, after a check that it is a regular file. It is not opened.

    Raises:
        UserError: it is missing or not a regular file.
    """
    try:
        path = PathManager.get_local_path(json_file)
        plain = stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        raise _unreadable(where, error) from error
    if not plain:  # opening a FIFO would block forever
        raise UserError(f"{where} is a folder or a pipe: give the path of a COCO-format file")
    return path


def read_bytes(where: str, json_file: str) -> bytes:
    """Read the contents of an annotation file.

    Raises:
        UserError: it is missing, not a regular file, or cannot be read.
    """
    path = locate(where, json_file)
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(where, error) from error


def parse(where: str, content: bytes, findings: Findings, *, annotated: bool) -> dict:
    """Parse an annotation file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        where: what to call the file in messages.
        content: the contents of the file.
        findings: collects the repairs.
        annotated: the list "annotations" is required.

    Raises:
        UserError: the file is not JSON, or lacks a list that a COCO-format file must have.
    """
    try:
        encoding = json.detect_encoding(content)
        whole = json.loads(content.decode(encoding))
    except (ValueError, RecursionError) as error:
        hint = " (it is compressed: unpack it)" if content[:2] in (b"\x1f\x8b", b"PK") else ""
        raise UserError(
            f"{where} is not valid JSON ({one_line(error)[:200]}){hint}: a COCO-format file in UTF-8 is needed"
        ) from error
    for key in ("images", "categories", "annotations"):
        if key == "annotations" and not annotated and isinstance(whole, dict) and key not in whole:
            continue
        if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
            raise UserError(f'{where} has no list "{key}", which a COCO-format file needs')
    if encoding != "utf-8":
        shown = {"utf-8-sig": "UTF-8 with a byte order mark"}.get(encoding, encoding.upper())
        findings.add(REPAIRED, "encoding", "the file", f"is in {shown}", "it is read as such")
    # pycocotools 2.0.10 copies "info" without checking that it exists.
    if not isinstance(whole.get("info"), dict):
        words = "has no info, which some versions of pycocotools need"
        findings.add(REPAIRED, "no info", "the file", words, "it is added, empty")
    return whole


def read_categories(where: str, whole: dict, findings: Findings) -> list[Category]:
    """Return the categories ordered by id, or in the file's order if any id is a string.

    Raises:
        UserError: there are none, one is incomplete, or two have the same id or the same name.
    """
    if not whole["categories"]:
        raise UserError(f'{where} lists no "categories": add the classes of its boxes')
    found = []
    for index, record in enumerate(whole["categories"]):
        _require(where, "category", index, record, ("id", "name"))
        number = read_id(record["id"])
        if number is None:
            raise UserError(f"{where}: category {record['name']!r} has id {record['id']!r}: give it a whole number")
        name = record["name"]
        if isinstance(name, int | float) and not isinstance(name, bool):
            words = f"has the number {name!r} as its name"
            findings.add(REPAIRED, "numeric name", f"category {record['id']!r}", words, "it is taken as text")
            name = str(name)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: category {record['id']!r} has name {name!r}: give it a name in words")
        _note_id(findings, f"category {name}", record["id"], number)
        found.append(Category(number, name))
    _refuse_twice(where, "category", "id", [category.id for category in found])
    _refuse_twice(where, "category", "name", [category.name for category in found])
    numbers = all(isinstance(category.id, int) for category in found)
    return sorted(found, key=lambda category: category.id) if numbers else found


def read_images(
    where: str, whole: dict, image_root: str, findings: Findings, *, allow_outside_root: bool
) -> list[ImageRecord]:
    """Return the images in the file's order.

    Raises:
        UserError: there are none, one is incomplete or lies outside the image root, or two have the same id.
    """
    if not whole["images"]:
        raise UserError(f'{where} lists no "images": a data set needs at least one')
    found, seen = [], {}
    for index, record in enumerate(whole["images"]):
        _require(where, "image", index, record, ("id", "file_name"))
        number, name = read_id(record["id"]), record["file_name"]
        if number is None:
            raise UserError(f"{where}: image {name!r} has id {record['id']!r}: give it a whole number")
        if not isinstance(name, str) or not name.strip() or "\0" in name:
            raise UserError(f"{where}: image {record['id']!r} has file_name {name!r}: give the name of a file")
        _note_id(findings, f"image {name}", record["id"], number)
        path = os.path.join(image_root, name)
        if not (allow_outside_root or lies_below(path, image_root)):
            raise UserError(
                f"{where}: image {record['id']!r} has file_name {name!r}, which leaves the image root {image_root}: "
                "correct it, or set DATASETS.ALLOW_OUTSIDE_ROOT True if you trust the file"
            )
        source = str(record.get(SOURCE, ""))
        if name in seen:
            words = f"is listed twice, as image {seen[name]!r} and {record['id']!r}"
            if source:
                words = f"has two label files, {seen[name]} and {source}"
            findings.add(REMARK, "listed twice", name, words, "each is used with its own boxes")
        seen[name] = source or record["id"]
        sides = [_read_side(findings, name, key, record.get(key)) for key in ("width", "height")]
        found.append(ImageRecord(number, name, *sides, path, source))
    _refuse_twice(where, "image", "id", [image.id for image in found])
    return found


def lies_below(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Return whether a path leads into a folder once each ".." is resolved; symbolic links are not followed."""
    return os.path.abspath(path).startswith(os.path.abspath(folder).rstrip(os.sep) + os.sep)


def read_id(value: object) -> int | str | None:
    """Normalise an id for comparison: 3.0 becomes 3; None if the value cannot be an id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | str):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def look_up(value: object, table: Mapping[int | str, int]) -> int | None:
    """Return the index of the record that a reference names, or None; 7 and "7" match if there is no exact match."""
    key = read_id(value)
    if key in table:
        return table[key]
    if isinstance(key, int):
        return table.get(str(key))
    return table.get(int(key)) if isinstance(key, str) and key.isascii() and key.isdigit() else None


def find_original_ids(whole: Mapping) -> tuple[dict[int, int | str], dict[int, int | str]]:
    """Return the image ids and the category ids in the user's file, by the ids that replaced them in the check.

    Args:
        whole: the content of a checked file.
    """
    images, categories = (
        {entry["id"]: entry["original_id"] for entry in whole[kind] if "original_id" in entry}
        for kind in ("images", "categories")
    )
    return images, categories


def _unreadable(where: str, error: OSError) -> UserError:
    return UserError(
        f"{where} cannot be read ({describe_os_error(error)}): give the path of a COCO-format file, absolute or "
        f"relative to {os.getcwd()}"
    )


def _note_id(findings: Findings, name: str, given: object, number: int | str) -> None:
    if isinstance(number, str):
        words = f"has the text {given!r} as its id, with which pycocotools cannot work"
        findings.add(REPAIRED, f"text id of {name.split()[0]}", name, words, _RENUMBERED)
    elif isinstance(given, float) or not -LARGEST_ID < number < LARGEST_ID:
        words = f"has id {given!r}, which is not a whole number of usual size"
        findings.add(REPAIRED, f"odd id of {name.split()[0]}", name, words, _RENUMBERED)


def _read_side(findings: Findings, name: str, key: str, value: object) -> int | None:
    """Read a width or height, also from text such as "640"; None if it must be taken from the image file later."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        side = None if isinstance(value, bool) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        side = None
    outcome = "it is taken from the image file" if side is None else "it is read as a whole number"
    findings.add(REPAIRED, f"{key} {outcome}", f"image {name}", f"has {key} {value!r}", outcome)
    return side


def _require(where: str, kind: str, index: int, record: object, keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        label = record.get("id", f"number {index}") if isinstance(record, dict) else f"number {index}"
        raise UserError(f"{where}: {kind} {label} has no {', '.join(missing)}: add it to the file")


def _refuse_twice(where: str, kind: str, what: str, values: list) -> None:
    seen, twice = set(), []
    for value in values:
        if value in seen:
            twice.append(value)
        seen.add(value)
    if twice:
        shown = ", ".join(str(value) for value in dict.fromkeys(twice[:5]))
        plural = {"category": "categories", "image": "images"}[kind]
        raise UserError(f"{where}: {kind} {what} {shown} occurs twice: give the {plural} different {what}s")
