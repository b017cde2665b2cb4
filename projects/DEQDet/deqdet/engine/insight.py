"""Measures in training how well the decoder converges to its equilibrium, for metrics.json and TensorBoard.

The norm of the gradient before clipping (the paper's Figure 4) is recorded by `optimizer.GradientClipper`.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.utils import comm

from ..data import build_mapper, random_state_kept
from ..decoders import EquilibriumDecoder
from ..detector import DEQDet
from ..equilibrium import FixedPointIteration, first_below, spectral_radius
from ..errors import UserError
from .hooks import is_due
from .models import unwrap

RTOL = 0.05  # relative residual up to which steps are counted


def build_insight(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """Build the hook that MODEL.DEQDET.INSIGHT asks for, on the main process; else return an empty list.

    Raises:
        UserError: the model has no equilibrium.
    """
    options = cfg.MODEL.DEQDET.INSIGHT
    if options.PERIOD == 0:
        return []
    model = unwrap(model)
    if not (isinstance(model, DEQDet) and model.decoder.has_equilibrium):
        raise UserError(
            f"MODEL.DEQDET.INSIGHT.PERIOD is {options.PERIOD}, but MODEL.DEQDET.DECODER {cfg.MODEL.DEQDET.DECODER} "
            "has no equilibrium to look at: set the period to 0, or choose EquilibriumDecoder"
        )
    if not comm.is_main_process():
        return []

    def load_probe() -> list[dict]:
        mapper = build_mapper(cfg, is_train=False)
        return [mapper(record) for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[: options.NUM_IMAGES]]

    return [EquilibriumInsight(options.PERIOD, load_probe, options.POWER_ITERATIONS)]


class EquilibriumInsight(HookBase):
    """Puts the results of `measure_equilibrium` into the event storage, as "equilibrium/<name>".

    The hook does not affect the training: it changes no random state, statistics or gradients, and runs no collective
    operation. Register it on the main process only.

    detectron2's writers read the latest values every 20 iterations, so a shorter period gains nothing.
    """

    def __init__(self, period: int, load_probe: Callable[[], list[dict]], power_iterations: int):
        """
        Args:
            period: iterations between measurements; the last iteration is always measured.
            load_probe: returns the images to measure on, as a test loader gives them; called once, when first needed.
            power_iterations: number of products with the Jacobian for the spectral radius.
        """
        self._period = period
        self._load_probe = load_probe
        self._power_iterations = power_iterations
        self._probe: list[dict] | None = None

    def after_step(self) -> None:
        if not is_due(self.trainer, [self._period]):
            return
        model = unwrap(self.trainer.model)
        # detectron2's test-time resize draws a number from NumPy.
        with random_state_kept(model.device):
            if self._probe is None:
                self._probe = self._load_probe()
            figures = measure_equilibrium(model, self._probe, self._power_iterations)
        for name, value in figures.items():
            self.trainer.storage.put_scalar(f"equilibrium/{name}", value, smoothing_hint=False)


@torch.no_grad()
def measure_equilibrium(model: DEQDet, batch: list[dict], power_iterations: int) -> dict[str, float]:
    """Measure how training's plain iteration converges, without its noise: medians over the images of a batch.

    Args:
        model: a detector with an equilibrium; its training mode is restored afterwards.
        batch: detectron2's inputs, as a test loader gives them.
        power_iterations: number of products with the Jacobian for the spectral radius.

    Returns:
        "residual_step1" and "residual": the relative residuals at the first step and at step T_train.
        "steps_to_rtol0.05": the first step with a relative residual below 0.05, or T = max(T_train, T_infer) if there
        is none. For a user's own decoder that is not an EquilibriumDecoder, T_train is its `test_steps`, T_infer.
        "reached_rtol0.05": no median, but the share of the images, 0 to 1, with a relative residual below 0.05 at one
        of the T steps.
        "spectral_radius": that of f's Jacobian with respect to the content at y_T_train (see
        `deqdet.equilibrium.spectral_radius`); above 1, small changes of the content grow.
    """
    decoder = model.decoder
    supervision = decoder.supervision if isinstance(decoder, EquilibriumDecoder) else None
    train_steps = decoder.test_steps if supervision is None else supervision.train_steps
    steps = max(train_steps, decoder.test_steps)
    with inference_context(model):
        options = {"steps": steps, "rtol": 0.0, "solver": FixedPointIteration()}
        path = model.walk(batch, **options, record=[train_steps], record_iterates=True).trajectory
        generator = torch.Generator(model.device).manual_seed(0)
        end = path.solution.outputs[train_steps]
        with model.autocast():
            radius = spectral_radius(path.refine, end, iterations=power_iterations, generator=generator)
    residuals = path.solution.residuals
    return {
        "residual_step1": _median(residuals[0]),
        "residual": _median(residuals[train_steps - 1]),
        f"steps_to_rtol{RTOL}": _median(first_below(residuals, RTOL)),
        f"reached_rtol{RTOL}": (residuals < RTOL).any(dim=0).float().mean().item(),
        "spectral_radius": _median(radius),
    }


def _median(values: Tensor) -> float:
    """Return the median, with NaN counted as infinite."""
    return float(median(values.nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()))
