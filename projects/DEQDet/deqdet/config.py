"""Every config key that DEQDet adds to Detectron2's, with the paper's symbol where it has one."""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode as CN

logger = logging.getLogger(__name__)

BASE = "_BASE_"  # the key in a config file with the files that it inherits from
DEFAULT_SOLVER = "FixedPointIteration"
# The sections that accept any key: options of solvers, and keys that a user's own modules read.
OPEN_SECTIONS = ("MODEL.DEQDET.SOLVER.OPTIONS", "MODEL.DEQDET.PLUGIN")


def add_deqdet_config(cfg: CN) -> None:
    """Add DEQDet's keys to a detectron2 config in place, with the values of the paper's Table 5.

    Only NUM_POINTS_INIT has another value in Table 1's DEQDet; its default is that of Table 1. docs/config.md gives the
    reason for each default.
    """
    _add_model_keys(cfg)
    _add_timm_keys(cfg)
    _add_layer_keys(cfg.MODEL.DEQDET)
    _add_equilibrium_keys(cfg.MODEL.DEQDET)
    _add_training_keys(cfg)
    _add_determinism_key(cfg)
    _add_precision_keys(cfg.SOLVER)
    _add_averaging_keys(cfg.SOLVER)
    _add_evaluation_keys(cfg)


def merge_overrides(cfg: CN, pairs: Sequence[str]) -> None:
    """Put KEY VALUE pairs into a config in place, as merge_from_list does, but allow new keys in open sections.

    A pair that names another solver drops the options of the present one, which would not fit. If the key is an open
    section itself, the value replaces the whole section: OPTIONS "{}" empties it.

    Args:
        pairs: alternating keys and values; a key in OPEN_SECTIONS need not exist yet.

    Raises:
        AssertionError, KeyError, ValueError: as CfgNode.merge_from_list.
    """
    named = dict(zip(pairs[::2], pairs[1::2], strict=True)).get("MODEL.DEQDET.SOLVER.NAME")
    if named is not None:
        _drop_options_of_another_solver(cfg.MODEL.DEQDET.SOLVER, CN._decode_cfg_value(named))
    nodes = dict(zip(OPEN_SECTIONS, (cfg.MODEL.DEQDET.SOLVER.OPTIONS, cfg.MODEL.DEQDET.PLUGIN), strict=True))
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        section, _, name = key.rpartition(".")
        if section in OPEN_SECTIONS:
            nodes[section][name] = CN._decode_cfg_value(value)
        elif key in OPEN_SECTIONS and isinstance(values := CN._decode_cfg_value(value), dict):
            nodes[key].clear()
            nodes[key].update(values)
        else:
            cfg.merge_from_list([key, value])


def merge_file(values: dict, merged: dict, prefix: str = "") -> None:
    """Put the values of a config file over those of its bases, in place.

    As in `merge_overrides`, naming another solver drops the bases' options, and an empty open section empties that of
    the bases.

    Args:
        values: the file's values, as parsed from YAML.
        merged: the values of its bases.
        prefix: the section that both belong to, with a trailing dot.

    Raises:
        ValueError: a section would replace a value.
    """
    if prefix == "MODEL.DEQDET.SOLVER." and "NAME" in values:
        _drop_options_of_another_solver(merged, values["NAME"])
    for key, value in values.items():
        if not isinstance(value, dict) or key not in merged or (not value and f"{prefix}{key}" in OPEN_SECTIONS):
            merged[key] = value
        elif isinstance(merged[key], dict):
            merge_file(value, merged[key], f"{prefix}{key}.")
        else:
            raise ValueError(f"{prefix}{key} is a section here, but one value in the file that {BASE} names")


def _drop_options_of_another_solver(section: dict, name: object) -> None:
    """Empty OPTIONS in MODEL.DEQDET.SOLVER, in place, if the section is about to name another solver."""
    present, options = section.get("NAME", DEFAULT_SOLVER), section.get("OPTIONS")
    if options and name != present:
        told = dict(options) if isinstance(options, dict) else options
        logger.warning("MODEL.DEQDET.SOLVER.OPTIONS %s of %s are dropped, since NAME is now %s", told, present, name)
        section["OPTIONS"] = type(section)(new_allowed=True) if isinstance(section, CN) else {}


def _add_model_keys(cfg: CN) -> None:
    cfg.MODEL.DEQDET = deqdet = CN()
    deqdet.NUM_CLASSES = 80
    deqdet.NUM_QUERIES = 100  # N
    deqdet.HIDDEN_DIM = 256  # C: channels of the neck's levels and of a query's content
    deqdet.IN_FEATURES = ["p2", "p3", "p4", "p5"]  # the levels that the decoder reads, finest first
    deqdet.REFINEMENT_LAYER = "AdaMixerLayer"  # a name in REFINEMENT_LAYER_REGISTRY
    deqdet.DECODER = "EquilibriumDecoder"  # a name in DECODER_REGISTRY
    deqdet.NUM_LAYERS = 6  # T of StackedDecoder and RecurrentDecoder, including the initialization layer

    # Any keys for your own layers, decoders and backbones: MODEL.DEQDET.PLUGIN.NUM_POINTS 8.
    deqdet.PLUGIN = CN(new_allowed=True)

    # BatchNorm of the backbone: keep the statistics of the checkpoint, and train only the affine part (except in
    # stages that MODEL.BACKBONE.FREEZE_AT freezes). Needs MODEL.RESNETS.NORM "BN".
    deqdet.FIX_BN_STATISTICS = False

    # Basic blocks in res2..res5 of build_basic_resnet_channel_mapper_backbone, a narrow ResNet for CPUs.
    cfg.MODEL.RESNETS.BASIC_BLOCKS = [1, 1, 1, 1]

    # detectron2's SwinTransformer, which has no config keys of its own; the defaults are Swin-S.
    # MODEL.BACKBONE.FREEZE_AT applies.
    cfg.MODEL.SWIN = CN()
    cfg.MODEL.SWIN.EMBED_DIM = 96
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 18, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3  # above 0, this needs the package timm

    deqdet.NECK = CN()
    deqdet.NECK.KERNEL_SIZE = 1  # k of the channel mapper's convolutions: 1 (the paper) or 3 (its released weights)

    deqdet.QUERIES = CN()
    deqdet.QUERIES.NORM_CONTENT = True  # LayerNorm without affine part on the initial content
    deqdet.QUERIES.LEARN_BOXES = False  # False: every initial box is the whole image, and is not learned

    # Each weight applies to both the matching cost and the loss (Table 5).
    deqdet.LOSS = CN()
    deqdet.LOSS.FOCAL_WEIGHT = 2.0  # lambda_focal
    deqdet.LOSS.L1_WEIGHT = 5.0  # lambda_l1, of xyxy coordinates divided by the image's size
    deqdet.LOSS.GIOU_WEIGHT = 2.0  # lambda_giou
    deqdet.LOSS.FOCAL_ALPHA = 0.25
    deqdet.LOSS.FOCAL_GAMMA = 2.0

    # Compile every layer except the first with torch.compile. The first image then takes at least ten seconds longer.
    deqdet.COMPILE = False
    # At test time on a GPU, record the decoder as one CUDA graph per image size, for this many sizes; those after
    # them run without a graph.
    deqdet.CUDA_GRAPHS = 0
    # float32 or bfloat16. With bfloat16, matrix products and features at test time are in bfloat16; positions, boxes,
    # level weights and the solver's arithmetic stay in float32.
    cfg.TEST.PRECISION = "float32"


def _add_timm_keys(cfg: CN) -> None:
    # For build_timm_channel_mapper_backbone and build_timm_fpn_backbone. MODEL.BACKBONE.FREEZE_AT applies: 1 freezes
    # the stem, k + 1 everything that the first k levels depend on.
    cfg.MODEL.TIMM = CN()
    cfg.MODEL.TIMM.NAME = ""  # a timm model, e.g. "resnet50", or with the tag of its weights, "resnet50.a1_in1k"
    # Indices of the levels in timm; []: the last level of each stride 4, 8, 16 and 32.
    cfg.MODEL.TIMM.OUT_INDICES = []
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0  # of stochastic depth; 0: the model's default, which is mostly 0
    # The initial weights of a training without MODEL.WEIGHTS: timm's own, which are downloaded, or those in a file with
    # timm's parameter names (see deqdet-fetch-weights). With neither, random weights.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TIMM.WEIGHTS = ""


def _add_layer_keys(deqdet: CN) -> None:
    deqdet.ADAMIXER = CN()
    deqdet.ADAMIXER.NUM_POINTS_INIT = 32  # P of the initialization layer g
    deqdet.ADAMIXER.NUM_POINTS_REFINE = 32  # P of the refinement layer f
    deqdet.ADAMIXER.NUM_OUT_POINTS = 128  # P_out
    deqdet.ADAMIXER.NUM_GROUPS = 4  # G
    deqdet.ADAMIXER.NUM_HEADS = 8  # of the attention among queries
    deqdet.ADAMIXER.FEEDFORWARD_DIM = 2048

    deqdet.SPARSE_RCNN = CN()
    deqdet.SPARSE_RCNN.POOLER_RESOLUTION = 7  # cells of RoIAlign along a side
    deqdet.SPARSE_RCNN.POOLER_SAMPLING_RATIO = 2
    deqdet.SPARSE_RCNN.DYNAMIC_DIM = 64  # channels between the two dynamic convolutions
    deqdet.SPARSE_RCNN.NUM_CLASS_LAYERS = 1  # hidden layers of the class tower
    deqdet.SPARSE_RCNN.NUM_BOX_LAYERS = 3  # hidden layers of the box tower
    deqdet.SPARSE_RCNN.NUM_HEADS = 8  # of the attention among queries
    deqdet.SPARSE_RCNN.FEEDFORWARD_DIM = 2048
    # Attention among queries: "plain" (Sparse R-CNN's, the paper's Appendix F) or "positional" (AdaMixer's). The two
    # parts of "positional" can be chosen alone: "embedding" of positions, and "overlap" of boxes.
    deqdet.SPARSE_RCNN.ATTENTION = "plain"
    # True: the last layer of the box tower starts at 0, so that an untrained layer moves no box, as in AdaMixer.
    deqdet.SPARSE_RCNN.ZERO_INIT_DELTAS = False


def _add_equilibrium_keys(deqdet: CN) -> None:
    deqdet.EQUILIBRIUM = CN()
    deqdet.EQUILIBRIUM.USE_INIT_LAYER = True  # False: f starts at the initial queries (Table 4a, first row)
    deqdet.EQUILIBRIUM.TRAIN_STEPS = 20  # T_train: applications of f after g while training
    deqdet.EQUILIBRIUM.TEST_STEPS = 25  # T_infer: applications of f after g at test time
    deqdet.EQUILIBRIUM.EXTRA_SUPERVISION = 2  # h: supervised applications of f right after g, with gradient
    deqdet.EQUILIBRIUM.GRADIENT_STEPS = 2  # k of the refinement-aware gradient; 1 is JFB
    deqdet.EQUILIBRIUM.GRADIENT_DAMPING = 1.0  # lambda of the phantom gradient; 1 is the paper's (no damping)
    deqdet.EQUILIBRIUM.SUPERVISION_COUNT = 4  # m of Omega = {1, C, 2C, ..., mC, T_train} (Eq. 12)
    deqdet.EQUILIBRIUM.SUPERVISION_INTERVAL = 3  # C of Omega
    # True: the k-step segments of Omega run one by one and are recomputed in the backward pass, so that memory does
    # not grow with Omega. False: all segments run in one batch, which is faster.
    deqdet.EQUILIBRIUM.CHECKPOINT_SEGMENTS = False

    deqdet.SOLVER = CN()  # at test time; training uses plain iteration
    deqdet.SOLVER.NAME = DEFAULT_SOLVER  # a name in SOLVER_REGISTRY: this one, "Anderson" or "Broyden"
    # Options of the solver by the upper-case names of its fields, e.g. OPTIONS: {WINDOW: 3} for your own solver with a
    # field `window`; they take precedence over the three keys below.
    deqdet.SOLVER.OPTIONS = CN(new_allowed=True)
    deqdet.SOLVER.DAMPING = 1.0  # beta of FixedPointIteration and Anderson: how far y goes towards f(y); 1: no damping
    deqdet.SOLVER.MEMORY = 4  # m, history_size: iterates that Anderson combines, rank-one terms that Broyden keeps
    deqdet.SOLVER.REGULARIZATION = 1e-6  # of Anderson's least-squares problem, whose columns have norm 1
    # The relative residual ||f(y) - y|| / ||f(y)|| at which an image stops; 0: all TEST_STEPS are taken.
    deqdet.SOLVER.RTOL = 0.0
    deqdet.SOLVER.RETURN_BEST = False  # True: f(y) of the iterate y with the smallest residual, not of the last one

    deqdet.PERTURBATION = CN()
    deqdet.PERTURBATION.KIND = "multi-step"  # multi-step (the paper's), one-step, zero-step (Table 4e) or none
    deqdet.PERTURBATION.PROBABILITY = 0.2  # v, for the content and the position each
    deqdet.PERTURBATION.CONTENT_SIZE = 0.1  # sigma_q, relative to the content's norm
    deqdet.PERTURBATION.POSITION_SIZE = 25.0  # sigma_p, pixels per corner coordinate; suits 800-pixel images


def _add_training_keys(cfg: CN) -> None:
    # Load a MODEL.WEIGHTS that is a pickle (.pkl) although reading it can run code. Only the command line can set this
    # key, not a config file. The .pkl files of detectron2:// and catalog:// need no trust: see deqdet.checkpoints.
    cfg.MODEL.TRUST_PICKLE = False

    cfg.DATASETS.REGISTER = []  # COCO-format sets to register: [[name, json file, image root], ...]
    # True: unusable images and annotations without a usable box are left out, with a warning that says how many.
    # False: a set with such faults is refused before anything starts.
    cfg.DATASETS.SKIP_BROKEN = False
    # True: a file_name in an annotation file may lead out of the image root, with ".." or as an absolute path.
    cfg.DATASETS.ALLOW_OUTSIDE_ROOT = False
    # The box format of the sets in REGISTER: xywh (COCO's: left, top, width, height, in pixels), xyxy (two corners),
    # xywh_relative or xyxy_relative (divided by the image's width and height). check: as xywh, but a set whose boxes
    # seem to have another format is refused.
    cfg.DATASETS.BOX_FORMAT = "check"
    cfg.INPUT.MAX_IMAGE_PIXELS = 100_000_000  # larger images are refused before anything starts; at most 178,956,970
    cfg.INPUT.AUGMENTATION = "1x"  # a policy in deqdet.data.augmentation
    cfg.INPUT.DETR_CROP = CN()
    cfg.INPUT.DETR_CROP.RESIZE = [400, 500, 600]  # short sides before the crop of the 2x policy, pixels
    cfg.INPUT.DETR_CROP.SIZE = [384, 600]  # smallest and largest side of that crop, pixels

    cfg.SOLVER.DECODER_LR_MULTIPLIER = 4.0  # of the layers g and f, relative to BASE_LR
    cfg.SOLVER.DECODER_DECAY_MULTIPLIER = 10.0  # relative to WEIGHT_DECAY
    cfg.SOLVER.BACKBONE_LR_MULTIPLIER = 1.0  # of the backbone without the neck, relative to BASE_LR
    cfg.SOLVER.BACKBONE_NORM_LR_MULTIPLIER = 1.0  # of the backbone's normalization layers, relative to its other layers
    cfg.SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER = 1.0  # the same for the decay; 0 for Swin
    # The paper decays normalization layers like all others (None); detectron2's default is 0.
    cfg.SOLVER.WEIGHT_DECAY_NORM = None
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model", which detectron2 does not have, clips the norm over all parameters.

    # Every PERIOD iterations, the convergence to the equilibrium is measured on the first images of DATASETS.TRAIN and
    # recorded in metrics.json and TensorBoard (see deqdet.engine.insight). 0: never.
    cfg.MODEL.DEQDET.INSIGHT = CN()
    cfg.MODEL.DEQDET.INSIGHT.PERIOD = 0
    cfg.MODEL.DEQDET.INSIGHT.NUM_IMAGES = 4
    cfg.MODEL.DEQDET.INSIGHT.POWER_ITERATIONS = 20  # of the Jacobian's spectral radius


def _add_determinism_key(cfg: CN) -> None:
    # GPU operations that add numbers in no fixed order: "" runs them, "strict" refuses those without a deterministic
    # implementation, and "warn" runs them with a warning. On a CPU, the seed determines everything anyway.
    cfg.DETERMINISTIC = ""


def _add_precision_keys(solver: CN) -> None:
    # The precision of convolutions and matrix products in training with detectron2's SOLVER.AMP.ENABLED: bfloat16 (GPUs
    # since Ampere, CPUs), or float16 with a scaled loss (older GPUs). Evaluation depends only on TEST.PRECISION.
    solver.AMP.PRECISION = "bfloat16"


def _add_averaging_keys(solver: CN) -> None:
    # An exponential moving average of the weights, evaluated and saved in addition to them, and used in model files.
    solver.EMA = CN()
    solver.EMA.ENABLED = False
    # The average's weight in each update; after n steps at most (1 + n) / (10 + n). 0.9998 averages about 5,000 steps.
    solver.EMA.DECAY = 0.9998
    # n: a batch of IMS_PER_BATCH images goes through the model in n parts, whose gradients add up. This changes memory
    # and time, but not the optimizer's batch.
    solver.ACCUMULATION_STEPS = 1
    # How BASE_LR, which is for REFERENCE_BATCH images, is scaled to IMS_PER_BATCH: none, linear (times the ratio) or
    # sqrt (times its square root).
    solver.LR_RULE = "none"
    solver.REFERENCE_BATCH = 0  # images; 0: unknown, in which case LR_RULE must be none


def _add_evaluation_keys(cfg: CN) -> None:
    # The training ends after this many evaluations in a row without an improvement of METRIC; 0: it never ends early.
    cfg.SOLVER.EARLY_STOP = CN()
    cfg.SOLVER.EARLY_STOP.PATIENCE = 0
    # A box AP on the first set in DATASETS.TEST (AP, AP50, AP75, APs, APm, APl), or validation_loss, which must fall.
    cfg.SOLVER.EARLY_STOP.METRIC = "AP"
    cfg.SOLVER.EARLY_STOP.MIN_DELTA = 0.0  # an improvement must exceed this; in AP points (0 to 100), or of the loss
    # The number of newest checkpoints to keep, of those saved every SOLVER.CHECKPOINT_PERIOD; 0: all.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0

    # True: evaluations in training also compute the training losses on DATASETS.TEST (see deqdet.engine.validation).
    cfg.TEST.VALIDATION_LOSS = False
    # The library that computes AP: pycocotools, or faster-coco-eval, a faster one with the same results (extra
    # "fast-eval").
    cfg.TEST.EVALUATOR = "pycocotools"

    # Tracking services that receive the metrics too: any of wandb and mlflow (extras of these names).
    cfg.WRITERS = []
