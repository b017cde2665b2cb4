"""Compiling a refinement layer, with the eager layer where that fails."""

import logging
from typing import Any

from torch._dynamo.exc import TorchDynamoException

from .base import RefinementLayer

logger = logging.getLogger(__name__)


def compile_layer(layer: RefinementLayer) -> None:
    """Let torch.compile make one graph of a layer's forward, for images of any size; it does so at the first call.

    The layer's parameters keep their names. Where the layer cannot be compiled, because there is no compiler or because
    its code has no single graph, a warning says so once, and the layer runs as it is.
    """
    layer.compile(fullgraph=True, dynamic=True)
    layer._compiled_call_impl = _CompiledCall(layer, layer._compiled_call_impl)


class _CompiledCall:
    """What a compiled module calls in place of its forward."""

    def __init__(self, layer: RefinementLayer, compiled: Any):
        self._layer, self._compiled = layer, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:  # what the code generator raises is one, too
            reason = str(error).strip().split("\n")[0]
            logger.warning("%s cannot be compiled and runs as it is: %s", type(self._layer).__name__, reason)
            self._layer._compiled_call_impl = None
            return self._layer(*args, **kwargs)
