import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode

from detectron2.structures import Boxes, Instances

from deqdet.structures import QueryState, Targets, to_device

CPU = torch.device("cpu")


def random_state(batch=2, queries=5, channels=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(batch, queries, 4, generator=generator) * torch.tensor([700.0, 700.0, 9.0, 1.0])
    content = torch.randn(batch, queries, channels, generator=generator)
    return QueryState(position.to(dtype), content.to(dtype))


def instances(height, width, boxes, labels):
    result = Instances((height, width))
    result.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    result.gt_classes = torch.tensor(labels, dtype=torch.int32)
    return result


def test_pack_by_hand():
    position = torch.tensor([[[512.0, 1024.0, 8.0, -4.0], [0.0, 2048.0, 2.0, 1.0]]])
    state = QueryState(position, torch.tensor([[[10.0, 20.0], [30.0, 40.0]]]))
    # cx and cy in units of 1024 pixels, z and r in units of 8; each query's content follows its position.
    expected = [[0.5, 1.0, 1.0, -0.5, 10.0, 20.0, 0.0, 2.0, 0.25, 0.125, 30.0, 40.0]]
    assert state.pack().tolist() == expected
    unpacked = QueryState.unpack(torch.tensor(expected), num_queries=2)
    assert torch.equal(unpacked.position, state.position) and torch.equal(unpacked.content, state.content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pack_and_unpack_are_exact(dtype):
    state = random_state(dtype=dtype)
    flat = state.pack()
    assert flat.shape == (2, 5 * (4 + 7)) and flat.dtype == dtype
    again = QueryState.unpack(flat, num_queries=5)
    assert torch.equal(again.position, state.position) and torch.equal(again.content, state.content)
    assert torch.equal(again.pack(), flat)


def test_images_do_not_mix():
    state = random_state(batch=3)
    alone = QueryState(state.position[1:2], state.content[1:2])
    assert torch.equal(state.pack()[1:2], alone.pack())
    assert not torch.equal(state.pack()[0:1], alone.pack())


def test_gradients_pass_through_pack_and_unpack():
    position = torch.zeros(1, 2, 4, requires_grad=True)
    content = torch.zeros(1, 2, 3, requires_grad=True)
    QueryState(position, content).pack().sum().backward()
    assert position.grad.tolist() == [[[1 / 1024, 1 / 1024, 1 / 8, 1 / 8]] * 2]
    assert content.grad.tolist() == [[[1.0] * 3] * 2]
    flat = torch.zeros(1, 14, requires_grad=True)
    QueryState.unpack(flat, num_queries=2).position.sum().backward()
    assert flat.grad.tolist() == [[1024.0, 1024.0, 8.0, 8.0, 0.0, 0.0, 0.0] * 2]


def test_detach_cuts_both_and_detach_position_one():
    state = random_state()
    state.position.requires_grad_()
    state.content.requires_grad_()
    cut, half = state.detach(), state.detach_position()
    assert not cut.position.requires_grad and not cut.content.requires_grad
    assert not half.position.requires_grad and half.content is state.content
    for other in (cut, half):
        assert torch.equal(other.position, state.position) and torch.equal(other.content, state.content)
    assert state.position.requires_grad  # the state itself stays as it was


def test_a_state_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        random_state().position = torch.zeros(1)


def test_targets_are_padded():
    three = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 10.0, 20.0]]
    one = [[9.0, 8.0, 19.0, 28.0]]
    batch = [instances(48, 64, [], []), instances(30, 20, one, [4]), instances(100, 50, three, [2, 0, 3])]
    targets = Targets.from_instances(batch, CPU)
    zero = [0.0] * 4
    assert targets.labels.tolist() == [[0, 0, 0], [4, 0, 0], [2, 0, 3]]
    assert targets.valid.tolist() == [[False] * 3, [True, False, False], [True] * 3]
    assert targets.boxes.tolist() == [[zero] * 3, [one[0], zero, zero], three]
    assert targets.image_sizes.tolist() == [[64.0, 48.0], [20.0, 30.0], [50.0, 100.0]]  # width, height
    assert (targets.labels.dtype, targets.valid.dtype) == (torch.int64, torch.bool)
    assert targets.boxes.dtype == targets.image_sizes.dtype == torch.float32


def test_targets_of_images_without_boxes():
    targets = Targets.from_instances([instances(48, 64, [], []), instances(10, 20, [], [])], CPU)
    assert targets.labels.shape == targets.valid.shape == (2, 0)
    assert targets.boxes.shape == (2, 0, 4)
    assert (targets.labels.dtype, targets.valid.dtype) == (torch.int64, torch.bool)
    assert targets.image_sizes.tolist() == [[64.0, 48.0], [20.0, 10.0]]


@pytest.mark.parametrize("compiled", [False, True])
def test_numbers_reach_a_gpu_that_is_only_imagined(compiled):
    """Where torch computes sizes alone, as under torch.compile and for --count-only, it cannot pin memory."""

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + to_device([1, 2, 3], torch.int32, x.device)

    with FakeTensorMode():
        call = torch.compile(add, backend="aot_eager", fullgraph=True) if compiled else add
        found = call(torch.zeros(3, dtype=torch.int32, device="cuda:0"))
    assert (found.device, found.dtype, found.shape) == (torch.device("cuda:0"), torch.int32, (3,))
