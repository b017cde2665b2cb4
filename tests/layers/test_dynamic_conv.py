import pytest
import torch
from torch import Tensor, nn

from deqdet.layers.dynamic_conv import DynamicConvolution

DIM, HIDDEN, CELLS = 4, 3, 5


def make_module(stir, dim: int = DIM, dynamic_dim: int = HIDDEN, num_cells: int = CELLS) -> DynamicConvolution:
    torch.manual_seed(0)
    module = DynamicConvolution(dim=dim, dynamic_dim=dynamic_dim, num_cells=num_cells).double()
    stir(module, size=0.3)
    return module


def make_inputs(rows: int = 2, queries: int = 3, cells: int = CELLS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rows, queries, DIM, **draw), torch.randn(rows, queries, cells, DIM, **draw)


def test_by_hand():
    """A LayerNorm of two numbers gives 1 to the larger and -1 to the smaller; ReLU leaves (1, 0) or (0, 1)."""
    module = DynamicConvolution(dim=2, dynamic_dim=2, num_cells=1)
    with torch.no_grad():
        module.generator.weight.zero_()
        # P1 and P2 row by row. (5, 1) P1 = (5, 17) -> (0, 1); (0, 1) P2 = (9, 7) -> (1, 0).
        # Transposed, P1 would give (8, 2), that is (1, 0); P2 (2, 7), that is (0, 1).
        module.generator.bias.copy_(torch.tensor([1.0, 3.0, 0.0, 2.0, 4.0, 2.0, 9.0, 7.0]))
        module.out.weight.copy_(torch.tensor([[5.0, 10.0], [2.0, 20.0]]))
        module.out.bias.zero_()
        module.out_norm.weight.copy_(torch.tensor([3.0, 4.0]))
        # (1, 0) W^T = (5, 2) -> (3, -4) -> ReLU.
        found = module(torch.zeros(1, 1, 2), torch.tensor([[[[5.0, 1.0]]]]))
    torch.testing.assert_close(found, torch.tensor([[[3.0, 0.0]]]), rtol=0, atol=1e-3)


def slow_norm(norm: nn.LayerNorm, numbers: list[Tensor]) -> list[Tensor]:
    """Apply LayerNorm, then ReLU."""
    mean = sum(numbers) / len(numbers)
    deviation = (sum((x - mean) ** 2 for x in numbers) / len(numbers) + 1e-5) ** 0.5
    scaled = zip(numbers, norm.weight, norm.bias, strict=True)
    return [max((x - mean) / deviation * weight + bias, torch.zeros(())) for x, weight, bias in scaled]


@torch.no_grad()
def test_against_loops(stir):
    module, (content, regions) = make_module(stir), make_inputs()
    found = module(content, regions)
    for row in range(2):
        for query in range(3):
            numbers = module.generator.weight @ content[row, query] + module.generator.bias
            flat = []
            for cell in regions[row, query]:
                hidden = [sum(cell[c] * numbers[c * HIDDEN + d] for c in range(DIM)) for d in range(HIDDEN)]
                hidden = slow_norm(module.hidden_norm, hidden)
                start = DIM * HIDDEN  # of P2
                filtered = [sum(hidden[d] * numbers[start + d * DIM + c] for d in range(HIDDEN)) for c in range(DIM)]
                flat += slow_norm(module.channel_norm, filtered)
            out = module.out.weight @ torch.stack(flat) + module.out.bias
            expected = torch.stack(slow_norm(module.out_norm, list(out)))
            torch.testing.assert_close(found[row, query], expected, rtol=0, atol=1e-12)
    assert found.any(dim=2).all()  # ReLU leaves something of every query


@torch.no_grad()
@pytest.mark.parametrize("part", [0, 1], ids=["content", "regions"])
def test_a_query_filters_its_own_region_only(stir, part):
    module, inputs = make_module(stir), make_inputs()
    before = module(*inputs)
    inputs[part][1, 2] *= torch.tensor([-1.0, 2.0, 3.0, -4.0])
    changed = (module(*inputs) - before).abs().amax(dim=2) > 1e-12
    assert changed.tolist() == [[False] * 3, [False, False, True]]


def test_shapes_and_parameters(stir):
    module = make_module(stir, num_cells=49)
    content, regions = make_inputs(cells=49)
    assert module(content, regions).shape == (2, 3, DIM)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    assert shapes == {
        "generator.weight": (2 * DIM * HIDDEN, DIM),
        "generator.bias": (2 * DIM * HIDDEN,),
        "hidden_norm.weight": (HIDDEN,),
        "hidden_norm.bias": (HIDDEN,),
        "channel_norm.weight": (DIM,),
        "channel_norm.bias": (DIM,),
        "out.weight": (DIM, 49 * DIM),
        "out.bias": (DIM,),
        "out_norm.weight": (DIM,),
        "out_norm.bias": (DIM,),
    }


@pytest.mark.parametrize("rows, queries", [(1, 1), (2, 3)])
def test_gradients_by_finite_differences(stir, rows, queries):
    module, inputs = make_module(stir), [x.requires_grad_() for x in make_inputs(rows, queries)]
    assert torch.autograd.gradcheck(module, inputs)
    module(*inputs).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
