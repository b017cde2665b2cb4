"""The wheel, outside the repository: what it holds, and that a detector can be used from any folder with it alone."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from deqdet import Predictor, __version__
from deqdet.checkpoints import write_model_file

from helpers.paths import ROOT

# In a folder outside the repository, with the wheel in front of an installed package.
SCRIPT = """
import json, sys
import numpy as np
import deqdet
assert sys.argv[1] in deqdet.__file__, deqdet.__file__
predictor = deqdet.Predictor.from_file("model.safetensors", threshold=0.0)
found = predictor(np.load("image.npy"))
configs = deqdet.model_zoo.list_configs()
deqdet.model_zoo.get_config(configs[-1])
print(json.dumps([found.instances.pred_boxes.tensor.tolist(), found.labels, configs, deqdet.__version__]))
"""
# The help text of each tool named on the command line.
HELP = """
import contextlib, importlib, io, json, sys
texts = {}
for name in sys.argv[1:]:
    module = importlib.import_module(f"deqdet.tools.{name}")
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        module.main(["--help"])
    texts[name] = printed.getvalue()
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    # A build leaves build/ in the source; a copy keeps the repository clean.
    source = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command[-1] = source
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("deqdet-*.whl")
    return path


def list_tools():
    files = (ROOT / "projects" / "DEQDet" / "deqdet" / "tools").glob("*.py")
    return {path.stem for path in files if "def main(" in path.read_text()}


def test_what_it_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(f"deqdet-{__version__}.dist-info/entry_points.txt").decode()
    configs = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.yaml"))
    assert sorted(name.removeprefix("deqdet/configs/") for name in names if "/configs/" in name) == configs
    assert "deqdet/py.typed" in names
    commands = dict(line.split(" = ") for line in entry_points.splitlines() if " = " in line)
    assert {target.removeprefix("deqdet.tools.").removesuffix(":main") for target in commands.values()} == list_tools()
    assert {"deqdet-train", "deqdet-demo", "deqdet-evaluate-steps", "deqdet-publish"} <= set(commands)


def test_it_works_from_an_empty_folder(wheel, small_model, small_cfg, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    work = tmp_path / "work"
    work.mkdir()
    write_model_file(
        work / "model.safetensors", weights=small_model().state_dict(), cfg=small_cfg(), class_names=["a", "b", "c"]
    )
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    np.save(work / "image.npy", image)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    run = {"cwd": work, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(installed)], **run)
    assert done.returncode == 0, done.stderr
    boxes, labels, configs, version = json.loads(done.stdout)
    here = Predictor.from_file(work / "model.safetensors", threshold=0.0)(image)
    np.testing.assert_allclose(boxes, here.instances.pred_boxes.tensor.numpy(), rtol=0, atol=1e-4)
    assert labels == here.labels and len(labels) == 6 and version == __version__
    assert "quick/deqdet_shapes" in configs
    done = subprocess.run([sys.executable, "-c", HELP, *sorted(list_tools())], **run)
    assert done.stderr == ""  # no error, and no warnings of libraries
    texts = json.loads(done.stdout)
    assert texts.keys() == list_tools() and all(text.startswith("usage: ") for text in texts.values())
