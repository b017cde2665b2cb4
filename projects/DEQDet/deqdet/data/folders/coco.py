"""Reads folders with COCO's JSON files: COCO's own layout, Roboflow's, and files next to a folder of images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ...errors import UserError
from ..coco_file import parse, read_bytes
from ..findings import Findings
from .found import IMAGE_FOLDERS, FolderData, FoundSet, list_folder, refuse_same_split, split_folders, split_of

LOOKED_FOR = "annotation files of COCO (*.json, annotations/*.json, train/_annotations.coco.json)"
_PROBED = 50  # images of a file that are looked up in each candidate folder


def find_coco_files(folder: Path) -> list[Path]:
    """Find the files that look like COCO's by path and content, without those of tasks other than detection."""
    places = [folder, folder / "annotations", *split_folders(folder).values()]
    found = [path for place in places for path in list_folder(place) if path.suffix == ".json" and _looks_right(path)]
    for place in places:
        here = [path for path in found if path.parent == place]
        if any(path.name.startswith("instances_") for path in here):
            others = ("captions_", "person_keypoints_", "panoptic_", "stuff_")
            found = [path for path in found if path.parent != place or not path.name.startswith(others)]
    return found


def read_coco_folder(folder: Path) -> FolderData:
    """Read every annotation file. Records are not modified; the data set check examines them.

    Raises:
        UserError: a file is not COCO-format JSON, two files are of the same split, or the images of a file cannot be
            found.
    """
    files = find_coco_files(folder)
    found = []
    for path in files:
        whole = parse(str(path), read_bytes(str(path), str(path)), Findings(), annotated=False)
        split = split_of(path.stem) or (split_of(path.parent.name) if path.parent != folder else "")
        found.append(FoundSet(split, path, _find_image_root(folder, path, whole["images"]), whole))
    remarks = []
    if any(each.split for each in found):
        unused = [str(each.source) for each in found if not each.split]
        found = [each for each in found if each.split]
        remarks += [f"{name} is not used: its name does not contain a split" for name in unused]
    refuse_same_split(folder, found)
    left_out = _find_placeholders([each.content for each in found])
    if left_out:
        remarks.append(f"the class {', '.join(left_out)} is left out: it has no box and only groups the other classes")
        found = [replace(each, content=_without_categories(each.content, left_out)) for each in found]
    return FolderData("coco", tuple(found), tuple(remarks))


def _looks_right(path: Path) -> bool:
    """Return whether a JSON file seems to be an object with "images", without parsing it, since it may be large."""
    content = read_bytes(str(path), str(path))
    return content[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") and b'"images"' in content


def _find_image_root(folder: Path, path: Path, images: Sequence[object]) -> Path:
    names = [record["file_name"] for record in images if isinstance(record, dict) and "file_name" in record]
    names = [name for name in names if isinstance(name, str) and name and "\0" not in name]
    names = names[:: max(1, len(names) // _PROBED)]
    places = list(dict.fromkeys(_possible_roots(folder, path)))
    counts = [sum((place / name).is_file() for name in names) for place in places]
    if names and not any(counts):
        looked = ", ".join(str(place) for place in places)
        raise UserError(f"{path}: none of its images exists, the first one is {names[0]} (looked in {looked})")
    return places[counts.index(max(counts))]


def _possible_roots(folder: Path, path: Path) -> Iterator[Path]:
    """Yield the folders that may hold the images of an annotation file, the likeliest first."""
    suffix = path.stem.rpartition("_")[2]  # train2017 of instances_train2017
    bases = [path.parent, *([path.parent.parent] if path.parent != folder else []), folder]
    split = split_of(path.stem) or (split_of(path.parent.name) if path.parent != folder else "")
    named = [suffix, split, *(("valid", "validation") if split == "val" else ())]
    for base in bases:
        yield from (base / images / name for images in IMAGE_FOLDERS for name in named if name)
        yield from (base / name for name in (*named, *IMAGE_FOLDERS) if name)
        yield base
    yield from (base for base in folder.iterdir() if base.is_dir() and base.name == path.stem)


def _find_placeholders(contents: Sequence[dict]) -> list[str]:
    """Return the classes that are only supercategories of others and have no boxes in any file, as Roboflow writes."""
    records = [record for whole in contents for record in whole["categories"] if isinstance(record, dict)]
    groups = {record.get("supercategory") for record in records}
    names = {record.get("name") for record in records if isinstance(record.get("name"), str)} & groups
    for whole in contents:
        used = {str(record.get("category_id")) for record in whole.get("annotations", ()) if isinstance(record, dict)}
        for record in whole["categories"]:
            if isinstance(record, dict) and str(record.get("id")) in used:
                names.discard(record.get("name"))
    if len({record.get("name") for record in records}) == len(names):
        return []  # every class would be left out
    return sorted(names)


def _without_categories(whole: dict, names: Sequence[str]) -> dict:
    kept = [x for x in whole["categories"] if not (isinstance(x, dict) and x.get("name") in names)]
    return {**whole, "categories": kept}
