"""The parts that both refinement layers share, one number at a time: no code in common with deqdet."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def slow_linear(module: nn.Linear, x: Tensor) -> Tensor:
    rows = torch.stack([row.dot(x) for row in module.weight])
    return rows if module.bias is None else rows + module.bias


def slow_normalise(x: Tensor) -> Tensor:
    """Over all of x."""
    deviation = x - x.sum() / x.numel()
    return deviation / (deviation.square().sum() / x.numel() + 1e-5).sqrt()


def slow_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return slow_normalise(x) * module.weight + module.bias


def slow_branch(module: nn.Sequential, x: Tensor) -> Tensor:
    """Any number of Linear-LN-ReLU, then Linear."""
    for first in range(0, len(module) - 1, 3):
        x = slow_norm(module[first + 1], slow_linear(module[first], x)).clamp(min=0)
    return slow_linear(module[-1], x)


def slow_feedforward(module: nn.Sequential, x: Tensor) -> Tensor:
    return slow_linear(module[2], slow_linear(module[0], x).clamp(min=0))


def slow_attention(
    module: nn.MultiheadAttention, u: list[Tensor], bias: Callable[[int, int, int], Tensor | float]
) -> list[Tensor]:
    """What each of the N inputs (C) attends to, with bias(head, i, j) on the odds of j for i."""
    dim = module.embed_dim
    weights, biases = module.in_proj_weight.view(3, dim, dim), module.in_proj_bias.view(3, dim)
    query, key, value = ([w @ x + b for x in u] for w, b in zip(weights, biases, strict=True))
    size, out = dim // module.num_heads, []
    for i in range(len(u)):
        attended = []
        for head in range(module.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = [query[i][part].dot(x[part]) / math.sqrt(size) + bias(head, i, j) for j, x in enumerate(key)]
            odds = [score.exp() for score in scores]
            attended.append(sum(o / sum(odds) * v[part] for o, v in zip(odds, value, strict=True)))
        out.append(slow_linear(module.out_proj, torch.cat(attended)))
    return out


def slow_box(position: list[float]) -> tuple[float, float, float, float]:
    """Eq. 3: z = log2 sqrt(w h), r = log2(h / w), so w = 2^z / sqrt(2^r), h = 2^z sqrt(2^r)."""
    cx, cy, z, r = position
    width, height = 2**z / math.sqrt(2**r), 2**z * math.sqrt(2**r)
    return cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2


def slow_iof(box: tuple, other: tuple) -> float:
    across = max(min(box[2], other[2]) - max(box[0], other[0]), 0)
    down = max(min(box[3], other[3]) - max(box[1], other[1]), 0)
    return across * down / max((box[2] - box[0]) * (box[3] - box[1]), 1e-6)


def slow_embedding(position: list[float], dim: int) -> Tensor:
    cx, cy, z, r = position
    features = []
    for value in (cx / 1000, cy / 1000, z, r):
        for i in range(dim // 4):
            angle = value / 10000 ** (2 * (i // 2) / (dim / 4))
            features.append(math.sin(angle) if i % 2 == 0 else math.cos(angle))
    return torch.tensor(features)
