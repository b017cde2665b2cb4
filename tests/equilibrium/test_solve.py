import math

import pytest
import torch

from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration, Status, first_below, relative_residual, solve

PLAIN = FixedPointIteration()


def affine(flat):
    """Compute A y + b for rows y (B, 2); the fixed point is (4, 4)."""
    return flat @ torch.tensor([[0.5, 0.25], [0.0, 0.5]], dtype=flat.dtype).T + flat.new_tensor([1.0, 2.0])


def contraction(flat):
    """Map rows (y, a) to (a y + 1, a), so that each row brings its own rate a; bitwise the same in any batch."""
    value, rate = flat.unbind(1)
    return torch.stack([rate * value + 1, rate], dim=1)


def narrowing_root(flat):
    """Compute sqrt(3 y - 2): from above 1 it goes to 2; from below 1 it falls until the root is NaN."""
    return (3 * flat - 2).sqrt()


class Counting:
    """A map that counts how often it is applied."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, flat):
        self.calls += 1
        return self.function(flat)


class RunningMean:
    """A solver whose next iterate is the mean of all outputs so far, so that it depends on its state."""

    def init(self, iterate):
        return torch.zeros_like(iterate), torch.zeros_like(iterate[:, :1])

    def step(self, iterate, output, state):
        total, count = state[0] + output, state[1] + 1
        return total / count, (total, count)


class HalfWay:
    """A solver that goes half of the way: y <- (y + f(y)) / 2."""

    def init(self, iterate):
        return ()

    def step(self, iterate, output, state):
        return (iterate + output) / 2, ()


def test_first_iterates_and_residuals_by_hand():
    initial = torch.zeros(1, 2, dtype=torch.float64)
    solution = solve(affine, initial, solver=PLAIN, max_steps=2, record=[1, 2])
    # (0, 0) -> (1, 2) -> (2, 3): changes of norm sqrt 5 and sqrt 2, over sqrt 5 and sqrt 13.
    assert solution.recorded[1].tolist() == [[1.0, 2.0]]
    assert solution.recorded[2].tolist() == solution.value.tolist() == [[2.0, 3.0]]
    assert solution.residuals.flatten().tolist() == pytest.approx([1.0, math.sqrt(2 / 13)], rel=1e-12)
    assert solution.residuals.shape == (2, 1)


def test_linear_contraction_reaches_its_fixed_point():
    initial = torch.tensor([[0.0, 0.0], [-300.0, 70.0]], dtype=torch.float64)
    solution = solve(affine, initial, solver=PLAIN, max_steps=200, rtol=1e-13)
    assert (solution.value - 4).abs().max() < 1e-11
    assert solution.status.tolist() == [Status.CONVERGED] * 2


def test_cosine_and_the_number_of_steps():
    steps, value = 0, 1.0
    while True:  # the definition, in plain Python
        steps, old, value = steps + 1, value, math.cos(value)
        if abs(value - old) / abs(value) < 1e-8:
            break
    solution = solve(torch.cos, torch.ones(1, 1, dtype=torch.float64), solver=PLAIN, max_steps=100, rtol=1e-8)
    assert solution.value.item() == pytest.approx(0.7390851332151607, abs=1e-8)
    assert solution.status.item() == Status.CONVERGED
    assert solution.steps.item() == len(solution.residuals) == steps


def test_two_cycle_uses_all_steps():
    solution = solve(torch.neg, torch.tensor([[3.0]]), solver=PLAIN, max_steps=5, rtol=1e-3, record=[0, 3, 4])
    assert solution.status.tolist() == [Status.MAX_STEPS] and solution.steps.tolist() == [5]
    assert solution.residuals.flatten().tolist() == [2.0] * 5
    assert {t: y.item() for t, y in solution.recorded.items()} == {0: 3.0, 3: -3.0, 4: 3.0}
    assert solution.value.item() == -3.0


@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_one_nonfinite_row_leaves_the_others_alone(rtol):
    # Backwards from 1/2, where 3 y - 2 < 0: (1/4 + 2) / 3 = 3/4, (9/16 + 2) / 3 = 41/48.
    initial = torch.tensor([[3.0], [41 / 48], [5.0]], dtype=torch.float64)
    solution = solve(narrowing_root, initial, solver=PLAIN, max_steps=90, rtol=rtol, record=[2, 90])
    alone = solve(narrowing_root, initial[[0, 2]], solver=PLAIN, max_steps=90, rtol=rtol)
    good = Status.CONVERGED if rtol else Status.MAX_STEPS
    assert solution.status.tolist() == [good, Status.NONFINITE, good]
    assert solution.steps[1] == 3
    assert solution.value[1].item() == pytest.approx(0.5, abs=1e-12)  # its last finite value
    assert torch.equal(solution.value[1], solution.recorded[2][1])
    assert torch.equal(solution.recorded[90], solution.value)
    assert torch.equal(solution.value[[0, 2]], alone.value)
    assert torch.equal(solution.steps[[0, 2]], alone.steps)
    assert (solution.value[[0, 2]] - 2).abs().max() < 1e-8


def test_the_iteration_ends_when_all_rows_are_nonfinite():
    function = Counting(narrowing_root)
    solution = solve(function, torch.tensor([[0.5], [41 / 48]]), solver=PLAIN, max_steps=50, rtol=1e-3)
    assert solution.status.tolist() == [Status.NONFINITE] * 2
    assert solution.steps.tolist() == [1, 3] and function.calls == 3
    assert solution.value[0].item() == 0.5


def test_a_nonfinite_row_stays_out():
    def fails_once(flat):
        output = flat / 2 + 1
        return torch.where(flat == 2, math.nan, output) if function.calls == 1 else output

    function = Counting(fails_once)
    solution = solve(function, torch.tensor([[0.0], [2.0]]), solver=PLAIN, max_steps=30, rtol=1e-3)
    # The second row starts at the fixed point 2 but fails once. The first: y_t = 2 - 2 / 2^t, residual 1 / (2^t - 1).
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert solution.steps.tolist() == [10, 1]
    assert solution.value[1].item() == 2.0


def test_divergent_but_finite():
    initial = torch.tensor([[1.0, -3.0]])
    solution = solve(lambda y: 2 * y, initial, solver=PLAIN, max_steps=10, rtol=1e-3)
    assert solution.value.tolist() == [[1024.0, -3072.0]]
    assert solution.status.tolist() == [Status.MAX_STEPS] and solution.steps.tolist() == [10]
    assert solution.residuals.flatten().tolist() == pytest.approx([0.5] * 10)


def test_divergent_to_infinity_keeps_the_last_finite_value():
    # 2^0, 2^50, 2^100; the next is beyond float32.
    solution = solve(lambda y: y * 2.0**50, torch.ones(1, 1), solver=PLAIN, max_steps=10)
    assert solution.value.item() == 2.0**100
    assert solution.status.tolist() == [Status.NONFINITE] and solution.steps.tolist() == [3]


def test_large_but_finite_outputs_are_finite():
    # 2^100 is a float32; its square is not.
    solution = solve(lambda y: y * 2.0**50, torch.ones(1, 3), solver=PLAIN, max_steps=2)
    assert solution.value.tolist() == [[2.0**100] * 3]
    assert solution.status.tolist() == [Status.MAX_STEPS]


def test_a_fixed_point_at_zero_is_finite():
    initial = torch.tensor([[10.0, 0.0], [0.1, 0.0]])
    solution = solve(torch.zeros_like, initial, solver=PLAIN, max_steps=5, rtol=1e-3)
    assert solution.value.tolist() == [[0.0, 0.0]] * 2
    assert solution.status.tolist() == [Status.CONVERGED] * 2 and solution.steps.tolist() == [2, 2]


def test_each_row_stops_on_its_own():
    rates = [0.0, 0.5, 0.9, 1.0]  # the last one never converges: y + 1
    initial = torch.tensor([[7.0, rate] for rate in rates])
    solution = solve(contraction, initial, solver=PLAIN, max_steps=40, rtol=1e-2, record=range(41))
    assert solution.status.tolist() == [Status.CONVERGED] * 3 + [Status.MAX_STEPS]
    # (7, 0) -> (1, 0) -> (1, 0). (7, .5): y_t = 2 + 5 / 2^t, the residual is 5 / 2^t / |(y_t, .5)|: 0.019 at
    # t = 7, 0.0094 at t = 8.
    assert solution.steps[:2].tolist() == [2, 8] and solution.steps[3] == 40
    assert solution.value[1].tolist() == [2 + 5 / 2**8, 0.5]  # the output of the last step is the result
    for row, steps in enumerate(solution.steps.tolist()):
        alone = solve(contraction, initial[row : row + 1], solver=PLAIN, max_steps=40, rtol=1e-2)
        assert torch.equal(alone.value[0], solution.value[row])
        assert alone.steps[0] == steps and alone.status[0] == solution.status[row]
        assert torch.equal(alone.residuals[:, 0], solution.residuals[:steps, row])
        assert (solution.residuals[steps:, row] == solution.residuals[steps - 1, row]).all()
        iterate = initial[row : row + 1]
        for t in range(41):
            assert torch.equal(solution.recorded[t][row], iterate[0])
            iterate = contraction(iterate) if t < steps else iterate


def test_early_stop_gives_the_last_value_for_later_steps():
    function = Counting(contraction)
    initial = torch.tensor([[7.0, 0.0], [7.0, 0.5]])
    solution = solve(function, initial, solver=PLAIN, max_steps=100, rtol=1e-2, record=[100, 0, 1, 9])
    assert function.calls == len(solution.residuals) == 8
    assert list(solution.recorded) == [0, 1, 9, 100]
    assert torch.equal(solution.recorded[0], initial)
    assert solution.recorded[1].tolist() == [[1.0, 0.0], [4.5, 0.5]]
    assert torch.equal(solution.recorded[9], solution.value)
    assert torch.equal(solution.recorded[100], solution.value)


def test_the_threshold_is_strict():
    # From 0 to 1 to 1.5: residuals 1 and 1/3.
    def status(max_steps, rtol):
        initial = torch.zeros(1, 1, dtype=torch.float64)
        return solve(lambda y: y / 2 + 1, initial, solver=PLAIN, max_steps=max_steps, rtol=rtol).status.item()

    assert status(max_steps=2, rtol=1 / 3 - 1e-9) == Status.MAX_STEPS
    assert status(max_steps=2, rtol=1 / 3 + 1e-9) == Status.CONVERGED
    assert status(max_steps=1, rtol=1.0) == Status.MAX_STEPS


def test_no_tolerance_takes_all_steps_at_a_fixed_point_too():
    function = Counting(affine)
    initial = torch.full((2, 2), 4.0)
    solution = solve(function, initial, solver=PLAIN, max_steps=6)
    assert function.calls == 6 and solution.steps.tolist() == [6, 6]
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert solution.residuals.tolist() == [[0.0, 0.0]] * 6
    assert torch.equal(solution.value, initial)


def test_without_a_tolerance_the_host_never_reads_a_value():
    # Tensors on "meta" have no values, so that reading one on the host is an error, as the run with a tolerance shows.
    initial = torch.empty(3, 5, device="meta")
    solution = solve(torch.cos, initial, solver=PLAIN, max_steps=4, record=[0, 2, 4])
    assert solution.value.shape == (3, 5) and solution.residuals.shape == (4, 3)
    with pytest.raises(RuntimeError, match="meta"):
        solve(torch.cos, initial, solver=PLAIN, max_steps=4, rtol=1e-3)


def test_no_step_at_all():
    initial = torch.tensor([[1.0, 2.0]])
    solution = solve(affine, initial, solver=PLAIN, max_steps=0, rtol=1e-3, record=[0])
    assert torch.equal(solution.value, initial) and torch.equal(solution.recorded[0], initial)
    assert solution.residuals.shape == (0, 1) and solution.residual.tolist() == [math.inf]
    assert solution.steps.tolist() == [0] and solution.status.tolist() == [Status.MAX_STEPS]


def test_the_initial_value_is_not_written_to():
    initial = torch.tensor([[7.0, 0.5], [0.5, 0.9]])
    before = initial.clone()
    solve(contraction, initial, solver=PLAIN, max_steps=20, rtol=1e-1)
    assert torch.equal(initial, before)


def test_the_solver_gets_iterate_output_and_state():
    # f(y) = 1 - y from 0. The next iterates are means of the outputs so far: 1; (1 + 0) / 2, which is the fixed point.
    # What is recorded are outputs: f(0), f(1), f(1/2).
    initial = torch.zeros(1, 1)
    means = solve(lambda y: 1 - y, initial, solver=RunningMean(), max_steps=9, rtol=1e-4, record=[1, 2, 3])
    assert [means.recorded[t].item() for t in (1, 2, 3)] == [1.0, 0.0, 0.5]
    assert means.steps.item() == 3 and means.status.item() == Status.CONVERGED
    # From 4: f(4) = -3, half of the way is 1/2, which stays. The residuals 7/3 and 0 are those of f.
    half = solve(lambda y: 1 - y, torch.full((1, 1), 4.0), solver=HalfWay(), max_steps=2)
    assert half.value.item() == 0.5
    assert half.residuals.flatten().tolist() == pytest.approx([7 / 3, 0.0])


def test_bfloat16_state():
    # 0, 1, 1.5, 1.75 are exact in bfloat16; the residual 1/3 is not, and is float32.
    initial = torch.zeros(2, 1, dtype=torch.bfloat16)
    solution = solve(lambda y: y / 2 + 1, initial, solver=PLAIN, max_steps=3, record=[2])
    assert solution.value.dtype == solution.recorded[2].dtype == torch.bfloat16
    assert solution.value.tolist() == [[1.75]] * 2
    assert solution.residuals.dtype == torch.float32
    assert solution.residuals[:, 0].tolist() == pytest.approx([1.0, 1 / 3, 1 / 7], rel=1e-6)


def test_the_best_iterate_is_given():
    # Heron's rule for the root of 2 from 1, but with a wrong third output: 1 -> 3/2 -> 17/12 -> 100 -> ...
    def heron(flat):
        return torch.full_like(flat, 100.0) if function.calls == 3 else (flat + 2 / flat) / 2

    results = {}
    for best in (True, False):
        function = Counting(heron)
        results[best] = solve(
            function, torch.ones(1, 1, dtype=torch.float64), solver=PLAIN, max_steps=4, best=best, record=range(5)
        )
    assert results[False].value.item() == (100 + 2 / 100) / 2
    # Residuals 1/3, 1/17, 0.986, 0.9996: the second step gave f(3/2) = 17/12, and no later one does better.
    assert results[True].residuals.flatten().tolist() == pytest.approx([1 / 3, 1 / 17, 0.98583, 0.9996], abs=1e-4)
    assert results[True].value.item() == pytest.approx(17 / 12)
    assert [results[True].recorded[t].item() for t in range(5)] == pytest.approx([1, 3 / 2] + [17 / 12] * 3)
    assert results[True].steps.item() == 4


def test_the_best_is_an_output_even_if_every_residual_is_infinite():
    solution = solve(torch.zeros_like, torch.ones(1, 3), solver=PLAIN, max_steps=1, best=True)
    assert solution.residuals.item() == solution.residual.item() == math.inf
    assert solution.value.tolist() == [[0.0] * 3]


def test_recorded_iterates_by_hand():
    # (0, 0) -> (1, 2) -> (2, 3) -> (2.75, 3.5): step t applies f to the iterate that is the output of step t - 1.
    initial = torch.zeros(1, 2, dtype=torch.float64)
    solution = solve(affine, initial, solver=PLAIN, max_steps=3, record=[0, 1, 3], record_iterates=True)
    assert {t: y.tolist() for t, y in solution.iterates.items()} == {1: [[0.0, 0.0]], 3: [[2.0, 3.0]]}
    assert {t: y.tolist() for t, y in solution.recorded.items()} == {
        0: [[0.0, 0.0]], 1: [[1.0, 2.0]], 3: [[2.75, 3.5]]
    }  # fmt: skip
    assert solve(affine, initial, solver=PLAIN, max_steps=3, record=[1, 3]).iterates == {}


def test_recorded_iterates_are_those_of_the_solver():
    # As above: 1 - y from 0, of which f is applied to 0, 1 and 1/2, and from 4, half of the way to -3.
    options = {"max_steps": 3, "record": [1, 2, 3], "record_iterates": True}
    means = solve(lambda y: 1 - y, torch.zeros(1, 1), solver=RunningMean(), **options)
    assert [means.iterates[t].item() for t in (1, 2, 3)] == [0.0, 1.0, 0.5]
    half = solve(lambda y: 1 - y, torch.full((1, 1), 4.0), solver=HalfWay(), **options)
    assert [half.iterates[t].item() for t in (1, 2, 3)] == [4.0, 0.5, 0.5]


@pytest.mark.parametrize("restrict", [None, lambda rows: contraction], ids=["all rows", "active rows"])
def test_iterates_and_residual_of_rows_that_stop(restrict):
    initial = torch.tensor([[7.0, 0.0], [7.0, 0.5]], dtype=torch.float64)
    options = {"rtol": 1e-2, "record": [1, 2, 3, 8, 9, 100], "record_iterates": True, "restrict": restrict}
    solution = solve(contraction, initial, solver=PLAIN, max_steps=100, **options)
    assert solution.steps.tolist() == [2, 8]
    # (7, 0) -> (1, 0) -> (1, 0): its last iterate is (1, 0), from step 2 on. (7, .5): step t applies f to
    # y = 2 + 5 / 2^(t - 1); the last is step 8, and steps 9 and 100 are never reached.
    assert {t: y[0].tolist() for t, y in solution.iterates.items()} == {1: [7, 0]} | dict.fromkeys(
        [2, 3, 8, 9, 100], [1, 0]
    )
    last = [2 + 5 / 2**7, 0.5]
    expected = {1: [7, 0.5], 2: [4.5, 0.5], 3: [3.25, 0.5], 8: last, 9: last, 100: last}
    assert {t: y[1].tolist() for t, y in solution.iterates.items()} == expected
    # From (2 + 5 / 2^7, .5) to (2 + 5 / 2^8, .5).
    assert solution.residual.tolist() == pytest.approx([0.0, 5 / 2**8 / math.hypot(2 + 5 / 2**8, 0.5)], abs=1e-12)
    assert torch.equal(solution.residual, solution.residuals[-1])


@pytest.mark.parametrize("restrict", [None, lambda rows: narrowing_root], ids=["all rows", "active rows"])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_iterates_and_residual_of_a_row_that_becomes_nonfinite(rtol, restrict):
    # 41/48 -> 3/4 -> 1/2 -> NaN, with the residuals (5/48) / (3/4) = 5/36 and (1/4) / (1/2) = 1/2; 1/2 -> NaN at once.
    initial = torch.tensor([[41 / 48], [0.5], [3.0]], dtype=torch.float64)
    options = {"rtol": rtol, "restrict": restrict, "record": [1, 2, 3, 40], "record_iterates": True}
    last, best = (
        solve(narrowing_root, initial, solver=PLAIN, max_steps=40, best=best, **options) for best in (False, True)
    )
    assert last.value[0].item() == pytest.approx(1 / 2) and best.value[0].item() == pytest.approx(3 / 4)
    assert last.residual[0].item() == pytest.approx(1 / 2) and best.residual[0].item() == pytest.approx(5 / 36)
    for solution in (last, best):
        assert solution.residual[1].item() == math.inf and solution.value[1].item() == 0.5
        assert solution.residual[2].item() == solution.residuals[-1, 2].item() < 1e-5
        iterates = {t: y[0].item() for t, y in solution.iterates.items()}
        assert iterates == pytest.approx({1: 41 / 48, 2: 3 / 4, 3: 1 / 2, 40: 1 / 2})
        assert [y[1].item() for y in solution.iterates.values()] == [0.5] * 4


def test_residual_and_iterates_with_best():
    # Heron's rule as above: 1 -> 3/2 -> 17/12 -> 100, with the residuals 1/3, 1/17, 0.986. The iterates are those of
    # each step, the residual is that of the best one.
    def heron(flat):
        return torch.full_like(flat, 100.0) if function.calls == 3 else (flat + 2 / flat) / 2

    results = {}
    for best in (True, False):
        function = Counting(heron)
        initial = torch.ones(1, 1, dtype=torch.float64)
        options = {"record": [1, 2, 3], "record_iterates": True}
        results[best] = solve(function, initial, solver=PLAIN, max_steps=3, best=best, **options)
        iterates = [y.item() for y in results[best].iterates.values()]
        assert iterates == pytest.approx([1, 3 / 2, 17 / 12])
    assert results[True].residual.item() == pytest.approx(1 / 17)
    assert results[False].residual.item() == pytest.approx((100 - 17 / 12) / 100)
    # 10 - y from 1 and 9: both give 9, the output of the iterate 1, with the residual 8/9.
    swing = solve(lambda y: 10 - y, torch.tensor([[1.0], [9.0]]), solver=PLAIN, max_steps=6, best=True)
    assert swing.residual.tolist() == pytest.approx([8 / 9] * 2)


def test_compiled_verdicts():
    def statuses(flat):
        return solve(narrowing_root, flat, solver=PLAIN, max_steps=4, rtol=0.0).status

    initial = torch.tensor([[3.0], [41 / 48]])
    found = torch.compile(statuses, backend="eager", fullgraph=True)(initial)
    assert found.tolist() == statuses(initial).tolist() == [Status.MAX_STEPS, Status.NONFINITE]


def test_first_below_by_hand():
    residuals = torch.tensor([[0.5, 0.04, 0.06, math.nan], [0.04, 0.3, 0.05, 0.2], [0.6, 0.01, 0.2, 0.3]])
    assert first_below(residuals, 0.05).tolist() == [2, 1, 3, 3]  # 0.05 is not below
    assert first_below(residuals[:0], 0.05).tolist() == [0, 0, 0, 0]  # no step was taken


@pytest.mark.parametrize("rtol", [0.0, 1e-2])
def test_a_map_may_return_another_dtype(rtol):
    def halve(flat):
        return (flat.double() / 2 + 1).to(torch.float64)

    found = solve(
        halve, torch.zeros(2, 1), solver=FixedPointIteration(0.5), max_steps=60, rtol=rtol, restrict=lambda rows: halve
    )
    assert found.value.dtype == torch.float32
    assert found.value.tolist() == [pytest.approx([2.0], abs=0.1)] * 2


def test_the_best_of_each_row():
    # y -> a - y alternates between y and a - y. The residual is |a - 2 y| / |a - y| at y and |a - 2 y| / |y| at a - y,
    # so that the larger output is the best one, whichever step it comes from.
    initial = torch.tensor([[1.0], [9.0]])
    solution = solve(lambda y: 10 - y, initial, solver=PLAIN, max_steps=6, best=True)
    assert solution.value.tolist() == [[9.0], [9.0]]  # steps 1, 3, 5 of the first row and 2, 4, 6 of the second


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("solver", [PLAIN, RunningMean()], ids=["plain", "running mean"])
def test_stopped_rows_leave_the_batch(solver, best):
    # Fixed points 2, 4, 6, 8, and rates that stop the rows one after the other; the third fails at its second step.
    rates, offsets = torch.tensor([[0.0], [0.5], [0.1], [0.9]]), torch.tensor([[2.0], [2.0], [5.4], [0.8]])
    sizes = []

    def restrict(rows):
        def function(flat):
            sizes.append(len(flat))
            output = rates[rows] * flat + offsets[rows]
            return torch.where((rows == 2)[:, None] & (flat > 3), math.nan, output)

        return function

    everything = restrict(torch.arange(4))
    arguments = {
        "solver": solver,
        "max_steps": 60,
        "rtol": 1e-2,
        "record": [0, 1, 7, 60],
        "record_iterates": True,
        "best": best,
    }
    initial = torch.full((4, 1), 3.0)
    stayed = solve(everything, initial, **arguments)
    computed_before, sizes[:] = sum(sizes), []
    left = solve(everything, initial, restrict=restrict, **arguments)
    assert torch.equal(left.value, stayed.value) and torch.equal(left.status, stayed.status)
    assert torch.equal(left.steps, stayed.steps)
    torch.testing.assert_close(left.residuals, stayed.residuals, rtol=0, atol=0, equal_nan=True)
    assert all(torch.equal(left.recorded[t], stayed.recorded[t]) for t in stayed.recorded)
    assert torch.equal(left.residual, stayed.residual)
    assert list(left.iterates) == list(stayed.iterates) == [1, 7, 60]
    assert all(torch.equal(left.iterates[t], stayed.iterates[t]) for t in stayed.iterates)
    assert left.status.tolist().count(Status.NONFINITE) == 1 and left.status[2] == Status.NONFINITE
    assert sum(sizes) == left.steps.sum() < computed_before
    assert sizes[0] == 4 and sizes == sorted(sizes, reverse=True)


def test_without_a_tolerance_nothing_leaves_the_batch():
    def restrict(rows):
        raise AssertionError("restricted")

    solution = solve(torch.cos, torch.zeros(2, 1), solver=PLAIN, max_steps=50, restrict=restrict)
    assert solution.steps.tolist() == [50, 50]


def test_a_value_that_overflows_a_norm_has_not_converged():
    # The squares of 2^80 are beyond float32: the residual is still 1/2.
    solution = solve(lambda y: 2 * y, torch.full((1, 3), 2.0**80), solver=PLAIN, max_steps=20, rtol=1e-3)
    assert solution.status.item() == Status.MAX_STEPS
    assert solution.residuals.flatten().tolist() == pytest.approx([0.5] * 20)


def test_relative_residual_by_hand():
    iterate = torch.tensor([[3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    output = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    assert relative_residual(iterate, output).tolist() == pytest.approx([0.8, 0.0, 0.0])
    assert relative_residual(output, iterate)[0].item() == pytest.approx(4 / 3)  # over ||f(y)||, not over ||y||
    assert relative_residual(iterate.double(), output.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"max_steps": -1}, "must be finite and not negative, got -1 and 0.0"),
        ({"max_steps": 4, "rtol": -0.5}, "must be finite and not negative, got 4 and -0.5"),
        ({"max_steps": 4, "rtol": math.inf}, "must be finite and not negative, got 4 and inf"),
        ({"max_steps": 4, "record": [5, 2, -1]}, r"lie in 0\.\.4 \(max_steps\), got \[-1, 5\]"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve(affine, torch.zeros(1, 2), solver=PLAIN, **arguments)


def test_a_path_without_residuals():
    """Its states are the same, also those of a row that becomes non-finite; what needs residuals is refused."""

    def function(y):
        return torch.where(y > 4, torch.inf, 2 * y)

    initial = torch.tensor([[1.0, 0.5], [0.1, 0.2]])
    options = {"solver": PLAIN, "max_steps": 5, "record": [1, 2, 4, 5]}
    full, bare = solve(function, initial, **options), solve(function, initial, residuals=False, **options)
    assert full.status.tolist() == bare.status.tolist() == [Status.NONFINITE, Status.MAX_STEPS]
    assert full.steps.tolist() == bare.steps.tolist() == [4, 5]
    assert full.recorded[5][0].tolist() == [8.0, 4.0]
    assert all(torch.equal(full.recorded[t], bare.recorded[t]) for t in full.recorded)
    assert bare.residual.isinf().all() and bare.residuals.isinf().all() and full.residuals[0].tolist() == [0.5, 0.5]
    for needed in ({"rtol": 0.1}, {"best": True}):
        with pytest.raises(ValueError, match="need the residuals"):
            solve(function, initial, residuals=False, **options, **needed)


def test_a_map_that_recovers_from_nan_has_failed():
    def function(flat):
        return torch.where(flat == 2, math.nan, flat.nan_to_num(nan=7.0) + 1)

    found = solve(function, torch.tensor([[0.0]]), solver=PLAIN, max_steps=20)
    assert (found.status.item(), found.steps.item(), found.value.item()) == (Status.NONFINITE, 3, 2.0)


def test_the_map_sees_finite_iterates_only():
    def function(flat):
        assert flat.isfinite().all()
        return torch.where(flat > 3, math.inf, flat + 1)

    assert solve(function, torch.zeros(1, 1), solver=PLAIN, max_steps=20).value.item() == 4.0


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-9}, {"best": True}], ids=str)
def test_the_residual_of_a_failure_is_infinite(options):
    """0 -> 1 -> 2 -> NaN, with the residuals 1 and 1/2."""

    def function(flat):
        return torch.where(flat < 2, flat + 1, math.nan)

    found = solve(function, torch.zeros(1, 1), solver=PLAIN, max_steps=5, **options)
    expected = [1.0, 0.5] + [math.inf] * (1 if "rtol" in options else 3)
    assert found.residuals.flatten().tolist() == expected
    assert found.residual.item() == 0.5
    repaired = solve(torch.nan_to_num, torch.tensor([[math.nan, 1.0]]), solver=PLAIN, max_steps=1, **options)
    assert repaired.value.tolist() == [[0.0, 1.0]]
    assert repaired.residual.item() == repaired.residuals.item() == math.inf


@pytest.mark.parametrize("solver, told", [
    ("anderson", "not 'anderson'"), (Anderson, "not the class Anderson"), (None, "not None"), (3, "not 3"),
])  # fmt: skip
def test_what_is_no_solver(solver, told):
    def fail(flat):
        raise AssertionError("f is not applied")

    message = "^solver must be an object with the methods init and step, such as Anderson\\(\\), " + told
    with pytest.raises(TypeError, match=message):
        solve(fail, torch.ones(2, 2), solver=solver, max_steps=3)


@pytest.mark.parametrize("initial, error, message", [
    (torch.ones(2, 2, dtype=torch.int64), TypeError, "initial must be a tensor of floating-point .*torch.int64"),
    (torch.ones(2, 2, dtype=torch.complex64), TypeError, "initial must be a tensor of floating-point .*complex64"),
    ([[1.0, 2.0]], TypeError, r"initial must be a tensor of floating-point numbers \(B, D\), not a list"),
    (torch.ones(2), ValueError, r"initial must have the shape \(B, D\), got \(2,\)"),
    (torch.ones(1, 2, 2), ValueError, r"initial must have the shape \(B, D\), got \(1, 2, 2\)"),
])  # fmt: skip
@pytest.mark.parametrize("max_steps", [0, 3])
def test_what_is_no_start(initial, error, message, max_steps):
    with pytest.raises(error, match=message):
        solve(affine, initial, solver=PLAIN, max_steps=max_steps)


@pytest.mark.parametrize("function, told", [
    (lambda y: y[:, :1], r"f was given \(3, 2\) and must return that shape, got \(3, 1\)"),
    (lambda y: y.mean(0, keepdim=True), r"must return that shape, got \(1, 2\)"),
    (lambda y: y[:, None] * torch.ones(1, 2, 1), r"must return that shape, got \(3, 2, 2\)"),
])  # fmt: skip
@pytest.mark.parametrize("solver", [FixedPointIteration(), Anderson(), Broyden()])
def test_an_output_of_another_shape_is_not_broadcast(function, told, solver):
    with pytest.raises(ValueError, match=told):
        solve(function, torch.ones(3, 2), solver=solver, max_steps=4)
