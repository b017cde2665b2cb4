"""Seconds, bytes and other figures of a small model."""

import math
import os
import signal
import threading
import time
from itertools import repeat

import pytest
import torch

from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration
from deqdet.errors import UserError
from deqdet.measurement.checkpoint_cost import IMAGES, measure, measure_apart
from deqdet.measurement.cost import count_multiply_adds
from deqdet.measurement.timing import WARM_UP, Latency, describe_machine, measure_latencies, peak_memory

SOLVERS = {"plain": FixedPointIteration(), "anderson": Anderson(history_size=3), "broyden": Broyden(history_size=2)}


def test_latency_is_measured_for_every_solver(small_model, make_inputs):
    """With fewer images than runs."""
    found = measure_latencies(small_model().eval(), [[x] for x in make_inputs(0, 0)], SOLVERS)
    assert found.keys() == SOLVERS.keys()
    assert len({latency.fixed for latency in found.values()}) == 1
    assert all(0 < latency.per_step < math.inf and latency.fixed > 0 for latency in found.values())
    assert Latency(fixed=0.25, per_step=0.5).of(3) == 1.75


def test_the_machine_is_described_in_one_line():
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}, "
    whole, device = describe_machine(), describe_machine(torch.device("cpu"))
    assert threads in device and threads not in whole
    for text in (whole, device):
        assert "\n" not in text and " cores, " in text and text.endswith(f"torch {torch.__version__}")


def test_figures_of_a_model(small_model, make_inputs):
    model = small_model().eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = measure(model, repeat(make_inputs(1)))
    assert len(calls) == WARM_UP + IMAGES
    assert found.steps == model.decoder.test_steps == 4
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.image_size == [64, 96]
    assert found.multiply_adds == count_multiply_adds(model, height=64, width=96).total.linear
    assert found.ms_per_image > 0
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    assert weights < found.inference_memory_mb < weights + 20  # a small image: no libraries are counted


def test_two_images_are_too_few(small_model, make_inputs):
    with pytest.raises(UserError, match="timing a model needs more than 2 images, but the set has 2 images: use"):
        measure(small_model().eval(), [make_inputs(1)] * 2)


def test_peak_of_memory():
    held = torch.zeros(2**20)  # 4 MiB, there before

    def step() -> torch.Tensor:
        doubled = held * 2  # 4
        more = torch.cat([doubled, held])  # 12
        del doubled
        return more.sum()  # 8 and a little

    assert peak_memory(step, torch.device("cpu")) / 2**20 == pytest.approx(12, abs=0.1)


def test_an_interruption_kills_the_measuring_process(tmp_path):
    """A plugin keeps it busy for longer than the test waits, and says that Ctrl-C at a terminal would not reach it."""
    said = tmp_path / "said"
    (tmp_path / "slow_plugin.py").write_text(f"""
import pathlib, os, signal, time
blocked = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
part = pathlib.Path({str(said)!r} + ".part")
part.write_text(f"{{os.getpid()}} {{blocked}}")
part.rename({str(said)!r})
time.sleep(600)
""")

    def interrupt() -> None:
        end = time.monotonic() + 240
        while not said.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    words = ["--config-file", "quick/deqdet_shapes", "--plugin", str(tmp_path / "slow_plugin.py")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            measure_apart(words, tmp_path / "weights.pth", tmp_path / "log")
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 300
    pid, blocked = said.read_text().split()
    assert blocked == "True"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
