"""Compiling a refinement layer, with the eager layer where that fails."""

import copy
import logging
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from ..structures import Features, PreparedFeatures, QueryState
from .base import RefinementLayer

logger = logging.getLogger(__name__)


def compile_layer(layer: RefinementLayer, *, repeated: bool = False, backend: str | Callable = "inductor") -> None:
    """Let torch.compile make one graph of a layer's forward, for images of any size; it does so at the first call.

    The layer's parameters keep their names. Where the layer cannot be compiled, because there is no compiler or because
    its code has no single graph, a warning says so once, and the layer runs as it is.

    Args:
        repeated: the layer is applied several times to the features of a batch. Under autocast its weights are then
            cast once for these features, and not in every step.
        backend: of torch.compile.
    """
    options = {"fullgraph": True, "dynamic": True, "backend": backend}
    layer.compile(**options)
    layer._compiled_call_impl = _CompiledCall(layer, _CastTwin(layer, options) if repeated else None)


class _CompiledCall:
    """What a compiled module calls in place of its forward."""

    def __init__(self, layer: RefinementLayer, twin: "_CastTwin | None"):
        self._layer, self._compiled, self._twin = layer, layer._compiled_call_impl, twin

    def __call__(self, state: QueryState, features: Features) -> QueryState:
        try:
            return self._choose(state, features)(state, features)
        except TorchDynamoException as error:  # what the code generator raises is one, too
            reason = str(error).strip().split("\n")[0]
            logger.warning("%s cannot be compiled and runs as it is: %s", type(self._layer).__name__, reason)
            self._layer._compiled_call_impl = None
            return self._layer(state, features)

    def _choose(self, state: QueryState, features: Features) -> Callable[[QueryState, Features], QueryState]:
        device = state.content.device.type
        if self._twin is None or torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
            return self._compiled
        if not isinstance(features, PreparedFeatures):  # a list is made anew, and says nothing about later steps
            return self._compiled
        return self._twin.compiled(features, torch.get_autocast_dtype(device))


class _CastTwin:
    """A copy of a layer whose linear layers have their weights in the type of autocast; the rest is the layer's own.

    In eager code, autocast casts a weight once and keeps the result, but a compiled graph casts it in every step.
    """

    def __init__(self, layer: RefinementLayer, options: dict[str, Any]):
        """
        Args:
            options: of torch.compile.
        """
        self._layer, self._options = layer, options
        self._twin: nn.Module | None = None
        self._dtype: torch.dtype | None = None
        self._made_of: list[Tensor] = []  # all tensors of the layer
        self._weights: list[Tensor] = []  # those that are cast
        self._cast: list[Tensor] = []
        self._features: Callable[[], PreparedFeatures | None] = lambda: None  # for which they were cast

    def compiled(self, features: PreparedFeatures, dtype: torch.dtype) -> nn.Module:
        """The compiled copy, with the weights that the layer had at the first step on these features."""
        if self._features() is not features or self._dtype != dtype:
            tensors = [*self._layer.parameters(), *self._layer.buffers()]
            if self._dtype != dtype or [*map(id, tensors)] != [*map(id, self._made_of)]:
                self._make(dtype)
                self._dtype, self._made_of = dtype, tensors
            torch._foreach_copy_(self._cast, self._weights)
            self._features = ref(features)
        return self._twin

    @torch.inference_mode(False)  # a tensor of inference mode could not be written to outside of it
    @torch.no_grad()
    def _make(self, dtype: torch.dtype) -> None:
        shared = {id(x): x for x in (*self._layer.parameters(), *self._layer.buffers())}
        self._twin = copy.deepcopy(self._layer, shared)  # without the compiled call, which modules do not copy
        self._weights, self._cast = [], []
        for module in self._twin.modules():
            if isinstance(module, nn.Linear | nn.MultiheadAttention):
                for name, weight in [*module.named_parameters(recurse=False)]:
                    self._weights.append(weight)
                    self._cast.append(nn.Parameter(weight.to(dtype), requires_grad=False))
                    module.register_parameter(name, self._cast[-1])
        self._twin.compile(**self._options)
