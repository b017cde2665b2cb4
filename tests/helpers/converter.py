"""tools/convert_checkpoint.py for the tests, and detectors made of what it writes and prints."""

import contextlib
import importlib.util
import io
import shlex
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from deqdet import add_deqdet_config
from deqdet.checkpoints import Checkpointer

from helpers import paths

GOLDEN = {name: paths.GOLDEN / name for name in ("deqdet", "sparse_rcnn")}


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_checkpoint", paths.TOOLS / "convert_checkpoint.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def run_tool(*arguments: object) -> list[str]:
    """The lines that the tool prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        load_tool().main([str(x) for x in arguments])
    return printed.getvalue().splitlines()


def make_cfg(pairs: str) -> CfgNode:
    """detectron2's and our defaults with KEY VALUE pairs as a shell would take them."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list(shlex.split(pairs) + ["MODEL.DEVICE", "cpu"])
    return cfg


class StrictCheckpointer(Checkpointer):
    """Loads a checkpoint that has all of a model, or of the part of it that begins with `part`, and nothing else."""

    def __init__(self, model: nn.Module, part: str = ""):
        super().__init__(model)
        self.part = part

    def _log_incompatible_keys(self, incompatible) -> None:
        assert not incompatible.unexpected_keys and not incompatible.incorrect_shapes
        assert not [key for key in incompatible.missing_keys if key.startswith(self.part)]


def load_converted(path: Path, pairs: str, part: str = "") -> nn.Module:
    """The model of these KEY VALUE pairs with the weights of a file, all of them and nothing else."""
    model = build_model(make_cfg(pairs))
    StrictCheckpointer(model, part).load(str(path))
    return model


def golden_weights(name: str) -> dict[str, Tensor]:
    loaded = torch.load(GOLDEN[name] / "upstream.pth", weights_only=True)
    return dict(loaded["state_dict" if name == "deqdet" else "model"])
