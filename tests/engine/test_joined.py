"""Runs that torchrun, srun or two launchers start: the same training and the same gradients, one set of outputs."""

import socket
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from engine.test_kills import LONG, end_of
from soak.kill_resume import same

from deqdet.engine import UserError, joined
from deqdet.engine.cluster import Place
from deqdet.engine.ranks import meet
from deqdet.engine.signals import CONFIRMATION

from helpers.engine_toy import write_dataset
from helpers.gradients import CASES, batch, build, gradients
from helpers.joined import free_port, run_together, slurm_step, torchrun
from helpers.toy_runs import HELPERS, command, read_lines, said

STEPS = 23  # of LONG


def compare_command(config: str, *words) -> list[str]:
    """As `command`, but the gradients of a DEQDet are saved at the end."""
    start = command(config, *words)
    return [start[0], str(HELPERS / "train_and_compare.py"), *start[2:]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By the way they were started, the folders of trainings in two processes; and what the processes printed."""
    root = tmp_path_factory.mktemp("joined")
    config = write_dataset(root, "joined")
    folders = {name: root / name for name in ("torchrun", "srun", "machines")}
    words = {name: [*LONG, "OUTPUT_DIR", folder] for name, folder in folders.items()}
    # torchrun starts both again when rank 1 has been killed.
    start = torchrun(compare_command(config, "--resume", *words["torchrun"]), "--max-restarts", "1")
    done = {"torchrun": run_together([start], [{}], kill="SIGKILL@10:1")}
    tasks = [slurm_step(rank) | {"MASTER_PORT": str(free_port())} for rank in (0, 1)]
    tasks[1]["MASTER_PORT"] = tasks[0]["MASTER_PORT"]
    done["srun"] = run_together([compare_command(config, *words["srun"])] * 2, tasks)
    machines = ["--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}", "--machine-rank"]
    commands = [compare_command(config, *machines, rank, *words["machines"]) for rank in (0, 1)]
    done["machines"] = run_together(commands, [{}, {}])
    return folders, done


def test_every_way_ends_well(runs):
    for way, processes in runs[1].items():
        for process in processes:
            assert process.returncode == 0, f"{way}: {process.stderr[-2000:]}"


def test_a_rank_is_killed_and_torchrun_starts_both_again(runs):
    folders, done = runs
    # On a busy machine, the SIGTERM of torchrun comes first.
    stopped = ("SIGTERM: the training ends with a checkpoint after this iteration or evaluation; a second signal ends "
               "it at once")  # fmt: skip
    error = ("error: a collective operation failed in iteration 10, probably because another rank is gone: --resume "
             "continues")  # fmt: skip
    assert said(done["torchrun"][0]) in ([error], [stopped, error])
    log = (folders["torchrun"] / "log.txt").read_text()
    assert "Starting training from iteration 0" in log and "Starting training from iteration 8" in log


@pytest.mark.parametrize("way", ["torchrun", "srun"])
def test_the_training_is_that_of_our_own_launcher(runs, way):
    """Bit for bit, also when it was killed in between."""
    folders, _ = runs
    assert same(end_of(folders[way]), end_of(folders["machines"]))


@pytest.fixture(scope="module")
def expected():
    return [gradients(build(), batch(case)) for case in CASES[:2]]


@pytest.mark.parametrize("way", ["torchrun", "srun", "machines"])
def test_the_gradients_are_those_of_one_process(runs, expected, way):
    found = torch.load(runs[0][way] / "gradients", weights_only=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            gap = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert gap < 1e-5, f"{name}: relative gap {gap:.1e}"


@pytest.mark.parametrize("way", ["torchrun", "srun", "machines"])
def test_there_is_one_set_of_outputs(runs, way):
    folders, done = runs
    folder = folders[way]
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.")}
    checkpoints = {f"model_{i:07d}.pth" for i in (3, 7, 11, 15, 19)} | {"model_final.pth", "model_final.safetensors"}
    logs = {"log.txt", "log.txt.rank1"}  # detectron2's own file of every other rank
    assert names - {".lock"} == {*checkpoints, *logs, "config.yaml", "last_checkpoint", "metrics.json", "gradients",
                                 "places"}  # fmt: skip
    assert len(list(folder.glob("events.*"))) == (2 if way == "torchrun" else 1)  # one for each start
    assert [line["iteration"] for line in read_lines(folder)] == [7, 15, 19, STEPS - 1]
    starts = sum(process.stdout.count("Starting training from iteration") for process in done[way])
    assert starts == (2 if way == "torchrun" else 1)
    assert sum(process.stdout.count(f"Saving checkpoint to {folder}/model_final.pth") for process in done[way]) == 1


@pytest.mark.parametrize("way, local_sizes", [("torchrun", 2), ("srun", 2), ("machines", 1)])
def test_detectron2_knows_the_ranks_of_each_machine(runs, way, local_sizes):
    local = [0, 1] if local_sizes == 2 else [0, 0]
    places = sorted((runs[0][way] / "places").read_text().splitlines())
    assert places == [f"{rank} 2 {local[rank]} {local_sizes}" for rank in (0, 1)]


def test_sigterm_to_torchrun_ends_with_a_checkpoint(toy_config, tmp_path):
    start = torchrun(command(toy_config, *LONG))
    done = run_together([start], [{}], kill="LAUNCHER-SIGTERM@9")[0]
    path = tmp_path / "out" / "model_0000009.pth"
    lines = [line for line in said(done) if not line.startswith("Traceback")]  # torchrun prints one of its own
    assert lines == [
        f"SIGTERM: {CONFIRMATION}",
        f"stopped by SIGTERM after iteration 9: saved {path}; --resume continues from there",
    ]
    assert path.exists()


class Ended(BaseException):
    pass


def end_with(code: int) -> None:
    raise Ended(code)


PLACE = Place("torchrun", rank=1, world_size=2, local_rank=1, local_size=2, host="127.0.0.1", port=1)


@pytest.mark.parametrize("phase, words", [(0.0, "while it loaded data"), (1.0, "in the forward pass")])
def test_a_rank_without_progress_ends(monkeypatch, capsys, phase, words):
    monkeypatch.setattr(joined, "end_process", end_with)
    with pytest.raises(Ended, match="1"):
        joined._watch([0.0, 1.0, 7.0, phase, 3.0], 0.1, joined._Voice(PLACE))
    line = f"error: rank 1 has made no progress for 0.1 s in iteration 7 {words} (--rank-timeout): --resume continues\n"
    assert capsys.readouterr().err == line


def test_one_rank_speaks_for_all(capsys):
    store = dist.HashStore()
    voices = [joined._Voice(PLACE), joined._Voice(PLACE)]
    for i, voice in enumerate(voices):
        voice.store = store
        voice.say(f"line {i}")
    assert capsys.readouterr().err == "line 0\n"


def test_rank_0_checks_first_and_a_mistake_is_said_once(monkeypatch):
    """The other ranks go on after it, or end without a word."""
    monkeypatch.setattr(joined, "end_process", end_with)
    monkeypatch.setattr(joined, "_GRACE", 0.1)
    order = []

    def check_well() -> bool:
        order.append("checked")
        return True

    def check_wrong() -> bool:
        raise UserError("a mistake")

    zero = replace(PLACE, rank=0, local_rank=0)
    store = dist.HashStore()
    waiting = threading.Timer(0.3, joined._check_in_turn, (check_well, store, zero))
    waiting.start()
    order.append("waiting")
    assert joined._check_in_turn(check_well, store, PLACE)
    assert order == ["waiting", "checked", "checked"]

    store = dist.HashStore()
    with pytest.raises(UserError, match="a mistake"):
        joined._check_in_turn(check_wrong, store, zero)
    with pytest.raises(Ended, match="1"):
        joined._check_in_turn(check_well, store, PLACE)
    assert len(order) == 3


def test_ranks_that_never_come():
    """One of two machines is never started."""
    with pytest.raises(UserError) as waited:
        meet("127.0.0.1", free_port(), rank=0, world_size=2, seconds=1)
    line = str(waited.value)
    assert line.startswith("rank 0 has waited 1 s (--rank-timeout) at 127.0.0.1:")
    assert line.endswith("check that each machine has started its ranks, with the same address, and can reach it")


def test_a_port_of_another_program():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"rank 0 cannot open 127.0.0.1:{port}, .* the port is in use"):
            meet("127.0.0.1", port, rank=0, world_size=2, seconds=1)


@pytest.mark.parametrize("launcher, gpus, rank, gpu", [
    ("torchrun", 2, 1, 1),
    ("srun", 2, 1, 1),
    ("srun", 1, 1, 0),  # Slurm gives each task one GPU and hides the others
])  # fmt: skip
def test_the_gpu_of_a_rank(monkeypatch, launcher, gpus, rank, gpu):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert joined._choose_gpu(replace(PLACE, launcher=launcher, rank=rank, local_rank=rank)) == gpu


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torchrun has started 2 processes on a machine with 1 GPUs: start one"):
        joined._choose_gpu(PLACE)
