"""Finds class names that are probably misspelt, for formats in which names are typed by hand in each label file."""

from collections.abc import Mapping
from difflib import SequenceMatcher

_RARE = 2  # a misspelt class occurs in at most this many images
_TIMES_MORE = 5  # the right class must occur in at least this many times as many images
_SHORTEST = 4  # letters: shorter names that differ by one letter, such as "cat" and "bat", may both be right


def find_misspelt(images: Mapping[str, int]) -> dict[str, str]:
    """Find rare classes whose names are almost those of frequent ones.

    Args:
        images: the number of images in which each class occurs.

    Returns:
        For each probably misspelt name, the name that is probably meant; the most frequent one if there are several.
    """
    found = {}
    for name, count in images.items():
        frequent = [other for other, more in images.items() if more >= _TIMES_MORE * count and _alike(name, other)]
        if count <= _RARE and frequent:
            found[name] = max(frequent, key=lambda other: images[other])
    return found


def _alike(one: str, other: str) -> bool:
    """Return whether two names differ only in case and white space, or by one letter inserted, deleted or replaced.

    Digits do not count as letters here, since "type 1" and "type 2" are different classes.
    """
    one, other = ("".join(name.split()).casefold() for name in (one, other))
    edits = [edit for edit in SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if edit[0] != "equal"]
    if not edits:
        return True
    if len(edits) > 1 or min(len(one), len(other)) < _SHORTEST:
        return False
    _, i, after_i, j, after_j = edits[0]
    changed = one[i:after_i] + other[j:after_j]
    return max(after_i - i, after_j - j) == 1 and not any(map(str.isdigit, changed))
