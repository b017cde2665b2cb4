"""Set-up errors; training of a toy detector alone, interrupted and resumed, and in two CPU processes."""

import argparse
import json
import logging
import os
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from deqdet.engine import Trainer, UserError, argument_parser, load_config, run, setup
from deqdet.engine.hooks import average_batch_norm
from deqdet.engine.launcher import count_cores

# detectron2's default_setup reads the config file without closing it.
pytestmark = pytest.mark.filterwarnings(r"ignore:unclosed file .*toy\.yaml:ResourceWarning")

TOOL = Path(__file__).parents[1] / "tools" / "train_net.py"
CONFIG = """
MODEL:
  META_ARCHITECTURE: "EngineToy"
  DEVICE: "cpu"
  DEQDET:
    NUM_CLASSES: 1
DATASETS:
  REGISTER: [["engine_{tag}", "{root}/boxes.json", "{root}"]]
  TRAIN: ("engine_{tag}",)
  TEST: ("engine_{tag}",)
INPUT:
  MIN_SIZE_TRAIN: (16,)
  MIN_SIZE_TEST: 16
DATALOADER:
  NUM_WORKERS: 0
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.1
  MAX_ITER: 4
  WARMUP_ITERS: 3
  CHECKPOINT_PERIOD: 2
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
SEED: 1
VERSION: 2
OUTPUT_DIR: "{root}/out"
"""


@META_ARCH_REGISTRY.register()
class EngineToy(nn.Module):
    """Finds the brighter half of an image: two candidates, the left and the right half."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.BatchNorm2d(2))
        self.decoder = nn.LazyLinear(2)
        self.decoder(torch.zeros(1, 2))

    def forward(self, batched_inputs):
        images = torch.stack([x["image"] for x in batched_inputs]).float() / 255
        scores = self.decoder(self.backbone(images).mean((2, 3)))
        if self.training:
            right = torch.tensor([float(x["instances"].gt_boxes.tensor[0, 0] >= 8) for x in batched_inputs])
            return {"loss_side": (scores.diff()[:, 0] - right).square().mean()}
        return [{"instances": self.detections(x, row)} for x, row in zip(batched_inputs, scores, strict=True)]

    @staticmethod
    def detections(inputs, scores):
        height, width = inputs["height"], inputs["width"]
        boxes = torch.tensor([[0.0, 0.0, width / 2, height], [width / 2, 0.0, width, height]])
        found = {"pred_boxes": Boxes(boxes), "pred_classes": torch.zeros(2, dtype=torch.long)}
        return Instances((height, width), **found, scores=scores.sigmoid())


def write_dataset(root, tag):
    """Four images of 16 x 16 pixels with a box on one half; returns the config file."""
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i in range(4):
        left = 8 * (i % 2)
        image = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        image[:, left : left + 8] += np.uint8(20 * (i + 1))
        cv2.imwrite(f"{root}/{i}.png", image)
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 16, "width": 16})
        box = {"bbox": [left, 0, 8, 16], "area": 128, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1} | box)
    whole = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "half"}]}
    Path(root, "boxes.json").write_text(json.dumps(whole))
    config = Path(root, "toy.yaml")
    config.write_text(CONFIG.format(root=root, tag=tag))
    return str(config)


@pytest.fixture
def toy_config(tmp_path):
    return write_dataset(tmp_path, tmp_path.name)


def parse(config, *words):
    return argument_parser().parse_args(["--config-file", config, *map(str, words)])


@pytest.fixture(autouse=True)
def loggers_as_before():
    """default_setup's log files are closed, and what it does to the loggers is undone."""
    known = [logging.getLogger(name) for name in ("detectron2", "fvcore", "deqdet")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in known]
    yield
    for logger, handlers, propagate, level in before:
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


# Set-up


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.MAX_ITR", 3], r"the command line: unknown config key SOLVER.MAX_ITR; .*SOLVER.MAX_ITER"),
        (["MODEL.NUM_QUERIES", 3], r"unknown config key MODEL.NUM_QUERIES; .*MODEL.DEQDET.NUM_QUERIES"),
        (["XYZ.QWERTY", 3], r"unknown config key XYZ.QWERTY; the known ones are in "),
        (["SOLVER.MAX_ITER", "many"], r"the command line: Type mismatch .* for config key: SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER=3"], r"pairs of KEY VALUE, a space between, but got SOLVER.MAX_ITER=3"),
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
        ("SOLVER: {", r"toy.yaml: while parsing"),
        ("_BASE_: missing.yaml", r"toy.yaml: .*No such file.*missing.yaml"),
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
        (["MODEL.DEQDET.NUM_CLASSES", 2], r"1 categories \(half\), but MODEL.DEQDET.NUM_CLASSES is 2"),
        (["DATASETS.TRAIN", "('nowhere',)"], r"'nowhere' is not registered"),
    ],
)
def test_a_run_that_does_not_fit_its_files(toy_config, words, message):
    with pytest.raises(UserError, match=message):
        setup(parse(toy_config, *words))


def test_missing_config_file_and_run_ends_with_one_line(toy_config):
    with pytest.raises(SystemExit) as error:
        run(setup, parse("gone.yaml"))
    assert error.value.code == "error: config file gone.yaml does not exist: correct --config-file"
    with pytest.raises(SystemExit) as error:
        run(setup, parse(toy_config, "--num-gpus", 3, "SOLVER.IMS_PER_BATCH", 4))
    assert error.value.code.startswith("error: SOLVER.IMS_PER_BATCH is 4: it must be a multiple of 3")
    with pytest.raises(SystemExit, match="--dist-url"):
        run(setup, parse(toy_config, "--num-machines", 2))


def test_the_tool_ends_with_one_line(toy_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", toy_config, "SOLVER.MAX_ITR", "3"])
    with pytest.raises(SystemExit, match=r"^error: the command line: unknown config key SOLVER.MAX_ITR; .*\?$"):
        runpy.run_path(str(TOOL), run_name="__main__")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_without_cuda_the_device_becomes_the_cpu(toy_config, capsys):
    cfg = setup(parse(toy_config, "MODEL.DEVICE", "cuda"))
    assert cfg.MODEL.DEVICE == "cpu" and cfg.is_frozen()
    assert capsys.readouterr().out.count("CUDA is not available: MODEL.DEVICE is cpu instead of cuda") == 1


def test_mixed_precision_needs_cuda(toy_config):
    cfg = setup(parse(toy_config, "SOLVER.AMP.ENABLED", True))
    with pytest.raises(UserError, match=r"SOLVER.AMP.ENABLED needs CUDA, but MODEL.DEVICE is cpu"):
        Trainer(cfg)


# One process


class SteadyTrainer(Trainer):
    """Every batch is the same, so that a resumed training sees what another sees; `fail_at` interrupts it."""

    fail_at = None

    @classmethod
    def build_train_loader(cls, cfg):
        batch = next(iter(super().build_train_loader(cfg)))
        while True:
            yield batch

    def run_step(self):
        if self.iter == self.fail_at:
            raise KeyboardInterrupt
        super().run_step()


def train(args, fail_at=None):
    trainer = SteadyTrainer(setup(args))
    trainer.fail_at = fail_at
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer


def read_metrics(directory):
    lines = [json.loads(line) for line in Path(directory, "metrics.json").read_text().splitlines()]
    return {(line["iteration"], key): value for line in lines for key, value in line.items()}


def test_training_writes_losses_norms_and_the_last_evaluation(toy_config, tmp_path, capsys):
    trainer = train(parse(toy_config))
    metrics = read_metrics(tmp_path / "out")
    assert {(3, "total_loss"), (3, "grad_norm"), (3, "lr"), (4, "bbox/AP")} <= set(metrics)
    assert metrics[4, "bbox/AP"] == trainer._last_eval_results["bbox"]["AP"] > 0
    assert "copypaste: AP,AP50" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/model_best*"))


def test_an_interrupted_training_resumes_to_the_same_end(toy_config, tmp_path):
    train(parse(toy_config, "OUTPUT_DIR", tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(parse(toy_config, "OUTPUT_DIR", tmp_path / "part"), fail_at=3)
    assert (tmp_path / "part/last_checkpoint").read_text() == "model_0000001.pth"
    resumed = train(parse(toy_config, "--resume", "OUTPUT_DIR", tmp_path / "part"))
    assert resumed.start_iter == 2
    ends = [torch.load(tmp_path / part / "model_final.pth") for part in ("whole", "part")]
    assert ends[0]["iteration"] == 3
    assert sorted(ends[0]["trainer"]["_trainer"]["optimizer"]["state"]) == [0, 1, 2, 3, 4, 5]
    assert_identical(*ends)


def assert_identical(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_best_weights_are_kept_over_a_resumption(toy_config, tmp_path, monkeypatch):
    aps = iter([30.0, 20.0, 25.0, 40.0])
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {"bbox": {"AP": next(aps)}}))
    words = ["SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER"]
    best, out = tmp_path / "out/model_best.json", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(parse(toy_config, *words, 5), fail_at=2)
    assert json.loads(best.read_text()) == {"value": 30.0, "iteration": 0}
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"  # not model_best.pth
    train(parse(toy_config, "--resume", *words, 3))  # 25, less than before the resumption
    assert json.loads(best.read_text()) == {"value": 30.0, "iteration": 0}
    train(parse(toy_config, "--resume", *words, 4))
    assert json.loads(best.read_text()) == {"value": 40.0, "iteration": 4}
    weights, last = (torch.load(out / name)["model"] for name in ("model_best.pth", "model_final.pth"))
    assert_identical(weights, last)


def test_a_loss_that_is_not_finite_stops_with_detectron2s_error(toy_config):
    trainer = SteadyTrainer(setup(parse(toy_config)))
    trainer.model.decoder.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="Loss became infinite or NaN at iteration=0"):
        trainer.train()


def test_the_evaluator_is_cocos(toy_config, tmp_path):
    cfg = setup(parse(toy_config))
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    assert isinstance(evaluator, COCOEvaluator)
    assert evaluator._output_dir == str(tmp_path / "out" / "inference")


# Two processes


def observe_worker(args: argparse.Namespace):
    """Train; each rank leaves what it saw in rank<r>.json."""
    seen = {"threads": torch.get_num_threads(), "backend": torch.distributed.get_backend()}
    norms = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()])
    for norm in norms:
        norm.running_mean += comm.get_rank()
        norm.running_var *= 2 + 4 * comm.get_rank()
    average_batch_norm(norms)
    seen["averaged"] = [norms[0].running_mean.tolist(), norms[0].running_var.tolist()]
    seen["fixed"] = norms[1].running_mean.tolist()

    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=False)
    trainer.train()
    seen["statistics"] = trainer.model.module.backbone[1].running_mean.tolist()
    seen["weights"] = trainer.model.module.decoder.weight.tolist()
    Path(args.config_file).with_name(f"rank{comm.get_rank()}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The config file of a training in two processes, and what each of the two saw."""
    root = tmp_path_factory.mktemp("two_ranks")
    config = write_dataset(root, "two_ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        run(observe_worker, parse(config, "--num-gpus", 2))
    return config, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_on_the_cpu(two_ranks):
    _, ranks = two_ranks
    assert [rank["backend"] for rank in ranks] == ["gloo", "gloo"]
    assert [rank["threads"] for rank in ranks] == [max(1, count_cores() // 2)] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ or os.environ["CUDA_VISIBLE_DEVICES"]


def test_batch_norm_statistics_are_averaged_unless_fixed(two_ranks):
    _, ranks = two_ranks
    for rank in ranks:
        assert rank["averaged"] == [[0.5, 0.5], [4.0, 4.0]]
    assert [rank["fixed"] for rank in ranks] == [[0.0, 0.0], [1.0, 1.0]]
    assert ranks[0]["statistics"] == ranks[1]["statistics"]


def test_the_checkpoint_gives_the_detections_of_the_end_of_training(two_ranks, tmp_path):
    config, _ = two_ranks
    out = Path(config).parent / "out"
    words = ["--eval-only", "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path]
    results = runpy.run_path(str(TOOL))["main"](parse(config, *words))
    assert results["bbox"]["AP"] == read_metrics(out)[4, "bbox/AP"]
    name = "inference/coco_instances_results.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((out / name).read_text())
