"""AdamW with a separate learning rate and weight decay for the decoder, and clipping of the whole gradient."""

import logging
import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, reduce_param_groups
from detectron2.utils.events import get_event_storage, has_event_storage

from ..errors import list_first, plural

logger = logging.getLogger(__name__)

# SOLVER.LR_RULE: the factor on the learning rate for a batch that is `ratio` times SOLVER.REFERENCE_BATCH.
LR_RULES: dict[str, Callable[[float], float]] = {
    "none": lambda ratio: 1.0,
    "linear": lambda ratio: ratio,  # Goyal et al., 2017: the same progress per epoch, for SGD
    "sqrt": math.sqrt,  # Malladi et al., NeurIPS 2022: the same noise relative to the step, for Adam
}
CLIP_TYPES = ("full_model", "value", "norm")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_POSITIONS = ("relative_position_bias_table", "absolute_pos_embed")  # Swin's, which its recipes treat like norms


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build AdamW over `parameter_groups`, with the clipping of SOLVER.CLIP_GRADIENTS.

    With any type of clipping, or none, the norm of the whole gradient before clipping is recorded in the event storage
    (see `GradientClipper`).

    Raises:
        ValueError: SOLVER.CLIP_GRADIENTS.CLIP_TYPE is unknown.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE not in CLIP_TYPES:
        known = ", ".join(CLIP_TYPES)
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}: it must be one of {known}")
    if cfg.SOLVER.LR_RULE != "none":
        logger.info(
            "learning rate %g: SOLVER.BASE_LR %g is for %d images, and the rule %s scales it to %d",
            scaled_base_lr(cfg), cfg.SOLVER.BASE_LR, cfg.SOLVER.REFERENCE_BATCH, cfg.SOLVER.LR_RULE,
            cfg.SOLVER.IMS_PER_BATCH,
        )  # fmt: skip
    groups = parameter_groups(cfg, model)
    fused = has_fused_kernel({x.device for group in groups for x in group["params"]})
    optimizer = AdamW(groups, fused=True if fused else None)
    # GradScaler would leave unscaling the gradients to a fused optimizer's kernel. The hooks below need them unscaled
    # before the step, as the scaler does for any other optimizer.
    optimizer._step_supports_amp_scaling = False
    whole = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    optimizer.register_step_pre_hook(GradientClipper(model, clip.CLIP_VALUE if whole else math.inf, clip.NORM_TYPE))
    if clip.ENABLED and not whole:
        # Not detectron2's own clipping: it wraps optimizer.step, so it would run before any hook.
        optimizer.register_step_pre_hook(ParameterClipper(model, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE))
    return optimizer


def scaled_base_lr(cfg: CfgNode) -> float:
    """Scale SOLVER.BASE_LR by SOLVER.LR_RULE from SOLVER.REFERENCE_BATCH to SOLVER.IMS_PER_BATCH images.

    The config itself is not changed. A resumed training takes the learning rates from its checkpoint, so none is scaled
    twice.
    """
    solver = cfg.SOLVER
    if solver.LR_RULE == "none":
        return solver.BASE_LR
    return solver.BASE_LR * LR_RULES[solver.LR_RULE](solver.IMS_PER_BATCH / solver.REFERENCE_BATCH)


def has_fused_kernel(devices: Collection[torch.device]) -> bool:
    """Return whether to use the fused AdamW, which updates many parameters in one kernel: only on CUDA.

    PyTorch has such a kernel for CPUs too, but there the update is a small part of an iteration, and the kernel's
    different rounding would change the measured results of the recipes. A resumed training keeps the setting of its
    checkpoint.
    """
    return bool(devices) and all(device.type == "cuda" for device in devices)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Return one parameter group per pair of learning rate and weight decay, without frozen parameters.

    Both are detectron2's values (from `scaled_base_lr`, SOLVER.BIAS_LR_FACTOR, WEIGHT_DECAY, WEIGHT_DECAY_NORM and
    WEIGHT_DECAY_BIAS) times our SOLVER.DECODER_* and SOLVER.BACKBONE_* multipliers.
    """
    multipliers = dict(_multipliers(cfg, model))
    groups = []
    for group in get_default_optimizer_params(
        model,
        base_lr=scaled_base_lr(cfg),
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    ):
        for parameter in group["params"]:
            lr, decay = multipliers.get(parameter, (1.0, 1.0))
            lr, decay = group["lr"] * lr, group["weight_decay"] * decay
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return reduce_param_groups(groups)


def _multipliers(cfg: CfgNode, model: nn.Module) -> Iterator[tuple[nn.Parameter, tuple[float, float]]]:
    """Yield each parameter of decoder and backbone with its multipliers of learning rate and weight decay."""
    decoder = cfg.SOLVER.DECODER_LR_MULTIPLIER, cfg.SOLVER.DECODER_DECAY_MULTIPLIER
    backbone = cfg.SOLVER.BACKBONE_LR_MULTIPLIER
    norm = backbone * cfg.SOLVER.BACKBONE_NORM_LR_MULTIPLIER, cfg.SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if name.startswith("decoder."):
                yield parameter, decoder
            elif name.startswith("backbone.bottom_up."):
                like_norm = isinstance(module, _NORMS) or name.endswith(_POSITIONS)
                yield parameter, norm if like_norm else (backbone, 1.0)


class GradientClipper:
    """Scales all gradients by one factor, so that their joint norm is at most `max_norm`, which may be infinite.

    It runs right before the optimizer's step. By then, DDP has averaged the gradients over the ranks, and GradScaler
    has unscaled them; if a gradient overflowed, the scaler skips the step and this hook with it. The `after_backward`
    hooks of the trainer are no alternative, since DefaultTrainer never calls them: its inner trainer has its own list.

    The norm before clipping goes to the event storage as "grad_norm". Reading it synchronises with the device, but
    detectron2's trainer has read the losses just before, so only the computation of the norm remains to wait for.
    """

    def __init__(self, model: nn.Module, max_norm: float, norm_type: float = 2.0):
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._max_norm = max_norm
        self._norm_type = norm_type

    def __call__(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Clip the gradients; the signature is that of Optimizer.register_step_pre_hook.

        Raises:
            FloatingPointError: the norm is infinite or NaN. The parameters are still those of the last step.
        """
        try:
            norm: Tensor = nn.utils.clip_grad_norm_(
                self._parameters.values(), self._max_norm, self._norm_type, error_if_nonfinite=True
            )
        except RuntimeError as error:
            raise FloatingPointError(self._describe()) from error
        if has_event_storage():
            get_event_storage().put_scalar("grad_norm", norm.item())

    def _describe(self) -> str:
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        at = f" at iteration={get_event_storage().iter}" if has_event_storage() else ""
        return f"the gradient became infinite or NaN{at}, in {plural(len(bad), 'parameter')}: {list_first(bad, 5)}"


class ParameterClipper:
    """Clips the gradient of each parameter by itself, as detectron2's CLIP_TYPE "norm" and "value" do."""

    def __init__(self, model: nn.Module, clip_type: str, clip_value: float, norm_type: float):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clip_type = clip_type
        self._clip_value = clip_value
        self._norm_type = norm_type

    def __call__(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Clip the gradients; the signature is that of Optimizer.register_step_pre_hook."""
        for parameter in self._parameters:
            if self._clip_type == "value":
                nn.utils.clip_grad_value_(parameter, self._clip_value)
            else:
                nn.utils.clip_grad_norm_(parameter, self._clip_value, self._norm_type)
