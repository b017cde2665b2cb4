"""A pretrained backbone: it learns, its file is the seed's, and every detector of the comparison starts from it."""

import json
import logging

import pytest
import safetensors
import torch

from detectron2.modeling import build_model

from deqdet import model_zoo
from deqdet.checkpoints import Checkpointer
from deqdet.checkpoints.files import read_checkpoint, read_torch
from deqdet.data.shapes import CLASSES
from deqdet.tools import pretrain_backbone
from deqdet.tools.pretrain_backbone import (
    BODY,
    HELD_OUT_SEED,
    TRAINING_SEED,
    draw_images,
    main,
    pretrain,
    smallest_size,
)

DETECTORS = [name for name in model_zoo.list_configs() if name.endswith("_pretrained")]
NARROW = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make("name.pth", "--seed", "1"): the path of a narrow backbone that was pretrained for three iterations."""
    monkeypatch.setattr(pretrain_backbone, "HELD_OUT", 100)

    def run(name: str, *words: str):
        path = tmp_path / "new" / name
        main(["--output", str(path), "--iterations", "3", "--batch", "4", *words, *NARROW])
        return path

    return run


def test_it_learns(capsys, monkeypatch):
    """Large shapes, in a few seconds. Chance is an eighth; the accuracy is of images that were not trained on."""
    changed = {"IMAGE_SIZE": 48, "MIN_SIZE": 38.4, "MAX_SIZE": 46.6, "BASE_LR": 3e-3, "HELD_OUT": 200}
    for name, value in changed.items():
        monkeypatch.setattr(pretrain_backbone, name, value)
    done = pretrain(model_zoo.get_config("quick/deqdet_shapes", NARROW), iterations=100, batch=16, seed=0)
    assert done.accuracy > 0.25
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_the_statistics_of_batch_norm_are_in_the_file(make):
    weights = read_checkpoint(make("backbone.pth")).weights
    assert all(name.startswith(BODY) and x.isfinite().all() for name, x in weights.items())
    assert (weights[f"{BODY}stem.conv1.norm.running_mean"] != 0).all()
    assert not [name for name in weights if name.endswith("num_batches_tracked")]


def test_the_same_seed_gives_the_same_file(make):
    """Whatever was drawn before."""
    first = make("first.pth").read_bytes()
    torch.rand(5)
    assert make("second.pth").read_bytes() == first
    assert make("third.pth", "--seed", "1").read_bytes() != first


def test_the_file_says_how_it_was_made(make):
    path = make("backbone.pth")
    how = read_torch(path)["pretraining"]
    assert (how["iterations"], how["batch"], how["seed"]) == (3, 4, 0)
    assert how["backbone"] == "build_basic_resnet_channel_mapper_backbone" and 0 <= how["accuracy"] <= 1
    other = make("backbone.safetensors")
    with safetensors.safe_open(other, framework="pt") as file:
        assert json.loads(file.metadata()["pretraining"]) == how
    one, two = read_checkpoint(path).weights, read_checkpoint(other).weights
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_starts_from_it(make, name, suffix, caplog, monkeypatch):
    """All of the bottom-up part comes from the file, nothing else changes, and the log says so."""
    path = make(f"backbone.{suffix}")
    monkeypatch.setattr(logging.getLogger("deqdet"), "propagate", True)
    model = build_model(model_zoo.get_config(name, NARROW))
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="deqdet.checkpoints"):
        Checkpointer(model).load(str(path))
    weights = read_checkpoint(path).weights
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    mine = {key for key in before if key.startswith(BODY) and not key.endswith("num_batches_tracked")}
    assert weights.keys() == mine
    assert all(torch.equal(model.state_dict()[key], x) for key, x in weights.items())
    assert changed <= mine and {key for key in mine if key.endswith(("conv1.weight", "running_var"))} <= changed
    total = len([key for key in before if not key.endswith("num_batches_tracked")])
    assert f"Loaded {len(mine)} of the model's {total} tensors, all in backbone.bottom_up;" in caplog.text


def test_frozen_stages_and_statistics_are_trained(make):
    """Kept random, they would be a start that has learned nothing."""
    weights = read_checkpoint(make("backbone.pth")).weights
    frozen = make("frozen.pth", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.BACKBONE.FREEZE_AT", "2")
    other = read_checkpoint(frozen).weights
    assert weights.keys() == other.keys() and all(torch.equal(weights[name], other[name]) for name in weights)


def test_the_images():
    images, labels = draw_images(TRAINING_SEED, 5, 40, 10.0)
    assert images.shape == (40, 3, 64, 64) and images.min() >= 0 and 128 < images.max() <= 255
    assert labels.shape == (40,) and set(labels.tolist()) == set(range(len(CLASSES)))
    assert torch.equal(draw_images(TRAINING_SEED, 7, 1, 10.0)[0][0], images[2])  # by index
    assert not torch.equal(draw_images(HELD_OUT_SEED, 5, 40, 10.0)[0], images)


def test_shapes_become_smaller():
    """From 60 px to 10 px by a constant factor, until 60 % of the iterations; sqrt(60 * 10) half of the way."""
    sizes = [smallest_size(progress) for progress in (0.0, 0.3, 0.6, 0.99)]
    assert sizes == pytest.approx([60.0, 24.4949, 10.0, 10.0])


@pytest.mark.parametrize("words, message", [
    (["--output", "a.pth", "--iterations", "0"], "--iterations is 0: it must be from 1 to"),
    (["--output", "a.pth", "--batch", "1"], "--batch is 1: it must be from 2 to"),
    (["--output", "a.pth", "--seed", "-1"], "--seed is -1: it must be from 0 to"),
    (["--output", "a.pkl"], "--output a.pkl must be a file whose name ends in .pth or .safetensors"),
    (["--output", "file/a.pth"], "file/a.pth cannot be written: its folder cannot be created"),
    (["--output", "a.pth", "MODEL.BACKBONE.NAME", "build_resnet_backbone"], "MODEL.BACKBONE.NAME .* choose one with"),
])  # fmt: skip
def test_what_is_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
