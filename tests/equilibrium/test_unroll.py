"""unroll() against solve(), which tests every step."""

import math

import pytest
import torch
from torch import Tensor

from deqdet.equilibrium import FixedPointIteration, Status, conclude, solve, unroll

PLAIN = FixedPointIteration()
NUMBERS = ("value", "residual", "status", "steps", "residuals")


def pack(states: list[Tensor]) -> Tensor:
    return torch.stack(states)


def up_to_a_limit(flat: Tensor) -> Tensor:
    """1 more, but NaN from a limit on, which is the second number."""
    value, limit = flat.unbind(1)
    return torch.stack([torch.where(value < limit, value + 1, math.nan), limit], dim=1)


def rows() -> Tensor:
    """Rows that fail in every part of the path, one of them at once and one never."""
    limits = torch.tensor([0.0, 0.5, 2, 14.5, 15.5, 16.5, 31.5, 32.5, 33, 1000])
    return torch.stack([torch.zeros_like(limits), limits], dim=1)


def assert_equal(found, expected) -> None:
    for name in NUMBERS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)
    assert (found.recorded, found.iterates, found.outputs) == ({}, {}, {})


def test_by_hand():
    # 0 -> 1 -> 2 -> 3 and 0 -> 1 -> NaN, with the residuals 1, 1/2, 1/3 and 1.
    def function(flat):
        return torch.where(flat < torch.tensor([[5.0], [1.0]]), flat + 1, math.nan)

    found = unroll(function, torch.zeros(2, 1), steps=3, pack=pack)
    assert found.value.flatten().tolist() == [3.0, 1.0]
    assert found.status.tolist() == [Status.MAX_STEPS, Status.NONFINITE] and found.steps.tolist() == [3, 2]
    assert found.residuals.T.tolist() == [pytest.approx([1, 1 / 2, 1 / 3]), [1.0, math.inf, math.inf]]
    assert found.residual.tolist() == [pytest.approx(1 / 3), 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 3, 15, 16, 17, 32, 33, 40])
def test_it_is_what_solve_finds(steps, dtype):
    initial = rows().to(dtype)
    found = unroll(up_to_a_limit, initial, steps=steps, pack=pack)
    assert_equal(found, solve(up_to_a_limit, initial, solver=PLAIN, max_steps=steps))
    assert found.residuals.shape == (steps, 10)


@pytest.mark.parametrize("steps", [5, 20])
def test_a_map_that_recovers_from_nan_has_failed(steps):
    def function(flat):
        return torch.where(flat == 2, math.nan, flat.nan_to_num(nan=7.0) + 1)

    found = unroll(function, torch.tensor([[0.0]]), steps=steps, pack=pack)
    assert (found.status.item(), found.steps.item(), found.value.item()) == (Status.NONFINITE, 3, 2.0)
    assert found.residual.item() == 0.5 and found.residuals[2:].isinf().all()


def test_states_of_any_form():
    """Pairs of numbers, of which the packed state has the half and the double."""

    def function(pair):
        a, b = pair
        return 0.5 * b + 1, 0.5 * a - 1

    def pack_pairs(pairs):
        return torch.stack([torch.cat([a / 2, b * 2], dim=1) for a, b in pairs])

    def packed(flat):
        a, b = function((flat[:, :1] * 2, flat[:, 1:] / 2))
        return torch.cat([a / 2, b * 2], dim=1)

    start = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-4.0]])
    found = unroll(function, start, steps=20, pack=pack_pairs)
    assert_equal(found, solve(packed, pack_pairs([start])[0], solver=PLAIN, max_steps=20))


def test_what_finishes_gets_the_last_steps():
    """16 steps are settled before; the other function is called once, and decides what is returned."""
    calls = []

    def finish(states, earlier):
        calls.append((states.shape, None if earlier is None else earlier.residuals.shape))
        return conclude(states, earlier)

    for steps in (4, 16, 17, 35):
        found = unroll(up_to_a_limit, rows(), steps=steps, pack=pack, finish=finish)
        assert_equal(found, unroll(up_to_a_limit, rows(), steps=steps, pack=pack))
    shapes = [((5, 10, 2), None), ((17, 10, 2), None), ((2, 10, 2), (16, 10)), ((4, 10, 2), (32, 10))]
    assert calls == shapes


def test_it_can_be_differentiated():
    """The value, and also the residuals: f(y) - y over f(y), for f(y) = w y + 1."""
    weight = torch.tensor(0.5, requires_grad=True)
    found = unroll(lambda y: weight * y + 1, torch.ones(1, 1), steps=18, pack=pack)
    of_value, of_residual = (
        torch.autograd.grad(x.sum(), weight, retain_graph=True)[0] for x in (found.value, found.residuals[2])
    )
    y, slope = 1.0, 0.0
    for step in range(18):
        before, slope_before = y, slope
        y, slope = 0.5 * y + 1, y + 0.5 * slope
        if step == 2:
            residual_slope = (before * slope - slope_before * y) / y**2
    assert of_value.item() == pytest.approx(slope, rel=1e-5)
    assert of_residual.item() == pytest.approx(residual_slope, rel=1e-4)


def test_a_negative_number_of_steps_is_an_error():
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        unroll(lambda y: y, torch.ones(1, 1), steps=-1, pack=pack)


def test_autocast_does_not_reach_the_numbers():
    def function(flat):
        return (flat @ torch.eye(2) * 0.75).float() + 1

    def finish(states, earlier):
        assert not torch.is_autocast_enabled("cpu")
        return conclude(states, earlier)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unroll(function, torch.ones(3, 2), steps=4, pack=pack, finish=finish)
        expected = solve(function, torch.ones(3, 2), solver=PLAIN, max_steps=4)
    assert_equal(found, expected)
    assert found.residuals.dtype == torch.float32
