from functools import partial

import pytest
import torch

from deqdet.equilibrium import FixedPointIteration, Implicit, Phantom, Unrolled, solve

INPUTS = ("W", "U", "b", "x")
ROWS, DIM, FEATURES = 2, 3, 4


def toy_inputs(seed=0):
    """Return W, U, b and x of the map tanh(W y + U x + b). W has the spectral norm 0.7, so that the map contracts."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight = random(DIM, DIM)
    weight *= 0.7 / torch.linalg.matrix_norm(weight, 2)
    return {"W": weight, "U": random(DIM, FEATURES), "b": random(DIM), "x": random(ROWS, FEATURES)}


def toy_map(inputs):
    return lambda y: torch.tanh(y @ inputs["W"].T + inputs["x"] @ inputs["U"].T + inputs["b"])


def fixed_point(inputs):
    with torch.no_grad():
        start = torch.zeros(ROWS, DIM, dtype=torch.float64)
        return solve(toy_map(inputs), start, solver=FixedPointIteration(), max_steps=100).value


def gradients(estimator, inputs, value, weight):
    """Return the gradient of the weighted sum of the estimator's output with respect to each input."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    output = estimator(toy_map(leaves), value)
    (weight * output).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def explicit_jacobians(inputs, value, name):
    """Return df/dy, (B D, B D), and df/d(name), (B D, entries of that input), at value."""
    jacobian = torch.autograd.functional.jacobian
    by_value = jacobian(toy_map(inputs), value)
    by_input = jacobian(lambda x: toy_map({**inputs, name: x})(value), inputs[name])
    size = value.numel()
    return by_value.reshape(size, size), by_input.reshape(size, -1)


@pytest.fixture(scope="module")
def toy():
    """Return the inputs, the fixed point, and the weights of a loss."""
    inputs = toy_inputs()
    weight = torch.tensor([[0.3, -1.2, 0.8], [2.0, 0.5, -0.7]], dtype=torch.float64)
    return inputs, fixed_point(inputs), weight


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_phantom_is_the_truncated_neumann_series(toy, steps, damping, name):
    inputs, value, weight = toy
    jacobian, by_input = explicit_jacobians(inputs, value, name)
    # y <- (1 - a) y + a f(y) has the Jacobians (1 - a) I + a J and a F: k steps give
    # sum_{i < k} ((1 - a) I + a J)^i a F, and with a = 1 sum_{i < k} J^i F (Eq. 9, Eq. 11).
    damped = (1 - damping) * torch.eye(len(jacobian), dtype=torch.float64) + damping * jacobian
    series = sum(torch.linalg.matrix_power(damped, i) for i in range(steps)) @ (damping * by_input)
    expected = (weight.flatten() @ series).view_as(inputs[name])
    found = gradients(Phantom(steps=steps, damping=damping), inputs, value, weight)[name]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_one_phantom_step_is_jfb_by_hand(toy):
    inputs, value, weight = toy
    found = gradients(Phantom(steps=1), inputs, value, weight)
    inner = weight * (1 - value**2)  # tanh' at the fixed point
    torch.testing.assert_close(found["b"], inner[0] + inner[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["W"], inner.T @ value, rtol=0, atol=1e-10)
    torch.testing.assert_close(found["x"], inner @ inputs["U"], rtol=0, atol=1e-10)


def test_the_default_phantom_is_the_refinement_aware_gradient(toy):
    inputs, value, weight = toy
    found = gradients(Phantom(), inputs, value, weight)
    inner = weight * (1 - value**2)
    inner = inner + (inner @ inputs["W"]) * (1 - value**2)  # (I + J^T), Eq. 11
    torch.testing.assert_close(found["b"], inner[0] + inner[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", INPUTS)
def test_many_damped_phantom_steps_are_exact(toy, name):
    inputs, value, weight = toy
    exact = gradients(Implicit(rtol=1e-12), inputs, value, weight)[name]
    many = gradients(Phantom(steps=150, damping=0.6), inputs, value, weight)[name]
    torch.testing.assert_close(many, exact, rtol=0, atol=1e-9)


def test_phantom_applies_damped_steps():
    start = torch.zeros(1, 1)
    # y / 2 + 1 from 0: 1, 3/2, 7/4. Half steps: 1/2; 1/4 + (1/4 + 1) / 2 = 7/8.
    assert Phantom(steps=3)(lambda y: y / 2 + 1, start).item() == 1.75
    assert Phantom(steps=2, damping=0.5)(lambda y: y / 2 + 1, start).item() == 0.875


@pytest.mark.parametrize("estimator", [Phantom(steps=3), Phantom(steps=2, damping=0.5), Implicit()])
def test_no_gradient_into_the_value(toy, estimator):
    inputs, value, _ = toy
    leaf = value.clone().requires_grad_()
    bias = inputs["b"].clone().requires_grad_()
    estimator(toy_map({**inputs, "b": bias}), leaf).sum().backward()
    assert leaf.grad is None and bias.grad.abs().min() > 0


def test_unrolled_passes_gradient_into_the_value(toy):
    inputs, _, weight = toy
    start = torch.linspace(-1, 1, ROWS * DIM, dtype=torch.float64).view(ROWS, DIM).requires_grad_()
    output = Unrolled(steps=2)(toy_map(inputs), start)
    (weight * output).sum().backward()
    first, _ = explicit_jacobians(inputs, start.detach(), "b")
    second, _ = explicit_jacobians(inputs, toy_map(inputs)(start.detach()), "b")
    expected = (weight.flatten() @ second @ first).view(ROWS, DIM)
    torch.testing.assert_close(start.grad, expected, rtol=0, atol=1e-12)


def test_unrolled_applies_the_map():
    assert Unrolled(steps=3)(lambda y: y / 2 + 1, torch.zeros(1, 1)).item() == 1.75


@pytest.mark.parametrize("name", INPUTS)
def test_implicit_is_the_linear_solve_and_unrolled_at_convergence(toy, name):
    inputs, value, weight = toy
    jacobian, by_input = explicit_jacobians(inputs, value, name)
    identity = torch.eye(len(jacobian), dtype=torch.float64)
    total = torch.linalg.solve(identity - jacobian, by_input)  # Eq. 8
    expected = (weight.flatten() @ total).view_as(inputs[name])
    implicit = gradients(Implicit(rtol=1e-12), inputs, value, weight)[name]
    unrolled = gradients(Unrolled(steps=150), inputs, torch.zeros_like(value), weight)[name]
    torch.testing.assert_close(implicit, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(unrolled, expected, rtol=0, atol=1e-9)
    jfb = gradients(Phantom(steps=1), inputs, value, weight)[name]
    assert (jfb - expected).abs().max() > 0.05  # JFB is far off, so that the comparison above can fail


@pytest.mark.parametrize("estimator", [Implicit(rtol=1e-12), Unrolled(steps=60)])
def test_finite_differences_of_the_fixed_point(estimator):
    inputs = toy_inputs(seed=1)

    def solved(weight, bias):
        """Solve for the fixed point anew, as a function of W and b."""
        current = {**inputs, "W": weight, "b": bias}
        return estimator(toy_map(current), fixed_point(current))

    tensors = inputs["W"].requires_grad_(), inputs["b"].requires_grad_()
    assert torch.autograd.gradcheck(solved, tensors, check_undefined_grad=False)


def test_implicit_returns_the_map_of_the_value(toy):
    inputs, value, _ = toy
    elsewhere = value + 1
    bias = inputs["b"].clone().requires_grad_()
    output = Implicit()(toy_map({**inputs, "b": bias}), elsewhere)
    assert torch.equal(output, toy_map(inputs)(elsewhere))


def test_implicit_with_a_row_outside_the_loss(toy):
    inputs, value, weight = toy
    weight = weight * torch.tensor([[1.0], [0.0]])
    found = gradients(Implicit(), inputs, value, weight)["x"]
    assert (found[1] == 0).all() and found[0].abs().min() > 0


@pytest.mark.parametrize(
    "slope, estimator, numbers",
    [
        (1.5, Implicit(), "rtol 1e-06 in 200 steps"),  # no contraction: the adjoint grows
        (0.9, Implicit(max_steps=3, rtol=1e-4), "rtol 0.0001 in 3 steps"),
    ],
)
def test_implicit_says_when_the_adjoint_does_not_converge(slope, estimator, numbers):
    bias = torch.ones(1, dtype=torch.float64, requires_grad=True)
    fixed = torch.full((2, 1), 1 / (1 - slope), dtype=torch.float64)
    output = estimator(lambda y: slope * y + bias, fixed)
    with pytest.raises(RuntimeError, match=f"adjoint .* did not converge to {numbers}"):
        output.sum().backward()


def test_implicit_of_a_steep_contraction_by_hand():
    # y = 0.9 y + b: dy/db = 10 for each of two rows.
    bias = torch.ones(1, dtype=torch.float64, requires_grad=True)
    value = torch.full((2, 1), 10.0, dtype=torch.float64)
    Implicit(max_steps=400, rtol=1e-12)(lambda y: 0.9 * y + bias, value).sum().backward()
    assert bias.grad.item() == pytest.approx(20.0, abs=1e-8)


@pytest.mark.parametrize("steps", [0, -2])
@pytest.mark.parametrize("kind", [Unrolled, Phantom])
def test_steps_must_be_positive(kind, steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        kind(steps=steps)


@pytest.mark.parametrize("damping", [0.0, -0.5, 1.5])
def test_damping_must_be_a_share(damping):
    with pytest.raises(ValueError, match=rf"damping must lie in \(0, 1\], got {damping}"):
        Phantom(steps=2, damping=damping)


@pytest.mark.parametrize("numbers", [{"rtol": 0.0}, {"max_steps": 0}])
def test_implicit_refuses_numbers_with_which_it_could_never_converge(numbers):
    with pytest.raises(ValueError, match=next(iter(numbers))):
        Implicit(**numbers)


def test_implicit_needs_no_gradient():
    value = torch.full((2, 3), 0.5, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(Implicit()(torch.cos, value), value.cos())
