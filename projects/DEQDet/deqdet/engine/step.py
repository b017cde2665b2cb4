"""One training step: autocast, loss scaling, and gradient accumulation over parts of a batch."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detectron2.engine import AMPTrainer
from detectron2.utils.events import get_event_storage

from ..detector import DEQDet
from ..errors import UserError, list_first
from ..precision import autocast
from .models import unwrap

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # SOLVER.AMP.PRECISION
# A gradient that overflows float16 even at this scale is infinite or NaN at every scale. The scaler starts at 2^16.
SMALLEST_SCALE = 2.0**-14


class StepTrainer(AMPTrainer):
    """detectron2's AMPTrainer on any device, with or without autocast, and with gradient accumulation.

    `run_step` is overridden because AMPTrainer's own requires CUDA and does not split a batch.

    Autocast covers the forward pass only. It runs convolutions and matrix products in the lower precision; weights,
    optimizer state, positions, boxes and losses stay in float32. In float16, the smallest gradients would underflow.
    The loss is therefore multiplied by a scale, which the scaler divides out of the gradients before the optimizer's
    step and adapts. If a gradient overflowed, the scaler skips the step and with it the optimizer's hooks. bfloat16
    has the range of float32 and needs no scale.

    With n parts, each part of the batch has its own forward and backward pass, and the gradients add up. The losses
    are divided by the number of matched boxes of the whole batch, so the sum is the gradient of the whole batch. Only
    what depends on the other images in a part still differs: BatchNorm's batch statistics, and the random numbers
    that the noise draws.
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
            model: the model, possibly wrapped in DDP; it must be a DEQDet if there are several parts.
            device_type: the model's device type: "cuda", "cpu" or "mps".
            precision: float16 or bfloat16 for autocast; None for float32.
            parts: number of parts into which this rank's batch is split.

        Raises:
            UserError: there are several parts, but the model's losses cannot be normalised over a whole batch.
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
        """Return the context for the forward pass."""
        return autocast(self._device_type, self.precision)

    def run_step(self) -> None:
        """Compute the gradient of the next batch, and take a step of the optimizer.

        Raises:
            FloatingPointError: a loss is infinite or NaN, or the gradient is so at every scale.
            UserError: with several ranks, a parameter got no gradient in the last iteration.
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
        """Accumulate the gradient of a batch in the parameters, and return its losses."""
        size = -(-len(batch) // self._parts)
        parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        options = {} if self._parts == 1 else {"normalizer": unwrap(self.model).loss_normalizer(batch)}
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            # The ranks exchange gradients once, in the backward pass of the last part.
            with nullcontext() if index + 1 == len(parts) else _unsynchronized(self.model):
                with self.autocast(), _unused_parameters_named(self.model):
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
        """Load a state dict; if it is of a training without float16, which has no scale, the scaler starts afresh."""
        scale = state_dict.get("grad_scaler") or self.grad_scaler.state_dict()
        super().load_state_dict({**state_dict, "grad_scaler": scale})


def _unsynchronized(model: nn.Module) -> AbstractContextManager:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@contextmanager
def _unused_parameters_named(model: nn.Module) -> Iterator[None]:
    """Name the parameters for whose gradients DDP still waits, when it refuses to begin the next iteration.

    The gradients of the last iteration are still there, since they are set to None after the forward pass.
    """
    try:
        yield
    except RuntimeError as error:
        unused = [name for name, x in unwrap(model).named_parameters() if x.requires_grad and x.grad is None]
        if "Expected to have finished reduction" not in str(error) or not unused:
            raise
        raise UserError(
            f"no loss depends on {list_first(unused)}, and with several ranks each trained parameter needs a gradient "
            "in every iteration: use them in the forward pass, remove them, or freeze them by requires_grad_(False)"
        ) from error
