"""The spectral radius: maps whose eigenvalues are known, and a refinement layer whose Jacobian is written out."""

import math

import pytest
import torch
from torch import Tensor

from deqdet.equilibrium import spectral_radius
from deqdet.structures import QueryState

from helpers.small_layers import CASES

QUERIES = 3


def estimate(function, value: Tensor, iterations: int = 60) -> Tensor:
    return spectral_radius(function, value, iterations=iterations, generator=torch.Generator().manual_seed(3))


def rows(*matrices: Tensor):
    """Return the map that multiplies row i by matrix i."""
    stacked = torch.stack(matrices)
    return lambda y: torch.einsum("bij,bj->bi", stacked, y)


def with_eigenvalues(*values: float) -> Tensor:
    """Return a matrix with these eigenvalues that is not symmetric: its eigenvectors are far from orthogonal."""
    basis = torch.eye(len(values), dtype=torch.float64) + 0.5 * torch.ones(len(values), len(values)).triu(1)
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.inverse()


def pair(modulus: float, angle: float, stretch: float = 1.0) -> Tensor:
    """Make a matrix with the eigenvalues modulus * exp(+-i angle); with a stretch, it turns vectors on ellipses."""
    turn = [[math.cos(angle), -math.sin(angle) * stretch], [math.sin(angle) / stretch, math.cos(angle)]]
    return modulus * torch.tensor(turn, dtype=torch.float64)


def value(count: int, size: int) -> Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_known_eigenvalues_of_a_linear_map():
    found = estimate(rows(with_eigenvalues(0.9, -0.4, 0.3, 0.1)), value(1, 4))
    assert found.shape == (1,) and found.item() == pytest.approx(0.9, rel=1e-6)


def test_the_sign_does_not_count():
    assert estimate(rows(with_eigenvalues(-1.7, 0.5, 0.2)), value(1, 3)).item() == pytest.approx(1.7, rel=1e-6)


def test_a_complex_pair():
    """A Rayleigh quotient would be modulus * cos(angle), below 0 here."""
    assert estimate(rows(pair(0.8, 2.0)), value(1, 2)).item() == pytest.approx(0.8, rel=1e-6)


def test_as_many_products_as_dimensions_are_exact():
    """Also for a complex pair whose steps along an ellipse grow by 0.8 / 3 to 0.8 * 3. More products change nothing."""
    for matrix, size in ((pair(0.8, 0.7, stretch=3.0), 2), (with_eigenvalues(0.9, -0.8, 0.7, 0.6, -0.5), 5)):
        exact = torch.linalg.eigvals(matrix).abs().max().item()
        for iterations in (size, size + 1, 40):
            assert estimate(rows(matrix), value(1, size), iterations).item() == pytest.approx(exact, rel=1e-9)


def test_few_products_are_close():
    """A random matrix of 200 x 200 with a leading pair, for which 20 steps of a power iteration give 0.89 to 1.02."""
    generator = torch.Generator().manual_seed(0)
    matrix = 0.5 / math.sqrt(200) * torch.randn(200, 200, dtype=torch.float64, generator=generator)
    matrix[:2] = 0
    matrix[:2, :2] = pair(0.95, 1.0, stretch=3.0)
    assert torch.linalg.eigvals(matrix).abs().max().item() == pytest.approx(0.95)
    assert estimate(rows(matrix), value(1, 200), 20).item() == pytest.approx(0.95, rel=1e-3)


def test_float32_is_enough():
    matrix = with_eigenvalues(*(0.9 * 0.97**k for k in range(60)))
    function, at = rows(matrix.float()), value(1, 60).float()
    exact = torch.linalg.eigvals(matrix.float().double()).abs().max().item()
    assert estimate(function, at, 60).item() == pytest.approx(exact, rel=1e-3)


def test_each_row_has_its_own():
    function = rows(with_eigenvalues(0.5, 0.1), pair(1.2, 0.9), with_eigenvalues(-2.0, 1.0), torch.zeros(2, 2).double())
    expected = torch.tensor([0.5, 1.2, 2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(estimate(function, value(4, 2)), expected, rtol=1e-6, atol=0)


def test_maps_whose_vector_becomes_zero():
    nilpotent = torch.tensor([[0.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    assert estimate(rows(nilpotent, 0 * nilpotent), value(2, 2)).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_the_jacobian_is_taken_at_the_value():
    """y^2 / 2 has the Jacobian diag(y)."""
    at = torch.tensor([[0.3, -0.7], [1.5, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(estimate(lambda y: y.square() / 2, at), torch.tensor([0.7, 1.5]).double())


def test_the_same_generator_gives_the_same():
    function, at = rows(with_eigenvalues(*(0.9**k for k in range(20)))), value(1, 20)
    before = torch.get_rng_state()
    first, second = estimate(function, at, 7), estimate(function, at, 7)
    other = spectral_radius(function, at, iterations=7, generator=torch.Generator().manual_seed(4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_iteration_is_too_few():
    with pytest.raises(ValueError, match="at least 2 iterations, got 1"):
        estimate(rows(pair(1, 1)), value(1, 2), 1)


@pytest.mark.parametrize("name", CASES)
def test_a_refinement_layer_has_the_radius_of_its_contents_jacobian(name, stir):
    """Compare with the whole Jacobian, and with finite differences along the content alone."""
    case = CASES[name]
    layer = case.make().double()
    stir(layer)
    features = [level.double() for level in case.features(1)]
    start = case.state(1, QUERIES)
    state = QueryState(start.position.double(), start.content.double())

    def refine(flat: Tensor) -> Tensor:
        return layer(QueryState.unpack(flat, QUERIES).detach_position(), features).pack()

    def refine_content(content: Tensor) -> Tensor:
        moved = QueryState(state.position, content.view_as(state.content))
        return layer(moved, features).content.flatten()

    with torch.no_grad():  # as in training: gradients are switched on where they are needed
        found = estimate(refine, state.pack(), 400).item()
        content, step = state.content.flatten(), 1e-6
        moves = step * torch.eye(len(content), dtype=torch.float64)
        differences = [(refine_content(content + m) - refine_content(content - m)) / (2 * step) for m in moves]
    by_differences = torch.linalg.eigvals(torch.stack(differences, dim=1)).abs().max().item()
    jacobian = torch.autograd.functional.jacobian(lambda flat: refine(flat[None])[0], state.pack()[0])
    assert torch.linalg.eigvals(jacobian).abs().max().item() == pytest.approx(by_differences, rel=1e-5)
    assert found == pytest.approx(by_differences, rel=0.01)
    assert by_differences > 0.05


def test_products_that_are_not_finite():
    """They concern their row alone; 1e30 is a number like another, though its square is none in float32."""
    factors = torch.tensor([[1e20], [1.0], [1e15]])
    radius = spectral_radius(lambda y: y * factors * factors * 0.5, torch.ones(3, 3), iterations=6)
    assert radius.tolist() == [float("inf"), pytest.approx(0.5), pytest.approx(5e29)]
    found = spectral_radius(lambda y: (y - 1).sqrt(), torch.tensor([[0.0, 2.0], [2.0, 5.0]]), iterations=6)
    assert found.tolist() == [float("inf"), pytest.approx(0.5)]
