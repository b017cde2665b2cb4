"""Averaged weights: the numbers, what is evaluated and what is saved."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deqdet.checkpoints.files import read_torch
from deqdet.engine import Trainer, setup
from deqdet.engine.averaging import AverageWeights, decay_after

from helpers.engine_toy import IN_PROCESS, parse
from helpers.toy_runs import read_lines

pytestmark = IN_PROCESS


def test_the_decay_grows_with_the_updates():
    assert [decay_after(n, 0.9998) for n in (1, 2, 990)] == [2 / 11, 3 / 12, 991 / 1000]
    assert decay_after(10**6, 0.9998) == 0.9998 and decay_after(5, 0.1) == 0.1


def average_of(values: list[float], decay: float) -> nn.Module:
    """The average of a model whose weight, mean and counter take these values in turn."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    hook = AverageWeights(model, decay, [0])
    hook.trainer = SimpleNamespace(iter=0, max_iter=100)
    hook.before_train()
    for value in values:
        with torch.no_grad():
            model[0].weight.fill_(value)
            model[1].running_mean.fill_(10 * value)
            model[1].num_batches_tracked.fill_(int(value))
        hook.after_step()
    assert hook.state_dict() == {"updates": len(values)}
    return hook.model


@pytest.mark.parametrize("decay, expected", [(0.9998, 38 / 11), (0.1, 3.79)])
def test_the_average_by_hand(decay, expected):
    """1; 2/11 * 1 + 9/11 * 2 = 20/11; 1/4 * 20/11 + 3/4 * 4 = 38/11. With 0.1: 1; 1.9; 0.19 + 3.6."""
    average = average_of([1.0, 2.0, 4.0], decay)
    assert average[0].weight.item() == pytest.approx(expected)
    assert average[1].running_mean.item() == pytest.approx(10 * expected)
    assert average[1].num_batches_tracked.item() == 4  # copied


def train(args) -> Trainer:
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    return trainer


def test_both_are_evaluated_and_the_average_is_saved(toy_config, tmp_path):
    trainer = train(parse(toy_config, "SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 2))
    final = read_torch(tmp_path / "out/model_final.pth")
    assert final["ema"].keys() == final["model"].keys()
    assert any(not torch.equal(x, final["model"][name]) for name, x in final["ema"].items())
    for name, x in trainer.averaging.model.state_dict().items():
        assert torch.equal(final["ema"][name], x)
    written = load_file(tmp_path / "out/model_final.safetensors")
    assert written and all(torch.equal(final["ema"][name], x) for name, x in written.items())
    last = read_lines(tmp_path / "out")[-1]
    assert {"bbox/AP", "ema/bbox/AP", "ema/bbox/AP50"} <= last.keys()
    found = [json.loads((tmp_path / f"out/{where}inference/coco_instances_results.json").read_text())
             for where in ("", "ema/")]  # fmt: skip
    assert len(found[0]) == len(found[1]) and found[0] != found[1]  # scores of other weights


def test_the_best_is_that_of_the_average(toy_config, tmp_path, monkeypatch):
    """The raw weights are best at the end, the averaged ones after two iterations."""
    aps = {"out": iter([10.0, 20.0, 30.0]), "ema": iter([30.0, 40.0, 5.0])}
    at_second = {}

    def test(cls, cfg, model):
        ap = next(aps[cfg.OUTPUT_DIR.rpartition("/")[2]])
        if ap == 40:
            at_second.update({name: x.clone() for name, x in model.state_dict().items()})
        return {"bbox": {"AP": ap}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    train(parse(toy_config, "SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 3))
    best = read_torch(tmp_path / "out/model_best.pth")
    assert (best["value"], best["iteration"]) == (40.0, 1)
    assert all(torch.equal(best["model"][name], x) for name, x in at_second.items()) and at_second


def test_without_the_key_there_is_no_average(toy_config, tmp_path):
    trainer = train(parse(toy_config, "SOLVER.MAX_ITER", 1))
    assert trainer.averaging is None and "ema" not in read_torch(tmp_path / "out/model_final.pth")
    assert not any(key.startswith("ema") for line in read_lines(tmp_path / "out") for key in line)
