"""The page's own function, with a detector that answers from a list; the page itself where Gradio is installed."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from deqdet.export import Found

from helpers.paths import ROOT


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("gradio_app", ROOT / "examples" / "gradio_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(step: int, residual: float) -> Found:
    box = np.array([[10.0 + step, 5.0, 30.0, 20.0]], np.float32)
    return Found(box, np.array([0.75]), np.array([1]), ["hen"], step, residual)


@pytest.fixture
def detector():
    """Two steps, whatever is asked; it keeps what it was asked."""
    asked = {}

    def refine(image, **options):
        asked.update(options)
        yield from (found(0, float("inf")), found(1, 0.5), found(2, 0.04))

    return SimpleNamespace(refine=refine, asked=asked, notes={"steps": 4, "rtol": 0.0, "solver": "plain"})


def test_detect_gives_picture_table_line_and_refinement(app, detector):
    image = np.full((40, 60, 3), 90, np.uint8)
    picture, rows, line, gallery = app.make_detect(detector)(image, 8.0, 0.05, 0.3, "anderson")
    assert detector.asked == {"steps": 8, "rtol": 0.05, "threshold": 0.3, "solver": "anderson"}
    assert rows == [["hen", 0.75, 12.0, 5.0, 30.0, 20.0]]
    assert line == "1 detections after 2 steps (below the tolerance); residual 0.0400"
    assert [caption for _, caption in gallery] == ["initialization", "1: 0.500", "2: 0.040"]
    assert picture.size == (480, 320)  # enlarged eight times
    color = app.COLORS[1]
    assert picture.getpixel((8 * 12, 100)) == color and picture.getpixel((8 * 20, 100)) == (90, 90, 90)
    assert gallery[0][0].getpixel((8 * 10, 100)) == color


def test_no_picture_is_a_message(app, detector):
    assert app.make_detect(detector)(None, 8, 0.0, 0.5, "plain") == (None, [], "Choose a picture.", [])


def test_it_loads_the_runner_without_the_package(app):
    runner = app.load_runner()
    assert runner.OnnxDetector.__module__ == "deqdet_runner" and "deqdet_runner" in sys.modules
    del sys.modules["deqdet_runner"]
