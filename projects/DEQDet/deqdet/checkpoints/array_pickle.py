"""Reads the .pkl files of detectron2's model zoo, dicts of NumPy arrays and plain values, without running code.

A pickle is a program that calls functions by name. This module maps the few names that such files need to its own
classes, which build an array from its bytes; any other name is an error. NumPy's own functions are not used, since a
forged dtype could make them interpret bytes as memory addresses.
"""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import one_line
from .files import CheckpointError

_PLAIN_TYPE = re.compile(r"b1|[iu][1248]|f[248]")  # booleans, integers and floating-point numbers


class _DType:
    """Replaces numpy.dtype; only numbers and booleans are allowed."""

    def __init__(self, code: str, *_: object):
        if not isinstance(code, str) or not _PLAIN_TYPE.fullmatch(code):
            raise pickle.UnpicklingError(f"arrays of type {code!r} are not loaded")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        """Set the byte order; the state is (version, byte order, ...), and the rest is the same for all plain types."""
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Replaces numpy.ndarray, and the function that creates an empty array to be filled by its state."""

    value: np.ndarray | None = None

    def __init__(self, *_: object):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote strings
        array = np.frombuffer(bytearray(content), _checked(dtype))
        self.value = array.reshape(shape, order="F" if fortran else "C")


class _Scalar:
    """Replaces the function that builds a NumPy scalar from its bytes."""

    def __init__(self, dtype: _DType, content: bytes | str):
        content = content.encode("latin1") if isinstance(content, str) else content
        self.value = np.frombuffer(content, _checked(dtype))[0]

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a scalar has no state")


class _Bytes:
    """Replaces _codecs.encode and (for empty bytes) bytes(), with which Python 3 writes bytes for Python 2."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> bytes:
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"unknown encoding {encoding!r}")
        return text.encode("latin1")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("bytes have no state")


_KNOWN = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _KNOWN |= {(_module, "_reconstruct"): _Array, (_module, "scalar"): _Scalar}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement for a name; pickle calls this for every name in the file."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which could run code")
        return _KNOWN[module, name]


def read_array_pickle(path: Path) -> dict:
    """Read a pickled dict whose values are NumPy arrays, plain values, or lists and dicts of these.

    Raises:
        CheckpointError: the file is missing or damaged, or holds any other object.
    """
    try:
        with path.open("rb") as file:
            loaded = _plain(_Unpickler(file, encoding="latin1").load())
    except Exception as error:  # on damaged bytes, the unpickler can raise any exception
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path} is damaged, or not a pickle of only NumPy arrays ({reason})") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}: a checkpoint is a dict of arrays")
    return loaded


def _plain(value: object) -> object:
    """Replace our stand-in objects in a value by the arrays and scalars that they hold."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, _Array | _Scalar):
        return value.value
    if value is None or isinstance(value, str | bytes | bool | int | float):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")


def _checked(dtype: object) -> np.dtype:
    if not isinstance(dtype, _DType):
        raise pickle.UnpicklingError("an array without a type")
    return dtype.value
