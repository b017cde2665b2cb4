"""Imports Detectron2 without its warnings, and without the garbage collections that would slow the import down.

The warnings concern the code of Detectron2 and fvcore. A user can do nothing about them, and every command would print
them.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGES = ("`torch.jit.script` is deprecated", "pkg_resources is deprecated")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Ignore these warnings for imports in the block.

    catch_warnings() would not do: it would also remove the filters that other libraries add when they are imported.
    """
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message)
    added = warnings.filters[: len(_MESSAGES)]
    try:
        yield
    finally:
        for entry in added:
            warnings.filters.remove(entry)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector in the block, and then move all objects to its oldest generation.

    Importing torch and Detectron2 creates about a million objects that live until the process ends. The collector would
    visit all of them several times during the imports, which takes a quarter of their time.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if gc.get_freeze_count() == 0:  # otherwise unfreeze() would also undo the caller's freeze()
            gc.freeze()
            gc.unfreeze()  # to the oldest generation; gc.collect() would do the same, but visit every object


with quiet_imports(), collector_paused():
    import detectron2.modeling  # noqa: F401
