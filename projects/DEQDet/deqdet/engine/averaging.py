"""The exponential moving average (EMA) of the weights, which often detects better than the weights of the last step."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detectron2.engine import HookBase

from .hooks import average_batch_norm
from .models import unwrap


def decay_after(updates: int, decay: float) -> float:
    """The decay of an average that has been updated so often.

    It is min(decay, (1 + n) / (10 + n)), so that an average never reaches back further than about a tenth of the steps
    so far: in a short training, one with the full decay would still consist of the first weights.
    """
    return min(decay, (1 + updates) / (10 + updates))


class AverageWeights(HookBase):
    """Keeps torch's AveragedModel of the model, with the average of all weights and floating-point buffers.

    BatchNorm's running statistics are buffers, and averaged as the weights are that they belong to. Counters are
    copied. Register it on every rank, after AverageBatchNorm and before what saves or evaluates.
    """

    def __init__(self, model: nn.Module, decay: float, periods: list[int]):
        """
        Args:
            model: DDP may be around it.
            decay: of a long training; see `decay_after`.
            periods: iterations between two moments at which the average is saved or used, 0 for never. The ranks then
                take the average of their BatchNorm statistics, as AverageBatchNorm does with the model's own.
        """
        self._model = unwrap(model)
        self._periods = [period for period in periods if period > 0]

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
        if self._average.n_averaged == 0:  # a new average, perhaps in a training that has already ended
            self.model.load_state_dict(self._model.state_dict())

    def after_step(self) -> None:
        self._average.update_parameters(self._model)
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self._periods):
            average_batch_norm(self.model)

    def state_dict(self) -> dict[str, int]:
        """The number of updates; the weights are an entry of the checkpoint themselves."""
        return {"updates": int(self._average.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._average.n_averaged.fill_(state_dict["updates"])
