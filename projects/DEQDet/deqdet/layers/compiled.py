"""Compiling a refinement layer, with the eager layer where that fails."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from .base import RefinementLayer

logger = logging.getLogger(__name__)


def compile_layer(layer: RefinementLayer) -> None:
    """Let torch.compile make one graph of a layer's forward, for images of any size; it does so at the first call.

    The layer's parameters keep their names. Where the layer cannot be compiled, because there is no compiler or because
    its code has no single graph, a warning says so once, and the layer runs as it is.
    """
    layer._compiled_call_impl = _CompiledCall(layer)


def cast_once(layer: RefinementLayer) -> RefinementLayer:
    """What a decode applies in its steps in place of a layer: the same function, with the weights that it has now.

    Under autocast, eager code casts each weight once for a batch, but compiled code in every step. Therefore the
    steps without a gradient of a compiled layer get a copy of it, whose linear layers have been cast beforehand. The
    cast is done in each call of this function, so that it is part of what a CUDA graph records.
    """
    call, parameter = layer._compiled_call_impl, next(layer.parameters(), None)
    if not isinstance(call, _CompiledCall) or parameter is None or torch.is_grad_enabled():
        return layer
    device = parameter.device
    if not torch.is_autocast_enabled(device.type):
        return layer
    return call.cast(device, torch.get_autocast_dtype(device.type))


class _CompiledCall:
    """What a compiled layer calls in place of its forward."""

    def __init__(self, layer: RefinementLayer, original: RefinementLayer | None = None):
        """
        Args:
            original: if the layer is a cast copy, the layer of which it is one, to be used where the copy fails.
        """
        self._layer, self._original = layer, original
        self._compiled = torch.compile(layer._call_impl, fullgraph=True, dynamic=True)
        self._copies: dict[tuple[torch.device, torch.dtype], RefinementLayer] = {}
        self.works = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # as part of a larger graph
            return self._layer._call_impl(*args, **kwargs)
        # A copy may also fail because something in it needs float32. If the reason is another, the original fails too.
        expected = TorchDynamoException if self._original is None else RuntimeError
        if self.works:
            try:
                return self._compiled(*args, **kwargs)
            except expected as error:  # what the code generator raises is a TorchDynamoException, too
                self.works = False
                if self._original is None:
                    reason = str(error).strip().split("\n")[0]
                    logger.warning("%s cannot be compiled and runs as it is: %s", type(self._layer).__name__, reason)
                    self._layer._compiled_call_impl = None
        return (self._layer if self._original is None else self._original)(*args, **kwargs)

    def cast(self, device: torch.device, dtype: torch.dtype) -> RefinementLayer:
        """A copy of the layer with linear layers of this dtype, or the layer itself if its copy has failed before."""
        found = self._copies.get((device, dtype))
        if found is None:
            found = self._copies[device, dtype] = _cast_copy(self._layer, dtype)
        if not found._compiled_call_impl.works:
            return self._layer
        with torch.no_grad():
            torch._foreach_copy_(_tensors(found), _tensors(self._layer))
        return found


def _cast_copy(layer: RefinementLayer, dtype: torch.dtype) -> RefinementLayer:
    """A compiled copy of a layer, whose linear layers hold their weights in a dtype."""
    with torch.inference_mode(False):  # in which no later call could write to the copy outside of it
        found = copy.deepcopy(layer).requires_grad_(False)
        for module in found.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
            elif isinstance(module, nn.MultiheadAttention):  # its output layer is an nn.Linear
                module.in_proj_weight.data = module.in_proj_weight.to(dtype)
                module.in_proj_bias.data = module.in_proj_bias.to(dtype)
    found._compiled_call_impl = _CompiledCall(found, original=layer)
    return found


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]
