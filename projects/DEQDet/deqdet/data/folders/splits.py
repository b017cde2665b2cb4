"""Completes missing splits, by dividing a set reproducibly: the same names and seed give the same split."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from ...errors import UserError, plural
from ..coco_file import look_up, read_id
from .found import TEST, TRAIN, VAL, FolderData, FoundSet


def complete_splits(data: FolderData, *, seed: int, val_fraction: float) -> FolderData:
    """Return the folder's sets, completed by a train and a validation set if they are missing.

    A labelled test set replaces a missing validation set. Without one, the train set, or the set of unknown split, is
    divided (see `divide`).

    Raises:
        UserError: there is no set to train on, or a set to be divided has fewer than two images.
    """
    train, val, test = data.find(TRAIN) or data.find(""), data.find(VAL), data.find(TEST)
    if train is None:
        names = ", ".join(str(found.source) for found in data.sets)
        raise UserError(f"there is no train set besides {names}: name one train, or put all images in one set")
    remarks = list(data.remarks)
    if val is None and test is not None and test.content.get("annotations"):
        val = replace(test, split=VAL)
        test = None
        remarks.append("there is no val set: the test set is evaluated in its place")
    if val is None:
        train, val = divide(train, seed=seed, val_fraction=val_fraction)
        counts = f"{len(train.content['images'])} to train on and {len(val.content['images'])} to evaluate on"
        remarks.append(f"there is no val set: the images are divided by SEED {seed}, {counts}")
    sets = [replace(train, split=TRAIN), val, *([test] if test else [])]
    return FolderData(data.format, tuple(sets), tuple(remarks))


def divide(found: FoundSet, *, seed: int, val_fraction: float) -> tuple[FoundSet, FoundSet]:
    """Divide a set into a train and a validation set.

    Images are ordered by a hash of the seed and their names. The split is therefore the same on every machine and in
    every format, and adding a few images moves few others. Starting with the rarest class, each class keeps at least
    one image in the train set and, if it has two, gets one in the validation set as long as there is room. The
    validation set has at least one image.

    Args:
        val_fraction: the fraction of images for the validation set; their number is rounded.

    Raises:
        UserError: there are fewer than two images.
    """
    images = found.content["images"]
    if len(images) < 2:
        listed = plural(len(images), "image")
        raise UserError(f"{found.source} lists {listed}: two are needed, to train on and to evaluate on")
    classes = _classes_of_images(found.content)
    names = [str(image.get("file_name", i)) if isinstance(image, dict) else str(i) for i, image in enumerate(images)]
    keys = [(hashlib.sha256(f"{seed}/{PurePosixPath(name).name}".encode()).hexdigest(), name) for name in names]
    order = sorted(range(len(images)), key=lambda i: keys[i])
    in_val = _choose(order, classes, max(1, min(len(images) - 1, round(val_fraction * len(images)))))
    return _part(found, TRAIN, [i not in in_val for i in range(len(images))]), _part(
        found, VAL, [i in in_val for i in range(len(images))]
    )


def _choose(order: Sequence[int], classes: Sequence[set], count: int) -> set[int]:
    """Choose the `count` images of the validation set."""
    members: dict[object, list[int]] = {}
    for i in order:
        for name in classes[i]:
            members.setdefault(name, []).append(i)
    train: set[int] = set()
    val: set[int] = set()
    for name in sorted(members, key=lambda name: (len(members[name]), str(name))):
        free = [i for i in members[name] if i not in train and i not in val]
        if not train.intersection(members[name]):
            if not free:  # all of them went to the validation set for the sake of rarer classes
                moved = next(i for i in members[name])
                val.discard(moved)
                train.add(moved)
            else:
                train.add(free.pop(0))
        if free and len(val) < count and not val.intersection(members[name]):
            val.add(free[0])
    rest = [i for i in order if i not in train and i not in val]
    val.update(rest[: max(0, count - len(val))])
    return val or {order[0]}


def _classes_of_images(content: dict) -> list[set]:
    by_id = {}
    for i, image in enumerate(content["images"]):
        by_id.setdefault(read_id(image.get("id")) if isinstance(image, dict) else None, i)
    classes: list[set] = [set() for _ in content["images"]]
    for annotation in content.get("annotations", ()):
        index = look_up(annotation.get("image_id"), by_id) if isinstance(annotation, dict) else None
        if index is not None:
            classes[index].add(str(annotation.get("category_id")))
    return classes


def _part(found: FoundSet, split: str, chosen: Sequence[bool]) -> FoundSet:
    content = found.content
    images = [image for image, take in zip(content["images"], chosen, strict=True) if take]
    ids = {read_id(image.get("id")): i for i, image in enumerate(images) if isinstance(image, dict)}
    known = {read_id(image.get("id")): i for i, image in enumerate(content["images"]) if isinstance(image, dict)}
    annotations = []
    for annotation in content.get("annotations", ()):
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        # Annotations of unknown images stay in the train set, so that the check sees them.
        if look_up(image_id, ids) is not None or (split == TRAIN and look_up(image_id, known) is None):
            annotations.append(annotation)
    return replace(found, split=split, content={**content, "images": images, "annotations": annotations})
