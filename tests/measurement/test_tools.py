"""The tools' command lines: a model file in place of a config, as main() and as scripts get it."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

from detectron2.modeling import build_model

from deqdet.checkpoints import write_model_file
from deqdet.data.shapes import CLASSES
from deqdet.tools import analyze_model, evaluate_steps, report

from helpers.engine_toy import IN_PROCESS
from helpers.paths import TOOLS

pytestmark = IN_PROCESS


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """Where the generated images go: in one process their set is registered once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def trained(monkeypatch, datasets, tmp_path, small_cfg, stir) -> dict[str, list[str]]:
    """The words that say which model a tool is about, once by its config and once by its model file."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    cfg = small_cfg("MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TRAIN", (), "DATASETS.TEST", ("shapes_seed43_3",),
                    "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
                    "OUTPUT_DIR", str(tmp_path / "trained"))  # fmt: skip
    (tmp_path / "small.yaml").write_text(cfg.dump())
    (tmp_path / "trained").mkdir()
    torch.manual_seed(0)
    model = build_model(cfg)
    stir(model, size=0.01)
    torch.save({"model": model.state_dict()}, tmp_path / "trained" / "model_final.pth")
    file = tmp_path / "small.safetensors"
    write_model_file(file, weights=model.state_dict(), cfg=cfg, class_names=CLASSES)
    return {"config": ["--config-file", str(tmp_path / "small.yaml")], "file": ["--model", str(file)]}


def test_a_model_file_gives_the_same_figures_as_its_config_and_checkpoint(trained, tmp_path):
    figures = {}
    for name, words in trained.items():
        output = tmp_path / f"steps_{name}"
        options = ["--output", str(output), "--solvers", "plain", "--steps", "2", "5", "--rtols", "0.5", "--opts"]
        evaluate_steps.main([*words, *options, "DATASETS.TEST", "('shapes_seed43_3',)"])
        figures[name] = json.loads((output / "steps.json").read_text())
        cost, drawn = tmp_path / f"{name}.json", tmp_path / f"report_{name}"
        analyze_model.main([*words, "--steps", "2", "--output", str(cost)])
        figures[name]["cost"] = json.loads(cost.read_text())
        weights = ["MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth")] if name == "config" else []
        report.main([*words, "--images", "2", "--steps", "3", *weights, "OUTPUT_DIR", str(drawn)])
        figures[name]["medians"] = json.loads((drawn / "residual.json").read_text())
        assert cv2.imread(str(drawn / "detections.png")).std() > 5
        assert not (drawn / "loss.png").exists()
    config, file = figures["config"], figures["file"]
    for key in ("cost", "medians", "images", "limit"):
        assert config[key] == file[key]
    (of_config,), (of_file,) = config["results"], file["results"]
    assert of_config["median_residuals"] == of_file["median_residuals"]
    for key in ("steps", "tolerances"):
        pairs = zip(of_config[key], of_file[key], strict=True)
        assert all(one["accuracy"] == other["accuracy"] for one, other in pairs)
    assert file["weights"].endswith("small.safetensors") and config["weights"].endswith("model_final.pth")
    assert f"deqdet-evaluate-steps --model {tmp_path}" in file["command"]


def test_a_report_of_a_detector_without_an_equilibrium_has_no_residuals(trained, small_cfg, tmp_path, capsys):
    cfg = small_cfg("MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 2, "OUTPUT_DIR", str(tmp_path),
                    "MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TRAIN", (), "DATASETS.TEST", ("shapes_seed43_3",),
                    "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0)  # fmt: skip
    (tmp_path / "stacked.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    report.main(["--config-file", str(tmp_path / "stacked.yaml"), "--images", "2"])
    printed = capsys.readouterr().out
    assert f"Pictures: {tmp_path}/detections.png\nReport: {tmp_path}/report.md\n" in printed
    assert (tmp_path / "report.md").is_file() and not (tmp_path / "residual.png").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--images", "0"], "--images and --steps must be at least 1, got 0 and 25"),
    (["--steps", "0"], "--images and --steps must be at least 1, got 8 and 0"),
    (["OUTPUT_DIR", "nowhere"], "nowhere/model_final.pth does not exist: train the model, or give a checkpoint"),
])  # fmt: skip
def test_one_line_says_what_is_wrong_with_a_report(trained, arguments, message):
    with pytest.raises(SystemExit, match=message):
        report.main([*trained["config"], *arguments])


@pytest.mark.parametrize("tool", ["analyze_model", "compare", "evaluate_steps", "report", "residual_signal"])
def test_the_scripts_are_the_tools(tool):
    done = subprocess.run([sys.executable, str(TOOLS / f"{tool}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"deqdet-{tool.replace('_', '-')} " in done.stdout
