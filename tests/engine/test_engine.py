"""Training of a toy detector alone, interrupted and resumed, and in two processes on the CPU."""

import argparse
import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

from deqdet.engine import Trainer, UserError, load_config, run, setup
from deqdet.engine.evaluation import StatesEvaluator, StepsEvaluator
from deqdet.engine.hooks import average_batch_norm, peak_memory_mb
from deqdet.engine.launcher import _hidden_gpus, count_cores
from deqdet.tools.train_net import work

from helpers.engine_toy import IN_PROCESS, parse, write_dataset

pytestmark = IN_PROCESS


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


def test_the_order_of_the_hooks(toy_config):
    """What each needs to come before or after is beside its place in Trainer.build_hooks."""
    flags = "SOLVER.EMA.ENABLED", True, "TEST.VALIDATION_LOSS", True, "TEST.PRECISE_BN.ENABLED", True
    words = *flags, "TEST.EVAL_PERIOD", 4, "SOLVER.EARLY_STOP.PATIENCE", 3
    trainer = Trainer(setup(parse(toy_config, *words)))
    assert [type(hook).__name__ for hook in trainer._hooks] == [
        "MarkProgress", "SeedIteration", "IterationTimer", "LRScheduler", "PreciseBN", "AverageBatchNorm",
        "AverageWeights", "PeakMemory", "FiniteGuard", "PeriodicCheckpointer", "KeepNewest",
        "EvalHook", "EvalHook", "EvalHook",  # the weights, their losses, the averaged weights
        "BestCheckpointer", "EvaluationsWriter", "ModelFileWriter", "EarlyStop", "StopOnSignal",
    ]  # fmt: skip


def test_a_script_does_not_overwrite_a_training(toy_config, tmp_path):
    """A script that calls Trainer itself, whose OUTPUT_DIR no command has claimed."""
    cfg = load_config(parse(toy_config, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path / "mine"))

    def run_script(resume: bool) -> None:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()

    run_script(resume=False)
    before = {path: path.read_bytes() for path in (tmp_path / "mine").glob("model_*")}
    message = r"mine already contains a training \(.*\): resume_or_load\(resume=True\) continues it"
    with pytest.raises(UserError, match=message):
        run_script(resume=False)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").glob("model_*")} == before
    cfg.SOLVER.MAX_ITER = 3
    run_script(resume=True)


def test_training_writes_losses_norms_and_the_last_evaluation(toy_config, tmp_path, capsys):
    trainer = train(parse(toy_config))
    metrics = read_metrics(tmp_path / "out")
    assert {(3, "total_loss"), (3, "grad_norm"), (3, "lr"), (4, "bbox/AP")} <= set(metrics)
    assert metrics[4, "bbox/AP"] == trainer._last_eval_results["bbox"]["AP"] > 0
    assert "copypaste: AP,AP50" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/model_best*"))


def test_peak_memory_is_written_with_the_losses(toy_config, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # by another test, on a GPU
    train(parse(toy_config, "SOLVER.MAX_ITER", 50, "SOLVER.CHECKPOINT_PERIOD", 100))
    metrics = read_metrics(tmp_path / "out")
    peaks = [metrics[iteration, "peak_memory_mb"] for iteration in (19, 39, 49)]
    assert 10 < peaks[0] <= peaks[1] <= peaks[2] <= peak_memory_mb()
    process = Path("/proc/self/status")
    if process.exists():  # on Linux, whose own figure is in KiB
        (highest,) = (line for line in process.read_text().splitlines() if line.startswith("VmHWM:"))
        assert peaks[2] == pytest.approx(int(highest.split()[1]) / 1024, rel=0.2)


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
    # An iteration's checkpoint comes before its evaluation, which a resumption therefore repeats: 30 and 25.
    aps = iter([30.0, 30.0, 20.0, 25.0, 25.0, 40.0])
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model: {"bbox": {"AP": next(aps)}}))
    words = ["SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER"]
    best, out = tmp_path / "out/model_best.json", tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(parse(toy_config, *words, 5), fail_at=1)
    assert json.loads(best.read_text()) == {"value": 30.0, "iteration": 0}
    assert (out / "last_checkpoint").read_text() == "model_0000000.pth"  # not model_best.pth
    train(parse(toy_config, "--resume", *words, 3))  # 25, less than before the resumption
    assert json.loads(best.read_text()) == {"value": 30.0, "iteration": 0}
    train(parse(toy_config, "--resume", *words, 4))
    assert json.loads(best.read_text()) == {"value": 40.0, "iteration": 4}
    weights, last = (torch.load(out / name)["model"] for name in ("model_best.pth", "model_final.pth"))
    assert_identical(weights, last)


def test_a_loss_that_is_not_finite_stops_with_detectron2s_error(toy_config):
    trainer = SteadyTrainer(setup(parse(toy_config)))
    trainer.model.decoder.bias.data[0] = float("nan")
    message = "Loss became infinite or NaN at iteration=0; first bad tensor: decoder.bias; images .*png"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()


def test_the_evaluator_is_cocos(toy_config, tmp_path):
    cfg = setup(parse(toy_config))
    evaluator, *others = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])._evaluators
    assert isinstance(evaluator, COCOEvaluator) and [type(other) for other in others] == [StatesEvaluator]
    assert evaluator._output_dir == str(tmp_path / "out" / "inference")


def test_the_steps_until_convergence_are_in_the_summary(toy_config, capsys):
    trainer = train(parse(toy_config, "MODEL.DEQDET.SOLVER.RTOL", 0.1, "SOLVER.MAX_ITER", 1))
    results = trainer._last_eval_results
    assert results["steps"] == pytest.approx({"mean": 2.5, "p50": 2.5, "p95": 3.85})
    assert results["bbox"]["AP"] >= 0
    printed = capsys.readouterr().out
    assert "Steps that 4 images took: mean 2.50, median 2.5, 95th percentile 3.8, maximum 4" in printed
    assert "copypaste: Task: steps" in printed


@pytest.mark.parametrize("key, value, message", [
    ("MODEL.META_ARCHITECTURE", "Nothing", "META_ARCHITECTURE is 'Nothing': it must be one of DEQDet, .* --plugin"),
    ("OUTPUT_DIR", __file__, "OUTPUT_DIR .*test_engine.py is a file: choose a folder"),
    ("OUTPUT_DIR", f"{__file__}/out", r"OUTPUT_DIR .*test_engine.py/out cannot be created \(Not a directory\)"),
])  # fmt: skip
def test_what_cannot_be_built_is_one_clear_error(toy_config, key, value, message):
    with pytest.raises(UserError, match=message):
        Trainer(setup(parse(toy_config, key, value)))


def test_the_steps_of_an_earlier_evaluation_do_not_count():
    evaluator = StepsEvaluator()
    assert evaluator.evaluate() == {}
    evaluator.process([{}, {}], [{"steps": torch.tensor(7)}, {"steps": torch.tensor(9)}])
    evaluator.reset()
    evaluator.process([{}], [{"steps": torch.tensor(3)}])
    assert evaluator.evaluate() == {"steps": {"mean": 3.0, "p50": 3.0, "p95": 3.0}}


@pytest.mark.parametrize("broken, total", [((), None), ((1, 2, 3, 4), 4), ((2,), 1)])
def test_images_that_left_the_finite_numbers_are_in_the_summary(toy_config, capsys, broken, total):
    """Once, below the AP, however many images."""

    def spoil(module, inputs, outputs):
        return outputs if module.training else [
            x | {"finite": torch.tensor(int(x["steps"]) not in broken)} for x in outputs
        ]  # fmt: skip

    trainer = Trainer(setup(parse(toy_config)))
    trainer.model.register_forward_hook(spoil)
    results = Trainer.test(trainer.cfg, trainer.model)
    out = capsys.readouterr().out
    assert results.get("nonfinite") == (total and {"images": total, "of": 4})
    lines = [line for line in out.splitlines() if "infinite or NaN" in line]
    assert [f"infinite or NaN in {total} of 4 images: their" in line for line in lines] == [True] * bool(total)
    if total:
        places = [out.index(words) for words in ("results for bbox", "infinite or NaN", "copypaste: Task: nonfinite")]
        assert places == sorted(places)


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
        run(observe_worker, parse(config, "--num-gpus", 2, "MODEL.DEQDET.SOLVER.RTOL", 0.1))
    return config, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_on_the_cpu(two_ranks):
    _, ranks = two_ranks
    assert [rank["backend"] for rank in ranks] == ["gloo", "gloo"]
    assert [rank["threads"] for rank in ranks] == [max(1, count_cores() // 2)] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.parametrize("before", [None, "", "0", "1,2"])
def test_gpus_are_hidden_for_a_while(monkeypatch, before):
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
    with pytest.raises(KeyError), _hidden_gpus():
        assert os.environ[name] == ""
        raise KeyError
    assert os.environ.get(name) == before


def test_batch_norm_statistics_are_averaged_unless_fixed(two_ranks):
    _, ranks = two_ranks
    for rank in ranks:
        assert rank["averaged"] == [[0.5, 0.5], [4.0, 4.0]]
    assert [rank["fixed"] for rank in ranks] == [[0.0, 0.0], [1.0, 1.0]]
    assert ranks[0]["statistics"] == ranks[1]["statistics"]


def test_steps_are_those_of_the_images_of_all_ranks(two_ranks):
    config, _ = two_ranks
    metrics = read_metrics(Path(config).parent / "out")
    found = [metrics[4, f"steps/{name}"] for name in ("mean", "p50", "p95")]
    assert found == pytest.approx([2.5, 2.5, 3.85])  # of 1, 2, 3, 4


def test_the_checkpoint_gives_the_detections_of_the_end_of_training(two_ranks, tmp_path):
    config, _ = two_ranks
    out = Path(config).parent / "out"
    words = ["--eval-only", "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path]
    results = work(parse(config, *words))
    assert results["bbox"]["AP"] == read_metrics(out)[4, "bbox/AP"]
    name = "inference/coco_instances_results.json"
    assert json.loads((tmp_path / name).read_text()) == json.loads((out / name).read_text())
