"""Two gloo processes on the CPU against one process with the same global batch."""

from collections.abc import Callable

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import defaults
from detectron2.utils.events import EventStorage

from deqdet.engine.step import StepTrainer
from deqdet.engine.trainer import _our_parts
from deqdet.errors import UserError
from deqdet.model_zoo import get_config

from helpers.gradients import CASES, batch, build, gradients
from helpers.two_ranks import run_two_ranks

FOUR = ["both", "none", "first", "both"]


def accumulate(inputs: list[dict], parts: int) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of a step of this rank's images in parts, and how often the ranks exchanged a bucket of them."""
    model, exchanged = DistributedDataParallel(build()), []

    def count(state, bucket):
        exchanged.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = StepTrainer(model, [inputs], optimizer, device_type="cpu", parts=parts)
    step.iter = 0
    with EventStorage():
        step.run_step()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}, len(exchanged)


def two_levels(inputs: list[dict], wrap: Callable) -> dict[str, torch.Tensor | None]:
    """The gradients after two iterations of a model that reads two levels of its backbone's four."""
    model = wrap(build("MODEL.DEQDET.IN_FEATURES", ["p3", "p4"]))
    return [gradients(model, inputs) for _ in range(2)][-1]


def wrap_as_the_trainer(model: torch.nn.Module) -> torch.nn.Module:
    with _our_parts(get_config("quick/deqdet_shapes")):
        return defaults.create_ddp_model(model, broadcast_buffers=False)


def refusal_of_unused(inputs: list[dict], parts: int) -> str:
    """The error of the second step of a model with a weight and a bias that no loss depends on."""
    model = build()
    model.decoder.refinement.forgotten = torch.nn.Linear(2, 2)
    model.decoder.refinement.frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = StepTrainer(DistributedDataParallel(model), [inputs] * 2, optimizer, device_type="cpu", parts=parts)
    step.iter = 0
    with EventStorage(), pytest.raises(UserError) as raised:
        step.run_step()
        step.run_step()
    return str(raised.value)


def work(output: str) -> None:
    """One image for each rank; find_unused_parameters is off, as it is by default. Then two for each, in two parts."""
    rank = torch.distributed.get_rank()
    found = [gradients(DistributedDataParallel(build()), batch(case)[rank : rank + 1]) for case in CASES]
    found.append([refusal_of_unused(batch(FOUR)[2 * rank :][:2], parts) for parts in (1, 2)])
    found.append([accumulate(batch(FOUR)[2 * rank :][:2], parts) for parts in (1, 2)])
    found.append(two_levels(batch(CASES[0])[rank : rank + 1], wrap_as_the_trainer))
    if rank == 0:
        torch.save(found, output)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    output = str(tmp_path_factory.mktemp("ddp") / "gradients.pth")
    run_two_ranks(work, output)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_have_the_gradients_of_one(two_processes, index):
    """The number of boxes differs between the ranks, so a loss divided by its own rank's number would show.

    With no box on any rank the divisor is its floor of 1, not a mean over ranks, and DDP's mean halves the sum.
    """
    case, found = CASES[index], two_processes[index]
    expected = gradients(build(), batch(case))
    share = 0.5 if case == ["none", "none"] else 1.0
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        gap = (found[name] - share * gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert gap < 1e-5, f"{name}: relative gap {gap:.1e}"
    assert expected["decoder.refinement.class_branch.3.weight"].abs().max() > 1e-3


def test_parameters_without_a_gradient_are_named(two_processes):
    names = "decoder.refinement.forgotten.weight, decoder.refinement.forgotten.bias"
    for message in two_processes[len(CASES)]:
        assert message.startswith(f"no loss depends on {names}, and with several ranks each trained parameter needs a")


def test_accumulated_gradients_of_two_processes_are_those_of_one(two_processes):
    """Four images as one batch, as two ranks' and as two parts of each; the parts cost no more communication."""
    (whole, exchanges), (parts, exchanges_of_parts) = two_processes[-2]
    assert exchanges_of_parts == exchanges > 0
    for name, gradient in gradients(build(), batch(FOUR)).items():
        for found in (whole, parts):
            assert (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6) < 1e-5, name


def test_levels_that_nothing_reads_have_no_gradient(two_processes):
    """The trainer's DDP accepts parameters without a gradient; the other gradients are those of one process."""
    expected, found = two_levels(batch(CASES[0]), lambda model: model), two_processes[-1]
    unread = {name for name, gradient in expected.items() if gradient is None}
    assert unread == {name for name, gradient in found.items() if gradient is None}
    assert {"backbone.convs.0.weight", "backbone.convs.3.weight"} < unread
    for name in expected.keys() - unread:
        assert (found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6) < 1e-5, name
