"""The files of configs/, loaded, and built without their weights taking memory or time."""

from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from deqdet import add_deqdet_config

from helpers.paths import ROOT

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
COMPLETE = [path for path in CONFIGS if not Path(path).name.startswith("Base-")]
EPOCH = 7330  # iterations: 117,266 images with boxes, 16 at a time


def load(path: str) -> CfgNode:
    """The config of a file, its path relative to the repository."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(ROOT / path))
    return cfg


@cache
def build(path: str) -> nn.Module:
    """The model of a file on the meta device, where tensors have a shape and no values."""
    cfg = load(path)
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""])
    # SwinTransformer reads its rates of drop path from a tensor.
    with torch.device("meta"), patch.object(torch, "linspace", partial(torch.linspace, device="cpu")):
        return build_model(cfg)


def value_of(cfg: CfgNode, key: str):
    """cfg.A.B of "A.B"."""
    for name in key.split("."):
        cfg = cfg[name]
    return cfg
