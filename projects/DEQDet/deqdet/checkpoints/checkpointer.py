"""detectron2's checkpointer, which also loads .safetensors files, model files among them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .files import CheckpointError, check_weights, read_safetensors, read_torch
from .model_file import is_model_file, read_model_file, resolve_file


class Checkpointer(DetectionCheckpointer):
    """Loads .safetensors files, model files and hf:// names as well; it saves .pth files as DetectionCheckpointer does.

    A .pth file may hold tensors and plain Python values only: building other objects can run code, so they are refused.
    The .pkl files of detectron2's model zoo are pickles and can run code: load none that you do not trust.

    Missing counters of BatchNorm give no warning, since nothing reads them and ImageNet weights do not have them.
    (torch does not miss them, but detectron2 turns the BatchNorm of frozen stages into a module that would.)

    Raises:
        CheckpointError: in `load`, if the file is damaged or no checkpoint, or cannot be downloaded.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As DetectionCheckpointer's; `path` may be an hf:// name (see `resolve_file`)."""
        return super().load(str(resolve_file(path)) if path.startswith("hf://") else path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        try:
            return super()._load_file(filename)
        except (pickle.UnpicklingError, EOFError, KeyError, UnicodeDecodeError) as error:  # of a .pkl or .pyth file
            raise CheckpointError(f"{filename} is damaged or no checkpoint ({type(error).__name__})") from error

    def _torch_load(self, f: str) -> dict:
        path = Path(f)
        if path.suffix == ".safetensors":
            return {"model": read_model_file(path).weights if is_model_file(path) else read_safetensors(path)}
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
    """Loads only a file that has all of the model's weights, as an evaluation needs them.

    Raises:
        CheckpointError: in `load`, also if weights are missing or have another shape.
    """

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        shapes = {name: f"{name} is {found}, not {wanted}" for name, found, wanted in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in shapes]
        if wrong := [*shapes.values(), *(f"{name} is missing" for name in missing)]:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"the checkpoint does not fit the model: {'; '.join(wrong[:3])}{more}. "
                "Give the config that it was trained with"
            )
