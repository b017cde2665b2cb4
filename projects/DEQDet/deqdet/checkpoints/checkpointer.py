"""detectron2's checkpointer, for .safetensors files too."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .reading import ConversionError, check_weights, read_safetensors, read_torch


class Checkpointer(DetectionCheckpointer):
    """As DetectionCheckpointer, but it also loads .safetensors files; it saves .pth files.

    It does not warn of missing counters of BatchNorm, which nothing reads and ImageNet weights do not have. (torch does
    not miss them, but detectron2 turns the BatchNorm of frozen stages into a module that would.)

    No object that a .pth file may hold beside tensors and plain Python values is built, since that can run code. The
    .pkl files of detectron2's model zoo are pickles and can: load none that you do not trust.

    Raises:
        ConversionError: in `load`, if the file is damaged or no checkpoint.
    """

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except (pickle.UnpicklingError, EOFError, KeyError, UnicodeDecodeError) as error:  # of a .pkl or .pyth file
            raise ConversionError(f"{filename} is damaged or no checkpoint ({type(error).__name__})") from error

    def _torch_load(self, f: str) -> dict:
        path = Path(f)
        if path.suffix == ".safetensors":
            return {"model": read_safetensors(path)}
        loaded = read_torch(path)
        is_checkpoint = isinstance(loaded, Mapping) and "model" in loaded
        check_weights(path, loaded["model"] if is_checkpoint else loaded, ["model"])
        return loaded

    def _load_model(self, checkpoint: dict) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if not name.endswith(".num_batches_tracked")]
        return incompatible


class CompleteCheckpointer(Checkpointer):
    """Loads only what has all of the model's weights, as an evaluation needs them.

    Raises:
        ConversionError: in `load`, also if weights are missing or have another shape.
    """

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        shapes = {name: f"{name} is {found}, not {wanted}" for name, found, wanted in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in shapes]
        if wrong := [*shapes.values(), *(f"{name} is missing" for name in missing)]:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise ConversionError(
                f"the checkpoint does not fit the model: {'; '.join(wrong[:3])}{more}. "
                "Give the config that it was trained with"
            )
