"""The examples of docs/extending.md, used as a user would: from outside the package, by --plugin and nothing else.

Each runs in a process of its own, so that what it registers is not there for other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from helpers.paths import ROOT

HERE = Path(__file__).parent
EXAMPLES = sorted(path.name for path in HERE.glob("*.py") if not path.name.startswith("test_"))
# A run on eight generated images, two iterations long.
RUN = """
DATASETS.TRAIN ('shapes_seed1_8',) DATASETS.TEST ('shapes_seed2_4',) MODEL.DEQDET.NUM_CLASSES 8
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0 DATALOADER.FILTER_EMPTY_ANNOTATIONS False
SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.CHECKPOINT_PERIOD 2 SEED 1
MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 3 INPUT.FORMAT RGB
"""
DRIVER = """
import importlib, json, sys
for name, *words in json.loads(sys.argv[1]):
    importlib.import_module(f"deqdet.tools.{name}").main(words)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    datasets = str(tmp_path_factory.mktemp("datasets"))
    return {**os.environ, "DETECTRON2_DATASETS": datasets, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def use(tmp_path, environment):
    """use([tool, word, ...], ...): call tools in turn, in one process and an empty folder; returns what they print."""

    def call(*commands):
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return call


@pytest.fixture
def config(tmp_path, small_cfg):
    """config(name, "KEY", "value", ...): a config file of a small detector with these keys."""

    def write(name, *pairs):
        path = tmp_path / f"{name}.yaml"
        path.write_text(small_cfg(*RUN.split(), *pairs).dump())
        return path

    return write


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "extending.md").read_text()
    assert len(EXAMPLES) == 5
    for name in EXAMPLES:
        assert (HERE / name).read_text().rstrip() in page, f"docs/extending.md shows another {name}"


def test_a_layer_trains_and_decodes_in_every_decoder(use, config, tmp_path):
    plugin, folders, commands = HERE / "center_layer.py", [], []
    for decoder in ("EquilibriumDecoder", "RecurrentDecoder", "StackedDecoder"):
        pairs = ["MODEL.DEQDET.REFINEMENT_LAYER", "CenterLayer", "MODEL.DEQDET.DECODER", decoder]
        common = ["--plugin", plugin, "--config-file", config(decoder, *pairs, "MODEL.DEQDET.NUM_LAYERS", "3")]
        out = tmp_path / f"out_{decoder}"
        folders.append(out)
        commands += [
            ["train_net", *common, "OUTPUT_DIR", out],
            ["analyze_model", *common, "--output", out / "cost.json"],
            ["demo", "--plugin", plugin, "--model", out / "model_final.safetensors", "--input",
             ROOT / "docs" / "detections.jpg", "--output", out / "seen"],
        ]  # fmt: skip
    printed = use(*commands)
    for out in folders:
        assert (out / "seen" / "detections.jpg").is_file()
        losses = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
        assert any("bbox/AP" in line for line in losses)
        cost = json.loads((out / "cost.json").read_text())
        assert cost["flops"]["linear"]["per_step"] > 0 and cost["parameters"]["total"] > 0
    assert printed.count("one step") == 3


def test_a_layer_is_compared_and_converted(use, config, tmp_path):
    plugin = HERE / "center_layer.py"
    file = config("center", "MODEL.DEQDET.REFINEMENT_LAYER", "CenterLayer")
    use(["compare", file, "--plugin", plugin, "--output", tmp_path / "table", "--eval-period", "2"])
    assert "CenterLayer" in (tmp_path / "table" / "comparison.md").read_text()
    trained = torch.load(tmp_path / "table" / "center-seed1" / "model_final.pth", weights_only=True)["model"]
    assert any(name.startswith("decoder.refinement.read") for name in trained)


def test_a_foreign_checkpoint_of_the_layer(use, config, tmp_path):
    """Another implementation's names become ours, with all values; the printed config has the layer."""
    narrow = ["MODEL.BACKBONE.NAME", "build_resnet_channel_mapper_backbone", "MODEL.RESNETS.DEPTH", "50"]
    narrow += ["MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"]
    file = config("wide", "MODEL.DEQDET.REFINEMENT_LAYER", "CenterLayer", *narrow, "SOLVER.MAX_ITER", "1")
    plugin, out = HERE / "center_layer.py", tmp_path / "out"
    use(["train_net", "--plugin", plugin, "--config-file", file, "OUTPUT_DIR", out])
    ours = torch.load(out / "model_final.pth", weights_only=True)["model"]
    names = [("backbone.", "body."), ("queries.content.weight", "query.weight"), ("queries.boxes", "query.boxes")]
    names += [("decoder.initialization.", "center_head.first."), ("decoder.refinement.", "center_head.shared.")]
    names += [(".attention.", ".mha."), (".feedforward.", ".ffn."), (".feedforward_norm.", ".norm.")]
    names += [(".move.", ".box."), (".classify.", ".cls.")]
    theirs = {}
    for name, value in ours.items():
        new = name
        for our, their in names:
            if not name.startswith("backbone.") or our == "backbone.":
                new = new.replace(our, their)
        theirs[new] = value
    torch.save(theirs, tmp_path / "theirs.pth")
    printed = use(["convert_checkpoint", "--plugin", plugin, tmp_path / "theirs.pth", tmp_path / "ours.pth"])
    assert "kind: center (guessed from the keys)" in printed
    assert "MODEL.DEQDET.REFINEMENT_LAYER CenterLayer" in printed
    converted = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert converted.keys() == ours.keys()
    assert all(torch.equal(converted[name], value) for name, value in ours.items())


def test_a_solver_appears_in_the_tables(use, config, tmp_path):
    plugin, file = HERE / "heavy_ball.py", config("plain")
    common = ["--plugin", plugin, "--config-file", file]
    use(
        ["train_net", *common, "OUTPUT_DIR", tmp_path / "out", "MODEL.DEQDET.SOLVER.NAME", "HeavyBall",
         "MODEL.DEQDET.SOLVER.OPTIONS.MOMENTUM", "0.2"],
        ["evaluate_steps", *common, "--output", tmp_path / "steps", "--steps", "1", "3", "--rtols", "0.5", "--solvers",
         "plain", "heavyball", "HeavyBall(momentum=0.5)", "MODEL.WEIGHTS", tmp_path / "out" / "model_final.pth"],
    )  # fmt: skip
    tables = (tmp_path / "steps" / "steps.md").read_text()
    assert "HeavyBall(momentum=0.1)" in tables and "HeavyBall(momentum=0.5)" in tables
    assert json.loads((tmp_path / "steps" / "steps.json").read_text())["results"][1]["name"] == "heavyball"


def test_a_decoder_and_a_backbone(use, config, tmp_path):
    commands = []
    for plugin, *pairs in (
        ("two_pass_decoder", "MODEL.DEQDET.DECODER", "TwoPassDecoder"),
        ("patch_backbone", "MODEL.BACKBONE.NAME", "build_patch_channel_mapper_backbone"),
    ):
        common, out = ["--plugin", HERE / f"{plugin}.py", "--config-file", config(plugin, *pairs)], tmp_path / plugin
        commands += [
            ["train_net", *common, "OUTPUT_DIR", out],
            ["analyze_model", *common],
            ["publish", out / "model_final.pth", *common, "--output", out / "own.safetensors"],
        ]
    assert use(*commands).count("one step") == 2
    assert all((tmp_path / plugin / "own.safetensors").is_file() for plugin in ("two_pass_decoder", "patch_backbone"))


def test_a_decoder_with_a_walk_of_its_own(use, config, tmp_path):
    """It is no EquilibriumDecoder; training with insight, CUDA graphs, the pictures of the demo and the export work."""
    plugin, model = HERE / "walking_decoder.py", tmp_path / "out" / "model_final.safetensors"
    pairs = ["MODEL.DEQDET.DECODER", "WalkingDecoder", "MODEL.DEQDET.INSIGHT.PERIOD", "1", "INPUT.MAX_SIZE_TEST", "64"]
    common = ["--plugin", plugin, "--model", model]
    printed = use(
        ["train_net", "--plugin", plugin, "--config-file", config("walking", *pairs), "OUTPUT_DIR", tmp_path / "out",
         "MODEL.DEQDET.CUDA_GRAPHS", "1"],
        ["demo", *common, "--input", ROOT / "docs" / "detections.jpg", "--output", tmp_path / "seen", "--steps", "4",
         "--solver", "anderson2", "--refinement-strip", "--convergence-plot"],
        ["export_model", *common, "--output", tmp_path / "walking.onnx", "--solver", "Anderson(history_size=3)",
         "--rtol", "0.1"],
    )  # fmt: skip
    figures = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    assert any("equilibrium/residual" in line for line in figures) and "with PyTorch after 3 steps" in printed
    names = {path.name for path in (tmp_path / "seen").iterdir()}
    assert names == {"detections.jpg", "detections_strip.png", "detections_convergence.png"}
    props = {x.key: json.loads(x.value) for x in onnx.load(tmp_path / "walking.step.onnx").metadata_props}
    assert (props["solver"], props["history_size"], props["rtol"], props["steps"]) == ("anderson", 3, 0.1, 3)


def test_a_model_file_without_its_plugin(use, config, tmp_path, environment):
    """One line that says what is missing, since the file cannot bring the code."""
    common = ["--plugin", HERE / "center_layer.py", "--config-file"]
    file = config("center", "MODEL.DEQDET.REFINEMENT_LAYER", "CenterLayer")
    use(["train_net", *common, file, "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", "1"])
    model = tmp_path / "out" / "model_final.safetensors"
    command = [sys.executable, "-m", "deqdet.tools.train_net", "--model", model, "--eval-only"]
    done = subprocess.run([str(x) for x in command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: MODEL.DEQDET.REFINEMENT_LAYER is 'CenterLayer'" in done.stderr and "--plugin" in done.stderr
    assert "Traceback" not in done.stderr
