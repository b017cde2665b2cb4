"""Conditions on several config values together; `options` has those on single values."""

from collections.abc import Callable, Iterator, Sequence

from detectron2.config import CfgNode

from ..decoders import build_solver
from ..errors import one_line

LEVELS = {"stem": "p2", "res2": "p2", "res3": "p3", "res4": "p4", "res5": "p5"}  # ResNet stages and their neck outputs
RESNET_MAPPER_BACKBONES = ("build_basic_resnet_channel_mapper_backbone", "build_resnet_channel_mapper_backbone")
MAPPER_BACKBONES = (
    *RESNET_MAPPER_BACKBONES,
    "build_swin_channel_mapper_backbone",
    "build_timm_channel_mapper_backbone",
)
RESNET_FPN_BACKBONES = ("build_basic_resnet_fpn_backbone", "build_resnet_fpn_backbone")
FPN_BACKBONES = (*RESNET_FPN_BACKBONES, "build_swin_fpn_backbone", "build_timm_fpn_backbone")
TIMM_BACKBONES = ("build_timm_channel_mapper_backbone", "build_timm_fpn_backbone")


def _check_schedule(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        yield f"SOLVER.STEPS is {solver.STEPS}: each step must be later than the one before it"
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and solver.MAX_ITER in solver.STEPS:
        yield f"SOLVER.STEPS is {solver.STEPS}: no step may be SOLVER.MAX_ITER ({solver.MAX_ITER}), leave it out"
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        yield f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}: it must be at most SOLVER.BASE_LR ({solver.BASE_LR})"


def _check_batch(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    if solver.IMS_PER_BATCH % solver.ACCUMULATION_STEPS:
        yield (
            f"SOLVER.ACCUMULATION_STEPS is {solver.ACCUMULATION_STEPS}: it must divide SOLVER.IMS_PER_BATCH "
            f"({solver.IMS_PER_BATCH}), the images of an optimizer step"
        )
    if solver.LR_RULE != "none" and solver.REFERENCE_BATCH == 0:
        yield (
            f"SOLVER.LR_RULE is {solver.LR_RULE}: give SOLVER.REFERENCE_BATCH, the number of images that "
            "SOLVER.BASE_LR is for"
        )
    if solver.LR_RULE != "none" and solver.REFERENCE_WORLD_SIZE > 0:
        yield (
            f"SOLVER.LR_RULE is {solver.LR_RULE}: it must be none with SOLVER.REFERENCE_WORLD_SIZE "
            f"({solver.REFERENCE_WORLD_SIZE}), which scales the learning rate too"
        )


def _check_sizes(cfg: CfgNode) -> Iterator[str]:
    sizes = cfg.INPUT
    if sizes.DETR_CROP.SIZE[0] > sizes.DETR_CROP.SIZE[1]:
        yield f"INPUT.DETR_CROP.SIZE is {sizes.DETR_CROP.SIZE}: the smallest side must come first"
    ordered = len(sizes.MIN_SIZE_TRAIN) == 2 and sizes.MIN_SIZE_TRAIN[0] <= sizes.MIN_SIZE_TRAIN[1]
    if sizes.MIN_SIZE_TRAIN_SAMPLING == "range" and not ordered:
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes.MIN_SIZE_TRAIN}: with INPUT.MIN_SIZE_TRAIN_SAMPLING range it must be two "
            "values, the smallest first"
        )


def _check_hidden_dim(cfg: CfgNode) -> Iterator[str]:
    deqdet, backbone = cfg.MODEL.DEQDET, cfg.MODEL.BACKBONE.NAME
    divisors = {}
    if deqdet.REFINEMENT_LAYER == "AdaMixerLayer":
        divisors["MODEL.DEQDET.ADAMIXER.NUM_GROUPS"] = deqdet.ADAMIXER.NUM_GROUPS
        divisors["MODEL.DEQDET.ADAMIXER.NUM_HEADS"] = deqdet.ADAMIXER.NUM_HEADS
        divisors["the features of the sine embedding"] = 8
    if deqdet.REFINEMENT_LAYER == "SparseRCNNLayer":
        divisors["MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS"] = deqdet.SPARSE_RCNN.NUM_HEADS
        if deqdet.SPARSE_RCNN.ATTENTION in ("embedding", "positional"):
            divisors["the features of the sine embedding"] = 8
    if backbone in MAPPER_BACKBONES:
        divisors["the groups of the channel mapper's GroupNorm"] = 32
    for name, divisor in divisors.items():
        if deqdet.HIDDEN_DIM % divisor:
            yield f"MODEL.DEQDET.HIDDEN_DIM is {deqdet.HIDDEN_DIM}: it must be a multiple of {divisor} ({name})"
    if backbone in FPN_BACKBONES and cfg.MODEL.FPN.OUT_CHANNELS != deqdet.HIDDEN_DIM:
        yield (
            f"MODEL.FPN.OUT_CHANNELS is {cfg.MODEL.FPN.OUT_CHANNELS}: it must be MODEL.DEQDET.HIDDEN_DIM "
            f"({deqdet.HIDDEN_DIM})"
        )


def _check_levels(cfg: CfgNode) -> Iterator[str]:
    resnets, fpn, backbone = cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.BACKBONE.NAME
    basic = backbone.startswith("build_basic_resnet_")
    stages = ["stem", *(f"res{2 + i}" for i in range(len(resnets.BASIC_BLOCKS) if basic else 4))]
    if basic or backbone.startswith("build_resnet_"):
        if missing := [name for name in resnets.OUT_FEATURES if name not in stages]:
            yield f"MODEL.RESNETS.OUT_FEATURES has {missing}: with MODEL.RESNETS.BASIC_BLOCKS it may have {stages}"
    if backbone in RESNET_FPN_BACKBONES:
        if not fpn.IN_FEATURES or not set(fpn.IN_FEATURES) <= set(resnets.OUT_FEATURES):
            yield (
                f"MODEL.FPN.IN_FEATURES is {fpn.IN_FEATURES}: it must be one or more of MODEL.RESNETS.OUT_FEATURES "
                f"({', '.join(resnets.OUT_FEATURES)})"
            )
    levels = _levels(cfg)
    unknown = [name for name in cfg.MODEL.DEQDET.IN_FEATURES if levels and name not in levels]
    if unknown:
        yield f"MODEL.DEQDET.IN_FEATURES has {unknown}: the levels of the backbone are {', '.join(levels)}"


def _levels(cfg: CfgNode) -> list[str]:
    """Return the output levels of the backbone, or an empty list if they are not known here."""
    resnets, backbone = cfg.MODEL.RESNETS, cfg.MODEL.BACKBONE.NAME
    if resnets.RES5_DILATION != 1:
        return []
    if backbone in RESNET_MAPPER_BACKBONES:
        return sorted({LEVELS[name] for name in resnets.OUT_FEATURES})
    if backbone in RESNET_FPN_BACKBONES:
        last = ["p6"] if backbone == "build_resnet_fpn_backbone" else []
        return sorted({LEVELS[name] for name in cfg.MODEL.FPN.IN_FEATURES}) + last
    if backbone.startswith("build_swin_"):
        return [f"p{2 + i}" for i in range(len(cfg.MODEL.SWIN.DEPTHS))]
    return []


def _check_backbone(cfg: CfgNode) -> Iterator[str]:
    resnets, swin, freeze_at = cfg.MODEL.RESNETS, cfg.MODEL.SWIN, cfg.MODEL.BACKBONE.FREEZE_AT
    is_swin = cfg.MODEL.BACKBONE.NAME.startswith("build_swin_")
    is_resnet = cfg.MODEL.BACKBONE.NAME.startswith("build_resnet_")
    if is_swin and len(swin.NUM_HEADS) != len(swin.DEPTHS):
        yield f"MODEL.SWIN.NUM_HEADS is {swin.NUM_HEADS}: it must have a value for each of MODEL.SWIN.DEPTHS"
    for index, heads in enumerate(swin.NUM_HEADS if is_swin else []):
        channels = swin.EMBED_DIM * 2**index
        if channels % heads:
            yield (
                f"MODEL.SWIN.NUM_HEADS is {swin.NUM_HEADS}: {heads} heads do not divide the {channels} channels of "
                f"stage {index + 1} (MODEL.SWIN.EMBED_DIM {swin.EMBED_DIM}, doubled by each stage)"
            )
    most = len(swin.DEPTHS) + 1 if is_swin else 5
    if (is_swin or "resnet" in cfg.MODEL.BACKBONE.NAME) and freeze_at > most:
        yield f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}: it must be an integer from 0 to {most} for this backbone"
    if is_resnet and resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS != 64:
        yield f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}: it must be 64 for depth {resnets.DEPTH}"
    if cfg.MODEL.DEQDET.FIX_BN_STATISTICS and resnets.NORM != "BN" and "resnet" in cfg.MODEL.BACKBONE.NAME:
        yield f"MODEL.DEQDET.FIX_BN_STATISTICS is True: MODEL.RESNETS.NORM must be BN then, not {resnets.NORM!r}"


def _check_timm(cfg: CfgNode) -> Iterator[str]:
    timm, backbone = cfg.MODEL.TIMM, cfg.MODEL.BACKBONE.NAME
    if backbone in TIMM_BACKBONES and not timm.NAME:
        yield f'MODEL.TIMM.NAME is "": it must name a model of timm for MODEL.BACKBONE.NAME {backbone}'
    if backbone not in TIMM_BACKBONES and timm.NAME:
        yield f"MODEL.TIMM.NAME is {timm.NAME}: MODEL.BACKBONE.NAME must be {' or '.join(TIMM_BACKBONES)} then"
    if not timm.NAME and timm.PRETRAINED:
        yield "MODEL.TIMM.PRETRAINED is True: MODEL.TIMM.NAME must name the model then"
    if not timm.NAME and timm.WEIGHTS:
        yield f"MODEL.TIMM.WEIGHTS is {timm.WEIGHTS}: MODEL.TIMM.NAME must name the model then"
    if timm.PRETRAINED and timm.WEIGHTS:
        yield f"MODEL.TIMM.PRETRAINED is True: it must be False if MODEL.TIMM.WEIGHTS names a file ({timm.WEIGHTS})"
    if list(timm.OUT_INDICES) != sorted(timm.OUT_INDICES):
        yield f"MODEL.TIMM.OUT_INDICES is {timm.OUT_INDICES}: the finest level must come first"


def _check_decoder(cfg: CfgNode) -> Iterator[str]:
    deqdet, steps = cfg.MODEL.DEQDET, cfg.MODEL.DEQDET.EQUILIBRIUM
    if deqdet.DECODER == "RecurrentDecoder" and deqdet.NUM_LAYERS < 2:
        yield f"MODEL.DEQDET.NUM_LAYERS is {deqdet.NUM_LAYERS}: it must be at least 2 for a RecurrentDecoder"
    if deqdet.DECODER in ("RecurrentDecoder", "StackedDecoder") and deqdet.INSIGHT.PERIOD > 0:
        yield (
            f"MODEL.DEQDET.INSIGHT.PERIOD is {deqdet.INSIGHT.PERIOD}: it must be 0 for MODEL.DEQDET.DECODER "
            f"{deqdet.DECODER}, which has no equilibrium to look at"
        )
    if deqdet.DECODER == "EquilibriumDecoder":
        if steps.SUPERVISION_COUNT * steps.SUPERVISION_INTERVAL > steps.TRAIN_STEPS:
            yield (
                f"MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT is {steps.SUPERVISION_COUNT}: times SUPERVISION_INTERVAL "
                f"({steps.SUPERVISION_INTERVAL}) it must be at most TRAIN_STEPS ({steps.TRAIN_STEPS})"
            )
        if not steps.USE_INIT_LAYER and steps.EXTRA_SUPERVISION == 0:
            yield (
                "MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION is 0: it must be at least 1 if USE_INIT_LAYER is False, "
                "because the solving path carries no gradient to the initial queries"
            )


def _check_solver(cfg: CfgNode) -> Iterator[str]:
    options = cfg.MODEL.DEQDET.SOLVER
    if options.NAME == "Anderson" and options.MEMORY < 2 and "HISTORY_SIZE" not in options.OPTIONS:
        yield f"MODEL.DEQDET.SOLVER.MEMORY is {options.MEMORY}: it must be at least 2 for Anderson"
    try:
        build_solver(cfg)
    except ValueError as error:
        yield one_line(f"MODEL.DEQDET.SOLVER.OPTIONS is {dict(options.OPTIONS)}: {error}")


def _check_early_stop(cfg: CfgNode) -> Iterator[str]:
    options, test = cfg.SOLVER.EARLY_STOP, cfg.TEST
    if options.PATIENCE == 0:
        return
    if test.EVAL_PERIOD == 0 or not cfg.DATASETS.TEST:
        missing = "DATASETS.TEST" if test.EVAL_PERIOD else "TEST.EVAL_PERIOD"
        yield f"SOLVER.EARLY_STOP.PATIENCE is {options.PATIENCE}, but nothing is evaluated in training: set {missing}"
    if options.METRIC == "validation_loss" and not test.VALIDATION_LOSS:
        yield "SOLVER.EARLY_STOP.METRIC is validation_loss, but TEST.VALIDATION_LOSS is False: set it to True"


def _only_for_deqdet(relation: Callable[[CfgNode], Iterator[str]]) -> Callable[[CfgNode], Iterator[str]]:
    def check_deqdet(cfg: CfgNode) -> Iterator[str]:
        return relation(cfg) if cfg.MODEL.META_ARCHITECTURE == "DEQDet" else iter(())

    return check_deqdet


def _check_determinism(cfg: CfgNode) -> Iterator[str]:
    if cfg.DETERMINISTIC and cfg.CUDNN_BENCHMARK:
        yield f"CUDNN_BENCHMARK is True: it must be False with DETERMINISTIC {cfg.DETERMINISTIC}, or DETERMINISTIC \"\""
    if cfg.DETERMINISTIC and cfg.SEED < 0:
        yield f"SEED is {cfg.SEED}: with DETERMINISTIC {cfg.DETERMINISTIC} it must be a number of at least 0"


# Each function yields one message per violated condition.
RELATIONS: Sequence[Callable[[CfgNode], Iterator[str]]] = (
    _check_schedule,
    _check_batch,
    _check_sizes,
    _check_determinism,
    _check_early_stop,
    _check_timm,
    *map(_only_for_deqdet, (_check_backbone, _check_hidden_dim, _check_levels, _check_decoder, _check_solver)),
)
