import math

import pytest
import torch

from detectron2.config import get_cfg

from deqdet.boxes import decode_boxes
from deqdet.config import add_deqdet_config
from deqdet.queries import InitialQueries

SIZES = torch.tensor([[640.0, 480.0], [333.0, 500.0]])  # width, height


def queries(*, norm_content=True, learn_boxes=False, num_queries=6, hidden_dim=32):
    torch.manual_seed(0)
    return InitialQueries(
        num_queries=num_queries, hidden_dim=hidden_dim, norm_content=norm_content, learn_boxes=learn_boxes
    )


@pytest.mark.parametrize("learn_boxes", [False, True])
def test_boxes_start_as_the_whole_image(learn_boxes):
    state = queries(learn_boxes=learn_boxes)(SIZES)
    assert state.position.shape == (2, 6, 4)
    expected = torch.tensor([[[0.0, 0.0, 640.0, 480.0]] * 6, [[0.0, 0.0, 333.0, 500.0]] * 6])
    torch.testing.assert_close(decode_boxes(state.position), expected, rtol=0, atol=1e-3)


def test_position_by_hand():
    # 64 x 16: centre (32, 8), z = log2 32 = 5, r = log2(16 / 64) = -2.
    position = queries(num_queries=1)(torch.tensor([[64.0, 16.0]])).position
    torch.testing.assert_close(position, torch.tensor([[[32.0, 8.0, 5.0, -2.0]]]), rtol=0, atol=1e-5)


def test_normed_content_has_no_mean_and_unit_variance():
    content = queries()(SIZES).content
    assert content.shape == (2, 6, 32) and torch.equal(content[0], content[1])
    torch.testing.assert_close(content.mean(dim=2), torch.zeros(2, 6), rtol=0, atol=1e-6)
    torch.testing.assert_close(content.var(dim=2, correction=0), torch.ones(2, 6), rtol=0, atol=1e-4)
    assert (content[0, 0] != content[0, 1]).all()


def test_content_without_norm_is_the_embedding():
    module = queries(norm_content=False, num_queries=300, hidden_dim=256)
    content = module(SIZES).content
    assert torch.equal(content[0], module.content.weight) and torch.equal(content[1], module.content.weight)
    # N(0, 1): 76,800 numbers, standard error 0.0036; the mean of one query strays by 1/16.
    assert content[0].mean().item() == pytest.approx(0.0, abs=0.015)
    assert content[0].std().item() == pytest.approx(1.0, abs=0.015)
    assert content[0].mean(dim=1).std().item() == pytest.approx(1 / math.sqrt(256), abs=0.015)


def test_fixed_boxes_are_no_parameters():
    module = queries()
    # The norm has no affine part either.
    assert [name for name, _ in module.named_parameters()] == ["content.weight"]
    assert module.state_dict()["boxes"].tolist() == [[0.5, 0.5, 1.0, 1.0]] * 6
    assert not module(SIZES).position.requires_grad


def test_learned_boxes_get_gradients():
    module = queries(learn_boxes=True)
    assert {name for name, _ in module.named_parameters()} == {"content.weight", "boxes"}
    decode_boxes(module(SIZES).position)[0].sum().backward()
    # x1 + x2 = 2 cx w, y1 + y2 = 2 cy h: the sizes cancel.
    expected = torch.tensor([[1280.0, 960.0, 0.0, 0.0]] * 6)
    torch.testing.assert_close(module.boxes.grad, expected, rtol=0, atol=1e-2)
    module.boxes.grad = None
    module(SIZES[:1]).position[..., 2:].sum().backward()
    # z + r = log2 w / 2 + log2 h / 2 + log2 h - log2 w: -1 / (2 ln 2) and 3 / (2 ln 2) at (1, 1).
    sizes = module.boxes.grad[:, 2:]
    torch.testing.assert_close(sizes, torch.tensor([[-0.5, 1.5]] * 6) / math.log(2), rtol=0, atol=1e-4)


def test_learned_boxes_are_relative_to_each_image():
    module = queries(learn_boxes=True, num_queries=2)
    moved = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.25, 0.5]])
    module.load_state_dict({**module.state_dict(), "boxes": moved})
    boxes = decode_boxes(module(torch.tensor([[400.0, 200.0], [80.0, 160.0]])).position)
    expected = [
        [[0.0, 0.0, 200.0, 200.0], [250.0, 50.0, 350.0, 150.0]],
        [[0.0, 0.0, 40.0, 160.0], [50.0, 40.0, 70.0, 120.0]],
    ]
    torch.testing.assert_close(boxes, torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("learn_boxes, norm_content", [(False, True), (True, False)])
def test_config(learn_boxes, norm_content):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.MODEL.DEQDET.NUM_QUERIES, cfg.MODEL.DEQDET.HIDDEN_DIM = 3, 8
    cfg.MODEL.DEQDET.QUERIES.LEARN_BOXES = learn_boxes
    cfg.MODEL.DEQDET.QUERIES.NORM_CONTENT = norm_content
    module = InitialQueries(cfg)
    state = module(SIZES)
    assert state.content.shape == (2, 3, 8)
    assert ("boxes" in dict(module.named_parameters())) == learn_boxes
    assert torch.equal(state.content[0], module.content.weight) == (not norm_content)
