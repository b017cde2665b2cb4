"""Builds the model of a config, with errors that users understand, and unwraps a model from DDP."""

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
    """Call detectron2's build_model, which builds the model on MODEL.DEVICE.

    Raises:
        UserError: a name in the config is unknown, or a value out of range.
    """
    with buildable():
        return modeling.build_model(cfg)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, or the model itself if it is not wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def buildable() -> Iterator[None]:
    """Turn errors in the block, which builds a model, into a UserError."""
    try:
        yield
    except KeyError as error:
        if not raised_in(error, Registry.__module__):
            raise
        raise UserError(str(error.args[0])) from error  # its str() is the repr of its message
    except ValueError as error:
        raise UserError(str(error)) from error
