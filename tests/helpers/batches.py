"""What goes into a detector and what comes out of it."""

import torch
from torch import Tensor

FIXED_STATISTICS = "MODEL.DEQDET.FIX_BN_STATISTICS", True, "MODEL.BACKBONE.FREEZE_AT", 2


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def strip(inputs: list[dict]) -> list[dict]:
    """As a test loader gives them, without ground truth."""
    return [{k: v for k, v in x.items() if k != "instances"} for x in inputs]
