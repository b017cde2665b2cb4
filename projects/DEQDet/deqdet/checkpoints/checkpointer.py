"""detectron2's checkpointer, for .safetensors files too."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .reading import read_safetensors


class Checkpointer(DetectionCheckpointer):
    """As DetectionCheckpointer, but it also loads .safetensors files; it saves .pth files.

    It does not warn of missing counters of BatchNorm, which nothing reads and ImageNet weights do not have. (torch does
    not miss them, but detectron2 turns the BatchNorm of frozen stages into a module that would.)
    """

    def _torch_load(self, f: str) -> dict:
        if f.endswith(".safetensors"):
            return {"model": read_safetensors(Path(f))}
        return super()._torch_load(f)

    def _load_model(self, checkpoint: dict) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if not name.endswith(".num_batches_tracked")]
        return incompatible
