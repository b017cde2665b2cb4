"""tools/convert_checkpoint.py: what it writes and prints, and one clear error for whatever it refuses."""

import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from helpers.converter import (
    GOLDEN,
    StrictCheckpointer,
    golden_weights,
    load_converted,
    load_tool,
    make_cfg,
    run_tool,
)
from helpers.paths import ROOT

RELEASED = GOLDEN["deqdet"] / "upstream.pth"


def refuse(*arguments: object) -> str:
    """The one line of the error with which the tool ends."""
    with pytest.raises(SystemExit) as ended:
        load_tool().main([str(x) for x in arguments])
    message = ended.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


# What it writes


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("converted") / "model.pth"
    return path, run_tool(RELEASED, path)


def test_detectron2_loads_it_as_it_is(converted):
    path, printed = converted
    assert sorted(x.name for x in path.parent.iterdir()) == ["model.pth"]
    saved = torch.load(path, weights_only=True)
    assert sorted(saved) == ["__author__", "model", "sha256"]  # no matching_heuristics

    class Recorder(DetectionCheckpointer):
        def _log_incompatible_keys(self, incompatible):
            self.incompatible = incompatible

    model = build_model(make_cfg(printed[-1]))
    checkpointer = Recorder(model)
    checkpointer.load(str(path))
    assert not any(checkpointer.incompatible)  # missing, unexpected, misshapen
    assert saved["model"].keys() == model.state_dict().keys()
    released = golden_weights("deqdet")
    conv = model.backbone.bottom_up.res3[1].conv2
    torch.testing.assert_close(conv.weight.data, released["backbone.layer2.1.conv2.weight"], rtol=0, atol=0)
    running_var = released["backbone.layer2.1.bn2.running_var"]
    torch.testing.assert_close(conv.norm.running_var, running_var, rtol=0, atol=0)


def test_what_it_prints(converted):
    _, printed = converted
    assert printed[0] == "kind: deqdet (guessed from the keys)"
    assert any(line.endswith(".instance_interactive_conv* (24 keys)") for line in printed)
    words = printed[-1].split()
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    expected = {
        "MODEL.BACKBONE.NAME": "build_resnet_channel_mapper_backbone",
        "MODEL.RESNETS.DEPTH": "50",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": "4",
        "MODEL.RESNETS.RES2_OUT_CHANNELS": "16",
        "MODEL.RESNETS.WIDTH_PER_GROUP": "4",
        "MODEL.RESNETS.OUT_FEATURES": "\"['res2','res3','res4','res5']\"",
        "MODEL.DEQDET.DECODER": "EquilibriumDecoder",
        "MODEL.DEQDET.REFINEMENT_LAYER": "AdaMixerLayer",
        "MODEL.DEQDET.NECK.KERNEL_SIZE": "3",
        "MODEL.DEQDET.HIDDEN_DIM": "32",
        "MODEL.DEQDET.NUM_CLASSES": "7",
        "MODEL.DEQDET.NUM_QUERIES": "12",
        "TEST.DETECTIONS_PER_IMAGE": "12",
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT": "8",
        "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE": "8",
        "MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS": "8",
        "MODEL.DEQDET.ADAMIXER.NUM_GROUPS": "2",
        "MODEL.DEQDET.ADAMIXER.NUM_HEADS": "4",
        "MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM": "64",
    }
    assert expected.items() <= pairs.items()


def test_safetensors_in_and_out(converted, tmp_path):
    path, printed = converted
    source, target = tmp_path / "released.safetensors", tmp_path / "model.safetensors"
    save_file(golden_weights("deqdet"), source)
    assert run_tool(source, target, "--from", "deqdet")[0] == "kind: deqdet"
    ours, expected = load_file(target), torch.load(path, weights_only=True)["model"]
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)

    model, same = load_converted(target, printed[-1]), load_converted(path, printed[-1])
    assert torch.equal(model.queries.boxes, same.queries.boxes)
    assert not torch.equal(model.queries.boxes, build_model(make_cfg(printed[-1])).queries.boxes)


def test_an_older_file_is_replaced(tmp_path):
    target = tmp_path / "model.pth"
    target.write_text("older")
    run_tool(RELEASED, target)
    assert "model" in torch.load(target, weights_only=True)
    assert list(tmp_path.iterdir()) == [target]


def test_slices_do_not_bring_what_they_are_cut_from(tmp_path):
    source, targets = tmp_path / "slices.pth", [tmp_path / "model.pth", tmp_path / "model.safetensors"]
    weights = golden_weights("deqdet")
    name = "roi_head.bbox_head.0.fc_cls.weight"
    weights[name] = torch.cat([weights[name], torch.zeros(10**5, 32)])[:7]
    torch.save({"state_dict": weights}, source)
    assert source.stat().st_size > 10**7
    for target in targets:
        run_tool(source, target)
        assert target.stat().st_size < 2 * 10**6


def test_the_exit_code(tmp_path):
    """As a program: 1, the line on standard error, nothing on standard output."""
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), "missing.pth", "model.pth"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("error: missing.pth cannot be read")
    assert list(tmp_path.iterdir()) == []


# Files that are no checkpoints


class Trap:
    """Leaves a file where it is unpickled, which needs no import of this module."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class HistoryBuffer:
    """As mmengine's, an object that a checkpoint may hold beside its weights."""


def save_truncated(path: Path, part: float, **options) -> None:
    torch.save({"state_dict": golden_weights("deqdet")}, path, **options)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])


def save_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


def save_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot be read (No such file"),
    "folder": (lambda path: path.mkdir(), "cannot be read (Is a directory"),
    "empty": (lambda path: path.touch(), "is damaged, or was not written by torch.save"),
    "text": (lambda path: path.write_text("hello world, this is text"), "is damaged, or was not written"),
    "json": (lambda path: path.write_text('{"model": 1}'), "is damaged, or was not written"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is damaged, or was not written"),
    "zip": (save_zip, "is damaged, or was not written"),
    "script": (save_script, "is damaged, or was not written"),
    "a tenth": (lambda path: save_truncated(path, 0.1), "is damaged, or was not written"),
    "almost all": (lambda path: save_truncated(path, 0.999), "is damaged, or was not written"),
    "half of an old format": (
        lambda path: save_truncated(path, 0.5, _use_new_zipfile_serialization=False),
        "is damaged, or was not written",
    ),
    "code": (
        lambda path: torch.save({"state_dict": golden_weights("deqdet"), "x": Trap(path.parent / "trap")}, path),
        f"holds {os.name}.mkdir, which is not loaded, because unpickling such objects can run code",
    ),
    "code alone": (lambda path: path.write_bytes(pickle.dumps(Trap(path.parent / "trap"))), "is damaged, or was not"),
    "object": (
        lambda path: torch.save({"state_dict": golden_weights("deqdet"), "message_hub": HistoryBuffer()}, path),
        "HistoryBuffer, which is not loaded, because unpickling such objects can run code: if you trust the file, "
        "load it where it was made and save its state dict alone",
    ),
    "list": (lambda path: torch.save([torch.zeros(2)], path), "holds a list: a checkpoint is a dict of tensors"),
    "numbers": (lambda path: torch.save({"state_dict": {"lr": 0.1}}, path), "its entry 'lr' is a float"),
    "nested": (lambda path: torch.save({"net": {"a": torch.zeros(2)}}, path), "its entry 'net' is a dict"),
    "nothing": (lambda path: torch.save({"state_dict": {}}, path), "holds no tensor"),
    "unknown": (
        lambda path: torch.save({"encoder.weight": torch.zeros(2)}, path),
        "the keys match no known kind (adamixer, deqdet, sparse_rcnn, swin, torchvision); the first are encoder.weight",
    ),
    "no.safetensors": (lambda path: path.write_text("hello world"), "is damaged or not a safetensors file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("older", [False, True], ids=["new", "over an older file"])
def test_bad_files(tmp_path, name, older):
    make, message = BAD_FILES[name]
    source, target = tmp_path / (name if "." in name else f"{name}.pth"), tmp_path / "out" / "model.pth"
    target.parent.mkdir()
    make(source)
    if older:
        target.write_text("older")
    line = refuse(source, target)
    assert str(source) in line and message in line
    assert [x.read_text() for x in target.parent.iterdir()] == (["older"] if older else [])
    assert not (tmp_path / "trap").exists()


def test_the_trap_works(tmp_path):
    """Were the pickle loaded, there would be a folder."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "trap")))
    assert (tmp_path / "trap").is_dir()


# Checkpoints that do not fit

CLASSIFIER = "roi_head.bbox_head.{}.fc_cls.{}"


def save_changed(folder: Path, change: Callable[[dict], object]) -> Path:
    weights = golden_weights("deqdet")
    change(weights)
    torch.save({"state_dict": weights}, folder / "changed.pth")
    return folder / "changed.pth"


def with_classes(weights: dict, count: int, layers: tuple[int, ...] = (0, 1)) -> None:
    for layer in layers:
        weights[CLASSIFIER.format(layer, "weight")] = torch.zeros(count, 32)
        weights[CLASSIFIER.format(layer, "bias")] = torch.zeros(count)


@pytest.mark.parametrize("change, message", [
    (lambda x: with_classes(x, 81), "have 81 outputs, COCO's 80 classes and a background class"),
    (
        lambda x: with_classes(x, 81, layers=(0,)),
        "roi_head.bbox_head.0.fc_cls.weight (81, 32) and roi_head.bbox_head.1.fc_cls.weight (7, 32) do not fit",
    ),
    (
        lambda x: x.update({CLASSIFIER.format(1, "bias"): torch.zeros(8)}),
        "1 misshapen key: roi_head.bbox_head.1.fc_cls.bias (8,) instead of (7,)",
    ),
    (lambda x: x.pop(CLASSIFIER.format(0, "bias")), "1 missing key: roi_head.bbox_head.0.fc_cls.bias"),
    (
        lambda x: [x.pop(f"backbone.layer3.5.bn3.{leaf}") for leaf in ("weight", "bias", "running_mean")],
        "3 missing keys: backbone.layer3.5.bn3.weight, backbone.layer3.5.bn3.bias, backbone.layer3.5.bn3.running_mean",
    ),
    (
        lambda x: [x.pop(key) for key in list(x) if key.startswith("roi_head.bbox_head.1.ffn")],
        "6 missing keys: roi_head.bbox_head.1.ffn.layers.0.0.weight, ",
    ),
    (
        lambda x: x.update({"backbone.layer1.0.se.weight": torch.zeros(2), "head.x": torch.zeros(2)}),
        "2 unknown keys: backbone.layer1.0.se.weight, head.x",
    ),
    (lambda x: x.update({"neck.convs.0.conv.scale": torch.zeros(2)}), "1 unknown key: neck.convs.0.conv.scale"),
    (
        lambda x: x.update({"roi_head.bbox_head.1.fc_mask.bias": x.pop("roi_head.bbox_head.1.fc_reg.bias")}),
        "1 unknown key: roi_head.bbox_head.1.fc_mask.bias; 1 missing key: roi_head.bbox_head.1.fc_reg.bias",
    ),
    (
        lambda x: [x.pop(key) for key in list(x) if key.startswith("roi_head.bbox_head.0")],
        "no usable key corresponds to our decoder.initialization.points.offsets",
    ),
    (
        lambda x: [x.pop(key) for key in list(x) if key.startswith("backbone.layer4.2")],
        "its backbone is not a ResNet-50, 101 or 152: the four stages have (3, 4, 6, 2) blocks",
    ),
    (
        lambda x: x.update({"rpn_head.init_proposal_features.weight": torch.zeros(11, 32)}),
        "rpn_head.init_proposal_bboxes.weight (12, 4) and rpn_head.init_proposal_features.weight (11, 32) do not fit",
    ),
])  # fmt: skip
def test_checkpoints_that_do_not_fit(tmp_path, change, message):
    target = tmp_path / "out" / "model.pth"
    target.parent.mkdir()
    line = refuse(save_changed(tmp_path, change), target)
    assert line.startswith(f"error: {tmp_path / 'changed.pth'}: taken as deqdet: ") and message in line
    assert list(target.parent.iterdir()) == []


def test_the_names_listed_are_few_and_all_are_counted(tmp_path):
    source = save_changed(tmp_path, lambda x: [x.pop(key) for key in list(x) if ".bn2." in key])
    line = refuse(source, tmp_path / "model.pth")
    # 16 blocks with 4 numbers each.
    assert "64 missing keys: " in line and line.endswith(" and 59 more") and line.count("backbone.layer") == 5


def test_the_number_of_classes(tmp_path):
    source, target = save_changed(tmp_path, lambda x: with_classes(x, 81)), tmp_path / "model.pth"
    assert "--num-classes 81" in refuse(source, target)
    assert "have 81 outputs, not the 80 of --num-classes" in refuse(source, target, "--num-classes", 80)
    assert "have 7 outputs, not the 81 of --num-classes" in refuse(RELEASED, target, "--num-classes", 81)
    assert not target.exists()
    assert "MODEL.DEQDET.NUM_CLASSES 81 " in run_tool(source, target, "--num-classes", 81)[-1]
    torch.save({"layer1.0.conv1.weight": torch.zeros(2)}, source)
    assert "ResNet" in refuse(source, target)


def test_a_wrong_kind_is_refused_by_names(tmp_path):
    line = refuse(RELEASED, tmp_path / "model.pth", "--from", "sparse_rcnn")
    assert "taken as sparse_rcnn: " in line and " unknown keys: " in line
    assert list(tmp_path.iterdir()) == []


# Outputs that cannot be


@pytest.mark.parametrize("name, message", [
    ("file/model.pth", "cannot be written: its folder cannot be created (File exists)"),
    ("folder", "it is a folder"),
    ("model.pkl", "detectron2 reads .pkl files as pickles: give"),
    ("link.pth", "is the checkpoint to be converted"),
    ("source.pth", "is the checkpoint to be converted"),
])  # fmt: skip
def test_bad_outputs(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    source = save_changed(tmp_path, lambda x: None).rename(tmp_path / "source.pth")
    (tmp_path / "link.pth").symlink_to(source)
    before = source.read_bytes(), sorted(tmp_path.rglob("*"))
    line = refuse(source, tmp_path / name)
    assert str(tmp_path / name) in line and message in line
    assert (source.read_bytes(), sorted(tmp_path.rglob("*"))) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed writing file")])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, error):
    target = tmp_path / "model.pth"
    target.write_text("older")

    def save(data, file):
        file.write(b"a part")
        raise error

    monkeypatch.setattr(torch, "save", save)
    line = refuse(RELEASED, target)
    assert f"{target} cannot be written" in line
    assert target.read_text() == "older" and list(tmp_path.iterdir()) == [target]


def test_the_strict_checkpointer_is_strict(converted, tmp_path):
    path, printed = converted
    saved = torch.load(path, weights_only=True)
    saved["model"].pop("queries.boxes")
    torch.save({"model": saved["model"]}, tmp_path / "less.pth")
    model = build_model(make_cfg(printed[-1]))
    with pytest.raises(AssertionError):
        StrictCheckpointer(model).load(str(tmp_path / "less.pth"))
