"""detectron2's checkpointer, which writes files whole and checks them, and also loads .safetensors files."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from .files import CheckpointError, check_weights, read_safetensors, read_torch, write_text, write_torch
from .latest import TAG, Found, find_checkpoint
from .model_file import is_model_file, read_model_file, resolve_file

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Saves files whole or not at all, with a checksum, and resumes from the newest checkpoint that is whole.

    It loads .safetensors files, model files and hf:// names as well.
    A .pth file may hold tensors and plain Python values only: building other objects can run code, so they are refused.
    The .pkl files of detectron2's model zoo are pickles and can run code: load none that you do not trust.

    Missing counters of BatchNorm give no warning, since nothing reads them and ImageNet weights do not have them.
    (torch does not miss them, but detectron2 turns the BatchNorm of frozen stages into a module that would.)

    Raises:
        CheckpointError: in `load`, if the file is damaged or no checkpoint, or cannot be downloaded; in `save`, if the
            file cannot be written.
    """

    complete = False  # whether a file must have all of the model's weights

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._found: Found | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and `kwargs` as save_dir/<name>.pth, and tag that as the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_torch({"model": self.model.state_dict(), **states, **kwargs}, path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let the file "last_checkpoint" name this one."""
        write_text(last_filename_basename, Path(self.save_dir, TAG))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As DetectionCheckpointer's, but a checkpoint to resume from must be whole and fit the model.

        A collective operation: rank 0 decides which checkpoint it is.
        """
        if resume:
            self._found = self._agree_on_checkpoint()
            self.complete = self.complete or self._found is not None
        return super().resume_or_load(path, resume=resume)

    def has_checkpoint(self) -> bool:
        """Whether `resume_or_load` has found one to resume from."""
        return self._found is not None

    def get_checkpoint_file(self) -> str:
        """The one to resume from, "" if there is none."""
        return str(self._found.path) if self._found else ""

    def _agree_on_checkpoint(self) -> Found | None:
        found, error = None, None
        if comm.is_main_process():
            try:
                found = find_checkpoint(Path(self.save_dir))
            except CheckpointError as failure:
                error = str(failure)
            for warning in found.warnings if found else ():
                logger.warning("%s", warning)
        path, error = comm.all_gather((found.path if found else None, error))[0]
        if error:
            raise CheckpointError(error)
        if path is None:
            return None
        return found or Found(path, read_torch(path), ())

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
        if self._found and self._found.path == path:
            loaded = dict(self._found.content)  # detectron2 takes the entries out as it loads them
        else:
            loaded = read_torch(path)
        is_checkpoint = isinstance(loaded, Mapping) and "model" in loaded
        check_weights(path, loaded["model"] if is_checkpoint else loaded, ["model"])
        return loaded

    def _load_model(self, checkpoint: dict) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if not name.endswith(".num_batches_tracked")]
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        if not self.complete:
            return
        shapes = {name: f"{name} is {found}, not {wanted}" for name, found, wanted in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in shapes]
        if wrong := [*shapes.values(), *(f"{name} is missing" for name in missing)]:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"the checkpoint does not fit the model: {'; '.join(wrong[:3])}{more}. "
                "Give the config that it was trained with"
            )


class CompleteCheckpointer(Checkpointer):
    """Loads only a file that has all of the model's weights, as an evaluation needs them.

    Raises:
        CheckpointError: in `load`, also if weights are missing or have another shape.
    """

    complete = True
