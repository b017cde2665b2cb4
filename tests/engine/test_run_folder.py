"""OUTPUT_DIR: what may be written where, and what happens where nothing can be written."""

import os
import subprocess

import pytest
import torch

from deqdet.checkpoints.files import read_torch
from deqdet.engine import Trainer, UserError, setup
from deqdet.model_zoo import get_config
from deqdet.tools.train_net import work

from helpers.engine_toy import IN_PROCESS, parse
from helpers.toy_runs import run_toy, said

pytestmark = IN_PROCESS


@pytest.fixture
def finished(toy_config, tmp_path) -> str:
    work(parse(toy_config))
    return toy_config


def weights_of(out) -> dict[str, torch.Tensor]:
    return read_torch(out / "model_final.pth")["model"]


def test_a_training_is_not_written_over(finished, tmp_path):
    out = tmp_path / "out"
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    message = "out already contains a training .last_checkpoint, metrics.json, model_0000001.pth and 3 more.: --resume"
    with pytest.raises(UserError, match=message):
        setup(parse(finished))
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="give only one of them"):
        setup(parse(finished, "--resume", "--overwrite"))
    for query in ("", "?matching_heuristics=True"):
        with pytest.raises(UserError, match="--overwrite would delete MODEL.WEIGHTS .*model_final.pth"):
            setup(parse(finished, "--overwrite", "MODEL.WEIGHTS", f"{out / 'model_final.pth'}{query}"))
    with pytest.raises(UserError, match="--overwrite would delete --init .*model_final.pth"):
        setup(parse(finished, "--overwrite", "--init", out / "model_final.pth"))
    work(parse(finished, "--eval-only", "MODEL.WEIGHTS", out / "model_final.pth"))  # as ever


def test_overwrite_deletes_what_the_training_left_and_nothing_else(finished, tmp_path):
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    (out / "my_model.pth").write_bytes(b"mine")
    stale = [out / "inference/coco_instances_results.json", out / "ema/inference/set/instances_predictions.pth"]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    (out / "inference" / "mine.json").write_text("mine")
    work(parse(finished, "--overwrite", "SOLVER.MAX_ITER", 1))
    assert [path.name for path in sorted(out.glob("model_*.pth"))] == ["model_final.pth"]
    assert {(out / name).read_text() for name in ("notes.txt", "my_model.pth", "inference/mine.json")} == {"mine"}
    assert not any(path.is_file() and path.read_bytes() == b"old" for path in stale)
    assert len((out / "metrics.json").read_text().splitlines()) == 2  # iteration 0 and the evaluation


@pytest.mark.parametrize("words, message", [
    (["DATASETS.TRAIN", "('nope',)"], "'nope' of DATASETS.TRAIN is not registered"),
    (["MODEL.WEIGHTS", "missing.pth"], "missing.pth does not exist"),
    (["MODEL.WEIGHTS", "damaged.pth"], "damaged.pth"),
    (["MODEL.META_ARCHITECTURE", "Nothing"], "Nothing"),
])  # fmt: skip
def test_overwrite_deletes_nothing_before_the_new_training_begins(finished, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    out = tmp_path / "out"
    before, config = {path.name for path in out.glob("model_*")}, (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        work(parse(finished, "--overwrite", *words))
    assert {path.name for path in out.glob("model_*")} == before != set()
    assert (out / "config.yaml").read_bytes() == config
    work(parse(finished, "--resume"))  # which is not taken for the overwriting one
    assert {path.name for path in out.glob("model_*")} == before


@pytest.mark.parametrize("name, content, free", [
    ("log.txt", b"x", True),
    ("config.yaml", b"x", True),
    ("metrics.json", b"", True),
    ("events.out.tfevents.1.x", b"x", True),
    (".unfinished.model_0000001.pth.17", b"x", True),
    ("metrics.json", b"x", False),
    ("model_best.pth", b"x", False),
    ("resnet.pkl", b"x", False),
])  # fmt: skip
def test_what_a_failed_start_leaves_is_no_training(toy_config, tmp_path, name, content, free):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    if free:
        setup(parse(toy_config))
    else:
        with pytest.raises(UserError, match=name):
            setup(parse(toy_config))


def test_what_a_killed_export_leaves_is_deleted(toy_config, tmp_path):
    """A folder with incomplete files, if the model was exported to OUTPUT_DIR."""
    left = tmp_path / "out" / ".unfinished.a1b2c3"
    left.mkdir(parents=True)
    (left / "model.encoder.onnx").write_bytes(b"x")
    setup(parse(toy_config))
    assert not left.exists()


@pytest.mark.parametrize("broken", ["model_final.pth", "model_final.safetensors"])
@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
@pytest.mark.parametrize("period", [2, 3])
def test_a_finished_training_writes_its_model_again(toy_config, tmp_path, broken, content, period):
    words = ["SOLVER.CHECKPOINT_PERIOD", period]
    work(parse(toy_config, *words))
    out = tmp_path / "out"
    metrics, weights = (out / "metrics.json").read_text(), weights_of(out)
    path = out / broken
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    work(parse(toy_config, "--resume", *words))
    assert path.stat().st_size > 100
    again = weights_of(out)
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    lines = [line.count('"iteration"') for line in (out / "metrics.json").read_text().splitlines()]
    assert len(lines) == len(metrics.splitlines()) == 2


def test_resume_with_a_model_that_cannot_fit(finished, tmp_path):
    config = (tmp_path / "out" / "config.yaml").read_bytes()
    for key, value, message in (
        ("MODEL.META_ARCHITECTURE", "WiderToy", "does not fit the model: backbone.0.weight is"),
        ("SOLVER.WEIGHT_DECAY_NORM", 0.3, "does not fit this config .*parameter group"),
    ):
        trainer = Trainer(setup(parse(finished, "--resume", key, value)))
        with pytest.raises(UserError, match=message):
            trainer.resume_or_load(resume=True)
    assert (tmp_path / "out" / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_config_yaml_is_that_of_the_training_that_has_begun(finished, tmp_path, flag):
    config = tmp_path / "out" / "config.yaml"
    work(parse(finished, flag, "SOLVER.MAX_ITER", 8))
    assert get_config(str(config)).SOLVER.MAX_ITER == 8
    with pytest.raises(UserError, match="does not fit"):
        work(parse(finished, "--resume", "SOLVER.MAX_ITER", 9, "MODEL.META_ARCHITECTURE", "WiderToy"))
    assert get_config(str(config)).SOLVER.MAX_ITER == 8
    for path in config.parent.iterdir():
        path.unlink() if path.is_file() else None
    work(parse(finished))  # and not the config of the refused one
    assert get_config(str(config)).SOLVER.MAX_ITER < 8


def test_a_full_disk_is_one_line(toy_config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.decode().strip()}")
    try:
        out = disk / "out"
        words = ["SOLVER.MAX_ITER", 100, "SOLVER.CHECKPOINT_PERIOD", 2, "OUTPUT_DIR", out]
        done = run_toy(toy_config, *words)
        assert done.returncode == 1
        (line,) = said(done)
        assert line.startswith(f"error: {out}") and "cannot be written" in line and "No space left on device" in line
        checkpoints = sorted(out.glob("model_*.pth"))
        assert checkpoints and (out / "last_checkpoint").read_text() == checkpoints[-1].name
        for path in checkpoints:
            assert read_torch(path)["iteration"] == int(path.stem[6:])
        assert not list(out.glob(".unfinished*"))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        done = run_toy(toy_config, "--resume", *words)
        assert done.returncode == 1
        reason = "cannot be written (Read-only file system): choose another OUTPUT_DIR"
        assert said(done) == [f"error: {out}/.lock {reason}"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_line(toy_config, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"out/\.lock cannot be written .Permission denied."):
        setup(parse(toy_config))
