"""The tools as a user calls them: train, interrupt, resume, evaluate, report, on a few generated images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from helpers.paths import ROOT

SMALL = """
DATASETS.TRAIN ('shapes_seed3_24',) DATASETS.TEST ('shapes_seed4_8',)
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8
MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 4 SOLVER.IMS_PER_BATCH 4 SOLVER.CHECKPOINT_PERIOD 2
"""


def run_tool(tool: str, folder: Path, *arguments: str, options: str = "") -> str:
    """Run a tool in `folder`, where data sets and output go; what it printed."""
    command = [sys.executable, str(ROOT / "tools" / tool), "--config-file"]
    command += [str(ROOT / "configs" / "quick" / "deqdet_shapes.yaml"), *options.split(), *SMALL.split(), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(folder / "datasets")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def last_results(output: str) -> list[str]:
    """The figures of detectron2's "copypaste" line."""
    return re.findall(r"copypaste: ([-\d.]+,.*)", output)[-1].split(",")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def trained(folder) -> str:
    """Two iterations, then two more from the checkpoint on."""
    run_tool("train_net.py", folder, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", "out")
    return run_tool("train_net.py", folder, "SOLVER.MAX_ITER", "4", "OUTPUT_DIR", "out", options="--resume")


def test_resume_goes_on_from_the_checkpoint(trained, folder):
    assert "Starting training from iteration 2" in trained
    assert (folder / "out" / "last_checkpoint").read_text() == "model_final.pth"
    assert (folder / "out" / "model_0000003.pth").is_file()


def test_evaluation_of_the_checkpoint_gives_the_same_detections(trained, folder):
    """The AP of four iterations is 0, so compare what it is computed from as well."""
    detections = folder / "out" / "inference" / "coco_instances_results.json"
    at_the_end = json.loads(detections.read_text())
    detections.unlink()
    weights = ["MODEL.WEIGHTS", "out/model_final.pth"]
    evaluated = run_tool("train_net.py", folder, *weights, "OUTPUT_DIR", "out", options="--eval-only")
    assert last_results(evaluated) == last_results(trained)
    assert json.loads(detections.read_text()) == at_the_end
    assert len(at_the_end) == 8 * 16  # images x DETECTIONS_PER_IMAGE


def test_report_draws_its_pictures(trained, folder):
    printed = run_tool("report.py", folder, "OUTPUT_DIR", "out", options="--images 3 --steps 6")
    assert re.search(r"step +6 +\d", printed)
    medians = json.loads((folder / "out" / "residual.json").read_text())["median_relative_residual"]
    assert len(medians) == 1 + 6 and all(value > 0 for value in medians)
    page = (folder / "out" / "report.md").read_text()
    assert "after 4 iterations" in page and "model_final.safetensors" in page and "| hourglass |" in page
    for name in ("detections.png", "loss.png", "residual.png", "curves.png", "worst.jpg"):
        picture = cv2.imread(str(folder / "out" / name))
        assert picture is not None and picture.std() > 5, f"{name} is missing or blank"
