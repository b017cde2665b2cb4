"""The range of every config key that this project reads, checked before a data set is read or a model is built.

RANGES has the condition on each single value, `relations` the conditions on several values together. The constructors
check their arguments as well, for users who build parts in Python.
"""

import argparse
import math

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..config_keys import read_key
from ..data import BOX_FORMATS, EVALUATORS, PILLOW_LIMIT
from ..decoders import DECODER_REGISTRY, SOLVER_REGISTRY, suggest_keys
from ..errors import UserError, one_line
from ..layers import REFINEMENT_LAYER_REGISTRY
from ..layers.sparse_rcnn import ATTENTIONS
from ..perturbation import KINDS
from .early_stop import METRICS
from .optimizer import CLIP_TYPES, LR_RULES
from .ranges import Range, either, integer, is_device, is_finite, named, number, one_of, refused, several
from .relations import LEVELS, RELATIONS
from .step import PRECISIONS as AMP_PRECISIONS
from .writers import WRITERS

MOST_STEPS = 10_000  # applications of f; a larger number must be a typing error
PROPOSALS = "files of proposals are pickles, which can run code"
TEXT = Range("a non-empty string", lambda value: isinstance(value, str) and value != "")
ANY_TEXT = Range("a string", lambda value: isinstance(value, str))
SWITCH = Range("True or False", lambda value: isinstance(value, bool))
NONE = Range("None", lambda value: value is None)
NORM = one_of("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
PIXEL = number(-1e6, 1e6)
WIDTH = integer(1, 65_536)  # channels
RATIO = number(0, 1)
WEIGHT = number(0)
POSITIVE = number(0, above=True)
DAMPING = number(0, 1, above=True)
SIDE = integer(1, 100_000)  # pixels
EXPECTED = Range(
    "a list of [task, metric, value, tolerance]",
    lambda value: (
        isinstance(value, list | tuple) and all(isinstance(entry, list | tuple) and len(entry) == 4 for entry in value)
    ),
)
OPTIONS = Range(
    "a section of plain values",
    lambda value: (
        isinstance(value, CfgNode)
        and all(item is None or isinstance(item, str | bool) or is_finite(item) for item in value.values())
    ),
)

RANGES: dict[str, Range] = {
    "MODEL.DEVICE": Range("cpu, cuda, cuda:N with N below the number of GPUs, or mps on a machine with it", is_device),
    "MODEL.META_ARCHITECTURE": named(META_ARCH_REGISTRY),
    "MODEL.WEIGHTS": ANY_TEXT,
    "MODEL.TRUST_PICKLE": SWITCH,
    "MODEL.LOAD_PROPOSALS": refused(False, PROPOSALS),
    "MODEL.MASK_ON": refused(False, "DEQDet finds boxes only"),
    "MODEL.KEYPOINT_ON": refused(False, "DEQDet finds boxes only"),
    "MODEL.PIXEL_MEAN": several(PIXEL, 3, 3),
    "MODEL.PIXEL_STD": several(POSITIVE, 3, 3),
    "MODEL.BACKBONE.NAME": named(BACKBONE_REGISTRY),
    "MODEL.BACKBONE.FREEZE_AT": integer(0, 100),
    "MODEL.FPN.OUT_CHANNELS": WIDTH,
    "MODEL.FPN.NORM": NORM,
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.FPN.IN_FEATURES": several(TEXT, 0, 100, distinct=True),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": several(one_of(*LEVELS), 1, distinct=True),
    "MODEL.RESNETS.NORM": NORM,
    "MODEL.RESNETS.NUM_GROUPS": WIDTH,
    "MODEL.RESNETS.WIDTH_PER_GROUP": WIDTH,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": WIDTH,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": WIDTH,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.STRIDE_IN_1X1": SWITCH,
    "MODEL.RESNETS.BASIC_BLOCKS": several(integer(1, 1000), 1, 4),
    "MODEL.SWIN.EMBED_DIM": WIDTH,
    "MODEL.SWIN.DEPTHS": several(integer(1, 1000), 1, 8),
    "MODEL.SWIN.NUM_HEADS": several(integer(1, 1000), 1, 8),
    "MODEL.SWIN.WINDOW_SIZE": integer(1, 1000),
    "MODEL.SWIN.DROP_PATH_RATE": number(0, 1, below=True),
    "MODEL.TIMM.NAME": ANY_TEXT,
    "MODEL.TIMM.OUT_INDICES": several(integer(0, 1000), 0, distinct=True),
    "MODEL.TIMM.DROP_PATH_RATE": number(0, 1, below=True),
    "MODEL.TIMM.PRETRAINED": SWITCH,
    "MODEL.TIMM.WEIGHTS": ANY_TEXT,
    "MODEL.DEQDET.NUM_CLASSES": integer(1, 100_000),
    "MODEL.DEQDET.NUM_QUERIES": integer(1, 100_000),
    "MODEL.DEQDET.HIDDEN_DIM": WIDTH,
    "MODEL.DEQDET.IN_FEATURES": several(TEXT, 1, distinct=True),
    "MODEL.DEQDET.REFINEMENT_LAYER": named(REFINEMENT_LAYER_REGISTRY),
    "MODEL.DEQDET.DECODER": named(DECODER_REGISTRY),
    "MODEL.DEQDET.NUM_LAYERS": integer(1, 1000),
    "MODEL.DEQDET.FIX_BN_STATISTICS": SWITCH,
    "MODEL.DEQDET.COMPILE": SWITCH,
    "MODEL.DEQDET.CUDA_GRAPHS": integer(0, 1000),
    "MODEL.DEQDET.NECK.KERNEL_SIZE": one_of(1, 3, 5, 7, 9, 11),
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": SWITCH,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": SWITCH,
    "MODEL.DEQDET.LOSS.FOCAL_WEIGHT": WEIGHT,
    "MODEL.DEQDET.LOSS.L1_WEIGHT": WEIGHT,
    "MODEL.DEQDET.LOSS.GIOU_WEIGHT": WEIGHT,
    "MODEL.DEQDET.LOSS.FOCAL_ALPHA": RATIO,
    "MODEL.DEQDET.LOSS.FOCAL_GAMMA": WEIGHT,
    "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT": integer(1, 10_000),
    "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE": integer(1, 10_000),
    "MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS": integer(1, 10_000),
    "MODEL.DEQDET.ADAMIXER.NUM_GROUPS": integer(1, 10_000),
    "MODEL.DEQDET.ADAMIXER.NUM_HEADS": integer(1, 10_000),
    "MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM": WIDTH,
    "MODEL.DEQDET.SPARSE_RCNN.POOLER_RESOLUTION": integer(1, 1000),
    "MODEL.DEQDET.SPARSE_RCNN.POOLER_SAMPLING_RATIO": integer(0, 1000),
    "MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM": WIDTH,
    "MODEL.DEQDET.SPARSE_RCNN.NUM_CLASS_LAYERS": integer(0, 1000),
    "MODEL.DEQDET.SPARSE_RCNN.NUM_BOX_LAYERS": integer(0, 1000),
    "MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS": integer(1, 10_000),
    "MODEL.DEQDET.SPARSE_RCNN.ATTENTION": one_of(*ATTENTIONS),
    "MODEL.DEQDET.SPARSE_RCNN.ZERO_INIT_DELTAS": SWITCH,
    "MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM": WIDTH,
    "MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER": SWITCH,
    "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS": integer(1, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS": integer(1, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION": integer(0, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_STEPS": integer(1, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING": DAMPING,
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT": integer(0, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL": integer(1, MOST_STEPS),
    "MODEL.DEQDET.EQUILIBRIUM.CHECKPOINT_SEGMENTS": SWITCH,
    "MODEL.DEQDET.SOLVER.NAME": named(SOLVER_REGISTRY, suggest_keys),
    "MODEL.DEQDET.SOLVER.OPTIONS": OPTIONS,
    "MODEL.DEQDET.SOLVER.DAMPING": DAMPING,
    "MODEL.DEQDET.SOLVER.MEMORY": integer(1, MOST_STEPS),
    "MODEL.DEQDET.SOLVER.REGULARIZATION": WEIGHT,
    "MODEL.DEQDET.SOLVER.RTOL": WEIGHT,
    "MODEL.DEQDET.SOLVER.RETURN_BEST": SWITCH,
    "MODEL.DEQDET.PERTURBATION.KIND": one_of(*KINDS),
    "MODEL.DEQDET.PERTURBATION.PROBABILITY": RATIO,
    "MODEL.DEQDET.PERTURBATION.CONTENT_SIZE": WEIGHT,
    "MODEL.DEQDET.PERTURBATION.POSITION_SIZE": WEIGHT,
    "MODEL.DEQDET.INSIGHT.PERIOD": integer(0),
    "MODEL.DEQDET.INSIGHT.NUM_IMAGES": integer(1),
    "MODEL.DEQDET.INSIGHT.POWER_ITERATIONS": integer(2, 1000),
    "DATASETS.TRAIN": several(TEXT, 0),
    "DATASETS.TEST": several(TEXT, 0),
    "DATASETS.REGISTER": several(several(TEXT, 3, 3), 0),
    "DATASETS.SKIP_BROKEN": SWITCH,
    "DATASETS.ALLOW_OUTSIDE_ROOT": SWITCH,
    "DATASETS.BOX_FORMAT": one_of(*BOX_FORMATS),
    "DATASETS.PROPOSAL_FILES_TRAIN": refused((), PROPOSALS),
    "DATASETS.PROPOSAL_FILES_TEST": refused((), PROPOSALS),
    "DATALOADER.NUM_WORKERS": integer(0, 1000),
    "DATALOADER.ASPECT_RATIO_GROUPING": SWITCH,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": SWITCH,
    "DATALOADER.REPEAT_THRESHOLD": WEIGHT,
    # detectron2's other samplers read keys that its config does not have.
    "DATALOADER.SAMPLER_TRAIN": one_of("TrainingSampler", "RepeatFactorTrainingSampler"),
    "INPUT.FORMAT": one_of("RGB", "BGR"),
    "INPUT.MAX_IMAGE_PIXELS": integer(1, PILLOW_LIMIT),
    "INPUT.AUGMENTATION": one_of("1x", "2x"),
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical", "both"),
    "INPUT.CROP.ENABLED": refused(False, "use INPUT.AUGMENTATION and INPUT.DETR_CROP"),
    "INPUT.DETR_CROP.RESIZE": several(SIDE, 1),
    "INPUT.DETR_CROP.SIZE": several(SIDE, 2, 2),
    "INPUT.MIN_SIZE_TRAIN": several(SIDE, 1),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": SIDE,
    "INPUT.MIN_SIZE_TEST": integer(0, 100_000),  # 0: images keep their size
    "INPUT.MAX_SIZE_TEST": SIDE,
    # detectron2's WarmupStepWithFixedGammaLR raises an IndexError after the last iteration.
    "SOLVER.LR_SCHEDULER_NAME": one_of("WarmupMultiStepLR", "WarmupCosineLR"),
    "SOLVER.MAX_ITER": integer(1),
    "SOLVER.BASE_LR": POSITIVE,
    "SOLVER.BASE_LR_END": WEIGHT,
    "SOLVER.BIAS_LR_FACTOR": POSITIVE,
    "SOLVER.DECODER_LR_MULTIPLIER": POSITIVE,
    "SOLVER.DECODER_DECAY_MULTIPLIER": WEIGHT,
    "SOLVER.BACKBONE_LR_MULTIPLIER": POSITIVE,
    "SOLVER.BACKBONE_NORM_LR_MULTIPLIER": POSITIVE,
    "SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER": WEIGHT,
    "SOLVER.WEIGHT_DECAY": WEIGHT,
    "SOLVER.WEIGHT_DECAY_NORM": either(WEIGHT, NONE),
    "SOLVER.WEIGHT_DECAY_BIAS": either(WEIGHT, NONE),
    "SOLVER.GAMMA": POSITIVE,
    "SOLVER.STEPS": several(integer(1), 0),
    "SOLVER.NUM_DECAYS": integer(1),
    "SOLVER.WARMUP_FACTOR": RATIO,
    "SOLVER.WARMUP_ITERS": integer(0),
    "SOLVER.WARMUP_METHOD": one_of("constant", "linear"),
    "SOLVER.RESCALE_INTERVAL": SWITCH,
    "SOLVER.CHECKPOINT_PERIOD": integer(1),
    "SOLVER.IMS_PER_BATCH": integer(1, 1_000_000),
    "SOLVER.REFERENCE_WORLD_SIZE": integer(0),
    "SOLVER.CLIP_GRADIENTS.ENABLED": SWITCH,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of(*CLIP_TYPES),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": either(POSITIVE, Range("inf", lambda value: value == math.inf)),
    "SOLVER.AMP.ENABLED": SWITCH,
    "SOLVER.AMP.PRECISION": one_of(*AMP_PRECISIONS),
    "SOLVER.EMA.ENABLED": SWITCH,
    "SOLVER.EMA.DECAY": number(0, 1, below=True),
    "SOLVER.ACCUMULATION_STEPS": integer(1, 1_000_000),
    "SOLVER.LR_RULE": one_of(*LR_RULES),
    "SOLVER.REFERENCE_BATCH": integer(0, 1_000_000),
    "SOLVER.EARLY_STOP.PATIENCE": integer(0),
    "SOLVER.EARLY_STOP.METRIC": one_of(*METRICS),
    "SOLVER.EARLY_STOP.MIN_DELTA": WEIGHT,
    "SOLVER.KEEP_CHECKPOINTS": integer(0),
    "TEST.EVAL_PERIOD": integer(0),
    "TEST.VALIDATION_LOSS": SWITCH,
    "TEST.EVALUATOR": one_of(*EVALUATORS),
    "TEST.PRECISION": one_of("float32", "bfloat16"),
    "TEST.DETECTIONS_PER_IMAGE": integer(1, 10_000_000),
    "TEST.EXPECTED_RESULTS": EXPECTED,
    "TEST.PRECISE_BN.ENABLED": SWITCH,
    "TEST.PRECISE_BN.NUM_ITER": integer(1),
    "OUTPUT_DIR": TEXT,
    "SEED": integer(-(2**31), 2**31 - 1),
    "VIS_PERIOD": integer(0),
    "WRITERS": several(one_of(*WRITERS), 0, distinct=True),
    "CUDNN_BENCHMARK": SWITCH,
    "DETERMINISTIC": one_of("", "warn", "strict"),
    "FLOAT32_PRECISION": one_of("", "medium", "high", "highest"),
}  # fmt: skip


def check_options(cfg: CfgNode) -> None:
    """Check that every value in a config is in its range, and that the values are compatible with each other.

    Raises:
        UserError: a value is out of range or incompatible; names its key, its value and the range.
    """
    check_ranges(cfg)
    for relation in RELATIONS:
        for problem in relation(cfg):
            raise UserError(problem)


def check_ranges(cfg: CfgNode) -> None:
    """Check that every single value in a config is in its range.

    Raises:
        UserError: a value is out of range; names its key, its value and the range.
    """
    for key, allowed in RANGES.items():
        value = read_key(cfg, key)
        if not allowed.holds(value):
            raise UserError(f"{key} is {one_line(repr(value))}: it must be {allowed}{allowed.suggest(value)}")


def check_processes(args: argparse.Namespace) -> None:
    """Check the numbers of processes and machines on a command line.

    Raises:
        UserError: a number is out of range; names the flag.
    """
    for flag, count in (("--num-gpus", args.num_gpus), ("--num-machines", args.num_machines)):
        if count < 1:
            raise UserError(f"{flag} is {count}: it must be an integer of at least 1")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank}: it must be from 0 to {args.num_machines - 1}, below --num-machines"
        )
