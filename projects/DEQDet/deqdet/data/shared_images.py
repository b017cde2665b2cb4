"""Finds images that are in both the training and the test sets, which makes the AP too high."""

import os
from collections.abc import Mapping

from .checking import CheckedSet
from .findings import REMARK, Finding, Findings


def find_shared_images(tested: CheckedSet, trained: Mapping[str, CheckedSet]) -> list[Finding]:
    """Compare the images of a test set with those of the training sets by their fingerprints (see `ImageHeader`).

    No file is read, since the check has already computed the fingerprints.

    Args:
        tested: the test set.
        trained: the training sets by name.

    Returns:
        A list with one finding, which names the first pair and counts the shared images; empty if there are none.
    """
    known = {mark: (path, name) for name, each in trained.items() for path, mark in each.fingerprints.items()}
    findings = Findings()
    for path, mark in tested.fingerprints.items():
        if mark in known:
            other, name = known[mark]
            words = f"looks the same as {other} of {name!r}, which is trained on"
            if other == path:
                words = f"is trained on too, in {name!r}"
            outcome = "the AP will be too high: leave such images out of one of the sets"
            findings.add(REMARK, "trained on", f"image {os.path.basename(path)}", words, outcome)
    return findings.all()
