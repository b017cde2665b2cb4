"""Checkpoint files: read without running code that a file may hold, checked, and written whole or not at all."""

import hashlib
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError, describe_os_error, one_line

# Where trainers put the weights in a checkpoint. A file without such an entry holds nothing but weights.
ENTRIES = ("state_dict", "model")
AUTHOR = "deqdet.checkpoints"
PICKLES = (".pkl", ".pyth")  # the names of files that detectron2 reads as pickles
UNFINISHED = ".unfinished."  # how the names of files begin that are not whole yet
# The ends of the names of BatchNorm's counters, which nothing reads, and which files of weights need not have.
COUNTER = ".num_batches_tracked"
CHECKSUM = "sha256"  # the entry of a .pth file with the checksum of its other entries


class CheckpointError(UserError):
    """A checkpoint, or a file name for one, that cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and the names of its other entries (the optimizer's state, for instance)."""

    weights: dict[str, Tensor]
    ignored: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights of a .safetensors file, or of what torch.save wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, is no checkpoint, or holds objects other than tensors and plain
            Python values. Such objects are never built, since building them can run code.
    """
    return find_weights(path, read_file(path))


def read_file(path: Path) -> Mapping:
    """Read all of a checkpoint, as `read_checkpoint` does; the result is a dict of any entries."""
    try:
        path.open("rb").close()
    except OSError as error:
        reason = describe_os_error(error)
        raise CheckpointError(f"{path} cannot be read ({reason}): give the checkpoint's file") from error
    refuse_pickle(str(path))
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}: a checkpoint is a dict of tensors")
    return loaded


def refuse_pickle(name: str, advice: str = "") -> None:
    """Refuse a file by its name, if detectron2 would read it as a pickle: that can run code.

    A pickle under any other name is refused too, when `read_torch` reads it.

    Args:
        name: the file, or its URL with or without a query.
        advice: what to do in place of the usual advice.

    Raises:
        CheckpointError: the name ends in .pkl or .pyth.
    """
    if name.split("?")[0].endswith(PICKLES):
        advice = advice or "save its weights as .safetensors, or by torch.save as .pth, where it was made"
        raise CheckpointError(f"{name} is a pickle, which is not loaded, because reading it can run code: {advice}")


def find_weights(path: Path, loaded: Mapping) -> Checkpoint:
    """Take the weights out of the entries of the file `path`.

    Raises:
        CheckpointError: there are none.
    """
    weights, ignored = loaded, ()
    for entry in ENTRIES:
        if isinstance(loaded.get(entry), Mapping):
            weights, ignored = loaded[entry], tuple(str(key) for key in loaded if key != entry)
            break
    if not weights:
        raise CheckpointError(f"{path} holds no tensor")
    check_weights(path, weights, ENTRIES)
    return Checkpoint(dict(weights), ignored)


def check_weights(path: Path, weights: object, entries: Sequence[str]) -> None:
    """See that `weights` is a dict of named tensors.

    Args:
        entries: the entries of the file in which the weights were sought, for the message.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}: a checkpoint is a dict of tensors")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is not a dict of tensors: its entry {name!r} is a {type(value).__name__} "
                f"(the weights are sought in {' or '.join(entries)}, else at the top)"
            )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, a format that cannot hold code.

    Raises:
        CheckpointError: the file is damaged or of another format.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise not_safetensors(path, error) from error


def not_safetensors(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that the safetensors package refuses, or that is not there."""
    if isinstance(error, OSError) and not path.is_file():
        fault = "is not a regular file" if path.exists() else "does not exist"
        return CheckpointError(f"{path} {fault}: correct its path")
    if path.suffix != ".safetensors":
        return CheckpointError(
            f"{path} is not a model file (.safetensors): give a checkpoint with its config (--config-file and "
            "MODEL.WEIGHTS, or Predictor.from_config), or make a model file of it with deqdet-publish"
        )
    return CheckpointError(f"{path} is damaged or not a safetensors file ({_first_sentence(error)})")


def read_torch(path: Path) -> object:
    """Read what torch.save wrote, provided that it consists of tensors and plain Python values.

    A file with a checksum (see `write_torch`) is compared with it, because torch.load does not notice changed bytes.
    Files without one, older ones or others', are taken as they are.

    Raises:
        CheckpointError: the file is damaged, or holds other objects.
    """
    if _is_tar(path):  # PyTorch before 2.6 runs code in these even if told to load weights only
        raise CheckpointError(f"{path} is a tar archive, as PyTorch wrote before 2016: save it again by torch.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is in the error
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler lets any exception through, depending on the bytes that it meets
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds {refused[1]}, which is not loaded, because unpickling such objects can run code: if you "
                "trust the file, load it where it was made and save its state dict alone"
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or was not written by torch.save ({_first_sentence(error)}): download or save it again"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get(CHECKSUM), str) and loaded.pop(CHECKSUM) != checksum(loaded):
        raise CheckpointError(f"{path} is damaged (its checksum is another one): take another checkpoint")
    return loaded


def checksum(content: object) -> str:
    """SHA-256 of tensors and plain Python values, nested in any dicts, lists and tuples.

    Dicts must have their entries in the order of writing, which a file keeps.
    """
    digest = hashlib.sha256()
    _update(digest, content)
    return digest.hexdigest()


def _update(digest: "hashlib._Hash", value: object) -> None:
    if isinstance(value, Mapping):
        digest.update(b"{%d" % len(value))
        for key, item in value.items():
            digest.update(repr(key).encode())
            _update(digest, item)
    elif isinstance(value, list | tuple):
        digest.update(b"[%d" % len(value))
        for item in value:
            _update(digest, item)
    elif isinstance(value, Tensor):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(repr(value).encode())


def check_target(path: Path, source: Path) -> None:
    """See, before any work is done, whether a checkpoint made of `source` can be written to `path`.

    Raises:
        CheckpointError: the folder is missing, or `path` names the source, something that is no plain file, or a format
            that detectron2 reads in another way.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: {path.parent} is not a folder, create it first")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} cannot be written: it is not a regular file")
    if path.exists() and source.exists() and path.samefile(source):
        raise CheckpointError(f"{path} is the checkpoint to be converted: give the output another name")
    if path.suffix in PICKLES:
        raise CheckpointError(f"detectron2 reads {path.suffix} files in a way of its own: name {path} .pth instead")


def write_checkpoint(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file if `path` is named so, else {"model": weights} as torch.save does.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if path.suffix == ".safetensors":
        write_safetensors(weights, path, {"author": AUTHOR})
        return
    write_torch({"model": _own_copies(weights), "__author__": AUTHOR}, path)


def write_torch(content: dict, path: Path) -> None:
    """Write what torch.save writes, with a checksum that `read_torch` verifies.

    Raises:
        CheckpointError: the file cannot be written.
    """
    content = {**content, CHECKSUM: checksum(content)}
    with replacing(path) as file:
        torch.save(content, file)


def write_text(text: str, path: Path) -> None:
    """Write a text file as UTF-8, whole or not at all; bytes of a file name that are not UTF-8 become escapes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_safetensors(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file with `metadata` in its header.

    Raises:
        CheckpointError: the file cannot be written.
    """
    # "format" is the entry by which other programs know that the tensors are PyTorch's.
    content = safetensors.torch.save(_own_copies(weights), {"format": "pt", **metadata})
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path`, which takes the name `path` once it is complete and on the disk.

    Until then, and so after an error or a kill at any moment, `path` is what it was before.

    Raises:
        CheckpointError: the file cannot be written.
    """
    unfinished = path.with_name(f"{UNFINISHED}{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        reason = describe_os_error(error) if isinstance(error, OSError) else one_line(error)
        raise CheckpointError(f"{path} cannot be written ({reason})") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    with suppress(OSError):  # not every file system can sync a folder, and the file itself is complete
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # puts the new name on the disk
        finally:
            os.close(folder)


def _is_tar(path: Path) -> bool:
    """Whether a file is a tar archive with anything in it; a file of zeros would be one with nothing."""
    with path.open("rb") as file:
        empty = not file.read(512).strip(b"\0")
    return not empty and tarfile.is_tarfile(path)


def _own_copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of which each has memory of its own.

    torch.save would store a slice with all of the tensor that it is cut from; safetensors refuses shared memory.
    """
    return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in weights.items()}


def _first_sentence(error: Exception) -> str:
    """The kind of an exception and the first sentence of its message, since torch's go on for a paragraph."""
    sentence = re.split(r"[.:]\s|\n", str(error), maxsplit=1)[0].strip().rstrip(".")
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
