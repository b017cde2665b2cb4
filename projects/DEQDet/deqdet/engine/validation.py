"""The training losses on the test sets, computed at each evaluation (TEST.VALIDATION_LOSS)."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from ..checkpoints.publish import AVERAGE
from ..data import build_validation_loader, mix_seed, random_state_kept, seed_all
from ..detector import DEQDet
from .models import unwrap


def build_validation_loss(cfg: CfgNode, model: nn.Module, average: nn.Module | None = None) -> list[hooks.EvalHook]:
    """Build the hook that TEST.VALIDATION_LOSS asks for, on every rank; else return an empty list.

    It puts "validation/<loss>" into the event storage, or with several test sets "<set>/validation/<loss>".

    Args:
        average: the model with averaged weights, whose losses are "ema/validation/<loss>"; None if there is none.

    Raises:
        UserError: a test set has no annotations.
    """
    names = cfg.DATASETS.TEST
    if not cfg.TEST.VALIDATION_LOSS or not names:
        return []
    for name in names:
        build_validation_loader(cfg, name)  # so that an error is raised now and not at the first evaluation

    def losses_of(evaluated: nn.Module, loaders: dict[str, Iterable[list[dict]]]) -> dict:
        results = {name: {"validation": compute_losses(evaluated, loader)} for name, loader in loaders.items()}
        return results if len(names) > 1 else results[names[0]]

    def evaluate() -> dict:
        loaders = {name: build_validation_loader(cfg, name) for name in names}
        results = losses_of(model, loaders)
        if average is not None:
            results[AVERAGE] = losses_of(average, loaders)
        return results if comm.is_main_process() else {}

    return [hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate)]


@torch.no_grad()
def compute_losses(model: nn.Module, loader: Iterable[list[dict]]) -> dict[str, float]:
    """Compute the training losses of a model on a whole data set, and their sum as "total_loss".

    They are normalised as in training, as if the set were one batch: each loss is summed over all images and divided by
    the number of matched boxes (an image without boxes counts as one). All submodules are in evaluation mode, so that
    BatchNorm uses its running statistics without changing them, and nothing is dropped out. The noise of the solving
    path is kept, since the losses are to be comparable with those of training. Its seed depends on the image only, so
    it is the same at every evaluation. The random state of the training is not affected.

    A collective operation: each rank brings its own images.

    Args:
        model: returns a dict of losses in training mode; may be wrapped in DDP.
        loader: gives batches of one image, with "image_id" and "instances".

    Returns:
        The losses over the images of all ranks, on every rank.
    """
    model = unwrap(model)
    sums, count = defaultdict(float), 0
    # A separate event storage, since the model may record statistics of its batch, which are not those of training.
    with _losses_without_training(model) as losses_of, random_state_kept(_device(model)), EventStorage():
        for batch in loader:
            (record,) = batch
            seed_all(mix_seed(int(record["image_id"]) % 2**32))
            matched = model.count_matches(batch) if isinstance(model, DEQDet) else len(record["instances"])
            boxes = max(matched, 1)
            count += boxes
            for name, loss in losses_of(batch).items():
                sums[name] += boxes * loss.item()
    parts = comm.all_gather((dict(sums), count))
    names = dict.fromkeys(name for part, _ in parts for name in part)
    whole = max(sum(boxes for _, boxes in parts), 1)
    losses = {name: sum(part.get(name, 0.0) for part, _ in parts) / whole for name in names}
    return {**losses, "total_loss": sum(losses.values())}


@contextmanager
def _losses_without_training(model: nn.Module) -> Iterator[Callable[[list[dict]], dict[str, torch.Tensor]]]:
    """Yield a function that computes a model's losses while its submodules are in evaluation mode."""
    training = model.training
    model.eval()
    model.training = True  # of the model itself only, which then returns losses
    try:
        # Not model.__call__, whose hooks are for iterations of training.
        yield model.forward
    finally:
        model.train(training)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
