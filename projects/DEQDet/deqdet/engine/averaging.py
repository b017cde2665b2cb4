"""The exponential moving average (EMA) of the weights, which often detects better than the weights of the last step."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase

from .hooks import average_batch_norm, is_due
from .models import unwrap


def decay_after(updates: int, decay: float) -> float:
    """Return the decay to use after n = `updates` updates, min(decay, (1 + n) / (10 + n)).

    The average then never covers more than about the last tenth of the steps so far. With the full decay, the average
    of a short training would still consist mostly of the initial weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


class AverageWeights(HookBase):
    """Keeps an AveragedModel (torch.optim.swa_utils) with the average of all weights and floating-point buffers.

    BatchNorm's running statistics are buffers, so they are averaged along with the weights they belong to. Integer
    buffers are copied. Register the hook on every rank, after AverageBatchNorm and before any hook that saves or
    evaluates.
    """

    def __init__(self, model: nn.Module, decay: float, periods: list[int]):
        """
        Args:
            model: the model, possibly wrapped in DDP.
            decay: the decay that a long training reaches; see `decay_after`.
            periods: periods in iterations at which the average is saved or evaluated; 0 for never. Right before, its
                BatchNorm statistics are averaged over the ranks, as AverageBatchNorm does for the model itself.
        """
        self._model = unwrap(model)
        self._periods = periods

        def update(averages: list[Tensor], values: list[Tensor], updates: Tensor) -> None:
            if averages[0].is_floating_point():
                get_ema_multi_avg_fn(decay_after(int(updates), decay))(averages, values, updates)
            else:
                torch._foreach_copy_(averages, values)

        self._average = AveragedModel(self._model, multi_avg_fn=update, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self._average.module

    def before_train(self) -> None:
        if self._average.n_averaged == 0:  # a new average, possibly of a training that has already ended
            self.model.load_state_dict(self._model.state_dict())

    def after_step(self) -> None:
        self._average.update_parameters(self._model)
        if is_due(self.trainer, self._periods):
            average_batch_norm(self.model)

    def state_dict(self) -> dict[str, int]:
        """Return the number of updates; the averaged weights have their own entry in the checkpoint."""
        return {"updates": int(self._average.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._average.n_averaged.fill_(state_dict["updates"])
