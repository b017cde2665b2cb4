"""What is read off a trajectory, against the layers called by hand."""

import pytest
import torch

from deqdet.equilibrium import Anderson, relative_residual
from deqdet.errors import UserError
from deqdet.structures import QueryState

from helpers.small_decoders import make_problem

QUERIES = 6


def by_hand(decoder, initial, features, steps):
    """y_0, f(y_0), f(f(y_0)), ..."""
    states = [decoder.initialization(initial, features)]
    for _ in range(steps):
        states.append(decoder.refinement(states[-1].detach_position(), features))
    return states


def assert_equal(found: QueryState, expected: QueryState) -> None:
    torch.testing.assert_close(found.content, expected.content, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.position, expected.position, rtol=0, atol=1e-9)


@torch.no_grad()
def test_states_and_predictions_of_every_step(small_decoder):
    decoder, (initial, features) = small_decoder(), make_problem()
    states = by_hand(decoder, initial, features, 4)
    path = decoder.walk(initial, features, steps=4, record=range(5))
    for step, state in enumerate(states):
        layer = decoder.refinement if step else decoder.initialization
        assert_equal(path.state(step), state)
        expected, found = layer.predict(state), path.predict(step)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)
    assert_equal(path.state(), states[-1])
    with pytest.raises(KeyError):
        decoder.walk(initial, features, steps=4).state(2)


@torch.no_grad()
def test_a_walk_without_steps_ends_at_the_initialization_layer(small_decoder):
    decoder, (initial, features) = small_decoder(), make_problem()
    path = decoder.walk(initial, features, steps=0)
    (start,) = by_hand(decoder, initial, features, 0)
    assert_equal(path.state(), start)
    expected = relative_residual(initial.pack(), start.pack())
    torch.testing.assert_close(path.initialization_residual(), expected, rtol=1e-12, atol=0)
    decoded = path.decoded()
    assert decoded.steps.tolist() == [0, 0]
    expected = decoder.initialization.predict(start)  # g reads out its own output
    for found in (decoded.prediction, path.predict(), path.predict(0)):
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-11)
        torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-9)


@torch.no_grad()
def test_residual_by_part(small_decoder):
    """Content and position apart, from the iterates of Anderson, which are no outputs of f."""
    decoder, (initial, features) = small_decoder(), make_problem()
    path = decoder.walk(initial, features, steps=5, solver=Anderson(), record=range(6), record_iterates=True)
    for step in (1, 5):
        iterate, output = path.application(step)
        assert_equal(output, decoder.refinement(iterate, features))
        parts = path.residual_parts(step)
        for image in range(2):
            change = output.content[image] - iterate.content[image]
            assert parts.content_norm[image].item() == pytest.approx(change.norm().item(), rel=1e-12)
            assert parts.content[image].item() == pytest.approx((change.norm() / output.content[image].norm()).item())
            unit = torch.tensor([1024.0, 1024.0, 8.0, 8.0], dtype=torch.float64)
            moved, there = (output.position - iterate.position)[image] / unit, output.position[image] / unit
            assert parts.position[image].item() == pytest.approx((moved.norm() / there.norm()).item())
            whole = (change.square().sum() + moved.square().sum()).sqrt()
            size = (output.content[image].square().sum() + there.square().sum()).sqrt()
            assert path.solution.residuals[step - 1, image].item() == pytest.approx((whole / size).item())
    iterate, _ = path.application(3)
    assert not torch.equal(iterate.content, path.state(2).content)  # Anderson goes on from a combination


@torch.no_grad()
def test_decode_is_the_end_of_the_walk(small_decoder):
    decoder, (initial, features) = small_decoder("MODEL.DEQDET.SOLVER.RTOL", 0.3), make_problem()
    decoded, path = decoder.decode(initial, features), decoder.walk(initial, features)
    assert torch.equal(decoded.prediction.boxes, path.predict().boxes)
    assert torch.equal(decoded.residual, path.solution.residual)
    for image, steps in enumerate(decoded.steps.tolist()):
        assert decoded.residual[image] == path.solution.residuals[steps - 1, image]


@pytest.mark.parametrize("name", ["StackedDecoder", "RecurrentDecoder"])
def test_other_decoders_have_no_trajectory(small_decoder, name):
    decoder, (initial, features) = small_decoder("MODEL.DEQDET.DECODER", name), make_problem()
    with pytest.raises(UserError, match=f"DECODER is {name}, whose number of steps is fixed"):
        decoder.walk(initial, features)
    with torch.no_grad():
        assert decoder.decode(initial, features).residual is None


@torch.no_grad()
@pytest.mark.parametrize("step", [0, -1])
@pytest.mark.parametrize("read", ["application", "residual_parts"])
def test_steps_begin_at_one(small_decoder, read, step):
    path = small_decoder().walk(*make_problem(), steps=2, record=range(3), record_iterates=True)
    with pytest.raises(ValueError, match=f"^step must be at least 1, got {step}: step 1 is the first application of f"):
        getattr(path, read)(step)
    with pytest.raises(KeyError, match="step 3 was not recorded: walk with record_iterates=True and record="):
        getattr(path, read)(3)


@pytest.mark.parametrize("solver", ["anderson", Anderson])
def test_a_walk_with_no_solver_object(small_model, make_inputs, solver):
    with pytest.raises(TypeError, match="solver must be an object with the methods init and step"):
        small_model().eval().walk(make_inputs(1), solver=solver)
