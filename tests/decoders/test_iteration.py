"""Plain iteration of a layer without a record, against the same with one, which tests every step by itself."""

import functools
import logging

import pytest
import torch
from torch._dynamo.utils import counters

from deqdet.decoders import iterate, iteration, prepare_features
from deqdet.equilibrium import Anderson, FixedPointIteration, Status
from deqdet.layers import CompiledFunction, compile_layer

from helpers.small_layers import ADAMIXER

PLAIN = FixedPointIteration()
NUMBERS = ("value", "residual", "status", "steps", "residuals")


@pytest.fixture
def case():
    """AdaMixer's layer, its prepared features and a state for two images, of which the second becomes NaN."""
    layer, features, state = ADAMIXER.make().eval(), ADAMIXER.features(), ADAMIXER.state()
    for level in features:
        level[1] = torch.nan
    return layer, prepare_features([layer], features), state


@pytest.fixture
def compiles(monkeypatch):
    """torch.compile traces as inductor does, but generates no code."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    iteration._compiled_conclude.cache_clear()
    yield
    iteration._compiled_conclude.cache_clear()


def assert_close(found, expected, rtol=0.0) -> None:
    for name in NUMBERS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=rtol)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_a_record_changes_nothing(case, steps, dtype):
    layer, features, state = case
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        found, recorded = (
            iterate(layer, state, features, solver=PLAIN, steps=steps, record=record) for record in ((), [steps])
        )
    assert_close(found, recorded)
    assert found.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE] and found.steps.tolist() == [steps, 1]
    assert found.value.isfinite().all() and torch.equal(found.value[1], state.pack()[1])


@torch.no_grad()
def test_what_unrolls(case, monkeypatch):
    """Only plain iteration without damping, tolerance, record and choice of the best, for a layer that accepts NaN."""
    layer, features, state = case
    called, unroll = [], iteration.unroll
    monkeypatch.setattr(iteration, "unroll", lambda *args, **options: called.append(1) or unroll(*args, **options))
    iterate(layer, state, features, solver=PLAIN, steps=2)
    assert len(called) == 1
    for options in (
        {"solver": FixedPointIteration(damping=0.5)},
        {"solver": Anderson(2)},
        {"solver": PLAIN, "rtol": 1e-9},
        {"solver": PLAIN, "best": True},
        {"solver": PLAIN, "record": range(2)},
    ):
        iterate(layer, state, features, steps=2, **options)
    layer.accepts_nonfinite = False
    iterate(layer, state, features, solver=PLAIN, steps=2)
    assert len(called) == 1


@torch.no_grad()
def test_the_end_of_a_compiled_iteration_is_compiled(case, compiles, caplog):
    """Once, whatever the number of steps, but for a path that is longer than what is packed at once."""
    layer, features, state = case
    expected = {steps: iterate(layer, state, features, solver=PLAIN, steps=steps) for steps in (5, 8, 12, 20, 30)}
    compile_layer(layer)
    graphs = {}
    for steps, one in expected.items():
        assert_close(iterate(layer, state, features, solver=PLAIN, steps=steps), one, rtol=1e-4)
        graphs[steps] = counters["stats"]["unique_graphs"]
    assert graphs[5] >= 2 and graphs[8] == graphs[12] and graphs[20] == graphs[30], graphs
    assert iteration._compiled_conclude().works and not counters["graph_break"]
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]


def test_with_a_gradient_the_end_is_not_compiled(case, compiles):
    layer, features, state = case
    compile_layer(layer)
    iterate(layer, state, features, solver=PLAIN, steps=2)
    assert iteration._compiled_conclude.cache_info().currsize == 0


def test_a_function_that_cannot_be_compiled_runs_as_it_is(caplog):
    function = CompiledFunction(lambda x: x + 1 if x.sum().item() > 0 else x, "the function of this test")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    (record,) = caplog.records  # it says so once
    assert record.getMessage().startswith("the function of this test cannot be compiled and runs as it is: ")
