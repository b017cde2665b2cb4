"""Keeps back the warnings that Detectron2 and fvcore cause when they are imported.

They are about the code of these libraries. A user can do nothing about them, and every command would print them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGES = ("`torch.jit.script` is deprecated", "pkg_resources is deprecated")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Ignore these warnings in the imports within.

    catch_warnings() would also take away the filters that other libraries set when they are imported.
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
