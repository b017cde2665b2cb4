"""The gradients of a small DEQDet, for comparing several processes with one that has the same global batch."""

import torch

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deqdet import add_deqdet_config

from helpers.paths import SHAPES_CONFIG

CONFIG = SHAPES_CONFIG
# No noise, and BatchNorm's statistics fixed: both would differ between the two set-ups.
OVERRIDES = ["MODEL.DEQDET.PERTURBATION.KIND", "none", "MODEL.DEQDET.FIX_BN_STATISTICS", True]
BOXES = {"both": [[8.0, 12.0, 40.0, 52.0], [30.0, 5.0, 60.0, 30.0]], "first": [[20.0, 20.0, 44.0, 36.0]], "none": []}
CASES = [["both", "first"], ["both", "none"], ["none", "none"]]


def build(*overrides: object) -> torch.nn.Module:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    narrow = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8]
    cfg.merge_from_list([*OVERRIDES, *narrow, *overrides])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():  # away from the initial zeros, behind which gradients would vanish
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().train()  # float32's rounding, amplified by the iteration, would hide an error of 1e-4


def batch(boxes_of: list[str]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for boxes in boxes_of:
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor(BOXES[boxes]).reshape(-1, 4)))
        instances.gt_classes = torch.arange(len(BOXES[boxes]))
        inputs.append({"image": image, "instances": instances})
    return inputs


def gradients(model: torch.nn.Module, inputs: list[dict]) -> dict[str, torch.Tensor]:
    sum(model(inputs).values()).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
