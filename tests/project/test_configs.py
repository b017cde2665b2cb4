"""Every file of configs/: it builds, says what it is and how to run it, and lists only what differs from its base."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from detectron2.config import get_cfg

from deqdet import add_deqdet_config
from deqdet.checkpoints.known_weights import KNOWN_WEIGHTS

from helpers.config_files import COMPLETE, CONFIGS, build, load, value_of
from helpers.paths import ROOT

SHAPES_BACKBONE = "weights/shapes_backbone.pth"
CHILDREN = [path for path in CONFIGS if "_BASE_" in yaml.safe_load((ROOT / path).read_text())]
# By file: the paper's tables and the AP there; None where the paper has no such row.
ROWS = {
    "adamixer_r50_100q_1x": ("Table 1 and 2", 42.7),
    "adamixer_r50_100q_1x_p64": ("Table 1 and 2", 42.7),
    "adamixer_r50_300q_1x": ("Table 3", 44.1),
    "adamixer_r50_300q_2x": ("Table 3", 46.7),
    "adamixer_r50_300q_3x": ("Table 3", 47.0),
    "adamixer_r101_300q_3x": ("Table 3", 48.0),
    "adamixer_swin_s_300q_3x": ("Table 3", 51.3),
    "rnndet_r50_100q_1x": ("Table 1 and 2", 43.4),
    "rnndet_r50_300q_3x": ("Table 3", 48.1),
    "rnndet_r50_300q_3x_p64": ("Table 3", 48.4),
    "deqdet_r50_100q_1x": ("Table 1 and 2", 45.3),
    "deqdet_r50_100q_1x_p64": ("Table 1 and 2", 46.0),
    "deqdet_r50_300q_1x": ("Table 3", 46.6),
    "deqdet_r50_300q_2x": ("Table 3", 48.6),
    "deqdet_r50_300q_2x_p64": ("Table 3", 49.5),
    "deqdet_r101_300q_2x": ("Table 3", 49.5),
    "deqdet_r101_300q_2x_p64": ("Table 3", 50.1),
    "deqdet_swin_s_300q_2x": ("Table 3", 52.7),
    "sparse_rcnn_r50_100q_1x": ("Table 1", 37.9),
    "sparse_rcnn_r50_100q_3x": None,
    "sparse_rcnn_r50_300q_3x": ("Table 3 and 6", 45.0),
    "sparse_rcnn_r101_300q_3x": ("Table 3", 46.4),
    "rnn_sparse_rcnn_r50_300q_3x": None,
    "sparse_rcnn_positional_r50_300q_3x": None,
    "rnn_sparse_rcnn_positional_r50_300q_3x": None,
    "deq_sparse_rcnn_positional_r50_300q_2x": None,
    "deq_sparse_rcnn_positional_r50_300q_3x": None,
    "deq_sparse_rcnn_r50_300q_2x": ("Table 6", 47.0),
    "deq_sparse_rcnn_r50_300q_3x": ("Table 6", 47.5),
}

# Of configs/ablations/: the part of Table 4 (nothing for the row that all parts share) and the AP there.
ABLATIONS = {
    "default": ("", 45.5),
    "init_layer_none": ("a", 45.2),
    "init_layer_p32": ("a", 45.3),
    "extra_supervision_0": ("b", 44.7),
    "extra_supervision_1": ("b", 45.1),
    "rag_1": ("c", 41.9),
    "rag_3": ("c", 45.5),
    "rag_4": ("c", 45.7),
    "supervision_m4_c4": ("d", 45.4),
    "supervision_m3_c3": ("d", 45.1),
    "supervision_m5_c3": ("d", 45.2),
    "perturbation_zero_step": ("e", 44.9),
    "perturbation_one_step": ("e", 45.1),
    "noise_none": ("f", 44.3),
    "noise_position_25": ("f", 45.4),
    "noise_position_50": ("f", 45.5),
    "noise_content_0.1": ("f", 45.0),
    "noise_content_0.2": ("f", 45.2),
    "noise_content_0.1_position_50": ("g", 45.5),
    "noise_content_0.2_position_25": ("g", 45.2),
    "noise_content_0.2_position_50": ("g", 45.2),
    "train_steps_15": ("h", 45.1),
    "train_steps_25": ("h", 45.3),
}


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        elif name != "_BASE_":
            yield prefix + name, value


def header(path: str) -> list[str]:
    """The lines of the comment that a file begins with."""
    lines = (ROOT / path).read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def comment_of(path: str) -> str:
    return " ".join(line.removeprefix("#").strip() for line in header(path))


@pytest.mark.parametrize("folder, rows", [("configs", ROWS), ("ablations", ABLATIONS)], ids=["tables 1-3", "table 4"])
def test_every_row_of_the_paper_has_a_file(folder, rows):
    assert {Path(path).stem for path in COMPLETE if Path(path).parent.name == folder} == set(rows)


@pytest.mark.parametrize("path", CONFIGS)
def test_it_builds(path):
    cfg, model = load(path), build(path)
    deqdet = cfg.MODEL.DEQDET
    assert cfg.MODEL.META_ARCHITECTURE == type(model).__name__ == "DEQDet"
    assert type(model.decoder).__name__ == deqdet.DECODER
    assert model.queries.content.weight.shape == (deqdet.NUM_QUERIES, deqdet.HIDDEN_DIM)
    assert model.max_detections == cfg.TEST.DETECTIONS_PER_IMAGE
    if path in COMPLETE:  # the k of top-k is N
        assert cfg.TEST.DETECTIONS_PER_IMAGE == deqdet.NUM_QUERIES
    if path.startswith("configs/quick/"):
        assert sum(p.numel() for p in model.parameters()) < 4 * 10**6


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
    name = str(Path(path).relative_to("configs").with_suffix(""))
    assert any(f"deqdet-train --config-file {name} " in line + " " for line in header(path))


@pytest.mark.parametrize("name", ROWS)
def test_it_begins_with_the_papers_row(name):
    comment = comment_of(f"configs/{name}.yaml")
    assert "Train it on 8 GPUs with 2 images each: deqdet-train" in comment
    if ROWS[name] is None:
        assert "The paper has no such row" in comment and "we have not trained it" in comment
        return
    tables, ap = ROWS[name]
    epochs = {"1x": 12, "2x": 24, "3x": 36}[re.search(r"_(\dx)", name)[1]]
    assert comment.startswith(f"{tables}, ")
    assert f"AP {ap} on COCO val2017 after {epochs} epochs" in comment
    assert ("with 300 queries" in comment) == ("_300q_" in name)
    assert "(paper; not trained by us)" in comment


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_begins_with_the_papers_row(name):
    part, ap = ABLATIONS[name]
    comment = comment_of(f"configs/ablations/{name}.yaml")
    assert comment.startswith(f"Table 4{part}, ")
    result = f"AP {ap} on COCO val2017 after 12 epochs (paper; not trained by us)."
    assert f"{result} Train it on 8 GPUs with 2 images each: deqdet-train" in comment


@pytest.mark.parametrize("path", [path for path in CONFIGS if load(path).MODEL.WEIGHTS == SHAPES_BACKBONE])
def test_a_pretrained_backbone_says_how_it_is_made(path):
    assert Path(path).stem.endswith("_pretrained")
    assert f"#   deqdet-pretrain-backbone --output {SHAPES_BACKBONE}" in header(path)


def test_every_quick_detector_has_the_pretrained_start():
    """The twins of the six detectors differ from them in the start alone, but for the positional attention."""
    names = ["deqdet", "rnndet", "adamixer", "deq_sparse_rcnn", "rnn_sparse_rcnn", "sparse_rcnn"]
    for name in names:
        expected = load(f"configs/quick/{name}_shapes.yaml")
        for kind in ["", "_positional"] if "sparse" in name else [""]:
            found = load(f"configs/quick/{name}{kind}_shapes_pretrained.yaml")
            expected.MODEL.WEIGHTS, expected.OUTPUT_DIR = SHAPES_BACKBONE, found.OUTPUT_DIR
            if "sparse" in name:
                expected.MODEL.DEQDET.SPARSE_RCNN.ZERO_INIT_DELTAS = True
                expected.MODEL.DEQDET.SPARSE_RCNN.ATTENTION = "positional" if kind else "plain"
            assert found == expected, (name, kind)


def test_every_detector_has_the_start_from_imagenet():
    """On photographs, the six detectors differ as on shapes, in decoder and layer alone."""
    for name in ["rnndet", "adamixer", "deq_sparse_rcnn", "rnn_sparse_rcnn", "sparse_rcnn"]:
        for kind in ["", "_positional"] if "sparse" in name else [""]:
            expected = load("configs/quick/deqdet_photos_mobilenet.yaml")
            found = load(f"configs/quick/{name}{kind}_photos_mobilenet.yaml")
            on_shapes = load(f"configs/quick/{name}{kind}_shapes_pretrained.yaml")
            expected.OUTPUT_DIR = found.OUTPUT_DIR
            for key in ["DECODER", "REFINEMENT_LAYER", "SPARSE_RCNN", "QUERIES"]:
                expected.MODEL.DEQDET[key] = on_shapes.MODEL.DEQDET[key]
            if "sparse" in name:
                expected.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
                expected.MODEL.FPN.OUT_CHANNELS = on_shapes.MODEL.FPN.OUT_CHANNELS
            assert found == expected, (name, kind)


@pytest.mark.parametrize("path", CONFIGS)
def test_a_converted_backbone_says_how_it_is_made(path):
    """In the file that names it."""
    weights = yaml.safe_load((ROOT / path).read_text()).get("MODEL", {}).get("WEIGHTS", "")
    if weights == SHAPES_BACKBONE:
        return  # this one is not converted, see above
    if not weights.startswith("weights/"):
        assert weights == "" or weights.startswith("detectron2://ImageNetPretrained/torchvision/R-50.pkl")
        return
    (command,) = [line for line in header(path) if "deqdet-convert-checkpoint" in line]
    source, result = command.split()[-2:]
    assert result == weights
    assert any(line.endswith("/" + source) and "https://" in line for line in header(path))


@pytest.mark.parametrize("path", [path for path in CONFIGS if "TIMM" in (ROOT / path).read_text()])
def test_weights_of_timm_say_how_they_are_fetched(path):
    """In the file that names them, for the model that the config names."""
    weights = yaml.safe_load((ROOT / path).read_text())["MODEL"]["TIMM"].get("WEIGHTS", "")
    commands = [line for line in header(path) if "deqdet-fetch-weights" in line]
    if not weights:
        assert not commands
        return
    (command,) = commands
    name, flag, output = command.split()[-3:]
    assert (flag, output) == ("--output", weights)
    assert KNOWN_WEIGHTS[name].timm_name == load(path).MODEL.TIMM.NAME


def test_a_backbone_from_scratch_is_the_same_network():
    """The pair of configs that shows what ImageNet weights are worth differs in how the training starts alone."""
    pretrained, scratch = (load(f"configs/quick/deqdet_photos_mobilenet{x}.yaml") for x in ("", "_scratch"))
    different = {key for key, value in leaves(pretrained) if value_of(scratch, key) != value}
    assert different == {
        "MODEL.TIMM.WEIGHTS", "MODEL.DEQDET.FIX_BN_STATISTICS", "SOLVER.BACKBONE_LR_MULTIPLIER", "OUTPUT_DIR",
    }  # fmt: skip


def test_an_unknown_key_is_an_error(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {ROOT / CONFIGS[0]}\nMODEL:\n  DEQDET:\n    NUM_QUERYS: 3\n")
    cfg = get_cfg()
    add_deqdet_config(cfg)
    with pytest.raises(KeyError, match="MODEL.DEQDET.NUM_QUERYS"):
        cfg.merge_from_file(str(child))
