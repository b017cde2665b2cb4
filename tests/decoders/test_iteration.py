"""Plain iteration of a layer without a record, against the same with one, which tests every step by itself."""

import functools
import logging

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from deqdet.decoders import iterate, iteration, prepare_features
from deqdet.equilibrium import Anderson, FixedPointIteration, Status
from deqdet.layers import CompiledFunction, RefinementLayer, compile_layer
from deqdet.structures import Prediction, QueryState

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
    counters.clear()  # of other tests in this process
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


class HalfWay(FixedPointIteration):
    """A solver of a user's, which makes another step."""

    def step(self, iterate, output, state):
        return (iterate + output) / 2, state


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 18])
def test_it_is_what_a_slow_loop_finds(case, steps):
    layer, features, state = case
    found = iterate(layer, state, features, solver=PLAIN, steps=steps)
    for _ in range(steps):
        before, state = state, layer(state, features)
    assert torch.equal(found.value[0], state.pack()[0])
    change = torch.linalg.vector_norm((state.pack() - before.pack())[0].double())
    expected = change / torch.linalg.vector_norm(state.pack()[0].double())
    assert found.residual[0].item() == found.residuals[-1, 0].item() == pytest.approx(expected.item(), rel=1e-6)


class HalfLayer(RefinementLayer):
    """A layer of a user's whose content is bfloat16; it keeps what it was given."""

    accepts_nonfinite = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        self.seen.append((state.content.dtype, len(state.content), state.content.is_contiguous()))
        return QueryState(state.position + 1, (0.5 * state.content).bfloat16())

    def predict(self, state: QueryState) -> Prediction:
        raise NotImplementedError


@torch.no_grad()
@pytest.mark.parametrize("record", [(), [3]], ids=["unrolled", "recorded"])
def test_a_layer_gets_float32_whatever_was_returned_before(record):
    """Also from a start of bfloat16, such as a g of the user's may return, and of one row for all images."""
    layer, content = HalfLayer(), torch.ones(1, 4, 8, dtype=torch.bfloat16).expand(2, -1, -1)
    found = iterate(layer, QueryState(torch.zeros(2, 4, 4), content), [torch.zeros(2, 8, 2, 2)], solver=PLAIN, steps=3,
                    record=record)  # fmt: skip
    assert [dtype for dtype, *_ in layer.seen] == [torch.float32] * 3
    assert record or all(contiguous for *_, contiguous in layer.seen)
    state = QueryState.unpack(found.value, 4)
    assert found.value.dtype == torch.float32 and state.position.unique().tolist() == [3.0]
    assert state.content.unique().tolist() == [0.125]


@torch.no_grad()
def test_several_states_of_an_image():
    """A layer that cannot take them at once gets those of all images one after the other."""
    layer = HalfLayer()
    start = QueryState(torch.zeros(6, 4, 4), torch.arange(6.0)[:, None, None].expand(6, 4, 8))
    found = iterate(layer, start, [torch.zeros(2, 8, 2, 2)], solver=PLAIN, steps=2)
    assert [rows for _, rows, _ in layer.seen] == [2] * 6
    assert QueryState.unpack(found.value, 4).content[:, 0, 0].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]


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
        {"solver": HalfWay()},
        {"solver": Anderson(2)},
        {"solver": PLAIN, "rtol": 1e-9},
        {"solver": PLAIN, "best": True},
        {"solver": PLAIN, "record": range(2)},
    ):
        iterate(layer, state, features, steps=2, **options)
    with torch.enable_grad():
        iterate(layer, state, features, solver=PLAIN, steps=2)
    layer.accepts_nonfinite = False
    iterate(layer, state, features, solver=PLAIN, steps=2)
    assert len(called) == 1


@torch.no_grad()
def test_the_end_of_a_compiled_iteration_is_compiled(case, compiles, caplog):
    """With one graph for several numbers of steps, and another for paths longer than what is packed at once."""
    layer, features, state = case
    expected = {steps: iterate(layer, state, features, solver=PLAIN, steps=steps) for steps in (5, 8, 12, 20, 30)}
    compile_layer(layer)
    graphs = {}
    for steps, one in expected.items():
        assert_close(iterate(layer, state, features, solver=PLAIN, steps=steps), one, rtol=1e-4)
        graphs[steps] = counters["stats"]["unique_graphs"]
    assert graphs[5] < graphs[20] and graphs[8] == graphs[12] and graphs[20] == graphs[30], graphs
    assert iteration._compiled_conclude().works and not counters["graph_break"]
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]


def test_with_a_gradient_the_end_is_not_compiled(case, monkeypatch):
    layer, features, state = case
    monkeypatch.setattr(iteration, "is_compiled", lambda layer: True)  # compiling a backward pass takes 20 seconds
    iteration._compiled_conclude.cache_clear()
    iterate(layer, state, features, solver=PLAIN, steps=2)
    assert iteration._compiled_conclude.cache_info().currsize == 0


@torch.no_grad()
def test_an_expanded_start_makes_no_graph_of_its_own(case, compiles):
    """As the initial queries are, from which a decoder without g starts."""
    layer, features, state = case
    compile_layer(layer)
    start = QueryState(state.position[:1].expand(2, -1, -1), state.content[:1].expand(2, -1, -1))
    iterate(layer, start, features, solver=PLAIN, steps=1)
    graphs = counters["stats"]["unique_graphs"]
    iterate(layer, state, features, solver=PLAIN, steps=1)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("new", [True, False], ids=["with set_stance", "before PyTorch 2.6"])
def test_beyond_the_limit_of_graphs_a_function_runs_as_it_is(compiles, monkeypatch, caplog, new):
    if not new:
        monkeypatch.delattr(torch.compiler, "set_stance")
    function = CompiledFunction(lambda x, word: x * len(word), "this function")
    before = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.WARNING, logger="deqdet"):
        found = [function(torch.ones(1), word).item() for word in ("a", "bb", "ccc", "dddd", "bb")]
    assert found == [1, 2, 3, 4, 2] and function.works
    assert counters["stats"]["unique_graphs"] == before + 2
    (message,) = [x.getMessage() for x in caplog.records if x.name.startswith("deqdet")]  # it says so once
    assert message.startswith("this function runs eagerly for inputs that fit none of its compiled graphs: ")


def test_a_function_that_cannot_be_compiled_runs_as_it_is(caplog):
    function = CompiledFunction(lambda x: x + 1 if x.sum().item() > 0 else x, "the function of this test")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    (record,) = caplog.records  # it says so once
    assert record.getMessage().startswith("the function of this test cannot be compiled and runs eagerly: ")
