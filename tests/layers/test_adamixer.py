"""The whole layer against loops that follow docs/design.md, "Refinement layers", and share no code with the layer."""

import math

import pytest
import torch
from torch import Tensor

from detectron2.layers import ShapeSpec

from deqdet.layers import AdaMixerLayer, build_refinement_layer
from deqdet.structures import QueryState

from helpers.slow_modules import (
    slow_attention,
    slow_box,
    slow_branch,
    slow_embedding,
    slow_feedforward,
    slow_iof,
    slow_linear,
    slow_norm,
    slow_normalise,
)
from helpers.small_layers import (
    ADAMIXER,
    CLASSES,
    DIM,
    GROUPS,
    OUT_POINTS,
    POINTS,
    STRIDES,
    make_adamixer,
    norm_weights,
    other_than_xavier,
)


def stirred_layer(stir) -> AdaMixerLayer:
    layer = make_adamixer()
    stir(layer, size=0.3)
    return layer


# The slow layer, which computes for one image, query, group, point and level after the other.


def slow_attend(layer: AdaMixerLayer, content: Tensor, positions: list[list[float]]) -> list[Tensor]:
    """Compute q1 of each query of one image (steps 1 and 2), from contents (N, C) and N positions."""
    boxes = [slow_box(p) for p in positions]
    u = [q + slow_embedding(p, DIM) for q, p in zip(content, positions, strict=True)]

    def bias(head: int, i: int, j: int) -> Tensor:
        return layer.attention.iof_scale[head] * math.log(slow_iof(boxes[i], boxes[j]) + 1e-7)

    attended = slow_attention(layer.attention.attention, u, bias)
    return [slow_norm(layer.attention_norm, x + y) for x, y in zip(u, attended, strict=True)]


def slow_bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """Interpolate a level (c, H, W) at x, y in cells. The centre of the first cell is at 0.5; outside, all is zero."""
    column, row = math.floor(x - 0.5), math.floor(y - 0.5)
    value = torch.zeros(len(level))
    for i in (row, row + 1):
        for j in (column, column + 1):
            if 0 <= i < level.shape[1] and 0 <= j < level.shape[2]:
                value = value + (1 - abs(y - 0.5 - i)) * (1 - abs(x - 0.5 - j)) * level[:, i, j]
    return value


def slow_samples(
    layer: AdaMixerLayer, q1: Tensor, position: list[float], levels: list[Tensor], group: int
) -> Tensor:
    """Sample the points of one query and group (step 3): (P, C / G)."""
    cx, cy, z, _ = position
    left, top, right, bottom = slow_box(position)
    offsets, size, samples = slow_linear(layer.points.offsets, q1), DIM // GROUPS, []
    for point in range(POINTS):
        dx, dy, dz = offsets[3 * (group * POINTS + point) :][:3].tolist()
        x, y = cx + dx * (right - left), cy + dy * (bottom - top)
        odds = [math.exp(-((z + dz - math.log2(stride)) ** 2) / 2) for stride in STRIDES]
        sample = torch.zeros(size)
        for level, stride, odd in zip(levels, STRIDES, odds, strict=True):
            own = level[group * size : (group + 1) * size]
            sample = sample + odd / sum(odds) * slow_bilinear(own, x / stride, y / stride)
        samples.append(sample)
    return torch.stack(samples)


def slow_layer(layer: AdaMixerLayer, state: QueryState, features: list[Tensor]) -> QueryState:
    size, per_group = DIM // GROUPS, (DIM // GROUPS) ** 2 + OUT_POINTS * POINTS
    all_positions, all_contents = [], []
    for row, (content, positions) in enumerate(zip(state.content, state.position.tolist(), strict=True)):
        levels = [level[row % len(level)] for level in features]
        q1s = slow_attend(layer, content, positions)
        for q1, position in zip(q1s, positions, strict=True):
            generated, mixed = slow_linear(layer.mixing.generator, q1), []
            for group in range(GROUPS):
                own = generated[group * per_group : (group + 1) * per_group]
                channel, point = own[: size**2].view(size, size), own[size**2 :].view(OUT_POINTS, POINTS)
                x = slow_samples(layer, q1, position, levels, group)
                x = slow_normalise(x @ channel).clamp(min=0)
                mixed.append(slow_normalise(point @ x).clamp(min=0).flatten())
            q2 = slow_norm(layer.mixing_norm, q1 + slow_linear(layer.mixing.out, torch.cat(mixed)))
            q3 = slow_norm(layer.feedforward_norm, q2 + slow_feedforward(layer.feedforward, q2))
            dx, dy, dz, dr = slow_branch(layer.box_branch, q3).tolist()
            cx, cy, z, r = position
            all_positions.append([cx + dx * 2**z, cy + dy * 2**z, z + dz, r + dr])
            all_contents.append(q3)
    return QueryState(
        torch.tensor(all_positions).view_as(state.position), torch.stack(all_contents).view_as(state.content)
    )


@torch.no_grad()
def test_against_loops(float64, stir):
    """Return a state of four rows: two states of each of two images."""
    layer, features, state = stirred_layer(stir), ADAMIXER.features(), ADAMIXER.state(rows=4)
    fast, slow = layer(state, features), slow_layer(layer, state, features)
    torch.testing.assert_close(fast.content, slow.content, rtol=0, atol=1e-10)
    torch.testing.assert_close(fast.position, slow.position, rtol=0, atol=1e-10)
    # Every position has moved, and far enough to be worth comparing.
    assert (fast.position - state.position).abs().min() > 1e-3

    prediction = layer.predict(fast)
    for row in range(4):
        for query in range(4):
            logits = slow_branch(layer.class_branch, slow.content[row, query])
            torch.testing.assert_close(prediction.logits[row, query], logits, rtol=0, atol=1e-10)
            box = slow_box(slow.position[row, query].tolist())
            assert prediction.boxes[row, query].tolist() == pytest.approx(box, abs=1e-9)


def test_jacobian_of_the_refined_position(float64, stir):
    """The Jacobian is that of cx + d_x 2^z, cy + d_y 2^z, z + d_z, r + d_r with constant deltas."""
    layer, features, state = stirred_layer(stir), ADAMIXER.features(1), ADAMIXER.state(rows=1, queries=2)

    def refined(position: Tensor) -> Tensor:
        return layer(QueryState(position, state.content), features).position

    jacobian = torch.autograd.functional.jacobian(refined, state.position)  # (1, N, 4, 1, N, 4)
    expected = torch.zeros(1, 2, 4, 1, 2, 4)
    with torch.no_grad():
        moved = refined(state.position) - state.position
    for query in range(2):
        expected[0, query, :, 0, query] = torch.eye(4)
        expected[0, query, 0, 0, query, 2] = math.log(2) * moved[0, query, 0]
        expected[0, query, 1, 0, query, 2] = math.log(2) * moved[0, query, 1]
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-12)


# Initialisation


def test_first_refinement_leaves_boxes_as_they_are():
    layer, state = make_adamixer(), ADAMIXER.state()
    refined = layer(state, ADAMIXER.features())
    assert torch.equal(refined.position, state.position)
    assert not refined.content.isclose(state.content).all(dim=2).any()
    assert layer.box_branch[3].weight.count_nonzero() == layer.box_branch[3].bias.count_nonzero() == 0


def test_iof_scale_starts_uniform_up_to_4():
    scale = make_adamixer(dim=512, num_heads=512).attention.iof_scale.detach()
    assert 0 <= scale.min() < 0.1 and 3.9 < scale.max() <= 4
    assert scale.mean().item() == pytest.approx(2, abs=0.2)  # standard error 0.05


def test_other_weights_start_as_xavier_uniform():
    weights = {
        "attention.attention.in_proj_weight": (64, 192),
        "attention.attention.out_proj.weight": (64, 64),
        "feedforward.0.weight": (64, 256),
        "feedforward.2.weight": (256, 64),
        "box_branch.0.weight": (64, 64),
        "class_branch.0.weight": (64, 64),
        "class_branch.3.weight": (64, CLASSES),
        "mixing.out.weight": (64 * OUT_POINTS, 64),
    }
    layer = make_adamixer(dim=64, num_heads=8, feedforward_dim=256)
    assert other_than_xavier(layer, weights) == []
    zero = {"points.offsets.weight", "mixing.generator.weight", "box_branch.3.weight"}
    ours = {name for name, _ in layer.named_parameters() if name.endswith("weight")}
    assert ours == weights.keys() | zero | norm_weights(layer)
    assert all(not layer.get_parameter(name).any() for name in zero)


# Construction


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"num_groups": 3}, "16 is not a multiple of the 3 groups"),
        ({"num_heads": 5}, "16 is not a multiple of the 5 heads"),
        ({"dim": 12, "num_heads": 4}, "12 is not a multiple of the 8 sine"),
    ],
)
def test_dimensions_must_divide(changed, message):
    with pytest.raises(ValueError, match=message):
        make_adamixer(**changed)


def test_the_config_gives_g_and_f_points_of_their_own(small_cfg):
    cfg = small_cfg("MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT", 9, "MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE", 5)
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]
    for initialization, points in ((True, 9), (False, 5)):
        layer = build_refinement_layer(cfg, shapes, initialization=initialization)
        assert layer.strides == [8, 16]
        assert layer.points.offsets.weight.shape == (2 * points * 3, 32)  # G P 3, C
        assert layer.mixing.generator.weight.shape == (2 * (16 * 16 + 8 * points), 32)
        assert layer.mixing.out.weight.shape == (32, 8 * 32)
        assert layer.feedforward[0].weight.shape == (64, 32)
        assert layer.attention.iof_scale.shape == (4,)
        assert layer.class_branch[3].weight.shape == (3, 32)
