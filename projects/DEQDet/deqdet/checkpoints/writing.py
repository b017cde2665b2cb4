"""From a state dict to a file that detectron2's checkpointer loads; all of it or nothing."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .reading import ConversionError, import_safetensors

AUTHOR = "deqdet.checkpoints"


def check_target(path: Path, source: Path) -> None:
    """See, before any work is done, whether a checkpoint can be written there.

    Raises:
        ConversionError: the folder is missing, the name is that of the source, of no plain file, or of a format that
            detectron2 reads in another way.
    """
    if not path.parent.is_dir():
        raise ConversionError(f"{path} cannot be written: {path.parent} is no folder, create it first")
    if path.exists() and not path.is_file():
        raise ConversionError(f"{path} cannot be written: it is no plain file")
    if path.exists() and source.exists() and path.samefile(source):
        raise ConversionError(f"{path} is the checkpoint to be converted: give the output another name")
    if path.suffix in (".pkl", ".pyth"):
        raise ConversionError(f"detectron2 reads {path.suffix} files in a way of its own: name {path} .pth instead")
    if path.suffix == ".safetensors":
        import_safetensors()


def write_checkpoint(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write {"model": weights}, or a .safetensors file if `path` is named so.

    The file appears, or replaces an older one, only when it is complete.

    Raises:
        ConversionError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Own memory for each: slices would be saved with all that they are cut from, shared ones not as safetensors.
        own = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in weights.items()}
        if path.suffix == ".safetensors":
            _save_safetensors(own, unfinished)
        else:
            with unfinished.open("wb") as file:
                torch.save({"model": own, "__author__": AUTHOR}, file)
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        raise ConversionError(f"{path} cannot be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _save_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    safetensors = import_safetensors()
    try:
        safetensors.torch.save_file(weights, path, metadata={"format": "pt", "author": AUTHOR})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
