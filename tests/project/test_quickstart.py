"""docs/quickstart.ipynb runs from the first cell to the last, with a training of a few iterations."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest

import deqdet

from helpers.paths import ROOT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The outputs of all cells after an execution in another process, whose warnings do not count."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copy(NOTEBOOK, folder)
    package = os.path.dirname(os.path.dirname(deqdet.__file__))
    environment = os.environ | {
        "QUICKSTART_ITERATIONS": "4",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(folder),  # where the notebook puts its own folder
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
    }
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done", NOTEBOOK.name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]  # nbconvert fails at the first cell that raises
    cells = json.loads((folder / "done.ipynb").read_text())["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    return [output for cell in cells for output in cell.get("outputs", ())]


def test_it_draws_detections_refinement_and_residuals(outputs):
    figures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == len(set(figures)) == 3


def test_the_residuals_are_finite(outputs):
    text = "".join("".join(output.get("text", "")) for output in outputs)
    by_steps = re.findall(r"(\d+) steps: residual (\S+),", text)
    assert [int(steps) for steps, _ in by_steps] == [1, 2, 5, 10, 25]
    assert all(math.isfinite(float(residual)) for _, residual in by_steps)
    last = re.search(r"last step: content (\S+), position (\S+), whole (\S+)", text)
    assert all(math.isfinite(float(number)) and float(number) >= 0 for number in last.groups())
    assert float(last[3]) == pytest.approx(float(by_steps[-1][1]), abs=1e-4)  # the walk and a call agree


def test_the_stored_notebook_is_small():
    assert NOTEBOOK.stat().st_size < 300_000
