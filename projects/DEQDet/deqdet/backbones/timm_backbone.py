"""Any feature extractor of the package timm (PyTorch Image Models), under either neck.

timm is an optional dependency, imported only where it is needed.
"""

import difflib
from collections.abc import Mapping, Sequence, Set
from types import ModuleType

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN

from ..errors import UserError, one_line
from ..extras import how_to_install
from .channel_mapper import ChannelMapper
from .fpn import build_fpn

STRIDES = (4, 8, 16, 32)
# By default, models whose windows or positions depend on the image's size accept only one size. One of these arguments
# lifts the restriction; each model understands at most one of them.
ANY_SIZE: tuple[dict, ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})
PROBE = (64, 96)  # height and width, in pixels, of the image that tests a model


class TimmBackbone(Backbone):
    """A timm feature extractor as a backbone of detectron2. The level of stride 2^n has the name "res<n>"."""

    def __init__(self, *, net: nn.Module, levels: Mapping[str, ShapeSpec], channels_last: bool, frozen: Set[str]):
        """
        Args:
            net: what timm.create_model(..., features_only=True) returns: from images to a list of levels.
            levels: the channels and the stride of each level, finest first.
            channels_last: whether the levels of `net` are (B, H, W, C), as Swin's are.
            frozen: names of parameters of `net` that are not trained. Modules whose parameters are all frozen stay in
                evaluation mode, so their BatchNorm layers keep their statistics, and they drop no path.
        """
        super().__init__()
        self.net = net
        self._levels = dict(levels)
        self._channels_last = channels_last
        parameters = dict(net.named_parameters())
        for name in frozen:
            parameters[name].requires_grad_(False)
        self._frozen = [module for module in net.modules() if _is_frozen(module)]
        self.train()

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set the mode of all modules except the frozen ones."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and the stride of each level."""
        return dict(self._levels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels (B, C_l, H / s_l, W / s_l), of strides s_l, from images (B, 3, H, W)."""
        levels = self.net(images)
        if self._channels_last:
            levels = [level.permute(0, 3, 1, 2).contiguous() for level in levels]
        return dict(zip(self._levels, levels, strict=True))


def _is_frozen(module: nn.Module) -> bool:
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


def build_timm(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the model that MODEL.TIMM describes, with random weights.

    With MODEL.BACKBONE.FREEZE_AT = 0 nothing is frozen, with 1 the stem, with k + 1 everything on which the first k
    levels depend. The stem is the part before the first stage: up to the level of stride 2 if timm has one.

    Raises:
        UserError: timm is missing or does not know the model, the model lacks these levels or accepts only one image
            size, or FREEZE_AT is out of range.
    """
    options, freeze_at = cfg.MODEL.TIMM, cfg.MODEL.BACKBONE.FREEZE_AT
    net = create_net(options.NAME, options.OUT_INDICES, options.DROP_PATH_RATE, channels=input_shape.channels)
    info = net.feature_info
    levels = {}
    for channels, stride in zip(info.channels(), info.reduction(), strict=True):
        name = f"res{stride.bit_length() - 1}"
        if stride.bit_count() != 1 or name in levels:
            raise UserError(
                f"MODEL.TIMM.OUT_INDICES is {list(info.out_indices)}: the strides of these levels of {options.NAME} "
                f"are {info.reduction()}, but they must be different powers of 2"
            )
        levels[name] = ShapeSpec(channels=channels, stride=stride)
    found = _probe(net, options.NAME, input_shape.channels)
    channels_last = _is_channels_last(found, list(levels.values()), options.NAME)
    frozen = _frozen_parameters(net, found, options.NAME, freeze_at)
    return TimmBackbone(net=net, levels=levels, channels_last=channels_last, frozen=frozen)


@BACKBONE_REGISTRY.register()
def build_timm_channel_mapper_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ChannelMapper:
    """Build a timm model with a channel mapper on the levels that MODEL.TIMM.OUT_INDICES chooses."""
    return ChannelMapper.from_bottom_up(build_timm(cfg, input_shape), cfg)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a timm model with detectron2's FPN on the levels that MODEL.TIMM.OUT_INDICES chooses.

    Raises:
        UserError: MODEL.FPN.IN_FEATURES is neither empty nor the list of these levels, or a stride is not twice the one
            before it. A level that is left out would have parameters without a gradient, with which
            DistributedDataParallel fails.
    """
    bottom_up = build_timm(cfg, input_shape)
    levels = bottom_up.output_shape()
    if cfg.MODEL.FPN.IN_FEATURES not in ([], list(levels)):
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {cfg.MODEL.FPN.IN_FEATURES}: it must be {list(levels)} (or []), the levels that "
            "MODEL.TIMM.OUT_INDICES chooses"
        )
    strides = [shape.stride for shape in levels.values()]
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:], strict=False)):
        raise UserError(
            f"MODEL.TIMM.OUT_INDICES is {cfg.MODEL.TIMM.OUT_INDICES}: an FPN needs strides of which each is twice the "
            f"one before it, not {strides}"
        )
    return build_fpn(cfg, bottom_up, list(levels))


def import_timm() -> ModuleType:
    """Import timm.

    Raises:
        UserError: timm cannot be imported; the message names the extra to install.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"MODEL.TIMM needs the package timm, which cannot be imported ({one_line(error)}): {how_to_install('timm')}"
        ) from error
    return timm


def create_net(
    name: str,
    out_indices: Sequence[int] = (),
    drop_path_rate: float = 0.0,
    *,
    channels: int = 3,
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Create a feature extractor without layers beyond its last level.

    Args:
        name: name of a timm model, with or without the tag of its weights ("resnet50", "resnet50.a1_in1k").
        out_indices: timm's numbers of the levels; if empty, the last level of each of the strides 4, 8, 16 and 32.
        drop_path_rate: rate of stochastic depth; 0: the model's default.
        channels: number of channels of the images.
        pretrained: download and load timm's own weights.
        weights: a state dict with timm's names to load instead.

    Raises:
        UserError: timm is missing, or cannot create the model or load the weights; the message says why.
    """
    timm = import_timm()
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise UserError(f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know: {hint}")
    arguments = {"features_only": True, "in_chans": channels}
    if drop_path_rate > 0:
        arguments["drop_path_rate"] = drop_path_rate
    indices = tuple(out_indices) or _pyramid_indices(_create(name, **arguments), name)
    if pretrained or weights is not None:
        arguments["pretrained"] = True
    if weights is not None:
        arguments["pretrained_cfg_overlay"] = {"state_dict": dict(weights)}
    return _create(name, out_indices=indices, **arguments)


def _create(name: str, **arguments: object) -> nn.Module:
    timm = import_timm()
    for any_size in ANY_SIZE:
        try:
            return timm.create_model(name, **arguments, **any_size)
        except TypeError as error:
            if not any(argument in str(error) for argument in any_size):
                raise UserError(f"MODEL.TIMM.NAME {name} cannot be created: {one_line(error)}") from error
        except Exception as error:  # timm raises many types, mostly RuntimeError and AssertionError
            how = " with its weights" if arguments.get("pretrained") else ""
            if isinstance(error, IndexError | AssertionError) and "out_indices" in arguments:
                how += f" with the levels {list(arguments['out_indices'])} of MODEL.TIMM.OUT_INDICES"
            raise UserError(f"MODEL.TIMM.NAME {name} cannot be created{how}: {_shorten(error)}") from error
    raise AssertionError("the last of ANY_SIZE adds no argument")


def _shorten(error: Exception) -> str:
    """Shorten the message of an error, because a list of missing weights can be pages long."""
    message = one_line(error)
    return f"{message[:300]} ..." if len(message) > 300 else message or type(error).__name__


def _pyramid_indices(net: nn.Module, name: str) -> tuple[int, ...]:
    strides = [level["reduction"] for level in net.feature_info.info]
    last = {stride: index for index, stride in enumerate(strides)}
    if missing := [stride for stride in STRIDES if stride not in last]:
        raise UserError(
            f"MODEL.TIMM.NAME {name} has no level of stride {' or '.join(map(str, missing))}, only of "
            f"{', '.join(map(str, sorted(last)))}: choose another model, or levels by MODEL.TIMM.OUT_INDICES"
        )
    return tuple(last[stride] for stride in STRIDES)


def _frozen_parameters(net: nn.Module, levels: Sequence[Tensor], name: str, freeze_at: int) -> set[str]:
    """Return the names of the parameters in the stem and in the first freeze_at - 1 stages, and of unused parameters.

    Some extractors have modules beyond their last level. DistributedDataParallel would wait for their gradients.

    Args:
        levels: the output of the extractor for any image.
    """
    if freeze_at > len(levels) + 1:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: it must be an integer from 0 to {len(levels) + 1} for {name}"
        )
    frozen = {key for key, _ in net.named_parameters()} - _dependencies(net, levels)
    if freeze_at > 1:
        frozen |= _dependencies(net, levels[: freeze_at - 1])
    elif freeze_at == 1:
        frozen |= _stem(net, name) & _dependencies(net, levels[:1])
    return frozen


def _dependencies(net: nn.Module, levels: Sequence[Tensor]) -> set[str]:
    """Return the names of the parameters on which the given levels depend."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    total = sum(level.sum() for level in levels)
    gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _stem(net: nn.Module, name: str) -> set[str]:
    """Return the names of the parameters before the first level of stride 4 or more.

    timm registers the modules of an extractor in the order in which they are applied.
    """
    info, order = net.feature_info.info, [module for module, _ in net.named_modules()]
    if finer := [level["module"] for level in info if level["reduction"] < STRIDES[0]]:
        end = _last_module(order, finer[-1], name) + 1
    else:
        end = _find_module(order, info[0]["module"], name)
    return {key for key, _ in net.named_parameters() if key.rpartition(".")[0] in order[:end]}


def _find_module(order: Sequence[str], module: str, name: str) -> int:
    """Return the index of the module that timm calls `module`, under any name that an extractor gives it."""
    for found in (module, module.replace(".", "_"), f"model.{module}"):
        if found and found in order:
            return order.index(found)
    raise UserError(
        f"MODEL.BACKBONE.FREEZE_AT must be 0 for MODEL.TIMM.NAME {name}: timm does not say which of its modules belong "
        "to which stage"
    )


def _last_module(order: Sequence[str], module: str, name: str) -> int:
    """Return the index of the last module inside `module`."""
    first = _find_module(order, module, name)
    inside = f"{order[first]}."
    return max(i for i, other in enumerate(order) if i == first or other.startswith(inside))


def _probe(net: nn.Module, name: str, channels: int) -> list[Tensor]:
    """Run the extractor on a small black image in evaluation mode, and return its levels with their graph.

    Raises:
        UserError: the extractor does not accept the image.
    """
    image = torch.zeros(1, channels, *PROBE, device=next(net.parameters()).device)
    training = net.training
    try:
        with torch.enable_grad():
            return net.eval()(image)
    except Exception as error:  # models fail in many ways on an unsupported size
        raise UserError(
            f"MODEL.TIMM.NAME {name} does not take images of every size ({_shorten(error)}): choose another "
            "model"
        ) from error
    finally:
        net.train(training)


def _is_channels_last(levels: Sequence[Tensor], shapes: Sequence[ShapeSpec], name: str) -> bool:
    """Return whether the levels are (B, H, W, C), not (B, C, H, W), which no attribute of timm tells for every model.

    Raises:
        UserError: the sizes of the levels do not match their strides.
    """
    found = [tuple(level.shape[1:]) for level in levels]
    sizes = [(shape.channels, *(side // shape.stride for side in PROBE)) for shape in shapes]
    if found == sizes:
        return False
    if found == [(height, width, depth) for depth, height, width in sizes]:
        return True
    raise UserError(
        f"MODEL.TIMM.NAME {name} cannot be used: its levels have the shapes {found} for an image of {PROBE}, not "
        f"{sizes}"
    )
