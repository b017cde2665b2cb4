import math

import pytest
import torch
from torch import Tensor

from deqdet.layers.mixing import AdaptiveMixing

DIM, GROUPS, POINTS, OUT_POINTS = 6, 2, 3, 5


def make_mixing(seed: int = 0) -> AdaptiveMixing:
    """Draw all weights anew, in float64."""
    torch.manual_seed(seed)
    mixing = AdaptiveMixing(dim=DIM, num_groups=GROUPS, num_points=POINTS, num_out_points=OUT_POINTS).double()
    for parameter in mixing.parameters():
        torch.nn.init.normal_(parameter)
    return mixing


def make_inputs(images: int = 2, queries: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    content = torch.randn(images, queries, DIM, generator=generator, dtype=torch.float64)
    shape = (images, queries, GROUPS, POINTS, DIM // GROUPS)
    return content, torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(module: torch.nn.Linear, vector: list[float]) -> list[float]:
    rows = zip(module.weight.tolist(), module.bias.tolist(), strict=True)
    return [bias + sum(w * x for w, x in zip(row, vector, strict=True)) for row, bias in rows]


def normalise_and_clip(rows: list[list[float]]) -> list[list[float]]:
    values = [x for row in rows for x in row]
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    return [[max((x - mean) / math.sqrt(variance + 1e-5), 0.0) for x in row] for row in rows]


def matrix(values: list[float], rows: int, columns: int) -> list[list[float]]:
    """Reshape a vector to a matrix, row by row."""
    return [[values[row * columns + column] for column in range(columns)] for row in range(rows)]


def product(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    columns = list(zip(*right, strict=True))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left]


def slow_mixing(mixing: AdaptiveMixing, content: list[float], samples: list) -> list[float]:
    """Mix one query, of content (C,) and samples (G, P, C / G): docs/design.md, "Refinement layers", step 4."""
    generated = linear(mixing.generator, content)
    channels, flat = DIM // GROUPS, []
    for group in range(GROUPS):
        start = group * (channels * channels + OUT_POINTS * POINTS)  # M, then S
        middle = start + channels * channels
        mixed = product(samples[group], matrix(generated[start:], channels, channels))
        mixed = product(matrix(generated[middle:], OUT_POINTS, POINTS), normalise_and_clip(mixed))
        flat += [x for row in normalise_and_clip(mixed) for x in row]
    return linear(mixing.out, flat)


def test_against_loops_over_groups_points_and_channels():
    mixing = make_mixing()
    content, samples = make_inputs()
    fast = mixing(content, samples)
    for image in range(2):
        for query in range(3):
            slow = slow_mixing(mixing, content[image, query].tolist(), samples[image, query].tolist())
            assert fast[image, query].tolist() == pytest.approx(slow, rel=1e-10, abs=1e-10)


def test_by_hand():
    """One group of one channel, two points. Normalising two numbers far apart gives -1 and 1."""
    mixing = AdaptiveMixing(dim=1, num_groups=1, num_points=2, num_out_points=2).double()
    with torch.no_grad():
        # M = 1; S = ((0, 1000), (0, 0)): X = (-1000, 1000) -> (0, 1) -> (1000, 0) -> (1, 0).
        mixing.generator.bias.copy_(torch.tensor([1.0, 0.0, 1000.0, 0.0, 0.0]))
        mixing.out.weight.copy_(torch.tensor([[7.0, 50.0]]))
        mixing.out.bias.fill_(0.5)
        samples = torch.tensor([-1000.0, 1000.0], dtype=torch.float64).view(1, 1, 1, 2, 1)
        assert mixing(torch.ones(1, 1, 1, dtype=torch.float64), samples).item() == pytest.approx(7.5)
        # S transposed: (0, 1) -> (0, 0), and all that is left is the bias.
        mixing.generator.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 1000.0, 0.0]))
        assert mixing(torch.ones(1, 1, 1, dtype=torch.float64), samples).item() == pytest.approx(0.5)


def test_the_size_of_the_samples_does_not_matter():
    """Both normalisations divide it away; without them the outputs would be 100 times as large."""
    mixing = make_mixing()
    content, samples = make_inputs()
    large = mixing(content, 1e3 * samples)
    torch.testing.assert_close(mixing(content, 1e5 * samples), large, rtol=1e-6, atol=1e-7)
    assert not mixing(content, -1e3 * samples).isclose(large).any()


def test_queries_do_not_mix():
    mixing = make_mixing()
    content, samples = make_inputs()
    before = mixing(content, samples)
    content[0, 1] += 1
    changed = mixing(content, samples).ne(before).all(dim=2)
    assert changed.tolist() == [[False, True, False], [False, False, False]]


def test_gradients_by_finite_differences():
    mixing = make_mixing()
    inputs = [x.requires_grad_() for x in make_inputs(images=1, queries=2)]
    assert torch.autograd.gradcheck(mixing, inputs)


def test_it_starts_static_but_not_dead():
    torch.manual_seed(0)
    mixing = AdaptiveMixing(dim=64, num_groups=4, num_points=8, num_out_points=16)
    assert not mixing.generator.weight.any()
    bias = mixing.generator.bias.detach()
    assert bias.shape == (4 * (16 * 16 + 16 * 8),)
    # U(-1/8, 1/8), of 1536 draws.
    assert -0.125 <= bias.min() < -0.124 and 0.124 < bias.max() <= 0.125
    assert bias.std().item() == pytest.approx(0.125 / math.sqrt(3), rel=0.05)
    bound = math.sqrt(6 / (64 + 64 * 16))  # Xavier
    assert 0.99 * bound < mixing.out.weight.abs().max().item() <= bound * (1 + 1e-6)

    samples = torch.randn(1, 2, 4, 8, 16, requires_grad=True)
    one, other = mixing(torch.randn(1, 2, 64), samples), mixing(torch.randn(1, 2, 64), samples)
    assert torch.equal(one, other)  # whatever the content
    one.square().sum().backward()
    assert mixing.generator.weight.grad.abs().amin(dim=1).median() > 0
    assert samples.grad.any()
