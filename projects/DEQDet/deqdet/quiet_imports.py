"""Imports what warns when it is imported, without these warnings, which every command would print.

They are about the code of Detectron2 and fvcore, and a user can do nothing about them.
"""

import warnings

_MESSAGES = ("`torch.jit.script` is deprecated", "pkg_resources is deprecated")

# Not catch_warnings(), which would also take away the filters that other libraries set when they are imported.
for _message in _MESSAGES:
    warnings.filterwarnings("ignore", _message)
_added = warnings.filters[: len(_MESSAGES)]

import detectron2.model_zoo  # noqa: E402
import detectron2.modeling  # noqa: E402, F401

for _filter in _added:
    warnings.filters.remove(_filter)
