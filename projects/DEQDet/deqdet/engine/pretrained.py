"""The ImageNet weights from which a timm backbone starts in a new training."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from ..backbones import create_net, import_timm
from ..checkpoints import CheckpointError
from ..checkpoints.files import COUNTER, read_checkpoint
from ..errors import UserError
from .models import unwrap
from .relations import TIMM_BACKBONES

logger = logging.getLogger(__name__)


def check_backbone_weights(cfg: CfgNode) -> None:
    """Check before a training that the file MODEL.TIMM.WEIGHTS exists and that the image format suits the weights.

    Raises:
        UserError: the file does not exist, or MODEL.TIMM.PRETRAINED asks for weights that expect another image format
            than that of MODEL.PIXEL_MEAN, PIXEL_STD and INPUT.FORMAT. For a file, whose origin is unknown, this is
            only a warning.
    """
    if not _starts_pretrained(cfg):
        return
    timm = cfg.MODEL.TIMM
    if timm.WEIGHTS and not Path(timm.WEIGHTS).is_file():
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {timm.WEIGHTS} does not exist: give a file with timm's names (deqdet-fetch-weights "
            'makes some), or "" to start from random weights'
        )
    if problem := _describe_other_images(cfg):
        if timm.PRETRAINED:
            raise UserError(problem)
        logger.warning("%s", problem)


def load_backbone_weights(model: nn.Module, cfg: CfgNode) -> None:
    """Load the weights that MODEL.TIMM names into the backbone, unless MODEL.WEIGHTS is set, which takes precedence.

    Args:
        model: the detector, possibly wrapped in DDP.

    Raises:
        UserError: the weights cannot be downloaded or read, or do not belong to the model.
    """
    if not _starts_pretrained(cfg):
        return
    timm, detector = cfg.MODEL.TIMM, unwrap(model)
    body = detector.backbone.bottom_up.net
    weights = None
    if timm.WEIGHTS:
        try:
            weights = read_checkpoint(Path(timm.WEIGHTS)).weights
        except CheckpointError as error:
            raise UserError(f"MODEL.TIMM.WEIGHTS: {error}") from error
    net = create_net(timm.NAME, timm.OUT_INDICES, pretrained=timm.PRETRAINED, weights=weights)
    if weights is not None:
        _check_taken(net, weights, timm.WEIGHTS, timm.NAME)
    body.load_state_dict(net.state_dict())
    logger.info("The backbone %s starts from %s", timm.NAME, timm.WEIGHTS or "timm's own weights")


def _starts_pretrained(cfg: CfgNode) -> bool:
    named = cfg.MODEL.TIMM.PRETRAINED or cfg.MODEL.TIMM.WEIGHTS
    return bool(named) and cfg.MODEL.BACKBONE.NAME in TIMM_BACKBONES and not cfg.MODEL.WEIGHTS


def _check_taken(net: nn.Module, weights: Mapping[str, Tensor], path: str, name: str) -> None:
    """Check that every weight of the feature extractor comes from the file.

    timm renames the weights of some models as it loads them, and silently skips weights of others whose names do not
    match. Therefore the values are compared, regardless of names and shapes.

    Raises:
        UserError: a weight does not come from the file; names the first.
    """
    given = {_digest(value) for value in weights.values()}
    ours = {key: value for key, value in net.state_dict().items() if not key.endswith(COUNTER)}
    lacking = [key for key, value in ours.items() if _digest(value) not in given]
    if lacking:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS {path} does not hold the weights of {name}: it lacks {len(lacking)} of them, "
            f"{lacking[0]} first; give a file with timm's names of the parameters (deqdet-fetch-weights makes some)"
        )


def _digest(value: Tensor) -> bytes:
    return hashlib.sha256(value.detach().float().contiguous().view(-1).view(torch.uint8).numpy()).digest()


def _describe_other_images(cfg: CfgNode) -> str | None:
    """Describe how the image format that timm's weights expect differs from the config's; None if it does not."""
    name = cfg.MODEL.TIMM.NAME
    expected = import_timm().get_pretrained_cfg(name)
    if expected is None:
        return None
    mean, std = ([round(255 * value, 3) for value in values] for values in (expected.mean, expected.std))
    given = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    close = all(abs(a - b) < 0.5 for a, b in zip(given, [*mean, *std], strict=True))
    if close and cfg.INPUT.FORMAT == "RGB":
        return None
    return (
        f"MODEL.TIMM.NAME {name}: its weights expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD "
        f"{std}, not {cfg.INPUT.FORMAT}, {list(cfg.MODEL.PIXEL_MEAN)} and {list(cfg.MODEL.PIXEL_STD)}"
    )
