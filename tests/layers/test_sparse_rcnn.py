"""The whole layer against loops that follow docs/design.md, "Refinement layers", and share no code with the layer."""

import math

import pytest
import torch
from torch import Tensor

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec

from deqdet import add_deqdet_config
from deqdet.layers import SparseRCNNLayer, build_refinement_layer
from deqdet.layers.sparse_rcnn import ATTENTIONS
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
)
from helpers.small_layers import (
    CLASSES,
    DIM,
    DYNAMIC_DIM,
    SIDE,
    SPARSE_RCNN,
    STRIDES,
    make_sparse_rcnn,
    norm_weights,
    other_than_xavier,
)


def stirred_layer(stir, **changed) -> SparseRCNNLayer:
    layer = make_sparse_rcnn(**changed)
    stir(layer, size=0.3)
    return layer


# The slow layer, which computes for one image, query, cell and sample after the other.


def slow_level(box: list[float]) -> int:
    """Return the index of the level: 224 x 224 is level 4, of stride 16; a quarter of this area is one level finer."""
    size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    finest, coarsest = int(math.log2(STRIDES[0])), int(math.log2(STRIDES[-1]))
    return min(max(math.floor(4 + math.log2(size / 224 + 1e-8)), finest), coarsest) - finest


def slow_value(level: Tensor, x: float, y: float) -> Tensor:
    """Interpolate a level (C, H, W) at x, y in cells from the first centre; up to a cell outside it is constant."""
    height, width = level.shape[1:]
    if not (-1 <= x <= width and -1 <= y <= height):
        return torch.zeros(len(level))
    x, y = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    value = torch.zeros(len(level))
    for i in {math.floor(y), math.ceil(y)}:
        for j in {math.floor(x), math.ceil(x)}:
            value = value + (1 - abs(y - i)) * (1 - abs(x - j)) * level[:, i, j]
    return value


def slow_regions(position: list[float], levels: list[Tensor]) -> Tensor:
    """Pool one box (step 1): (M, C), cells row by row, each the mean of 2 x 2 samples. Boxes are float32."""
    box = torch.tensor(slow_box(position), dtype=torch.float32).tolist()
    index, cells = slow_level(box), []
    left, top, right, bottom = (side / STRIDES[index] - 0.5 for side in box)
    for row in range(SIDE):
        for column in range(SIDE):
            samples = []
            for down in (0.25, 0.75):
                for across in (0.25, 0.75):
                    x = left + (column + across) / SIDE * (right - left)
                    y = top + (row + down) / SIDE * (bottom - top)
                    samples.append(slow_value(levels[index], x, y))
            cells.append(sum(samples) / 4)
    return torch.stack(cells)


def slow_dynamic_conv(layer: SparseRCNNLayer, q1: Tensor, region: Tensor) -> Tensor:
    module = layer.dynamic_conv
    generated, size = slow_linear(module.generator, q1), DIM * DYNAMIC_DIM
    first, second = generated[:size].view(DIM, DYNAMIC_DIM), generated[size:].view(DYNAMIC_DIM, DIM)
    cells = []
    for cell in region:
        hidden = slow_norm(module.hidden_norm, cell @ first).clamp(min=0)
        cells.append(slow_norm(module.channel_norm, hidden @ second).clamp(min=0))
    return slow_norm(module.out_norm, slow_linear(module.out, torch.cat(cells))).clamp(min=0)


def slow_refine(position: list[float], deltas: list[float]) -> list[float]:
    (cx, cy, z, r), (dx, dy, dw, dh) = position, deltas
    width, height = 2**z / math.sqrt(2**r), 2**z * math.sqrt(2**r)
    cx, cy = cx + width * dx / 2, cy + height * dy / 2
    width *= math.exp(min(dw, math.log(100000 / 16)))
    height *= math.exp(min(dh, math.log(100000 / 16)))
    return [cx, cy, math.log2(math.sqrt(width * height)), math.log2(height / width)]


def slow_attend(layer: SparseRCNNLayer, content: Tensor, positions: list[list[float]]) -> list[Tensor]:
    """Compute q1 of each query of one image (step 2), from contents (N, C) and N positions."""
    embed, overlap = ATTENTIONS[layer.kind]
    boxes = [slow_box(position) for position in positions]
    u = [q + slow_embedding(p, DIM) if embed else q for q, p in zip(content, positions, strict=True)]

    def bias(head: int, i: int, j: int) -> Tensor | float:
        return layer.attention.iof_scale[head] * math.log(slow_iof(boxes[i], boxes[j]) + 1e-7) if overlap else 0.0

    module = layer.attention if layer.kind == "plain" else layer.attention.attention
    attended = slow_attention(module, u, bias)
    return [slow_norm(layer.attention_norm, x + y) for x, y in zip(u, attended, strict=True)]


def slow_layer(layer: SparseRCNNLayer, state: QueryState, features: list[Tensor]) -> QueryState:
    all_positions, all_contents = [], []
    for row, (content, positions) in enumerate(zip(state.content, state.position.tolist(), strict=True)):
        levels = [level[row % len(level)] for level in features]
        for q1, position in zip(slow_attend(layer, content, positions), positions, strict=True):
            filtered = slow_dynamic_conv(layer, q1, slow_regions(position, levels))
            q2 = slow_norm(layer.dynamic_conv_norm, q1 + filtered)
            q3 = slow_norm(layer.feedforward_norm, q2 + slow_feedforward(layer.feedforward, q2))
            all_positions.append(slow_refine(position, slow_branch(layer.box_branch, q3).tolist()))
            all_contents.append(q3)
    return QueryState(
        torch.tensor(all_positions).view_as(state.position), torch.stack(all_contents).view_as(state.content)
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_against_loops(float64, stir, attention):
    """Return a state of four rows, two of each of two images, with boxes of every level and some beyond the edge."""
    layer, features, state = stirred_layer(stir, attention=attention), SPARSE_RCNN.features(), SPARSE_RCNN.state(rows=4)
    layer.kind = attention
    boxes = [slow_box(position) for position in state.position.flatten(0, 1).tolist()]
    assert {slow_level(box) for box in boxes} == {0, 1, 2}
    fast, slow = layer(state, features), slow_layer(layer, state, features)
    torch.testing.assert_close(fast.content, slow.content, rtol=0, atol=1e-9)
    torch.testing.assert_close(fast.position, slow.position, rtol=0, atol=1e-7)
    # Every position has moved, and far enough to be worth comparing.
    assert (fast.position - state.position).abs().min() > 1e-3

    prediction = layer.predict(fast)
    for row in range(4):
        for query in range(4):
            logits = slow_branch(layer.class_branch, slow.content[row, query])
            torch.testing.assert_close(prediction.logits[row, query], logits, rtol=0, atol=1e-9)
            box = slow_box(slow.position[row, query].tolist())
            assert prediction.boxes[row, query].tolist() == pytest.approx(box, rel=1e-7, abs=1e-6)


def test_jacobian_of_the_refined_position(float64, stir):
    """It is that of cx + d_x w / 2, cy + d_y h / 2, w = 2^(z - r / 2), h = 2^(z + r / 2); z, r move by the deltas."""
    layer, features, state = stirred_layer(stir), SPARSE_RCNN.features(1), SPARSE_RCNN.state(rows=1, queries=2)

    def refined(position: Tensor) -> Tensor:
        return layer(QueryState(position, state.content), features).position

    jacobian = torch.autograd.functional.jacobian(refined, state.position)  # (1, N, 4, 1, N, 4)
    expected = torch.zeros(1, 2, 4, 1, 2, 4)
    with torch.no_grad():
        moved = refined(state.position) - state.position
    for query in range(2):
        expected[0, query, :, 0, query] = torch.eye(4)
        for axis, sign in ((0, -1), (1, 1)):
            expected[0, query, axis, 0, query, 2] = math.log(2) * moved[0, query, axis]
            expected[0, query, axis, 0, query, 3] = sign * math.log(2) / 2 * moved[0, query, axis]
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-11)


# Initialisation


def test_every_matrix_starts_as_xavier_uniform():
    weights = {
        "attention.in_proj_weight": (64, 192),
        "attention.out_proj.weight": (64, 64),
        "dynamic_conv.generator.weight": (64, 2 * 64 * DYNAMIC_DIM),
        "dynamic_conv.out.weight": (64 * SIDE**2, 64),
        "feedforward.0.weight": (64, 256),
        "feedforward.2.weight": (256, 64),
        "class_branch.0.weight": (64, 64),
        "class_branch.3.weight": (64, CLASSES),
        "box_branch.0.weight": (64, 64),
        "box_branch.3.weight": (64, 64),
        "box_branch.6.weight": (64, 64),
        "box_branch.9.weight": (64, 4),
    }
    layer = make_sparse_rcnn(dim=64, num_heads=8, feedforward_dim=256)
    assert other_than_xavier(layer, weights) == []
    ours = {name for name, _ in layer.named_parameters() if name.endswith("weight")}
    assert ours == weights.keys() | norm_weights(layer)


# Construction


def test_the_towers_have_as_many_layers_as_asked_for():
    layer = make_sparse_rcnn(num_class_layers=2, num_box_layers=0)
    towers = [name for name, _ in layer.named_parameters() if name.startswith(("class_branch", "box_branch"))]
    # Linear layers without bias, then a norm; the last has a bias.
    hidden = [f"class_branch.{i}" for i in ("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias")]
    last = [f"{name}.{kind}" for name in ("class_branch.6", "box_branch.0") for kind in ("weight", "bias")]
    assert towers == hidden + last


def test_dimensions_must_divide():
    with pytest.raises(ValueError, match="16 is not a multiple of the 5 heads"):
        make_sparse_rcnn(num_heads=5)
    with pytest.raises(ValueError, match="12 is not a multiple of the 8 sine embedding's features"):
        make_sparse_rcnn(dim=12, attention="embedding")
    with pytest.raises(ValueError, match="SPARSE_RCNN.ATTENTION is 'sine': it must be one of plain, embedding"):
        make_sparse_rcnn(attention="sine")


@torch.no_grad()
def test_zero_deltas_leave_the_boxes(float64):
    """Without the option, the random start moves every box. No other weight is changed by it."""
    features, state = SPARSE_RCNN.features(), SPARSE_RCNN.state(rows=2)
    free, zero = make_sparse_rcnn(), make_sparse_rcnn(zero_init_deltas=True)
    moved = (free(state, features).position - state.position).abs().amax(2)
    assert moved.min() > 1e-3
    refined = zero(state, features)
    torch.testing.assert_close(refined.position, state.position, rtol=0, atol=1e-12)
    assert (refined.content - state.content).abs().amax(2).min() > 1e-3
    last = ("box_branch.9.weight", "box_branch.9.bias")
    for (name, one), other in zip(free.named_parameters(), zero.parameters(), strict=True):
        assert (not other.any() and one.any()) if name in last else torch.equal(one, other), name


def test_parameters_of_each_attention():
    """The overlap bias has a number for each head, the embedding none; the plain one keeps the names of old weights."""
    names = {kind: set(dict(make_sparse_rcnn(attention=kind).named_parameters())) for kind in ATTENTIONS}
    assert "attention.in_proj_weight" in names["plain"] and "attention.attention.in_proj_weight" in names["embedding"]
    assert names["positional"] - names["embedding"] == {"attention.iof_scale"}
    assert names["overlap"] == names["positional"]


def test_the_config_reaches_the_layer(small_cfg):
    """An initialization layer is built like a refinement layer."""
    key = "MODEL.DEQDET.SPARSE_RCNN"
    overrides = {
        "MODEL.DEQDET.REFINEMENT_LAYER": "SparseRCNNLayer",
        f"{key}.POOLER_RESOLUTION": 5,
        f"{key}.POOLER_SAMPLING_RATIO": 3,
        f"{key}.DYNAMIC_DIM": 11,
        f"{key}.NUM_CLASS_LAYERS": 2,
        f"{key}.NUM_BOX_LAYERS": 4,
        f"{key}.NUM_HEADS": 16,
        f"{key}.FEEDFORWARD_DIM": 48,
        f"{key}.ATTENTION": "overlap",
        f"{key}.ZERO_INIT_DELTAS": True,
    }
    shapes = [ShapeSpec(channels=32, stride=8), ShapeSpec(channels=32, stride=16)]
    for initialization in (True, False):
        cfg = small_cfg(*[x for pair in overrides.items() for x in pair])
        layer = build_refinement_layer(cfg, shapes, initialization=initialization)
        poolers = [(x.output_size, x.spatial_scale, x.sampling_ratio, x.aligned) for x in layer.pooler.level_poolers]
        assert poolers == [((5, 5), 1 / 8, 3, True), ((5, 5), 1 / 16, 3, True)]
        assert layer.dynamic_conv.generator.weight.shape == (2 * 32 * 11, 32)
        assert layer.dynamic_conv.out.weight.shape == (32, 25 * 32)
        assert layer.attention.attention.num_heads == 16 and len(layer.attention.iof_scale) == 16
        assert not layer.attention.embed
        assert not layer.box_branch[-1].weight.any() and layer.box_branch[-4].weight.any()
        assert layer.feedforward[0].weight.shape == (48, 32)
        assert len(layer.class_branch) == 2 * 3 + 1 and layer.class_branch[-1].weight.shape == (3, 32)
        assert len(layer.box_branch) == 4 * 3 + 1 and layer.box_branch[-1].weight.shape == (4, 32)


def test_parameters_of_the_papers_layer():
    """With the default keys: C = 256, 64 dynamic channels, 49 cells, hidden 2048, 80 classes."""
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.MODEL.DEQDET.REFINEMENT_LAYER = "SparseRCNNLayer"
    with torch.device("meta"):
        shapes = [ShapeSpec(channels=256, stride=stride) for stride in (4, 8, 16, 32)]
        layer = build_refinement_layer(cfg, shapes, initialization=False)
    parts = {
        "attention": 4 * 256 * 256 + 4 * 256,
        "attention_norm": 2 * 256,
        "dynamic_conv": 257 * 2 * 256 * 64 + 2 * 64 + 2 * 256 + (49 * 256 + 1) * 256 + 2 * 256,
        "dynamic_conv_norm": 2 * 256,
        "feedforward": 257 * 2048 + 2049 * 256,
        "feedforward_norm": 2 * 256,
        "class_branch": 256 * 256 + 2 * 256 + 257 * 80,
        "box_branch": 3 * (256 * 256 + 2 * 256) + 257 * 4,
    }
    counted = dict.fromkeys(parts, 0)
    for name, parameter in layer.named_parameters():
        counted[name.split(".")[0]] += parameter.numel()
    assert counted == parts
