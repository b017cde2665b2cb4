"""Measure how close the iterates come to a fixed point on a data set."""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from detectron2.evaluation import inference_context

from ..detector import DEQDet


def measure_residuals(model: DEQDet, batches: Iterable[list[dict]], steps: int) -> Tensor:
    """Measure relative residuals ||f(y) - y|| / ||f(y)|| of packed states, without noise, with the decoder's solver.

    Args:
        model: its training mode is restored afterwards.
        batches: detectron2's inputs, as from a test loader.
        steps: T, applications of f after g.

    Returns:
        (1 + T, images) float32 on the CPU. Row 0 is the change that g makes to the initial queries.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    columns = []
    with inference_context(model):
        for batch in tqdm(batches, desc="residuals", disable=None):
            path = model.walk(batch, steps=steps, rtol=0.0).trajectory
            column = torch.cat([path.initialization_residual()[None], path.solution.residuals])
            columns.append(column.float().cpu())
    return torch.cat(columns, dim=1)
