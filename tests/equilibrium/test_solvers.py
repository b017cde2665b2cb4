"""Every solver on problems with known answers."""

import math

import pytest
import torch

from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration, Status, solve

SOLVERS = {
    "plain": FixedPointIteration(),
    "damped": FixedPointIteration(damping=0.5),
    "anderson2": Anderson(history_size=2),
    "anderson4": Anderson(history_size=4),
    "anderson damped": Anderson(history_size=4, damping=0.7),
    "broyden": Broyden(history_size=4),
}
ACCELERATED = {name: solver for name, solver in SOLVERS.items() if name.startswith(("anderson", "broyden"))}

# Eigenvalues from -0.5 to 0.98, whose eigenvectors are not the coordinate axes.
BASIS = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
STIFF = BASIS @ torch.diag(torch.linspace(-0.5, 0.98, 20, dtype=torch.float64)) @ BASIS.T
STIFF_POINT = torch.linalg.solve(torch.eye(20, dtype=torch.float64) - STIFF, torch.ones(20, dtype=torch.float64))
LINEAR = torch.tensor([[0.5, 0.25], [0.0, 0.5]], dtype=torch.float64)


def linear(flat):
    return flat @ LINEAR.T.to(flat) + flat.new_tensor([1.0, 2.0])


def stiff(flat):
    return flat @ STIFF.T.to(flat) + 1


def rotation(flat):
    """A quarter turn about (1, 0): a 4-cycle from anywhere else. Its eigenvalues are +-i."""
    x, y = flat.unbind(1)
    return torch.stack([1 - y, x - 1], dim=1)


def logistic(flat):
    """From 0.6 plain iteration falls into a 2-cycle around the fixed point 1 - 1/3.2 = 0.6875."""
    return 3.2 * flat * (1 - flat)


def broken(flat):
    return flat * math.nan


def breaks_later(flat):
    """-2 sqrt(y) + 8 has the fixed point 4, but from 20 the first output is below 0."""
    return 8 - 2 * flat.sqrt()


def exploding(flat):
    return flat.exp() + flat**2 + 1


CONVERGES, CYCLES, FAILS = Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE
# f, initial row, fixed point, and the verdict of the solvers after 600 steps: one for all, or a dict of those that do
# not converge.
PROBLEMS = {
    "linear": (linear, [0.0, -300.0], [4.0, 4.0], CONVERGES),
    "cosine": (torch.cos, [1.0, 0.2], [0.7390851332151607] * 2, CONVERGES),
    "stiff": (stiff, [0.0] * 20, STIFF_POINT.tolist(), {"damped": CYCLES, "plain": CYCLES}),
    "two-cycle": (logistic, [0.6], [0.6875], {"plain": CYCLES}),
    "reflection": (lambda y: 6 - y, [1.0, 5.5], [3.0, 3.0], {"plain": CYCLES}),
    "four-cycle": (rotation, [3.0, 4.0], [1.0, 0.0], {"plain": CYCLES}),
    "constant": (lambda y: torch.full_like(y, 7.0), [0.0, 9.0], [7.0, 7.0], CONVERGES),
    "nan": (broken, [1.0, 2.0], None, FAILS),
    "nan in one number": (lambda y: y * y.new_tensor([1.0, math.nan]), [1.0, 2.0], None, FAILS),
    # -0.94 is the first output; half of the way to it is still above 0.
    "nan at the second step": (breaks_later, [20.0], [4.0], {name: FAILS for name in SOLVERS if "damped" not in name}),
    "exploding": (exploding, [1.0, 2.0], None, FAILS),
}


def run(name, solver, **options):
    function, initial, _, _ = PROBLEMS[name]
    arguments = {"max_steps": 600, "rtol": 1e-9} | options
    return solve(function, torch.tensor([initial], dtype=torch.float64), solver=solver, **arguments)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_verdicts(problem, solver):
    function, _, point, verdicts = PROBLEMS[problem]
    expected = verdicts.get(solver, CONVERGES) if isinstance(verdicts, dict) else verdicts
    solution = run(problem, SOLVERS[solver])
    assert solution.status.item() == expected
    assert solution.value.isfinite().all()
    if expected == CONVERGES:
        assert solution.value[0].tolist() == pytest.approx(point, abs=1e-6)
        assert solution.residuals[-1].item() < 1e-9
    if expected == CYCLES:
        assert solution.steps.item() == 600


@pytest.mark.parametrize("name", ACCELERATED)
def test_acceleration_saves_evaluations(name):
    plain = run("stiff", SOLVERS["plain"], max_steps=5000, rtol=1e-6)
    fast = run("stiff", ACCELERATED[name], max_steps=5000, rtol=1e-6)
    assert plain.status.item() == fast.status.item() == Status.CONVERGED
    assert fast.steps < 0.7 * plain.steps


def test_broyden_solves_a_linear_map_in_two_steps_a_dimension():
    # Gay, SIAM J. Numer. Anal. 1979: 2 n steps at most for n dimensions, with all terms kept.
    torch.manual_seed(1)
    for size in (2, 3, 5):
        matrix = torch.randn(size, size, dtype=torch.float64)  # no contraction
        solution = solve(
            lambda y, m=matrix: y @ m.T + 1,
            torch.zeros(1, size, dtype=torch.float64),
            solver=Broyden(history_size=50),
            max_steps=2 * size + 1,
            rtol=1e-8,
        )
        assert solution.status.item() == Status.CONVERGED, size


def test_the_full_anderson_is_gmres():
    # Walker and Ni: on a linear map, with all iterates kept, it reaches the fixed point in n + 1 combinations.
    matrix = torch.tensor([[0.9, 0.3, 0.0], [0.0, -0.7, 0.2], [0.1, 0.0, 0.5]], dtype=torch.float64)
    initial = torch.tensor([[5.0, -2.0, 1.0]], dtype=torch.float64)
    solver = Anderson(history_size=10, regularization=0)
    solution = solve(lambda y: y @ matrix.T + 2, initial, solver=solver, max_steps=5, rtol=0)
    point = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - matrix, torch.full((3,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(solution.value[0], point, rtol=0, atol=1e-10)


def test_anderson_by_hand():
    # f(y) = y / 2 + 1 from 0: g = 1 at 0, g = 1/2 at 1. The secant through them is 0 at y = 2, the fixed point.
    solver = Anderson(history_size=2, regularization=0)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    first, state = solver.step(zero, one, solver.init(zero))
    second, _ = solver.step(one, 1.5 * one, state)
    assert first.item() == 1.0 and second.item() == pytest.approx(2.0, abs=1e-14)
    # Damped by 1/2: from (0, g 1) and (1/2, g 3/4) the best combination has weights -3, 4: the same point.
    damped = Anderson(history_size=2, damping=0.5, regularization=0)
    first, state = damped.step(zero, one, damped.init(zero))
    second, _ = damped.step(first, first / 2 + 1, state)
    assert first.item() == 0.5 and second.item() == pytest.approx(2.0, abs=1e-14)


def test_regularization_shortens_the_extrapolation():
    # One difference of norm 1 and lambda = 1 halve the weight: from 1.5 on, back by -1/2 of the -1 that would do.
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    solver = Anderson(history_size=2, regularization=1.0)
    _, state = solver.step(zero, one, solver.init(zero))
    proposal, _ = solver.step(one, 1.5 * one, state)
    assert proposal.item() == pytest.approx(1.75, abs=1e-14)


@pytest.mark.parametrize("regularization", [0.0, 1e-6])
@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_no_new_information_is_a_plain_step(solver, regularization):
    # The same iterate twice: all differences are 0, the least-squares problem is singular.
    options = {"regularization": regularization} if solver is Anderson else {}
    iterate, output = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 5.0]])
    _, state = solver(history_size=3, **options).step(iterate, output, solver(history_size=3, **options).init(iterate))
    proposal, _ = solver(history_size=3, **options).step(iterate, output, state)
    assert proposal.tolist() == output.tolist()


@pytest.mark.parametrize("name", ACCELERATED)
def test_parallel_differences_do_no_harm(name):
    # All entries of a row are equal, so that all differences are parallel and their Gram matrix has rank 1.
    solution = solve(lambda y: 0.9 * y + 1, torch.zeros(1, 50), solver=ACCELERATED[name], max_steps=60, rtol=1e-5)
    assert solution.status.item() == Status.CONVERGED
    assert solution.value[0].tolist() == pytest.approx([10.0] * 50, rel=1e-3)


@pytest.mark.parametrize("name", SOLVERS)
def test_rows_do_not_depend_on_each_other(name):
    # To the last bit of float32: the iterations of rows as wide as a detector's would magnify a rounding.
    generator = torch.Generator().manual_seed(3)
    initial, offset = 3 * torch.randn(5, 4000, generator=generator), torch.randn(4000, generator=generator)
    initial[2, 4] = math.nan

    def wave(flat):
        return 0.9 * (flat + flat.roll(1, dims=1)).sin() + offset

    arguments = {"solver": SOLVERS[name], "max_steps": 12}
    together = solve(wave, initial, **arguments)
    assert together.status.tolist() == [Status.MAX_STEPS] * 2 + [Status.NONFINITE] + [Status.MAX_STEPS] * 2
    for row in range(5):
        alone = solve(wave, initial[row : row + 1], **arguments)
        found = torch.cat([together.value[row], together.residuals[:, row]])
        expected = torch.cat([alone.value[0], alone.residuals[:, 0]])
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SOLVERS)
def test_bfloat16_state(name):
    solution = solve(linear, torch.zeros(2, 2, dtype=torch.bfloat16), solver=SOLVERS[name], max_steps=30, record=[3])
    assert solution.value.dtype == solution.recorded[3].dtype == torch.bfloat16
    assert solution.value.float().tolist() == [pytest.approx([4.0, 4.0], rel=2**-6)] * 2
    assert solution.residuals.dtype == torch.float32


@pytest.mark.parametrize("name", SOLVERS)
def test_autocast_leaves_the_arithmetic_of_a_solver_alone(name):
    initial = torch.zeros(2, 20)
    expected = solve(stiff, initial, solver=SOLVERS[name], max_steps=9).value
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = solve(lambda y: (y[:, None] * STIFF.float()).sum(2) + 1, initial, solver=SOLVERS[name], max_steps=9)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, expected, rtol=1e-3, atol=1e-3)


def test_a_proposal_that_overflows_is_a_plain_step():
    # The second number's secant extrapolates 1e5 times the last step, which was 3e38 in the first number.
    solver = Anderson(history_size=2)
    iterates = torch.tensor([[[-1.5e38, 0.0]], [[1.5e38, 0.0]]])
    outputs = torch.tensor([[[-1.5e38, 1.0]], [[1.5e38, 0.99999]]])
    _, state = solver.step(iterates[0], outputs[0], solver.init(iterates[0]))
    proposal, _ = solver.step(iterates[1], outputs[1], state)
    assert proposal.tolist() == outputs[1].tolist()
    # A term of H so large that H g overflows.
    none, huge = torch.zeros(1, 0, 1), torch.full((1, 1, 1), 3e38)
    proposal, _ = Broyden(history_size=2).step(torch.zeros(1, 1), torch.ones(1, 1), (none, none, huge, huge))
    assert proposal.tolist() == [[1.0]]


@pytest.mark.parametrize("name", SOLVERS)
def test_nothing_waits_for_the_device(name):
    # Reading a value of a tensor on "meta" is an error.
    initial = torch.empty(3, 5, device="meta")
    assert solve(torch.cos, initial, solver=SOLVERS[name], max_steps=7, record=[2]).value.shape == (3, 5)


@pytest.mark.parametrize("build, message", [
    (lambda: FixedPointIteration(damping=0), r"damping must lie in \(0, 1\], got 0"),
    (lambda: FixedPointIteration(damping=1.5), r"damping must lie in \(0, 1\], got 1.5"),
    (lambda: Anderson(damping=-1), "damping"),
    (lambda: Anderson(history_size=1), "at least 2 .1 would be plain iteration., got 1"),
    (lambda: Anderson(regularization=-1e-3), "regularization must be finite and not negative, got -0.001"),
    (lambda: Anderson(regularization=math.nan), "regularization must be finite"),
    (lambda: Broyden(history_size=0), "history_size of Broyden must be at least 1, got 0"),
])  # fmt: skip
def test_numbers_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()
