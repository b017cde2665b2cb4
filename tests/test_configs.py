"""Every file of configs/ against DESIGN: the recipe (section 4) and the numbers of parameters (section 5)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from deqdet import add_deqdet_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
COMPLETE = [path for path in CONFIGS if not Path(path).name.startswith("Base-")]
CHILDREN = [path for path in CONFIGS if "_BASE_" in yaml.safe_load((ROOT / path).read_text())]
EPOCH = 7330  # iterations: 117,266 images with boxes, 16 at a time

# Queries, P of g, P of f, and parameters in millions: the paper's figure, truncated, and DESIGN's, rounded.
MODELS = {
    "configs/deqdet_r50_100q_1x.yaml": (100, 32, 32, 61, 61.3),
    "configs/deqdet_r50_100q_1x_p64.yaml": (100, 64, 64, 69, 69.9),
    "configs/deqdet_r50_300q_2x_p64.yaml": (300, 64, 64, 69, 69.9),
}
# The same for all of MODELS: Tables 5 and 4, and DESIGN section 4.
RECIPE = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 2.5e-5,
    "SOLVER.WEIGHT_DECAY": 0.01,
    "SOLVER.DECODER_LR_MULTIPLIER": 4.0,
    "SOLVER.DECODER_DECAY_MULTIPLIER": 10.0,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WARMUP_ITERS": 500,
    "SOLVER.WARMUP_FACTOR": 0.001,
    "SOLVER.WARMUP_METHOD": "linear",
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1.0,
    "INPUT.FORMAT": "RGB",
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MAX_SIZE_TRAIN": 1333,
    "INPUT.MIN_SIZE_TEST": 800,
    "INPUT.MAX_SIZE_TEST": 1333,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 2,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.DEQDET.FIX_BN_STATISTICS": True,
    "MODEL.DEQDET.NECK.KERNEL_SIZE": 1,
    "MODEL.DEQDET.QUERIES.NORM_CONTENT": True,
    "MODEL.DEQDET.QUERIES.LEARN_BOXES": False,
    "MODEL.DEQDET.EQUILIBRIUM.USE_INIT_LAYER": True,
    "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS": 20,
    "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS": 25,
    "MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION": 2,
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_STEPS": 2,
    "MODEL.DEQDET.EQUILIBRIUM.GRADIENT_DAMPING": 1.0,
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT": 4,
    "MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL": 3,
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
SCHEDULES = {
    "1x": {
        "SOLVER.MAX_ITER": 12 * EPOCH,
        "SOLVER.STEPS": (8 * EPOCH, 11 * EPOCH),
        "INPUT.AUGMENTATION": "1x",
        "INPUT.MIN_SIZE_TRAIN": (800,),
    },
    "2x": {
        "SOLVER.MAX_ITER": 24 * EPOCH,
        "SOLVER.STEPS": (16 * EPOCH, 22 * EPOCH),
        "INPUT.AUGMENTATION": "2x",
        "INPUT.MIN_SIZE_TRAIN": tuple(range(480, 801, 32)),
        "INPUT.DETR_CROP.RESIZE": [400, 500, 600],
        "INPUT.DETR_CROP.SIZE": [384, 600],
    },
}


def load(path: str) -> CfgNode:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(ROOT / path))
    return cfg


def build(path: str) -> nn.Module:
    cfg = load(path)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    return build_model(cfg)


def value_of(cfg: CfgNode, key: str):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "_BASE_":
            yield prefix + name, value


def count_parameters(num_queries: int, points_init: int, points_refine: int) -> int:
    """DESIGN section 2 at full width on a ResNet-50, 80 classes, by hand."""
    dim, groups, hidden, classes, points_out = 256, 4, 2048, 80, 128

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    def layer(points: int) -> int:
        attention = linear(dim, 3 * dim) + linear(dim, dim) + 8
        offsets = linear(dim, groups * points * 3)
        generator = linear(dim, groups * ((dim // groups) ** 2 + points_out * points))
        mixing = generator + linear(dim * points_out, dim)
        feedforward = linear(dim, hidden) + linear(hidden, dim)
        branches = 2 * (linear(dim, dim) + 2 * dim) + linear(dim, 4) + linear(dim, classes)
        return attention + offsets + mixing + feedforward + branches + 3 * 2 * dim

    # torchvision's ResNet-50 without its classifier, and without the affine part of BatchNorm in the frozen
    # stem and res2: FrozenBatchNorm has it in buffers.
    backbone = 25_557_032 - linear(2048, 1000) - 2 * (64 + 3 * (64 + 64 + 256) + 256)
    neck = sum(linear(channels, dim) for channels in (256, 512, 1024, 2048)) + 2 * dim
    return backbone + neck + num_queries * dim + layer(points_init) + layer(points_refine)


def test_there_are_configs():
    assert set(MODELS) <= set(COMPLETE) and len(CONFIGS) > len(COMPLETE) > 3


@pytest.mark.parametrize("path", CONFIGS)
def test_it_builds(path):
    cfg, model = load(path), build(path)
    deqdet = cfg.MODEL.DEQDET
    assert cfg.MODEL.META_ARCHITECTURE == type(model).__name__ == "DEQDet"
    assert model.queries.content.weight.shape == (deqdet.NUM_QUERIES, deqdet.HIDDEN_DIM)
    assert model.max_detections == cfg.TEST.DETECTIONS_PER_IMAGE
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert type(model.decoder).__name__ == deqdet.DECODER
    if path in COMPLETE:  # the k of top-k is N
        assert cfg.TEST.DETECTIONS_PER_IMAGE == deqdet.NUM_QUERIES

    count = sum(p.numel() for p in model.parameters())
    if path in MODELS:
        queries, points_init, points_refine, truncated, rounded = MODELS[path]
        assert count == count_parameters(queries, points_init, points_refine)
        assert count // 10**6 == truncated and round(count / 10**6, 1) == rounded
    elif path.startswith("configs/quick/"):
        assert count < 3 * 10**6


@pytest.mark.parametrize("path", MODELS)
def test_the_recipe(path):
    cfg = load(path)
    expected = RECIPE | SCHEDULES["2x" if "_2x" in path else "1x"]
    assert {key: value_of(cfg, key) for key in expected} == expected
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.DEQDET.NUM_CLASSES == 80
    # Saved and evaluated after each epoch, so after the last one too.
    assert cfg.SOLVER.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == EPOCH


@pytest.mark.parametrize("path", MODELS)
def test_the_name_says_what_differs(path):
    cfg = load(path)
    queries, points_init, points_refine = MODELS[path][:3]
    adamixer = cfg.MODEL.DEQDET.ADAMIXER
    assert (adamixer.NUM_POINTS_INIT, adamixer.NUM_POINTS_REFINE) == (points_init, points_refine)
    assert cfg.MODEL.DEQDET.NUM_QUERIES == queries
    assert f"_{queries}q_" in path and ("_p64" in path) == (points_init == points_refine == 64)
    assert ("_r50_" in path) == (cfg.MODEL.RESNETS.DEPTH == 50)


@pytest.mark.parametrize("path", CHILDREN)
def test_a_child_lists_only_what_differs(path):
    own = yaml.safe_load((ROOT / path).read_text())
    cfg = load(str(Path(path).parent / own["_BASE_"]))
    for key, value in leaves(own):
        before = value_of(cfg, key)
        cfg.merge_from_list([key, value])
        assert value_of(cfg, key) != before, f"{key} is {before} already"


@pytest.mark.parametrize("path", COMPLETE)
def test_it_begins_with_its_command(path):
    lines = (ROOT / path).read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert any(f"--config-file {path}" in line for line in header)


def test_an_unknown_key_is_an_error(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {ROOT / CONFIGS[0]}\nMODEL:\n  DEQDET:\n    NUM_QUERYS: 3\n")
    cfg = get_cfg()
    add_deqdet_config(cfg)
    with pytest.raises(KeyError, match="MODEL.DEQDET.NUM_QUERYS"):
        cfg.merge_from_file(str(child))
