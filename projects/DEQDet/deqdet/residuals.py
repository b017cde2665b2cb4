"""How close the iterates come to a fixed point, measured on a data set."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from .detector import DEQDet


@torch.no_grad()
def measure_residuals(model: DEQDet, batches: Iterable[list[dict]], steps: int) -> Tensor:
    """Relative residuals ||f(y) - y|| / ||f(y)|| of packed states, without noise.

    Args:
        model: with an EquilibriumDecoder; its training mode is restored afterwards.
        batches: of detectron2's inputs, as a test loader gives them.
        steps: T, applications of f after g.

    Returns:
        (1 + T, images) float32 on the CPU; row 0 is g's, against the initial queries.
    """
    training = model.training
    model.eval()
    columns = []
    for batch in tqdm(batches, desc="residuals", disable=None):
        path = model.walk(batch, steps=steps, rtol=0.0).trajectory
        columns.append(torch.cat([path.initialization_residual()[None], path.solution.residuals]).float().cpu())
    model.train(training)
    return torch.cat(columns, dim=1)
