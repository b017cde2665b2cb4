"""From a file to a state dict, without running any code that the file may hold."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Where trainers put the weights in a checkpoint; a file without them holds nothing but the weights.
ENTRIES = ("state_dict", "model")


class ConversionError(ValueError):
    """A checkpoint, or a file for one, that does not do: one line that names what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    weights: dict[str, Tensor]
    ignored: tuple[str, ...]  # entries beside the weights


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a .safetensors file, or what torch.save wrote, on the CPU.

    Raises:
        ConversionError: the file is missing, damaged, no checkpoint, or holds objects other than tensors and plain
            Python values. Such objects are never built, since that can run code.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}): give the checkpoint's file") from error
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(loaded, Mapping):
        raise ConversionError(f"{path} holds a {type(loaded).__name__}: a checkpoint is a dict of tensors")
    weights, ignored = loaded, ()
    for entry in ENTRIES:
        if isinstance(loaded.get(entry), Mapping):
            weights, ignored = loaded[entry], tuple(str(key) for key in loaded if key != entry)
            break
    if not weights:
        raise ConversionError(f"{path} holds no tensor")
    check_weights(path, weights, ENTRIES)
    return Checkpoint(dict(weights), ignored)


def check_weights(path: Path, weights: object, entries: Sequence[str]) -> None:
    """
    Args:
        entries: of the file, where the weights were sought before they were taken from its top; for the message.

    Raises:
        ConversionError: `weights` is no dict of named tensors.
    """
    if not isinstance(weights, Mapping):
        raise ConversionError(f"{path} holds a {type(weights).__name__}: a checkpoint is a dict of tensors")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConversionError(
                f"{path} is no dict of tensors: its entry {name!r} is a {type(value).__name__} "
                f"(the weights are sought in {' or '.join(entries)}, else at the top)"
            )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """
    Raises:
        ConversionError: the file is damaged or no safetensors file, or the package is missing.
    """
    safetensors = import_safetensors()
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged or no safetensors file ({_first_line(error)})") from error


def import_safetensors():
    """The package, which only .safetensors files need.

    Raises:
        ConversionError: it is not installed.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ConversionError("files named .safetensors need that package: pip install safetensors") from error
    return safetensors


def read_torch(path: Path) -> object:
    """What torch.save wrote, if it is tensors and plain Python values.

    Raises:
        ConversionError: the file is damaged, or holds other objects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is in the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # its unpickler lets any exception through, according to the bytes that it meets
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ConversionError(
                f"{path} holds {refused[1]}, which is not loaded, because unpickling such objects can run code: if you "
                "trust the file, load it where it was made and save its state dict alone"
            ) from error
        raise ConversionError(
            f"{path} is damaged, or was not written by torch.save ({_first_line(error)}): download or save it again"
        ) from error


def _first_line(error: Exception) -> str:
    """The kind of an exception and the first sentence of its message; torch's go on for a paragraph."""
    sentence = re.split(r"[.:]\s|\n", str(error), maxsplit=1)[0].strip().rstrip(".")
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
