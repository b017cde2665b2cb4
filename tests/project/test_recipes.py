"""The numbers of the full-size configs against docs/design.md, "Losses and recipe", and the paper's Table 5."""

import re
from pathlib import Path

import pytest

from deqdet.config_keys import flatten

from helpers.config_files import COMPLETE, EPOCH, load, value_of

NAMES = [Path(path).stem for path in COMPLETE if Path(path).parent.name == "configs"]

COMMON = {
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 2.5e-5,
    "SOLVER.BIAS_LR_FACTOR": 1.0,
    "SOLVER.WEIGHT_DECAY_NORM": None,
    "SOLVER.WEIGHT_DECAY_BIAS": None,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    # Saved and evaluated after each epoch. detectron2 does both after the last iteration too.
    "SOLVER.CHECKPOINT_PERIOD": EPOCH,
    "TEST.EVAL_PERIOD": EPOCH,
    "INPUT.FORMAT": "RGB",
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.DEQDET.NUM_CLASSES": 80,
    "MODEL.DEQDET.HIDDEN_DIM": 256,
    "MODEL.DEQDET.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER": True,
    "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS": 20,
    "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS": 25,
    "MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION": 2,
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_STEPS": 2,
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING": 1.0,
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT": 4,
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL": 3,
    "MODEL.DEQDET.SOLVER.NAME": "FixedPointIteration",
    "MODEL.DEQDET.SOLVER.RTOL": 0.0,
    "MODEL.DEQDET.PERTURBATION.KIND": "multi-step",
    "MODEL.DEQDET.PERTURBATION.PROBABILITY": 0.2,
    "MODEL.DEQDET.PERTURBATION.CONTENT_SIZE": 0.1,
    "MODEL.DEQDET.PERTURBATION.POSITION_SIZE": 25.0,
    "MODEL.DEQDET.LOSS.FOCAL_WEIGHT": 2.0,
    "MODEL.DEQDET.LOSS.L1_WEIGHT": 5.0,
    "MODEL.DEQDET.LOSS.GIOU_WEIGHT": 2.0,
    "MODEL.DEQDET.LOSS.FOCAL_ALPHA": 0.25,
    "MODEL.DEQDET.LOSS.FOCAL_GAMMA": 2.0,
}
ADAMIXER = {
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "SOLVER.WEIGHT_DECAY": 0.01,
    "SOLVER.DECODER_LR_MULTIPLIER": 4.0,
    "SOLVER.DECODER_DECAY_MULTIPLIER": 10.0,
    "SOLVER.WARMUP_ITERS": 500,
    "SOLVER.WARMUP_FACTOR": 0.001,
    "MODEL.DEQDET.REFINEMENT_LAYER": "AdaMixerLayer",
    "MODEL.DEQDET.NECK.KERNEL_SIZE": 1,
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": True,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": False,
}
SPARSE_RCNN = {
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.DECODER_LR_MULTIPLIER": 1.0,
    "SOLVER.DECODER_DECAY_MULTIPLIER": 1.0,
    "SOLVER.WARMUP_ITERS": 1000,
    "SOLVER.WARMUP_FACTOR": 0.01,
    "MODEL.DEQDET.REFINEMENT_LAYER": "SparseRCNNLayer",
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": False,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": True,
}
RESNET = {
    "SOLVER.BACKBONE_NORM_LR_MULTIPLIER": 1.0,
    "SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER": 1.0,
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
}
R50 = RESNET | {"MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl", "MODEL.RESNETS.DEPTH": 50}
R101 = RESNET | {"MODEL.WEIGHTS": "weights/resnet101.pth", "MODEL.RESNETS.DEPTH": 101}
TRAINED_NORMS = {
    "MODEL.BACKBONE.NAME": "build_resnet_channel_mapper_backbone",
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.DEQDET.FIX_BN_STATISTICS": True,
}
FROZEN_NORMS = {
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.DEQDET.FIX_BN_STATISTICS": False,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.FPN.NORM": "",
    "MODEL.FPN.FUSE_TYPE": "sum",
}
SWIN_S = {
    "SOLVER.BACKBONE_NORM_LR_MULTIPLIER": 0.1,
    "SOLVER.BACKBONE_NORM_DECAY_MULTIPLIER": 0.0,
    "MODEL.WEIGHTS": "weights/swin_small.pth",
    "MODEL.BACKBONE.NAME": "build_swin_channel_mapper_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.DEQDET.FIX_BN_STATISTICS": False,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 18, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
}
PLAIN = {"INPUT.AUGMENTATION": "1x", "INPUT.MIN_SIZE_TRAIN": (800,)}
CROPPED = {
    "INPUT.AUGMENTATION": "2x",
    "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
    "INPUT.DETR_CROP.RESIZE": [400, 500, 600],
    "INPUT.DETR_CROP.SIZE": [384, 600],
}


def epochs(last: int, *drops: int) -> dict[str, object]:
    return {"SOLVER.MAX_ITER": last * EPOCH, "SOLVER.STEPS": tuple(drop * EPOCH for drop in drops)}


SCHEDULES = {
    "1x": epochs(12, 8, 11) | PLAIN,
    "2x": epochs(24, 16, 22) | CROPPED,
    "3x": epochs(36, 24, 33) | CROPPED,
    "sparse_rcnn 300q 3x": {"SOLVER.MAX_ITER": 270_000, "SOLVER.STEPS": (210_000, 250_000)} | CROPPED,
    "sparse_rcnn 100q 3x": {"SOLVER.MAX_ITER": 270_000, "SOLVER.STEPS": (210_000, 250_000)} | CROPPED | {
        "INPUT.AUGMENTATION": "1x"
    },
}
DECODERS = {
    r"adamixer|sparse_rcnn": "StackedDecoder",
    r"rnndet|rnn_sparse_rcnn": "RecurrentDecoder",
    r"deqdet|deq_sparse_rcnn": "EquilibriumDecoder",
}

# Of configs/ablations/, under MODEL.DEQDET: what each row of Table 4 has in place of the default row's.
ABLATIONS = {
    "default": {},
    "init_layer_none": {"EQUILIBRIUM.USE_INIT_LAYER": False},
    "init_layer_p32": {"ADAMIXER.NUM_POINTS_INIT": 32},
    "extra_supervision_0": {"EQUILIBRIUM.EXTRA_SUPERVISION": 0},
    "extra_supervision_1": {"EQUILIBRIUM.EXTRA_SUPERVISION": 1},
    "rag_1": {"EQUILIBRIUM.GRADIENT_STEPS": 1},
    "rag_3": {"EQUILIBRIUM.GRADIENT_STEPS": 3},
    "rag_4": {"EQUILIBRIUM.GRADIENT_STEPS": 4},
    "supervision_m4_c4": {"EQUILIBRIUM.SUPERVISION_INTERVAL": 4},
    "supervision_m3_c3": {"EQUILIBRIUM.SUPERVISION_COUNT": 3},
    "supervision_m5_c3": {"EQUILIBRIUM.SUPERVISION_COUNT": 5},
    "perturbation_zero_step": {"PERTURBATION.KIND": "zero-step"},
    "perturbation_one_step": {"PERTURBATION.KIND": "one-step"},
    "noise_none": {"PERTURBATION.KIND": "none"},
    "noise_position_25": {"PERTURBATION.CONTENT_SIZE": 0.0},
    "noise_position_50": {"PERTURBATION.CONTENT_SIZE": 0.0, "PERTURBATION.POSITION_SIZE": 50.0},
    "noise_content_0.1": {"PERTURBATION.POSITION_SIZE": 0.0},
    "noise_content_0.2": {"PERTURBATION.CONTENT_SIZE": 0.2, "PERTURBATION.POSITION_SIZE": 0.0},
    "noise_content_0.1_position_50": {"PERTURBATION.POSITION_SIZE": 50.0},
    "noise_content_0.2_position_25": {"PERTURBATION.CONTENT_SIZE": 0.2},
    "noise_content_0.2_position_50": {"PERTURBATION.CONTENT_SIZE": 0.2, "PERTURBATION.POSITION_SIZE": 50.0},
    "train_steps_15": {"EQUILIBRIUM.TRAIN_STEPS": 15},
    "train_steps_25": {"EQUILIBRIUM.TRAIN_STEPS": 25},
}


def expected(name: str) -> dict[str, object]:
    """Return the settings that the name of a file stands for, by docs/design.md, "Losses and recipe"."""
    detector, backbone, queries, schedule, dagger = re.fullmatch(
        r"(\w+?)_(r50|r101|swin_s)_(\d+)q_(\dx)(_p64)?", name
    ).groups()
    detector, positional, _ = detector.partition("_positional")
    sparse_rcnn = "sparse_rcnn" in detector
    bodies = {"r50": R50, "r101": R101, "swin_s": SWIN_S}
    norms = {} if backbone == "swin_s" else FROZEN_NORMS if sparse_rcnn else TRAINED_NORMS
    points = {
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT": 64 if dagger or queries == "300" else 32,
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE": 64 if dagger else 32,
    }
    return {
        **COMMON,
        **(SPARSE_RCNN if sparse_rcnn else ADAMIXER | points),
        **({"MODEL.DEQDET.SPARSE_RCNN.ATTENTION": "positional"} if positional else {}),
        **bodies[backbone],
        **norms,
        **SCHEDULES.get(f"sparse_rcnn {queries}q {schedule}" if sparse_rcnn else schedule, SCHEDULES[schedule]),
        "MODEL.DEQDET.DECODER": next(d for pattern, d in DECODERS.items() if re.fullmatch(pattern, detector)),
        "MODEL.DEQDET.NUM_LAYERS": 8 if name.startswith("rnndet_r50_300q_3x") else 6,
        "MODEL.DEQDET.NUM_QUERIES": int(queries),
        "TEST.DETECTIONS_PER_IMAGE": int(queries),
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe(name):
    cfg, values = load(f"configs/{name}.yaml"), expected(name)
    assert {key: value_of(cfg, key) for key in values} == values


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_the_1x_recipe_but_for_its_row(name):
    """Every key. The default row has 64 sampling points in the initialization layer."""
    base, row = load("configs/deqdet_r50_100q_1x.yaml"), load(f"configs/ablations/{name}.yaml")
    changes = {"ADAMIXER.NUM_POINTS_INIT": 64} | ABLATIONS[name]
    for key, value in changes.items():
        base.merge_from_list([f"MODEL.DEQDET.{key}", value])
    assert dict(flatten(row)) == dict(flatten(base))
