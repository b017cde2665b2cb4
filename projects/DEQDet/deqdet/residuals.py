"""How close the iterates come to a fixed point, measured on a data set."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from .detector import DEQDet
from .equilibrium import relative_residual


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
        features, initial = model.encode(model.preprocess(batch))
        start = model.decoder.initialize(initial, features)
        solution = model.decoder.solve(start, features, steps=steps)
        first = relative_residual(initial.pack(), start.pack())
        columns.append(torch.cat([first[None], solution.residuals]).float().cpu())
    model.train(training)
    return torch.cat(columns, dim=1)
