"""Detectron2's own ways: a config, a trainer and a predictor built by hand, with no set-up of ours."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from deqdet import Predictor, Trainer, UserError, add_deqdet_config

from helpers.engine_toy import write_dataset


@pytest.fixture
def cfg(tmp_path, small_cfg):
    """A small detector on four images, whose data set is registered by nobody."""
    write_dataset(tmp_path, tmp_path.name)
    name = f"by_hand_{tmp_path.name}"
    entry = [name, f"{tmp_path}/boxes.json", str(tmp_path)]
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_other_cfg(small_cfg("MODEL.DEQDET.NUM_CLASSES", 1))
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [entry], (name,), (name,)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER = 2, 2
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    Path(cfg.OUTPUT_DIR).mkdir()
    return cfg


@pytest.mark.usefixtures("loggers")
def test_a_trainer_from_a_config_alone(cfg):
    """It registers DATASETS.REGISTER itself, trains, evaluates, and leaves a model file."""
    assert cfg.DATASETS.TRAIN[0] not in DatasetCatalog
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    out = Path(cfg.OUTPUT_DIR)
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP" in line for line in lines)
    predictor = Predictor.from_file(out / "model_final.safetensors", threshold=0.0)
    assert predictor.class_names == ("half",)
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    state = predictor.model.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], value) for name, value in state.items())
    assert predictor.cfg.MODEL.DEQDET.NUM_QUERIES == cfg.MODEL.DEQDET.NUM_QUERIES
    found = predictor(str(next(Path(cfg.DATASETS.REGISTER[0][2]).glob("*.png"))))
    assert len(found) == 6 and found.labels == ["half"] * 6 and found.steps == 4


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("weights, loads, warned", [("w.pth", False, True), ("w.pth", True, False), ("", False, False)])
def test_a_training_without_its_weights_is_warned_of(cfg, caplog, tmp_path, weights, loads, warned):
    cfg.MODEL.WEIGHTS = weights and str(tmp_path / weights)
    trainer = Trainer(cfg)
    if loads:
        torch.save({"model": trainer.model.state_dict()}, cfg.MODEL.WEIGHTS)
        trainer.resume_or_load(resume=False)
    logging.getLogger("deqdet").propagate = True  # to caplog
    trainer.before_train()
    assert ("w.pth is not loaded, since resume_or_load() was not called" in caplog.text) == warned


class ConstantTrainer(Trainer):
    """A trainer whose learning-rate schedule has a name of its own."""

    @classmethod
    def check_config(cls, cfg):
        known = cfg.clone()
        known.SOLVER.LR_SCHEDULER_NAME = "WarmupCosineLR"
        super().check_config(known)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        return ConstantLR(optimizer, factor=0.5, total_iters=1)


def test_a_trainer_of_ones_own_may_take_other_values(cfg):
    cfg.SOLVER.LR_SCHEDULER_NAME = "Constant"
    with pytest.raises(UserError, match="^SOLVER.LR_SCHEDULER_NAME is 'Constant': it must be WarmupMulti"):
        Trainer(cfg)
    assert isinstance(ConstantTrainer(cfg).scheduler, ConstantLR)
    cfg.SOLVER.BASE_LR = -1.0
    with pytest.raises(UserError, match="^SOLVER.BASE_LR is -1.0: it must be a finite number above 0"):
        ConstantTrainer(cfg)


def test_a_wrong_data_set_is_one_line(cfg):
    cfg.DATASETS.REGISTER = [["x", "gone.json", "."]]
    with pytest.raises(UserError, match=r"DATASETS.REGISTER\[0\] \('x'\): gone.json cannot be read"):
        Trainer(cfg)
