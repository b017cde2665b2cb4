"""Properties of every refinement layer, whatever it computes."""

import pytest
import torch
from torch import Tensor

from detectron2.layers import ShapeSpec

from deqdet.layers import REFINEMENT_LAYER_REGISTRY, RefinementLayer, build_refinement_layer
from deqdet.structures import QueryState

from helpers.small_layers import CASES, LayerCase

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=list(CASES))
def case(request) -> LayerCase:
    return CASES[request.param]


@pytest.fixture
def layer(case, stir) -> RefinementLayer:
    layer = case.make()
    stir(layer, size=0.3)
    return layer


def test_there_is_a_case_of_every_layer():
    assert {name for name, _ in REFINEMENT_LAYER_REGISTRY} == set(CASES)


@torch.no_grad()
def test_the_order_of_queries_does_not_matter(case, layer):
    features, state = case.features(), case.state()
    order = torch.tensor([2, 0, 3, 1])
    straight = layer(state, features)
    permuted = layer(QueryState(state.position[:, order], state.content[:, order]), features)
    torch.testing.assert_close(permuted.content, straight.content[:, order], rtol=0, atol=1e-11)
    torch.testing.assert_close(permuted.position, straight.position[:, order], rtol=0, atol=1e-11)
    assert not straight.content.isclose(straight.content[:, order]).any()


@torch.no_grad()
def test_queries_see_each_other_but_images_do_not(case, layer):
    features, state = case.features(), case.state()
    before = layer(state, features).content
    content = state.content.clone()
    content[0, 1] += 1
    changed = layer(QueryState(state.position, content), features).content.ne(before).any(dim=2)
    assert changed.tolist() == [[True] * 4, [False] * 4]


@torch.no_grad()
def test_segments_read_the_features_of_their_image(case, layer):
    """Rows are ordered state by state: with 3 states of 2 images, rows 0, 2 and 4 are those of the first image."""
    features, state = case.features(images=2), case.state(rows=6)
    together = layer(state, features)
    for image in range(2):
        rows = [image, image + 2, image + 4]
        for row in rows:
            own = [level[image : image + 1] for level in features]
            alone = layer(QueryState(state.position[row : row + 1], state.content[row : row + 1]), own)
            torch.testing.assert_close(together.content[row], alone.content[0], rtol=0, atol=1e-11)
            torch.testing.assert_close(together.position[row], alone.position[0], rtol=0, atol=1e-11)
        changed = [level.clone() for level in features]
        for level in changed:
            level[image] += torch.linspace(-1, 1, level[image].numel()).view_as(level[image])
        moved = layer(state, changed).content.ne(together.content).any(dim=(1, 2))
        assert moved.nonzero().flatten().tolist() == rows


def test_content_has_no_gradient_to_the_position(case, layer):
    features, state = case.features(), case.state()
    position = state.position.requires_grad_()
    content = layer(QueryState(position, state.content), features).content
    assert content.requires_grad
    assert torch.autograd.grad(content.square().sum(), position, allow_unused=True) == (None,)


def test_gradients_by_finite_differences(case, layer):
    """The gradient passes through the content and the features; the positions are constant."""
    features, state = case.features(1), case.state(rows=1, queries=2)

    def function(content: Tensor, *levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refined = layer(QueryState(state.position, content), list(levels))
        return refined.content, refined.position, layer.predict(refined).logits

    inputs = [x.requires_grad_() for x in (state.content, *features)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_every_parameter_has_a_gradient(case, layer):
    refined = layer(case.state(), case.features())
    prediction = layer.predict(refined)
    (prediction.logits.square().sum() + prediction.boxes.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_the_first_scores_are_the_prior(case):
    bias = case.make().class_branch[-1].bias
    assert bias.sigmoid().tolist() == pytest.approx([0.01] * 3, rel=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_the_config_names_the_layer(small_cfg, name):
    shapes = [ShapeSpec(channels=32, stride=stride) for stride in (8, 16)]
    cfg = small_cfg("MODEL.DEQDET.REFINEMENT_LAYER", name)
    for initialization in (True, False):
        assert type(build_refinement_layer(cfg, shapes, initialization=initialization)).__name__ == name


def test_an_unknown_layer_is_an_error(small_cfg):
    cfg = small_cfg("MODEL.DEQDET.REFINEMENT_LAYER", "NoSuchLayer")
    with pytest.raises(ValueError, match="NoSuchLayer.*AdaMixerLayer, SparseRCNNLayer"):
        build_refinement_layer(cfg, [], initialization=True)
