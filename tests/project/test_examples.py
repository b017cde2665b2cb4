"""The Python examples of docs/equilibrium.md run, and show what the page says."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from deqdet import Predictor
from deqdet.equilibrium import Implicit

from helpers.paths import ROOT

ON_A_MAP, ON_A_DETECTOR = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "equilibrium.md").read_text().split("## From Python")[1], flags=re.S
)


def test_the_example_of_a_map():
    torch.manual_seed(0)
    shown: dict = {}
    exec(ON_A_MAP, shown)
    solution, layer = shown["solution"], shown["layer"]
    assert (solution.status == shown["Status"].CONVERGED).all() and (solution.residual < 1e-4).all()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    exact = Implicit(rtol=1e-5)(shown["f"], solution.value)
    exact.square().sum().backward()
    error = torch.linalg.norm(gradient - layer.weight.grad) / torch.linalg.norm(layer.weight.grad)
    dense = torch.autograd.functional.jacobian(shown["f"], solution.value[:1])[0, :, 0]
    assert error < torch.linalg.eigvals(dense).abs().max() < 1  # two terms of a series with this ratio


def test_the_example_of_a_detector(small_cfg, small_model, monkeypatch, tmp_path):
    sizes = ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 160, "DATASETS.TEST", ()]
    predictor = Predictor(small_model(*sizes), small_cfg(*sizes), ("ox", "ass", "hen"), threshold=0.0)
    monkeypatch.setattr(Predictor, "from_file", lambda path: predictor)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save("image.jpg")
    shown: dict = {}
    exec(ON_A_DETECTOR, shown)
    expected = predictor("image.jpg", steps=5).instances
    found = shown["after_five"]
    assert torch.allclose(found.pred_boxes.tensor, expected.pred_boxes.tensor, atol=1e-3)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    assert float(shown["parts"].content) == pytest.approx(float(shown["path"].solution.residuals[24]), rel=0.5)
