"""Suppresses the warnings that Detectron2 and fvcore cause when they are imported.

The warnings concern the code of these libraries. A user can do nothing about them, and every command would print them.
"""

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


with quiet_imports():
    import detectron2.modeling  # noqa: F401
