"""Stops a training when a number becomes infinite or NaN, and reports where that began."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detectron2.engine import HookBase
from detectron2.modeling import Backbone
from detectron2.utils import comm

from ..checkpoints.files import check_finite_weights, write_torch
from ..checkpoints.latest import TAG
from ..contract import describe, describe_source
from ..data import mix_seed, seed_all
from ..decoders import Decoder
from ..detector import DEQDet
from ..errors import UserError, list_first, one_line
from ..layers import RefinementLayer
from ..matcher import NonFinitePredictionError
from ..structures import nonfinite_names
from .hooks import is_due
from .models import unwrap

SHOWN = 8  # images in a message; the file that it names has the whole batch


class NonFiniteError(UserError, FloatingPointError):
    """A loss, a prediction, a gradient, a statistic or a weight became infinite or NaN in training."""


class _Enough(Exception):
    """Ends a forward pass as soon as its purpose is served."""


class FiniteGuard(HookBase):
    """Checks all weights and BatchNorm statistics before they are saved, and explains a failed iteration.

    Losses, predictions and gradients are checked in every iteration where they are computed: detectron2's trainer, the
    matcher and the gradient clipping raise FloatingPointError. `explain` locates the origin of such an error. Register
    the guard before the checkpointer, on every rank.
    """

    def __init__(
        self,
        folder: str,
        seed: int,
        checkpoint_period: int,
        period: int = 20,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """
        Args:
            folder: OUTPUT_DIR.
            seed: the run's seed; together with the iteration it reproduces the noise of a failed iteration.
            checkpoint_period, period: check in iterations that are multiples of either, and in the last one.
            autocast: the context of the training's forward pass.
        """
        self._autocast = autocast
        self._folder = Path(folder)
        self.seed = seed
        self._periods = checkpoint_period, period
        self._batch: list[dict] = []
        self._handle: RemovableHandle | None = None

    def before_train(self) -> None:
        self._handle = self.trainer.model.register_forward_pre_hook(self._keep_batch)

    def after_step(self) -> None:
        """Check the weights and statistics if this iteration is due.

        Raises:
            NonFiniteError: a weight or a statistic is not finite. The existing checkpoints are not affected.
        """
        if is_due(self.trainer, self._periods):
            model = unwrap(self.trainer.model)
            if bad := [*nonfinite_names(model.named_parameters()), *nonfinite_names(model.named_buffers())]:
                what = "a weight" if bad[0] in dict(model.named_parameters()) else "a statistic"
                raise self._error(f"{what} became infinite or NaN", bad)

    def after_train(self) -> None:
        if self._handle:
            self._handle.remove()

    def explain(self, error: FloatingPointError) -> NonFiniteError:
        """Return an error to raise in place of the iteration's own; it names the first bad tensor."""
        if isinstance(error, NonFinitePredictionError):
            return self._error(error.what, self._find_bad(), [self._batch[image] for image in error.images])
        return self._error(one_line(error).split(" loss_dict")[0], self._find_bad())

    def _find_bad(self) -> list[str]:
        """Return the names of the bad tensors, causes before effects."""
        model = unwrap(self.trainer.model)
        gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
        return [
            *nonfinite_names(model.named_parameters()),
            *nonfinite_names((f"image {_name(x)}", x["image"]) for x in self._batch),
            *self._find_activation(model),
            *(f"gradient of {name}" for name in nonfinite_names(gradients)),
            # Last, because a bad batch makes BatchNorm's running statistics bad in the forward pass.
            *nonfinite_names(model.named_buffers()),
        ]

    def _find_activation(self, model: nn.Module) -> list[str]:
        """Run the iteration's forward pass again, and name the first module or prediction with a bad output.

        Of a batch that was split for gradient accumulation, the last part that ran is repeated, with the first part's
        noise.
        """
        names = {module: name for name, module in model.named_modules()}
        if comm.get_world_size() > 1 and "criterion" not in names.values():
            return []  # the loss may need a collective operation, in which the other ranks would not take part
        found = []

        def look(module: nn.Module, inputs: tuple, output: object) -> None:
            if not _is_finite(output):
                found.append(f"output of {names[module] or 'the model'}{_describe_owner(model, names[module])}")
                raise _Enough

        def stop(module: nn.Module, inputs: tuple) -> None:
            if isinstance(model, DEQDet):
                bad = (name for name, prediction in inputs[0].items() if not _is_finite(prediction))
                found.extend(f"prediction {name} of {describe_source(model.decoder)}" for name in bad)
            raise _Enough

        seed_all(mix_seed(self.seed, comm.get_rank(), self.trainer.iter, 1))  # as SeedIteration does
        with _hooked(model, look, stop), torch.no_grad(), self._autocast(), suppress(_Enough, FloatingPointError):
            model(self._batch)
        return found

    def _error(self, what: str, bad: list[str], failed: Sequence[dict] | None = None) -> NonFiniteError:
        """Store the batch and return the error.

        Args:
            what: what became infinite or NaN, without the images.
            bad: the names of the bad tensors, causes before effects.
            failed: the images in which it did; None if that is unknown, then the message names the whole batch.
        """
        iteration, rank = self.trainer.iter, comm.get_rank()
        images = [_name(x) for x in self._batch]
        path = self._folder / f"nonfinite_{iteration:07d}{f'_rank{rank}' if rank else ''}.pth"
        figures = self.trainer.storage.latest()
        losses = {name: value for name, (value, _) in figures.items() if "loss" in name}
        content = {
            "iteration": iteration, "rank": rank, "error": what, "images": images, "bad_tensors": bad,
            "last_losses": losses, "batch": [x["image"] for x in self._batch],
        }  # fmt: skip
        try:
            write_torch(content, path)
            dump = f"see {path}"
        except UserError as error:
            dump = str(error)
        first = f"first bad tensor: {bad[0]}" if bad else "no stored tensor is infinite or NaN"
        at = "" if f"iteration={iteration}" in what else f" at iteration={iteration}"
        shown = list_first(images if failed is None else [_name(x) for x in failed], SHOWN)
        parts = f"{what.rstrip('.!')}{at}", first, f"images {shown}", dump, self._advice()
        return NonFiniteError("; ".join(parts))

    def _advice(self) -> str:
        tag, last = self._folder / TAG, "no checkpoint was saved: train again"
        if tag.is_file():
            checkpoint = self._folder / tag.read_text().strip()
            last = f"the last good checkpoint is {checkpoint}: train from it as MODEL.WEIGHTS in another OUTPUT_DIR,"
        return f"{last} with a lower SOLVER.BASE_LR (docs/training.md, Troubleshooting)"

    def _keep_batch(self, module: nn.Module, inputs: tuple) -> None:
        if module.training:
            self._batch = inputs[0]


def check_finite_model(model: nn.Module, source: str) -> None:
    """Check that a loaded model has finite weights and statistics.

    Args:
        source: where the weights come from, for the message.

    Raises:
        UserError: a value is infinite or NaN; names the first bad tensor.
    """
    model = unwrap(model)
    check_finite_weights(source, [*model.named_parameters(), *model.named_buffers()])


@contextmanager
def _hooked(model: nn.Module, look: Callable, stop: Callable) -> Iterator[None]:
    """Within the block, call `look` after each module's forward pass, and `stop` before that of model.criterion."""
    handles = [module.register_forward_hook(look) for module in model.modules()]
    handles += [child.register_forward_pre_hook(stop) for name, child in model.named_children() if name == "criterion"]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _describe_owner(model: nn.Module, name: str) -> str:
    """Name the class of the layer, decoder or backbone that contains a module, for the end of a message."""
    parts = name.split(".")
    owners = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts), 0, -1))
    owner = next((x for x in owners if isinstance(x, RefinementLayer | Decoder | Backbone)), None)
    return "" if owner is None else f" in {describe(owner)}"


def _is_finite(value: object) -> bool:
    return all(bool(x.isfinite().all()) for x in _tensors(value))


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested dicts, lists, tuples and dataclasses, such as a QueryState."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _name(sample: dict) -> str:
    return str(sample.get("file_name", sample.get("image_id", "?")))
