"""The detector that a config describes, without memory for its weights: names and shapes to compare with a file."""

import warnings

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from ..config import add_deqdet_config
from ..detector import DEQDet
from .implied import Config
from .reading import ConversionError

# What has no part in names and shapes: nothing frozen, no drop path (which needs timm), heads that divide any C.
NEUTRAL = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
    "MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS": 1,
}


class _WithoutMemory(TorchFunctionMode):
    """Within it, new parameters are on the meta device.

    `torch.device("meta")` would put everything there, but SwinTransformer reads values of a torch.linspace, and the
    values of its relative_position_index are of use.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_structure(config: Config, *, backbone_only: bool) -> dict[str, Tensor]:
    """The state dict of the detector, or of its bottom-up backbone, under the detector's names.

    The tensors are on the meta device, so without values, but for some buffers.

    Raises:
        ConversionError: no such detector can be built; says why.
    """
    cfg = get_cfg()
    add_deqdet_config(cfg)
    if backbone_only:  # either neck would do
        body = "swin" if "MODEL.SWIN.DEPTHS" in config else "resnet"
        config = config | {"MODEL.BACKBONE.NAME": f"build_{body}_channel_mapper_backbone"}
    pairs = {**config, **NEUTRAL, "MODEL.DEVICE": "cpu"}
    cfg.merge_from_list([x for pair in pairs.items() for x in pair])
    try:
        with _WithoutMemory(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch.meshgrid's, for SwinTransformer
            if backbone_only:
                module, prefix = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up, "backbone.bottom_up."
            else:
                module, prefix = DEQDet(cfg), ""
    except (ValueError, AssertionError, ArithmeticError, RuntimeError) as error:
        raise ConversionError(f"its shapes imply a detector that cannot be built: {error}") from error
    return module.state_dict(prefix=prefix)
