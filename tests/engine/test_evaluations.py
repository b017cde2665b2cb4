"""What evaluations in training leave behind: all their figures, the end of the training, the checkpoints that stay."""

import json
import logging
import math

import pytest
import torch

from deqdet.checkpoints.files import read_torch, write_torch
from deqdet.checkpoints.latest import delete_older
from deqdet.engine import UserError, check_options, run, setup
from deqdet.engine.early_stop import build_early_stop
from deqdet.engine.resume import CLOCK_FIGURES

from helpers.engine_toy import IN_PROCESS, parse, write_dataset
from helpers.short_training import in_metrics, in_tensorboard, train
from helpers.two_ranks import forked_ranks

pytestmark = IN_PROCESS

# Every evaluation is written


def by_iteration(iteration: int) -> float:
    return 100.0 + iteration


# Evaluations after iterations 6, 13, 20, ... of 45, and one at the end; other figures after 19, 39 and 44.
EVERY_SEVEN = "TEST.EVAL_PERIOD", 7, "SOLVER.MAX_ITER", 45, "SOLVER.CHECKPOINT_PERIOD", 10
EVALUATED = [(i, 100.0 + i) for i in (6, 13, 20, 27, 34, 41, 45)]


def test_every_evaluation_is_written_once(toy_config, tmp_path):
    train(toy_config, *EVERY_SEVEN, ap=by_iteration)
    assert in_metrics(tmp_path / "out", "bbox/AP") == EVALUATED
    assert in_tensorboard(tmp_path / "out", "bbox/AP") == EVALUATED
    assert {19, 39, 44} <= {iteration for iteration, _ in in_metrics(tmp_path / "out", "total_loss")}


@pytest.mark.parametrize("fail_at", [25, 20, 14])  # between two evaluations, before one, before the first checkpoint's
def test_every_evaluation_is_written_once_over_a_resumption(toy_config, tmp_path, fail_at):
    train(toy_config, *EVERY_SEVEN, "OUTPUT_DIR", tmp_path / "whole", ap=by_iteration)
    train(toy_config, *EVERY_SEVEN, ap=by_iteration, fail_at=fail_at)
    train(toy_config, "--resume", *EVERY_SEVEN, ap=by_iteration)
    assert in_metrics(tmp_path / "out", "bbox/AP") == EVALUATED
    assert in_tensorboard(tmp_path / "out", "bbox/AP") == EVALUATED
    for name in ("total_loss", "grad_norm"):
        assert in_metrics(tmp_path / "out", name) == in_metrics(tmp_path / "whole", name)
        assert in_tensorboard(tmp_path / "out", name) == in_tensorboard(tmp_path / "whole", name)


def test_an_evaluation_that_was_interrupted_is_repeated(toy_config, tmp_path):
    """Checkpoint, evaluation and other figures come after the same iteration, and the evaluation never ends."""
    words = "TEST.EVAL_PERIOD", 20, "SOLVER.MAX_ITER", 30, "SOLVER.CHECKPOINT_PERIOD", 20

    def never(iteration: int) -> float:
        raise KeyboardInterrupt

    train(toy_config, *words, ap=never, fail_at=99)
    train(toy_config, "--resume", *words, ap=by_iteration)
    for found in (in_metrics, in_tensorboard):
        assert found(tmp_path / "out", "bbox/AP") == [(19, 119.0), (30, 130.0)]


def test_a_finished_training_that_is_resumed_writes_nothing_twice(toy_config, tmp_path):
    train(toy_config, *EVERY_SEVEN, ap=by_iteration)
    train(toy_config, "--resume", *EVERY_SEVEN, ap=by_iteration)
    assert in_metrics(tmp_path / "out", "bbox/AP") == EVALUATED
    assert in_tensorboard(tmp_path / "out", "bbox/AP") == EVALUATED


# Early stop

# Evaluations after iterations 1, 3, 5, ...: 10, 20, 15, 15, 30; with a patience of 2, the fourth is the last.
APS = {1: 10.0, 3: 20.0, 5: 15.0, 7: 15.0, 9: 30.0}
STOPPING = "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 12, "SOLVER.EARLY_STOP.PATIENCE", 2


def early(iteration: int) -> float:
    return APS.get(iteration, 15.0)


def end_of(out) -> dict:
    """The last checkpoint, and all figures that are not the clock's."""
    final = read_torch(out / "model_final.pth")
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k not in CLOCK_FIGURES} for line in lines]
    return {"model": final["model"], "trainer": final["trainer"]["_trainer"], "figures": figures}


def assert_same(a, b):
    assert a["figures"] == b["figures"]
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert str(a["trainer"]) == str(b["trainer"])


def test_a_training_without_improvement_ends_early(toy_config, tmp_path, capsys):
    trainer = train(toy_config, *STOPPING, ap=early)
    out = tmp_path / "out"
    assert "after iteration 7: bbox/AP was best at 20.000, 2 evaluations ago" in capsys.readouterr().out
    assert read_torch(out / "model_final.pth")["iteration"] == 7
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert (out / "model_final.safetensors").is_file()
    assert trainer.iter == trainer.max_iter == 8
    assert "eta_seconds" not in (out / "metrics.json").read_text().splitlines()[-1]
    assert in_metrics(out, "bbox/AP") == [(1, 10.0), (3, 20.0), (5, 15.0), (7, 15.0), (8, 15.0)]
    best, last = (read_torch(out / f"model_{name}.pth") for name in ("best", "final"))
    assert best["iteration"] == 3
    assert not torch.equal(best["model"]["decoder.weight"], last["model"]["decoder.weight"])
    # As if it had been the end anyway.
    train(toy_config, *STOPPING, "SOLVER.MAX_ITER", 8, "OUTPUT_DIR", tmp_path / "short", ap=early)
    short = read_torch(tmp_path / "short/model_final.pth")["model"]
    assert all(torch.equal(short[name], last["model"][name]) for name in short)


@pytest.mark.parametrize("period, fail_at", [(4, 5), (4, 7), (6, 7), (1, 4)])
def test_a_resumed_training_ends_at_the_same_iteration(toy_config, tmp_path, period, fail_at):
    words = *STOPPING, "SOLVER.CHECKPOINT_PERIOD", period
    train(toy_config, *words, "OUTPUT_DIR", tmp_path / "whole", ap=early)
    train(toy_config, *words, ap=early, fail_at=fail_at)
    train(toy_config, "--resume", *words, ap=early)
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "out"))


def test_the_decision_is_made_again_if_its_evaluation_was_interrupted(toy_config, tmp_path):
    words = *STOPPING, "SOLVER.CHECKPOINT_PERIOD", 8  # the checkpoint is that of the last evaluation
    train(toy_config, *words, "OUTPUT_DIR", tmp_path / "whole", ap=early)

    def interrupted(iteration: int) -> float:
        if iteration == 7:
            raise KeyboardInterrupt
        return early(iteration)

    train(toy_config, *words, ap=interrupted, fail_at=99)
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000007.pth"
    train(toy_config, "--resume", *words, ap=early)
    assert_same(end_of(tmp_path / "whole"), end_of(tmp_path / "out"))
    assert (tmp_path / "out/model_final.safetensors").is_file()


def test_a_training_that_ended_early_does_not_go_on(toy_config, tmp_path, capsys):
    train(toy_config, *STOPPING, ap=early)
    before = end_of(tmp_path / "out")
    (tmp_path / "out/model_final.safetensors").unlink()  # as if it had been killed before
    train(toy_config, "--resume", *STOPPING, ap=early)
    assert "This training has ended early (bbox/AP was best at 20.000, 2 evaluations ago" in capsys.readouterr().out
    assert_same(before, end_of(tmp_path / "out"))
    assert (tmp_path / "out/model_final.safetensors").is_file()
    more = train(toy_config, "--resume", *STOPPING, "SOLVER.EARLY_STOP.PATIENCE", 3, ap=early)
    assert more.iter == 12 and read_torch(tmp_path / "out/model_final.pth")["iteration"] == 11


@pytest.mark.parametrize("metric, min_delta, values, waited", [
    ("AP", 0.0, [10, 10, 11], [0, 1, 0]),
    ("AP", 0.5, [10, 10.5, 10.6, 10.7, 11.2], [0, 1, 0, 1, 0]),  # from the best, not from the one before
    ("AP", 0.0, [math.nan, 1, math.nan, 2], [1, 0, 1, 0]),
    ("validation_loss", 0.1, [5, 4, 4.5, 3.95, 3.8], [0, 0, 1, 2, 0]),
])  # fmt: skip
@pytest.mark.parametrize("sets", [("val",), ("hairloss_val", "val")])  # the name of a set is part of the metric's name
def test_what_counts_as_an_improvement(small_cfg, sets, metric, min_delta, values, waited):
    stop = "SOLVER.EARLY_STOP.PATIENCE", 9, "SOLVER.EARLY_STOP.METRIC", metric, "SOLVER.EARLY_STOP.MIN_DELTA", min_delta
    (hook,) = build_early_stop(small_cfg("DATASETS.TEST", sets, *stop))
    found = []
    for value in values:
        hook._take(value)
        found.append(hook.state_dict()["waited"])
    assert found == waited


@pytest.mark.parametrize("change", [("SOLVER.EARLY_STOP.METRIC", "AP50"), ("SOLVER.EMA.ENABLED", True)])
def test_the_best_of_another_metric_does_not_count(small_cfg, change, caplog):
    """A resumed training may watch another metric, whose values have nothing to do with the old best."""
    stop = "DATASETS.TEST", ("val",), "SOLVER.EARLY_STOP.PATIENCE", 9
    caplog.set_level(logging.INFO)
    (before,), (same,), (other,) = (build_early_stop(small_cfg(*stop, *more)) for more in ((), (), change))
    for value in (40.0, 30.0):
        before._take(value)
    for hook in (same, other):
        hook.load_state_dict(before.state_dict())
        hook._take(35.0)
    assert [(hook._best, hook._waited) for hook in (same, other)] == [(40.0, 2), (35.0, 0)]
    (line,) = caplog.messages
    assert line.startswith("SOLVER.EARLY_STOP watched bbox/AP before and starts over with ")


def test_an_evaluation_without_the_metric_is_one_clear_error(toy_config):
    with pytest.raises(UserError, match="computed no bbox/AP50, which SOLVER.EARLY_STOP watches: put"):
        train(toy_config, *STOPPING, "SOLVER.EARLY_STOP.METRIC", "AP50", ap=early)


@pytest.mark.parametrize("words, message", [
    (["TEST.EVAL_PERIOD", 0], "PATIENCE is 3, but nothing is evaluated in training: set TEST.EVAL_PERIOD"),
    (["DATASETS.TEST", "()"], "PATIENCE is 3, but nothing is evaluated in training: set DATASETS.TEST"),
    (["SOLVER.EARLY_STOP.METRIC", "validation_loss"], "TEST.VALIDATION_LOSS is False: set it to True"),
    (["SOLVER.EARLY_STOP.METRIC", "mAP"], "METRIC is 'mAP': it must be one of AP, AP50, .*validation_loss"),
    (["SOLVER.EARLY_STOP.PATIENCE", -1], "PATIENCE is -1: it must be an integer of at least 0"),
    (["SOLVER.EARLY_STOP.MIN_DELTA", -0.1], "MIN_DELTA is -0.1: it must be a finite number"),
    (["SOLVER.KEEP_CHECKPOINTS", -1], "KEEP_CHECKPOINTS is -1: it must be an integer of at least 0"),
    (["TEST.EVALUATOR", "coco"], "EVALUATOR is 'coco': it must be pycocotools or faster-coco-eval"),
    (["WRITERS", "['wandb','tensorboard']"], "WRITERS is .*: it must be a list, each wandb or mlflow"),
    (["WRITERS", "['wandb','wandb']"], "WRITERS is .*without duplicates"),
])  # fmt: skip
def test_a_mistake_in_a_key_is_one_line(toy_config, words, message):
    with pytest.raises(UserError, match=message) as caught:
        setup(parse(toy_config, "TEST.EVAL_PERIOD", 2, "SOLVER.EARLY_STOP.PATIENCE", 3, *words))
    assert "\n" not in str(caught.value)


def stop_worker(args):
    trainer = train(args.config_file, "--num-gpus", 2, *STOPPING, ap=early)
    assert trainer.iter == trainer.max_iter == 8


def test_two_ranks_stop_together(tmp_path):
    """Only rank 0 knows the AP; the other would wait for it forever in the next iteration."""
    config = write_dataset(tmp_path, "stop")
    with forked_ranks():
        run(stop_worker, parse(config, "--num-gpus", 2))
    assert read_torch(tmp_path / "out/model_final.pth")["iteration"] == 7


# The checkpoints that stay


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("*.pth"))


def test_the_newest_checkpoints_are_kept(toy_config, tmp_path):
    words = "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 11, "TEST.EVAL_PERIOD", 3
    train(toy_config, *words, "SOLVER.KEEP_CHECKPOINTS", 2, ap=early)
    assert names(tmp_path / "out") == ["model_0000007.pth", "model_0000009.pth", "model_best.pth", "model_final.pth"]
    train(toy_config, *words, "OUTPUT_DIR", tmp_path / "all", ap=early)
    assert len(names(tmp_path / "all")) == 7


def test_a_resumed_training_deletes_checkpoints_of_before(toy_config, tmp_path):
    words = "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 11, "SOLVER.KEEP_CHECKPOINTS", 2
    train(toy_config, *words, fail_at=6)
    assert names(tmp_path / "out") == ["model_0000003.pth", "model_0000005.pth"]
    train(toy_config, "--resume", *words, fail_at=8)
    assert names(tmp_path / "out") == ["model_0000005.pth", "model_0000007.pth"]
    train(toy_config, "--resume", *words)
    assert names(tmp_path / "out") == ["model_0000007.pth", "model_0000009.pth", "model_final.pth"]


def test_what_is_never_deleted(tmp_path):
    for name in ("0000001", "0000003", "0000005", "0000099", "final", "best"):
        write_torch({"model": {}}, tmp_path / f"model_{name}.pth")
    (tmp_path / "mine_0000001.pth").touch()
    for tag, left in (("model_0000001.pth", ["0000001", "0000005"]), ("model_final.pth", ["0000005"])):
        (tmp_path / "last_checkpoint").write_text(tag)
        delete_older(tmp_path, 1, iteration=5)
        kept = [*(f"model_{name}.pth" for name in left), "model_0000099.pth", "model_best.pth", "model_final.pth"]
        assert names(tmp_path) == ["mine_0000001.pth", *kept]


def test_a_deletion_comes_after_the_new_checkpoint_is_whole(toy_config, tmp_path, monkeypatch):
    """The disk is full when the second checkpoint is written: the first one must be there still."""
    from deqdet.checkpoints import checkpointer

    written = []

    def write(content, path):
        if len(written) == 1:
            raise UserError("no room")
        written.append(write_torch(content, path))

    monkeypatch.setattr(checkpointer, "write_torch", write)
    with pytest.raises(UserError, match="no room"):
        train(toy_config, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 6, "SOLVER.KEEP_CHECKPOINTS", 1)
    assert names(tmp_path / "out") == ["model_0000001.pth"]


def test_the_defaults_change_nothing(toy_config):
    cfg = setup(parse(toy_config))
    assert cfg.SOLVER.EARLY_STOP.PATIENCE == cfg.SOLVER.KEEP_CHECKPOINTS == 0
    assert not cfg.TEST.VALIDATION_LOSS and cfg.TEST.EVALUATOR == "pycocotools" and list(cfg.WRITERS) == []
    check_options(cfg)
