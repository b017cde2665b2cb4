"""The runner as a file of its own: its resize, its solver, and what it needs to be imported."""

import ast
import importlib.util
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import transforms as T

from deqdet.equilibrium import Anderson

from helpers.paths import ROOT

FILE = ROOT / "projects" / "DEQDet" / "deqdet" / "export" / "runner.py"


@pytest.fixture(scope="module")
def runner():
    """The file, imported by its path."""
    spec = importlib.util.spec_from_file_location("copied_runner", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_needs_numpy_and_onnxruntime_only():
    names = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would tie the file to the package"
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("source, target", [
    ((60, 80), (64, 85)), ((480, 640), (160, 213)), ((97, 33), (235, 80)), ((50, 51), (50, 75)), ((7, 300), (1, 43)),
])  # fmt: skip
def test_resize_equals_pillow(runner, source, target):
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    want = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(runner.resize(image, *target), want)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (100, 100), (100, 1000), (333, 500), (427, 641)])
def test_sizes_equal_detectron2s(runner, height, width):
    want = T.ResizeShortestEdge.get_output_shape(height, width, 160, 300)
    assert runner.target_size(height, width, 160, 300) == want
    assert runner.target_size(height, width, 0, 300) == (height, width)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_anderson_equals_the_packages(runner, damping):
    """An affine map in 12 dimensions, of which Anderson must find the fixed point too."""
    generator = torch.Generator().manual_seed(0)
    matrix = 0.2 * torch.randn(12, 12, generator=generator)
    offset = torch.randn(2, 12, generator=generator)
    solver = Anderson(history_size=4, damping=damping)
    iterate = torch.zeros(2, 12)
    state, other, history = solver.init(iterate), iterate.numpy(), []
    for _ in range(12):
        iterate, state = solver.step(iterate, iterate @ matrix + offset, state)
        output = other @ matrix.numpy() + offset.numpy()
        other, history = runner.anderson(other, output, history, 4, damping, solver.regularization)
        np.testing.assert_allclose(other, iterate, atol=2e-3)
    fixed = torch.linalg.solve((torch.eye(12) - matrix).T, offset.T).T
    np.testing.assert_allclose(other, fixed, atol=1e-2)


def test_anderson_takes_a_plain_step_where_nothing_changes(runner):
    same = np.ones((1, 5), np.float32)
    iterate, history = runner.anderson(same, same, [], 4, 1.0, 0.0)
    iterate, _ = runner.anderson(iterate, same, history, 4, 1.0, 0.0)
    np.testing.assert_array_equal(iterate, same)
