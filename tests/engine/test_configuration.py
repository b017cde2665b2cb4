"""The set-up of a run: what the user may get wrong is one line that names it."""

import runpy
import sys

import pytest
import torch

from deqdet.engine import Trainer, UserError, load_config, run, setup
from deqdet.engine.configuration import check_run

from helpers.engine_toy import IN_PROCESS, TRAIN_NET, parse

pytestmark = IN_PROCESS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.MAX_ITR", 3], r"the command line: unknown config key SOLVER.MAX_ITR; .*SOLVER.MAX_ITER"),
        (["MODEL.NUM_QUERIES", 3], r"unknown config key MODEL.NUM_QUERIES; .*MODEL.DEQDET.NUM_QUERIES"),
        (["XYZ.QWERTY", 3], r"unknown config key XYZ.QWERTY; the known ones are in "),
        (["SOLVER.MAX_ITER", "many"], r"the command line: SOLVER.MAX_ITER cannot be many \(type str\): it must be a"),
        (["SOLVER.MAX_ITER=3"], r"must be KEY VALUE pairs .*, but SOLVER.MAX_ITER=3 stands in the place of a key"),
        (["SEED", 1, "SOLVER.MAX_ITER"], r"must be KEY VALUE pairs .*, but SOLVER.MAX_ITER has no value"),
        (["SOLVER.MAX_ITER", 3, "--eval-only"], r"--eval-only must come before the KEY VALUE pairs"),
    ],
)
def test_mistakes_on_the_command_line(toy_config, words, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(parse(toy_config, *words))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER:\n  BASE_LRS: 1.0", r"toy.yaml: unknown config key SOLVER.BASE_LRS; did .*SOLVER.BASE_LR"),
        ("SOLVER:\n  MAX_ITER: many", r"toy.yaml: SOLVER.MAX_ITER cannot be many \(type str\): it must be a whole"),
        ("SOLVER: {", r"toy.yaml: while parsing"),
        ("_BASE_: missing.yaml", r"toy.yaml: its _BASE_ .*missing.yaml does not exist"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, text, message):
    config = tmp_path / "toy.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(parse(str(config)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.WEIGHTS", "gone.pth"], r"MODEL.WEIGHTS gone.pth does not exist: give a checkpoint file"),
        (["MODEL.DEQDET.NUM_CLASSES", 2], r"1 categories \(half\), .*MODEL.DEQDET.NUM_CLASSES"),
        (["DATASETS.TRAIN", "('nowhere',)"], r"'nowhere' of DATASETS.TRAIN is not registered"),
        (["DATASETS.TRAIN", "()"], r"DATASETS.TRAIN is empty"),
    ],
)
def test_a_run_that_does_not_fit_its_files(toy_config, words, message):
    with pytest.raises(UserError, match=message):
        setup(parse(toy_config, *words))


def test_evaluation_needs_weights(toy_config):
    with pytest.raises(UserError, match="nothing to evaluate: give a checkpoint as MODEL.WEIGHTS, or --resume"):
        setup(parse(toy_config, "--eval-only", "MODEL.WEIGHTS", ""))


def test_missing_config_file_and_run_ends_with_one_line(toy_config):
    with pytest.raises(SystemExit) as error:
        run(setup, parse("gone.yaml"))
    assert error.value.code.startswith("error: config file gone.yaml does not exist, and no config of the model zoo")
    with pytest.raises(SystemExit) as error:
        run(setup, parse(toy_config, "--num-gpus", 3, "SOLVER.IMS_PER_BATCH", 4))
    assert error.value.code.startswith("error: SOLVER.IMS_PER_BATCH is 4: it must be a multiple of 3")
    with pytest.raises(SystemExit, match="--dist-url"):
        run(setup, parse(toy_config, "--num-machines", 2))


def test_the_tool_ends_with_one_line(toy_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", toy_config, "SOLVER.MAX_ITR", "3"])
    with pytest.raises(SystemExit, match=r"^error: .*: unknown config key SOLVER.MAX_ITR; .*\?$"):
        runpy.run_path(str(TRAIN_NET), run_name="__main__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_without_cuda_the_device_becomes_the_cpu(toy_config, capsys):
    cfg = setup(parse(toy_config, "MODEL.DEVICE", "cuda"))
    assert cfg.MODEL.DEVICE == "cpu" and cfg.is_frozen()
    assert capsys.readouterr().out.count("CUDA is not available: MODEL.DEVICE is cpu instead of cuda") == 1


def test_the_gpu_of_the_config_becomes_the_current_one(toy_config, monkeypatch):
    chosen = []
    monkeypatch.setattr("deqdet.engine.configuration.adapt_device", lambda cfg: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        setup(parse(toy_config, "--overwrite", "MODEL.DEVICE", device))
    assert chosen == ["cuda:1"]


def test_several_processes_do_not_share_a_gpu(toy_config, monkeypatch):
    args = parse(toy_config, "--num-gpus", 2, "SOLVER.IMS_PER_BATCH", 4, "MODEL.DEVICE", "cuda:1")
    cfg = load_config(args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^MODEL.DEVICE is cuda:1, the same GPU for 2 processes: it must be cuda"):
        check_run(cfg, args)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun may show each process only one
    check_run(cfg, args)


def test_parts_of_a_batch_need_a_detector_of_ours(toy_config):
    cfg = setup(parse(toy_config, "SOLVER.ACCUMULATION_STEPS", 2))
    message = r"^SOLVER.ACCUMULATION_STEPS is 2: it must be 1 for MODEL.META_ARCHITECTURE EngineToy"
    with pytest.raises(UserError, match=message):
        Trainer(cfg)


def test_parts_of_a_batch_must_divide_the_images_of_a_process(toy_config):
    args = parse(toy_config, "--num-gpus", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 4)
    with pytest.raises(UserError, match=r"^SOLVER.ACCUMULATION_STEPS is 4: times 2, the number of processes, .* \(4\)"):
        setup(args)
