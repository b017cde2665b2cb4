"""The fast step, which gathers from a table of all levels, against the simple one, which reads level by level."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from deqdet.boxes import decode_boxes, encode_boxes
from deqdet.decoders import prepare_features
from deqdet.layers import table as tables
from deqdet.layers.regions import pool_regions
from deqdet.layers.sampling import sample_pyramid, sample_table
from deqdet.layers.table import build_table
from deqdet.structures import QueryState, count_images, select_images

from helpers.small_layers import ADAMIXER, CASES, SPARSE_RCNN, STRIDES, make_sparse_rcnn


def draw_levels(strides: list[int], images: int = 2, height: int = 64, width: int = 96, dim: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [(-(-height // s), -(-width // s)) for s in strides]
    return [torch.randn(images, dim, *size, generator=generator).requires_grad_() for size in sizes]


def draw_points(rows: int, reach: float, groups: int = 3) -> Tensor:
    """(rows, 5, G, 7, 3), some of them `reach` pixels beyond an image of 64 x 96."""
    generator = torch.Generator().manual_seed(4)
    low = torch.tensor([-reach, -reach, -3.0])
    size = torch.tensor([96.0 + 2 * reach, 64.0 + 2 * reach, 12.0])
    return (torch.rand(rows, 5, groups, 7, 3, generator=generator) * size + low).requires_grad_()


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [8, 16], [4], [3, 7, 20], [64, 128]])  # 128: levels of one cell
@pytest.mark.parametrize("rows, reach", [(2, 0.0), (6, 60.0), (2, 1e6)])
def test_samples_and_their_gradients(strides, rows, reach):
    features, points = draw_levels(strides), draw_points(rows, reach)
    simple = sample_pyramid(features, strides, points)
    fast = sample_table(build_table(features, strides, torch.float32, groups=3), points)
    torch.testing.assert_close(fast, simple, rtol=1e-4, atol=1e-4)
    weights = torch.randn(simple.shape, generator=torch.Generator().manual_seed(5))
    for one, other in zip(*(torch.autograd.grad((x * weights).sum(), [*features, points]) for x in (fast, simple)),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert simple.abs().max() > 0.1 or reach > 1e5


def test_the_gradients_by_finite_differences():
    features = [x.detach().double()[..., :3, :4].requires_grad_() for x in draw_levels([8, 16], dim=2)]
    # Away from the lines through the centres of either level's cells, where the derivative jumps.
    points = torch.tensor([[7.0, 9.0, 2.3], [17.0, 13.5, 3.1], [25.0, 3.0, 4.0], [1.0, 1.0, 2.0]]).double()
    points = points.view(4, 1, 1, 1, 3).requires_grad_()

    def sample(first: Tensor, second: Tensor, where: Tensor) -> Tensor:
        return sample_table(build_table([first, second], [8, 16], torch.float64), where)

    assert torch.autograd.gradcheck(sample, [*features, points])


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_a_point_that_is_not_finite_leaves_the_others_alone(value):
    features, points = draw_levels([8, 16]), draw_points(2, 5.0).detach()
    table = build_table(features, [8, 16], torch.float32, groups=3)
    before = sample_table(table, points)
    points[1, 2, 0, 3, :2] = value
    after = sample_table(table, points)
    same = torch.ones(after.shape[:4], dtype=torch.bool)
    same[1, 2, 0, 3] = False
    assert torch.equal(after[same], before[same])


@torch.no_grad()
@pytest.mark.parametrize("ratio, side", [(1, 3), (2, 7), (3, 4)])
@pytest.mark.parametrize("dtype, within", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_regions_are_those_of_roi_pooler(ratio, side, dtype, within):
    """Three states of two images; boxes of every level, inside and outside the image, empty ones and huge ones.

    In float32 a coordinate of 500 pixels is rounded by 3e-5, and a sample by as much times the slope of the features.
    """
    layer = make_sparse_rcnn(pooler_resolution=side, pooler_sampling_ratio=ratio)
    features = [x.to(dtype) for x in SPARSE_RCNN.features()]
    boxes = decode_boxes(SPARSE_RCNN.state(rows=6, queries=40).position).to(dtype)  # ROIPooler's are float32 always
    boxes[0, 0], boxes[1, 1], boxes[2, 2] = boxes[0, 0, :2].repeat(2), torch.tensor([-1e6, -1e6, 1e6, 1e6]), 1e6
    boxes[3, 3] = torch.tensor([100.0, 60.0, 100.0 + 224.0, 60.0 + 224.0])  # on the border of two levels
    fast = pool_regions(build_table(features, STRIDES, dtype), boxes, side, ratio)
    torch.testing.assert_close(fast, layer._pool(features, boxes), rtol=0, atol=within)
    assert fast.abs().max() > 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [2, 6])
def test_layers_and_their_gradients(name, rows, stir):
    case = CASES[name]
    layer = case.make()
    stir(layer, size=0.3)
    features, found = [x.requires_grad_() for x in case.features()], []
    for prepared in (layer.prepare(features), features):
        state = case.state(rows=rows)
        inputs = [state.content.requires_grad_(), *features, *layer.parameters()]
        after = layer(state, prepared)
        loss = (after.content.sin().sum() + (after.position / 10).sin().sum()) / rows
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        found.append((after.content, after.position, [x for x in grads if x is not None]))
    (content, position, grads), (simple_content, simple_position, simple_grads) = found
    torch.testing.assert_close(content, simple_content, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(position, simple_position, rtol=1e-4, atol=1e-3)
    assert len(grads) == len(simple_grads) > len(features)
    for one, other in zip(grads, simple_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * (1 + other.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_some_of_the_images(name):
    """As when images have converged and leave the batch, twice in a row."""
    case = CASES[name]
    layer, features, state = case.make(), case.features(images=3), case.state(rows=3)
    whole = layer(state, layer.prepare(features))
    some = select_images(select_images(layer.prepare(features), torch.tensor([2, 0])), torch.tensor([1]))
    assert count_images(some) == 1 and torch.equal(some[1], features[1][:1])
    one = layer(QueryState(state.position[:1], state.content[:1]), some)
    torch.testing.assert_close(one.content[0], whole.content[0], rtol=0, atol=1e-5)


def test_a_table_is_shared_and_stays_a_pyramid():
    layers, features = [ADAMIXER.make(), ADAMIXER.make()], ADAMIXER.features()
    once, twice = prepare_features(layers[:1], features), prepare_features([None, *layers], features)
    assert prepare_features(layers, once) is once
    assert [x.data_ptr() for x in twice] == [x.data_ptr() for x in features] and len(twice[:2]) == 2
    with pytest.raises(ValueError, match="3 levels of a pyramid need as many strides, got 2"):
        build_table(features, [4, 8], torch.float32)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_table_is_in_autocasts_precision_but_sparse_rcnns_not_with_a_gradient(gradient):
    """Then the gradient of Sparse R-CNN's features comes through the table, and is summed in its precision."""
    features = [x.bfloat16() for x in ADAMIXER.features()]
    with torch.set_grad_enabled(gradient):
        found = [case.make().prepare(features).rows.dtype for case in (ADAMIXER, SPARSE_RCNN)]
        with torch.autocast("cpu", dtype=torch.float16):
            found += [case.make().prepare(features).rows.dtype for case in (ADAMIXER, SPARSE_RCNN)]
    assert found == [torch.float32, torch.float32, torch.float16, torch.float32 if gradient else torch.float16]


def test_a_step_with_a_gradient_reads_the_levels(stir):
    """AdaMixer's: its gradients reach the features, and its result is that of the step without a gradient."""
    layer, features, state = ADAMIXER.make(), [x.requires_grad_() for x in ADAMIXER.features()], ADAMIXER.state()
    stir(layer, size=0.3)
    prepared = layer.prepare(features)
    assert not prepared.rows.requires_grad
    after = layer(state, prepared)
    assert all(x.any() for x in torch.autograd.grad(after.content.sin().sum(), features))
    with torch.no_grad():
        torch.testing.assert_close(layer(state, prepared).content, after.content, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_boxes_in_half_precision_keep_their_coordinates():
    """At 1,500 pixels half precision would be off by one, which is 1/4 at stride 4; 1e6 would be infinite."""
    layer = make_sparse_rcnn()
    levels = [torch.zeros(1, 16, 2, 2048 // s) + torch.arange(2048 / s) - 1500 / s for s in STRIDES]
    boxes = torch.tensor([[[1501.0, 0.0, 1511.0, 8.0], [-1e30, 0.0, 1e30, 8.0]]])
    state = QueryState(encode_boxes(boxes), torch.zeros(1, 2, 16))
    exact = layer._pool(layer.prepare(levels), decode_boxes(state.position))
    with torch.autocast("cpu", dtype=torch.float16):
        for features in (levels, layer.prepare([x.half() for x in levels])):
            found = layer._pool(features, decode_boxes(state.position)).float()
            torch.testing.assert_close(found, exact, rtol=1e-3, atol=5e-3)


def test_traced_code_builds_a_table_without_trying_the_kernels(monkeypatch):
    """As AdaMixer does in a compiled, deterministic training on a GPU."""

    def try_kernels(device: torch.device) -> bool:
        raise AssertionError("the kernels were tried in traced code")

    monkeypatch.setattr(tables, "_kernels_work", try_kernels)

    def build(level: Tensor) -> Tensor:
        return build_table([level], [8], torch.float32, groups=4).rows

    with FakeTensorMode():
        rows = torch.compile(build, backend="aot_eager", fullgraph=True)(torch.zeros(1, 16, 8, 8, device="cuda:0"))
    assert rows.shape == (1, 4, 12 * 12, 4)
