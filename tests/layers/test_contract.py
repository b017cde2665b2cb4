"""What a layer's author may rely on: a layer that knows nothing of several states for each image works."""

import math

import pytest
import torch
from torch import Tensor, nn

from deqdet.layers import RefinementLayer
from deqdet.structures import Prediction, QueryState

from helpers.small_decoders import make_problem
from helpers.small_layers import ADAMIXER, CASES, make_sparse_rcnn


class PlainLayer(RefinementLayer):
    """Adds to each query the mean of its own image's features; fails on rows that are no images."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.classify, self.move = nn.Linear(dim, dim), nn.Linear(dim, 3), nn.Linear(dim, 4)

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        assert len(state.content) == len(features[0])
        content = self.linear(state.content) + features[0].mean(dim=(2, 3))[:, None]
        return QueryState(state.position + self.move(content), content)

    def predict(self, state: QueryState) -> Prediction:
        return Prediction(self.classify(state.content), state.position)


def test_segments_of_a_layer_that_does_not_know_them():
    torch.manual_seed(0)
    layer = PlainLayer(4)
    features = [torch.randn(2, 4, 3, 3)]
    states = QueryState(torch.randn(6, 5, 4), torch.randn(6, 5, 4))
    together = layer.refine_segments(states, features)
    for row in range(6):
        image = row % 2  # rows 0, 2, 4 are the first image's three states
        one = QueryState(states.position[row : row + 1], states.content[row : row + 1])
        alone = layer(one, [features[0][image : image + 1]])
        torch.testing.assert_close(together.content[row], alone.content[0])
        torch.testing.assert_close(together.position[row], alone.position[0])


def test_it_trains_in_an_equilibrium(small_decoder):
    """Its gradients, with all points of Omega in one batch, are those of one point after the other."""
    decoder = small_decoder()
    decoder.initialization, decoder.refinement = PlainLayer(32).double(), PlainLayer(32).double()
    problem, gradients = make_problem(), []
    for checkpointed in (False, True):
        decoder.checkpoint_segments = checkpointed
        predictions = decoder.supervise(*problem)
        assert [x.logits.shape for x in predictions.values()] == [(2, 6, 3)] * len(predictions)
        sum(x.logits.square().sum() + x.boxes.square().sum() for x in predictions.values()).backward()
        gradients.append([p.grad.clone() for p in decoder.parameters() if p.grad is not None])
        decoder.zero_grad()
    assert len(gradients[0]) > 4
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


class DroppingLayer(PlainLayer):
    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        refined = super().forward(state, features)
        return QueryState(refined.position, nn.functional.dropout(refined.content, 0.5))


def test_recomputed_segments_drop_the_same_numbers_again(small_decoder):
    key = "MODEL.DEQDET.EQUILIBRIUM"
    decoder = small_decoder(f"{key}.TRAIN_STEPS", 1, f"{key}.SUPERVISION_COUNT", 0)
    decoder.initialization, decoder.refinement = PlainLayer(32).double(), DroppingLayer(32).double()
    problem, gradients = make_problem(), []
    for checkpointed in (False, True):
        decoder.checkpoint_segments = checkpointed
        torch.manual_seed(0)
        loss = sum(x.logits.square().sum() for x in decoder.supervise(*problem).values())
        gradients.append(torch.autograd.grad(loss, list(decoder.refinement.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_our_layers_take_all_segments_in_one_call():
    layer, calls = ADAMIXER.make(), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.refine_segments(ADAMIXER.state(rows=6), ADAMIXER.features(images=2))
    assert calls == [1]


@torch.no_grad()
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("part", ["position", "z", "content"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_our_layers_bear_nonfinite_numbers(case, value, part, prepared):
    """They raise nothing, and the other image's queries come out as ever."""
    layer, features, state = case.make(), case.features(), case.state()
    assert layer.accepts_nonfinite
    if prepared:
        features = layer.prepare(features)
    expected = layer(state, features)
    {"position": state.position[0], "z": state.position[0, :, 2], "content": state.content[0]}[part].fill_(value)
    found = layer(state, features)
    assert torch.equal(found.position[1], expected.position[1]) and torch.equal(found.content[1], expected.content[1])
    assert not found.content[0].isfinite().all() or not found.position[0].isfinite().all()


def test_adaptive_sampling_does_not_bear_them():
    """RoIAlign would need as many points as an infinite box has pixels."""
    assert not make_sparse_rcnn(pooler_sampling_ratio=0).accepts_nonfinite
