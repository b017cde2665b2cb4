"""What goes into a detector and what comes out of it."""

import torch
from torch import Tensor

# Overrides for a small detector that reads two levels instead of four; with an FPN, its levels must be given too.
TWO_LEVELS = "MODEL.DEQDET.IN_FEATURES", ["p2", "p3"], "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"]
FIXED_STATISTICS = "MODEL.DEQDET.FIX_BN_STATISTICS", True, "MODEL.BACKBONE.FREEZE_AT", 2


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def strip(inputs: list[dict]) -> list[dict]:
    """As a test loader gives them, without ground truth."""
    return [{k: v for k, v in x.items() if k != "instances"} for x in inputs]
