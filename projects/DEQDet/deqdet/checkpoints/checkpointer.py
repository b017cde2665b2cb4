"""detectron2's checkpointer, for .safetensors files too."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from .reading import ConversionError, read_safetensors, read_torch


class Checkpointer(DetectionCheckpointer):
    """As DetectionCheckpointer, but it also loads .safetensors files; it saves .pth files.

    It does not warn of missing counters of BatchNorm, which nothing reads and ImageNet weights do not have. (torch does
    not miss them, but detectron2 turns the BatchNorm of frozen stages into a module that would.)

    Raises:
        ConversionError: in `load`, if a .pth or .safetensors file is damaged, or holds other objects than tensors and
            plain Python values, which are never built, since that can run code.
    """

    def _torch_load(self, f: str) -> Any:
        path = Path(f)
        return {"model": read_safetensors(path)} if path.suffix == ".safetensors" else read_torch(path)

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
