"""Reads checkpoint files without running any code that they contain, and writes them atomically (see atomic.py)."""

import hashlib
import re
import tarfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import prepare_output, replacing
from ..errors import UserError, describe_os_error, list_first
from ..structures import nonfinite_names

# Where trainers put the weights in a checkpoint. A file without such an entry holds nothing but weights.
ENTRIES = ("state_dict", "model")
AUTHOR = "deqdet.checkpoints"
PICKLES = (".pkl", ".pyth")  # suffixes of the files that detectron2 reads as pickles
# Suffix of BatchNorm's counters, which nothing reads, and which files of weights need not have.
COUNTER = ".num_batches_tracked"
CHECKSUM = "sha256"  # the entry of a .pth file with the checksum of its other entries


class CheckpointError(UserError):
    """A checkpoint, or the name of one, cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and the names of its other entries (the optimizer's state, for instance)."""

    weights: dict[str, Tensor]
    ignored: tuple[str, ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the weights of a .safetensors file, or of a file that torch.save wrote, onto the CPU.

    Raises:
        CheckpointError: the file is missing, damaged or not a checkpoint, or holds objects other than tensors and plain
            Python values. Such objects are never built, since building them can run code.
    """
    return find_weights(path, read_file(path))


def read_file(path: Path) -> Mapping:
    """Read all entries of a checkpoint, without running code; raises the errors of `read_checkpoint`."""
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
    """Refuse a file whose suffix makes detectron2 read it as a pickle, which can run code.

    A pickle with any other suffix is refused when `read_torch` reads it.

    Args:
        name: the file, or its URL with or without a query.
        advice: replaces the usual advice in the message.

    Raises:
        CheckpointError: the name ends in .pkl or .pyth.
    """
    if name.split("?")[0].endswith(PICKLES):
        advice = advice or "save its weights as .safetensors, or by torch.save as .pth, where it was made"
        raise CheckpointError(f"{name} is a pickle, which is not loaded, because reading it can run code: {advice}")


def find_weights(path: Path, loaded: Mapping) -> Checkpoint:
    """Find the weights among the entries of the file `path`.

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
    """Check that `weights` is a dict of named tensors.

    Args:
        path: the file, for the message.
        weights: the object to check.
        entries: the entries of the file that may hold the weights, for the message.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}: a checkpoint is a dict of tensors")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is not a dict of tensors: its entry {name!r} is a {type(value).__name__} "
                f"(the weights must be in its entry {' or '.join(entries)}, or at the top level)"
            )


def check_finite_weights(source: str | Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Check that weights and statistics are finite.

    Args:
        source: where they come from, for the message.
        weights: pairs of a name and a tensor.

    Raises:
        CheckpointError: a value is infinite or NaN; names the first bad tensor.
    """
    if bad := nonfinite_names(weights):
        raise CheckpointError(f"{source} has infinite values or NaN in {list_first(bad, 1)}: take another checkpoint")


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
    """Return the error for a file that the safetensors package refuses, or that does not exist."""
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
    """Read a file that torch.save wrote, provided that it holds only tensors and plain Python values.

    If the file has a checksum (see `write_torch`), it is verified, because torch.load does not notice changed bytes.
    Older files and files of other programs have none.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds other objects.
    """
    try:
        is_tar = _is_tar(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({describe_os_error(error)})") from error
    if is_tar:  # PyTorch before 2.6 runs code in these even if told to load weights only
        raise CheckpointError(f"{path} is a tar archive, as PyTorch wrote before 2016: save it again with torch.save")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says what they are about
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes, the unpickler can raise any exception
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds {refused[1]}, which is not loaded, because unpickling such objects can run code: if you "
                "trust the file, load it where it was made and save its state dict alone"
            ) from error
        raise CheckpointError(
            f"{path} is damaged, or was not written by torch.save ({_first_sentence(error)}): download or save it again"
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get(CHECKSUM), str) and loaded.pop(CHECKSUM) != checksum(loaded):
        raise CheckpointError(f"{path} is damaged (its checksum does not match): take another checkpoint")
    return loaded


def checksum(content: object) -> str:
    """Compute the SHA-256 of tensors and plain Python values, nested in any dicts, lists and tuples.

    It depends on the order of the entries of dicts, which files preserve.
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
    """Check, before any work is done, whether a checkpoint made from `source` can be written to `path`.

    A missing folder is created.

    Raises:
        UserError: the folder cannot be created, or `path` is the source, not a regular file, or has the suffix of a
            format that detectron2 reads differently.
    """
    prepare_output(path)
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} cannot be written: it is not a regular file")
    if path.exists() and source.exists() and path.samefile(source):
        raise CheckpointError(f"{path} is the checkpoint to be converted: give the output another name")
    if path.suffix in PICKLES:
        raise CheckpointError(f"detectron2 reads {path.suffix} files as pickles: give {path} the suffix .pth instead")


def write_checkpoint(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a .safetensors file if `path` has that suffix, else {"model": weights} with torch.save.

    Raises:
        UserError: the file cannot be written.
    """
    if path.suffix == ".safetensors":
        write_safetensors(weights, path, {"author": AUTHOR})
        return
    write_torch({"model": _own_copies(weights), "__author__": AUTHOR}, path)


def write_torch(content: dict, path: Path) -> None:
    """Write a file with torch.save, adding a checksum that `read_torch` verifies.

    Raises:
        UserError: the file cannot be written.
    """
    content = {**content, CHECKSUM: checksum(content)}
    with replacing(path) as file:
        torch.save(content, file)


def write_safetensors(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file with `metadata` in its header.

    Raises:
        UserError: the file cannot be written.
    """
    # The entry "format" tells other programs that the tensors are PyTorch's.
    content = safetensors.torch.save(_own_copies(weights), {"format": "pt", **metadata})
    with replacing(path) as file:
        file.write(content)


def _is_tar(path: Path) -> bool:
    """Return whether a file is a non-empty tar archive; tarfile takes a file of zeros for an empty one."""
    with path.open("rb") as file:
        empty = not file.read(512).strip(b"\0")
    return not empty and tarfile.is_tarfile(path)


def _own_copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor into its own memory.

    torch.save would store the whole underlying tensor of a slice, and safetensors refuses tensors that share memory.
    """
    return {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in weights.items()}


def _first_sentence(error: Exception) -> str:
    """Return an exception's type and the first sentence of its message, since torch's messages are paragraphs."""
    sentence = re.split(r"[.:]\s|\n", str(error), maxsplit=1)[0].strip().rstrip(".")
    return f"{type(error).__name__}: {sentence}" if sentence else type(error).__name__
