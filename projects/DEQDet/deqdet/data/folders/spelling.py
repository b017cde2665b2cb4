"""Class names that are probably slips of the pen, where names are typed by hand in each label file."""

from collections.abc import Mapping
from difflib import SequenceMatcher

_RARE = 2  # images in which a misspelt class occurs at most
_TIMES_MORE = 5  # how many times more images the right class must have
_SHORTEST = 4  # letters: "cat" and "bat" differ by one letter too, and are two animals


def find_misspelt(images: Mapping[str, int]) -> dict[str, str]:
    """Find rare classes whose names are nearly those of frequent ones.

    Args:
        images: in how many images each class occurs.

    Returns:
        For each name that looks misspelt the name that is probably meant, the most frequent one if there are several.
    """
    found = {}
    for name, count in images.items():
        frequent = [other for other, more in images.items() if more >= _TIMES_MORE * count and _alike(name, other)]
        if count <= _RARE and frequent:
            found[name] = max(frequent, key=lambda other: images[other])
    return found


def _alike(one: str, other: str) -> bool:
    """Whether two names differ in capitals and white space only, or by one letter that is put in, left out or changed.

    A digit is no such letter, since "type 1" and "type 2" are surely two classes.
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
