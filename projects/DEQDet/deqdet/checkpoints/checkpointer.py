"""detectron2's checkpointer with atomic writes and checksums, which also loads model files and never runs code."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..atomic import write_text
from ..errors import list_first
from .array_pickle import read_array_pickle
from .files import (
    COUNTER,
    CheckpointError,
    check_weights,
    read_torch,
    refuse_pickle,
    write_torch,
)
from .latest import TAG, Found, find_checkpoint
from .model_file import read_entries, resolve_file

logger = logging.getLogger(__name__)

MODEL_ZOO = ("detectron2://", "catalog://")  # names of files on detectron2's own server
TRUST = (
    "if you trust whoever made it, put MODEL.TRUST_PICKLE True on the command line; else take a .pth or .safetensors "
    "file"
)


class Checkpointer(DetectionCheckpointer):
    """Saves files atomically, with a checksum, and resumes from the newest checkpoint that is intact.

    It also loads .safetensors files, model files and hf:// names, and no file runs code. A .pth file, or one with any
    other suffix, may hold only tensors and plain Python values; other objects are refused, since building them can run
    code. Of .pkl files, which are pickles, only those of detectron2's model zoo are loaded, and of these only NumPy
    arrays and plain values.

    There is no warning about missing counters of BatchNorm: nothing reads them, and ImageNet weights lack them.
    (torch tolerates that, but detectron2 turns the BatchNorm of frozen stages into a module that does not.)

    Raises:
        CheckpointError: in `load`, if the file is damaged, not a checkpoint or a pickle, or cannot be downloaded; in
            `save`, if the file cannot be written.
    """

    complete = False  # whether a file must have all of the model's weights

    def __init__(self, model: nn.Module, save_dir: str = "", *, trust_pickle: bool = False, **others: Any):
        """
        Args:
            trust_pickle: load any .pkl file as DetectionCheckpointer does, which runs the code in it.
            others: see DetectionCheckpointer.
        """
        super().__init__(model, save_dir, **others)
        self._trust_pickle = trust_pickle
        self._from_model_zoo = False  # whether the file being loaded is on detectron2's server
        self._resumed: Path | None = None  # the checkpoint to resume from
        self._content: dict | None = None  # what it holds, until it is loaded

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and `kwargs` as save_dir/<name>.pth, and tag it as the last one."""
        if not self.save_dir or not self.save_to_disk:
            return
        states = {key: item.state_dict() for key, item in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_torch({"model": self.model.state_dict(), **states, **kwargs}, path)
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of a checkpoint to the file "last_checkpoint"."""
        write_text(last_filename_basename, Path(self.save_dir, TAG))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume or load as DetectionCheckpointer does; a checkpoint to resume from must be intact and fit the model.

        A collective operation: rank 0 chooses the checkpoint.
        """
        if resume:
            found = self._agree_on_checkpoint()
            self._resumed, self._content = (found.path, found.content) if found else (None, None)
            self.complete = self.complete or found is not None
        return super().resume_or_load(path, resume=resume)

    def has_checkpoint(self) -> bool:
        """Return whether `resume_or_load` has found a checkpoint to resume from."""
        return self._resumed is not None

    def get_checkpoint_file(self) -> str:
        """Return the path of the checkpoint to resume from; "" if there is none."""
        return str(self._resumed or "")

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
        """Load a file as DetectionCheckpointer does; `path` may also be an hf:// name (see `resolve_file`)."""
        path = path or ""
        self._from_model_zoo = path.startswith(MODEL_ZOO)
        if not self._from_model_zoo:
            check_pickle(path, trusted=self._trust_pickle)  # before anything is downloaded
        check_query(path)
        return super().load(str(resolve_file(path)) if path.startswith("hf://") else path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict:
        if not filename.endswith(".pkl"):
            refuse_pickle(filename)
            return super()._load_file(filename)
        if self._from_model_zoo:
            return _as_checkpoint(filename, read_array_pickle(Path(filename)))
        check_pickle(filename, trusted=self._trust_pickle)
        try:
            return super()._load_file(filename)
        except (pickle.UnpicklingError, EOFError, KeyError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{filename} is damaged or not a checkpoint ({type(error).__name__})") from error

    def _torch_load(self, f: str) -> dict:
        path = Path(f)
        if path == self._resumed and self._content is not None:
            # It was read when it was chosen. No reference is kept, so that its tensors are freed once they are loaded.
            loaded, self._content = self._content, None
        else:
            loaded = read_entries(path)
        check_weights(path, loaded.get("model", loaded), ["model"])
        return loaded

    def _load_model(self, checkpoint: dict) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if not name.endswith(COUNTER)]
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        super()._log_incompatible_keys(incompatible)
        if not self.complete:
            self._log_part(incompatible)
            return
        shapes = {name: f"{name} is {found}, not {wanted}" for name, found, wanted in incompatible.incorrect_shapes}
        missing = [name for name in incompatible.missing_keys if name not in shapes]
        if wrong := [*shapes.values(), *(f"{name} is missing" for name in missing)]:
            raise CheckpointError(
                f"the checkpoint does not fit the model: {list_first(wrong, separator='; ')}. Give the config that it "
                "was trained with"
            )

    def _log_part(self, incompatible: Any) -> None:
        """Log which part of the model was loaded, if the file has only a part, such as a pretrained backbone."""
        without = {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}
        names = [name for name in self.model.state_dict() if not name.endswith(COUNTER)]
        loaded = [name for name in names if name not in without]
        if len(loaded) == len(names):
            return
        part = os.path.commonprefix(loaded).rpartition(".")[0]
        where = f", all in {part}" if part else ""
        counts = len(loaded), len(names)
        logger.info("Loaded %d of the model's %d tensors%s; the others keep their initial values", *counts, where)


def check_pickle(path: str, *, trusted: bool) -> None:
    """Refuse a pickle by its suffix, unless it is a .pkl that is trusted or comes from detectron2's model zoo.

    Raises:
        CheckpointError: the file is refused; says what to do.
    """
    name = path.split("?")[0]
    if not name.endswith(".pkl"):
        refuse_pickle(path)
    elif not (trusted or path.startswith(MODEL_ZOO)):
        refuse_pickle(path, TRUST)


def check_query(path: str) -> None:
    """Check that a file name has no ?query other than the one that detectron2 knows.

    Raises:
        CheckpointError: it has another query.
    """
    query = urlparse(path).query
    if query not in ("", "matching_heuristics=True", "matching_heuristics=False"):
        raise CheckpointError(f"{path} ends in ?{query}: the only option of a file is ?matching_heuristics=True")


def _as_checkpoint(filename: str, loaded: dict) -> dict:
    """Convert the content of a model zoo .pkl, in detectron2's or Caffe2's format, into a checkpoint of detectron2."""
    own_format = "model" in loaded and "__author__" in loaded
    arrays = loaded["model"] if own_format else loaded.get("blobs", loaded)  # Caffe2's detectors have "blobs"
    if not isinstance(arrays, dict):
        raise CheckpointError(f"{filename} is not a dict of arrays")
    for name, value in arrays.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise CheckpointError(f"{filename} is not a dict of arrays: its entry {name!r} is a {type(value).__name__}")
    if own_format:
        return loaded
    weights = {name: value for name, value in arrays.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


class CompleteCheckpointer(Checkpointer):
    """A Checkpointer that requires all of the model's weights, as an evaluation does.

    Raises:
        CheckpointError: in `load`, also if weights are missing or have a wrong shape.
    """

    complete = True
