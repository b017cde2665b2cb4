"""One step of training: autocast, the gradient's scale, and the accumulation of gradients over parts of a batch."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detectron2.engine import AMPTrainer
from detectron2.utils.events import get_event_storage

from ..detector import DEQDet
from ..errors import UserError
from .models import unwrap

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # SOLVER.AMP.PRECISION
# A gradient that overflows float16 even at this scale is infinite or NaN at every scale. The scaler starts at 2^16.
SMALLEST_SCALE = 2.0**-14


class StepTrainer(AMPTrainer):
    """detectron2's AMPTrainer on any device, with or without autocast, and with gradients of several parts of a batch.

    AMPTrainer's own step refuses a machine without CUDA and takes a batch as a whole, so that `run_step` is ours.

    Autocast is around the forward pass alone. It runs convolutions and matrix products in the lower precision; the
    weights, the optimizer's state, positions, boxes and losses stay in float32. The smallest gradients would be 0 in
    float16, so that there the loss is multiplied by a scale, which the scaler divides out of the gradients before the
    optimizer's step and adapts. Where a gradient overflowed, the scaler skips the step, and with it the optimizer's
    hooks. bfloat16 has the range of float32 and needs no scale.

    With n parts, each part's images go forward and back by themselves, and their gradients add up. The losses are
    divided by the number of matched boxes of the whole batch, so that the sum is the whole batch's gradient. What
    depends on the images beside an image in its part still differs: the batch statistics of BatchNorm, and which
    random numbers the noise gets.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: object,
        optimizer: Optimizer,
        *,
        device_type: str,
        precision: torch.dtype | None = None,
        parts: int = 1,
    ):
        """
        Args:
            model: a DEQDet if there are several parts; DDP may be around it.
            device_type: of the model: "cuda", "cpu" or "mps".
            precision: float16 or bfloat16 for autocast; None for float32.
            parts: the parts into which a batch of this rank is split.

        Raises:
            UserError: there are several parts, and the model's losses cannot be normalised over them.
        """
        scaler = torch.amp.GradScaler(device_type, enabled=precision == torch.float16)
        super().__init__(model, data_loader, optimizer, grad_scaler=scaler, precision=precision)
        self._device_type = device_type
        self._parts = parts
        if parts > 1 and not isinstance(unwrap(model), DEQDet):
            raise UserError(
                f"SOLVER.ACCUMULATION_STEPS is {parts}: it must be 1 for MODEL.META_ARCHITECTURE "
                f"{type(unwrap(model)).__name__}, whose losses cannot be normalised over a whole batch"
            )

    def autocast(self) -> AbstractContextManager:
        """The context of the forward pass."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self.precision)

    def run_step(self) -> None:
        """Take the gradient of the next batch, and the optimizer's step.

        Raises:
            FloatingPointError: a loss is infinite or NaN; or the gradient is, at any scale.
        """
        assert self.model.training, "the model was changed to evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        losses = self._accumulate(batch)
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.grad_scaler.is_enabled():
            self._check_scale()

    def _accumulate(self, batch: list[dict]) -> dict[str, Tensor]:
        """Put the gradient of a batch into the parameters, and return its losses."""
        size = -(-len(batch) // self._parts)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        options = {} if self._parts == 1 else {"normalizer": unwrap(self.model).loss_normalizer(batch)}
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            # The ranks exchange gradients once, in the backward pass of the last part.
            with nullcontext() if index + 1 == len(parts) else _unsynchronized(self.model):
                with self.autocast():
                    losses = self.model(part, **options)
                    losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
                    total = sum(losses.values())
                if index == 0:
                    self.optimizer.zero_grad()
                self.grad_scaler.scale(total).backward()
            sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
        return sums

    def _check_scale(self) -> None:
        scale = self.grad_scaler.get_scale()
        get_event_storage().put_scalar("grad_scale", scale, smoothing_hint=False)
        if scale < SMALLEST_SCALE:
            raise FloatingPointError(f"the gradient is infinite or NaN in float16 at every scale down to {scale:g}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned; a training without float16 has no scale, and then a new one is begun."""
        scale = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scale})


def _unsynchronized(model: nn.Module) -> AbstractContextManager:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
