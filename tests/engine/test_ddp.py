"""Two gloo processes on the CPU against one process with the same global batch."""


import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from detectron2.engine import launch

from helpers.gradients import CASES, batch, build, gradients


def work(output: str) -> None:
    """One image for each rank; find_unused_parameters is off, as it is by default."""
    torch.set_num_threads(1)
    rank = torch.distributed.get_rank()
    found = [gradients(DistributedDataParallel(build()), batch(case)[rank : rank + 1]) for case in CASES]
    if rank == 0:
        torch.save(found, output)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    output = str(tmp_path_factory.mktemp("ddp") / "gradients.pth")
    launch(work, 2, dist_url="auto", args=(output,))
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
