"""From a config to a model, with errors that users understand, and from DDP back to the model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..contract import raised_in
from ..errors import UserError


def build_model(cfg: CfgNode) -> nn.Module:
    """detectron2's, on MODEL.DEVICE.

    Raises:
        UserError: a name in the config is unknown, or a value out of range.
    """
    with buildable():
        return modeling.build_model(cfg)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, if DistributedDataParallel is around it; else what was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def buildable() -> Iterator[None]:
    """What goes wrong within it, building a model, becomes a UserError."""
    try:
        yield
    except KeyError as error:
        if not raised_in(error, Registry.__module__):
            raise
        raise UserError(str(error.args[0])) from error  # its str() is the repr of its message
    except ValueError as error:
        raise UserError(str(error)) from error
