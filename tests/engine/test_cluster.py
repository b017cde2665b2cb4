"""What torchrun and Slurm tell a process about its run, and command lines that contradict it."""

import argparse

import pytest

from deqdet.engine import UserError, launcher, parse_arguments, run
from deqdet.engine.arguments import add_config_arguments
from deqdet.engine.cluster import Place, check_alone, find_place, first_host
from deqdet.tools import compare, convert_checkpoint, evaluate_steps

from helpers.engine_toy import parse
from helpers.joined import slurm_step

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
# The third of four tasks, on the second of two machines.
STEP = slurm_step(2, tasks=4) | {
    "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


def test_torchrun():
    place = Place("torchrun", rank=3, world_size=4, local_rank=1, local_size=2, host="node1", port=29500)
    assert find_place(TORCHRUN) == place
    assert find_place(TORCHRUN | STEP) == place  # srun has started torchrun
    restarted = find_place(TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (restarted.restarts, restarted.attempt) == (3, 2)


def test_srun():
    # 20,000 + (16 * 4711) % 12,000
    place = Place("srun", rank=2, world_size=4, local_rank=0, local_size=2, host="node07", port=23376)
    assert find_place(STEP) == place
    assert find_place(slurm_step(1)).host == "127.0.0.1"  # all on one machine, whatever its name
    given = find_place(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"})
    assert (given.host, given.port) == ("10.0.0.1", 5)
    other = find_place(STEP | {"SLURM_STEP_ID": "1"})
    assert other.port != place.port


def test_tasks_dealt_out_in_turn_have_ranks_that_follow_each_other_on_a_machine():
    """With --distribution=cyclic, srun's tasks 0 and 2 are on the first machine, 1 and 3 on the second."""
    dealt = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (1, 1)}
    ranks = {}
    for task, (node, local) in dealt.items():
        changed = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
        ranks[task] = find_place(STEP | changed).rank
    assert ranks == {0: 0, 2: 1, 1: 2, 3: 3}


def test_tasks_per_node_of_the_job_count_where_the_step_has_none():
    step = {key: value for key, value in STEP.items() if key != "SLURM_STEP_TASKS_PER_NODE"}
    assert find_place(step | {"SLURM_NTASKS_PER_NODE": "2"}).local_size == 2


def test_two_processes_that_something_starts_as_srun_does():
    """Without a job there is no script that srun has not started, and one machine only."""
    environ = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"}
    place = find_place(environ)
    assert (place.rank, place.world_size, place.local_rank, place.local_size, place.host) == (1, 2, 1, 2, "127.0.0.1")


BATCH = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize("environ", [
    {},
    BATCH,  # the shell of salloc
    BATCH | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # the script of sbatch
    slurm_step(0, tasks=1),  # srun -n 1
    BATCH | slurm_step(0, tasks=1) | {"SLURM_NTASKS": "8"},  # salloc whose shell is a step of its own
    {"MASTER_ADDR": "x", "MASTER_PORT": "1", "WORLD_SIZE": "2"},
])  # fmt: skip
def test_a_process_of_its_own(environ):
    assert find_place(environ) is None
    check_alone(environ)


def test_a_shell_of_srun_pty_starts_a_run_of_its_own(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    shell = slurm_step(0) | {"SLURM_PTY_PORT": "40001"}
    assert find_place(shell).world_size == 2  # the variable is inherited by an srun in that shell
    monkeypatch.setattr("sys.stdin", Terminal())
    assert find_place(shell) is None


@pytest.mark.parametrize("nodes, host", [
    ("node1", "node1"),
    ("node03,other", "node03"),
    ("node[03-07,9],other", "node03"),
    ("node[9,03-07]", "node9"),
    ("gpu-a[1-2].cluster.org,b", "gpu-a1.cluster.org"),
    ("rack[2-3]n[05-06]", "rack2n05"),
    ("a,node[03-07]", "a"),
])  # fmt: skip
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "node[03", "node]3[", ",a", "node[]"])
def test_what_is_no_list_of_hosts(nodes):
    with pytest.raises(UserError, match="cannot be read: set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize("environ, message", [
    (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is missing in the environment"),
    (TORCHRUN | {"RANK": "two"}, "RANK is 'two' in the environment: it must be an integer of at least 0"),
    (TORCHRUN | {"RANK": "4"}, "rank 4 of 4, .* the same number of processes on every machine"),
    (TORCHRUN | {"LOCAL_RANK": "0"}, "rank 3 of 4, and on its machine rank 0 of 2"),
    (TORCHRUN | {"WORLD_SIZE": "5"}, "the same number of processes on every machine"),
    (TORCHRUN | {"LOCAL_WORLD_SIZE": "0"}, "the same number of processes on every machine"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not: start the processes with torchrun, or unset RANK"),
    (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, "srun has started 3,1 processes .* --ntasks-per-node"),
    (STEP | {"SLURM_STEP_NODELIST": "node["}, "cannot be read"),
    (STEP | {"SLURM_LOCALID": ""}, "SLURM_LOCALID is missing"),
])  # fmt: skip
def test_an_environment_that_makes_no_sense(environ, message):
    with pytest.raises(UserError, match=message):
        find_place(environ)


def never(*args, **options):
    raise AssertionError("started")


def called(args):
    print("called", args.num_gpus)


def refusal(monkeypatch, environ, args) -> str:
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(launcher, "run_joined", never)
    with pytest.raises(SystemExit) as stop:
        run(never, args)
    return str(stop.value)


@pytest.mark.parametrize("environ", [TORCHRUN, STEP, TORCHRUN | {
    "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}])  # fmt: skip
@pytest.mark.parametrize("flags", [
    ["--num-gpus", 2],
    ["--num-machines", 2],
    ["--dist-url", "tcp://127.0.0.1:29500"],
])  # fmt: skip
def test_processes_of_ours_contradict_theirs(toy_config, monkeypatch, environ, flags):
    name = "torchrun" if "RANK" in environ else "srun"
    message = refusal(monkeypatch, environ, parse(toy_config, *flags))
    assert message.startswith(f"error: {flags[0]} {flags[1]} asks for processes besides the ")
    assert message.endswith(f"{name} has started: leave it out, and let {name} start as many as you need")


def test_restarts_need_resume(toy_config, monkeypatch):
    environ = TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    message = refusal(monkeypatch, environ, parse(toy_config, "--overwrite"))
    assert message.startswith("error: torchrun --max-restarts 3 starts the same command again after a failure")
    assert "add --resume" in message


def test_one_process_of_torchrun_is_a_run_of_its_own(toy_config, monkeypatch, capsys):
    sizes = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for key, value in (TORCHRUN | sizes).items():
        monkeypatch.setenv(key, value)
    run(called, parse(toy_config))
    assert capsys.readouterr().out == "called 1\n"


def test_other_tools_refuse_several_processes(monkeypatch):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    for key, value in (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="runs in one process, but torchrun has started 4: start it without torchrun"):
        parse_arguments(parser, [])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:  # the first process has said it
        parse_arguments(parser, [])
    assert stop.value.code == 1
    assert parse_arguments(parser, [], joins=True).opts == []


@pytest.mark.parametrize("tool", [compare, convert_checkpoint, evaluate_steps])
def test_a_tool_says_it_in_one_line(monkeypatch, tool):
    for key, value in slurm_step(0).items():
        monkeypatch.setenv(key, value)
    words = {compare: ["a", "--output", "b"], convert_checkpoint: ["a", "b"], evaluate_steps: ["--output", "b"]}
    with pytest.raises(SystemExit) as stop:
        tool.main(words[tool])
    assert stop.value.code == (
        "error: this command runs in one process, but srun has started 2: start it without srun, or unset "
        "SLURM_STEP_NUM_TASKS if the processes are independent of each other"
    )
