"""Compiling a refinement layer, with the eager layer where that fails."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import exc
from torch._dynamo.exc import TorchDynamoException

from .base import RefinementLayer

logger = logging.getLogger(__name__)

# torch.compile makes another graph for each new kind of input, up to a limit, beyond which it raises one of these.
_LIMIT_REACHED = tuple(
    getattr(exc, name) for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit") if hasattr(exc, name)
)
_Key = tuple[torch.device, torch.dtype]  # where a copy is, and the dtype of its linear layers


def compile_layer(layer: RefinementLayer) -> None:
    """Let torch.compile make one graph of a layer's forward, for images of any size; it does so at the first call.

    The layer's parameters keep their names. Where the layer cannot be compiled, because there is no compiler or because
    its code has no single graph, a warning says so once, and the layer runs as it is.
    """
    layer._compiled_call_impl = _CompiledCall(layer)


def is_compiled(layer: RefinementLayer) -> bool:
    """Return True if compile_layer was called for this layer, and no attempt to compile it has failed so far.

    The first attempt is made when the layer is called for the first time.
    """
    call = layer._compiled_call_impl
    return isinstance(call, _CompiledCall) and call.works


def cast_once(layer: RefinementLayer, device: torch.device) -> RefinementLayer:
    """Return the layer that a decode should apply in its steps: the same function, with the weights of now.

    Under autocast, eager code casts each weight once for a batch, but compiled code in every step. Therefore the
    steps of a compiled layer at test time get a copy of it, whose linear layers have been cast beforehand. The cast is
    done in each call of this function, so that it is part of what a CUDA graph records. The copy is kept for the next
    decode. It follows the parameters and buffers of the layer, but not hooks that the layer gets later.

    Args:
        device: where the layer is.
    """
    call = layer._compiled_call_impl
    if not isinstance(call, _CompiledCall) or layer.training or torch.is_grad_enabled():
        return layer
    if _is_traced() or not torch.is_autocast_enabled(device.type):
        return layer
    return call.cast(device, torch.get_autocast_dtype(device.type))


class CompiledFunction:
    """A function that torch.compile makes one graph of, for tensors of any size, at its first call.

    If it cannot be compiled, a warning says so once, and the function runs without compilation. It also runs without
    compilation for inputs that would need more graphs than torch.compile keeps of a function, and under
    torch.jit.trace, which cannot look into compiled code.
    """

    def __init__(self, function: Callable, name: str):
        """
        Args:
            name: for the warning.
        """
        self.works = True
        self._function, self._name = function, name
        self._compiled = _compile(function, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.works and not _is_traced():
            try:
                return self._compiled(*args, **kwargs)
            except TorchDynamoException as error:  # what the code generator raises is one, too
                self.works = False
                logger.warning("%s cannot be compiled and runs as it is: %s", self._name, _reason(error))
        return self._function(*args, **kwargs)


class _CompiledCall(CompiledFunction):
    """What a compiled layer calls in place of its forward."""

    def __init__(self, layer: RefinementLayer):
        super().__init__(layer._call_impl, type(layer).__name__)
        self._layer = layer
        self._copies: dict[_Key, _CastCopy] = {}
        self._broken: set[_Key] = set()  # of which a copy does not work

    def cast(self, device: torch.device, dtype: torch.dtype) -> RefinementLayer:
        """A copy of the layer with linear layers of this dtype, or the layer itself if that does not work."""
        key = device, dtype
        if key in self._broken or not self.works:
            return self._layer
        if key not in self._copies or not self._copies[key].is_current():
            try:
                found = _CastCopy(self._layer, dtype)
            except Exception as error:  # a layer of the user's may hold anything
                self._give_up(key, error)
                return self._layer
            call = _compile(found.layer._call_impl, self._name)
            found.layer._compiled_call_impl = partial(self._call_copy, call, key)
            self._copies[key] = found
        self._copies[key].update()
        return self._copies[key].layer

    def _call_copy(self, compiled: Callable, key: _Key, *args: Any, **kwargs: Any) -> Any:
        if key not in self._broken:
            try:
                return compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # something in it may need float32
                self._give_up(key, error)
        return self._layer(*args, **kwargs)

    def _give_up(self, key: _Key, error: Exception) -> None:
        self._broken.add(key)
        text = "%s, compiled, casts its weights to %s in every step, since a copy cast beforehand does not work: %s"
        logger.info(text, self._name, key[1], _reason(error))


def _compile(function: Callable, name: str) -> Callable:
    """Compile a function so that torch.compile's limit of graphs is no error.

    Once the limit is reached, a call uses one of the graphs that exist if it fits the inputs, and runs the function
    uncompiled otherwise.
    """
    compiled, full = torch.compile(function, fullgraph=True, dynamic=True), False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal full
        if not full:
            try:
                return compiled(*args, **kwargs)
            except _LIMIT_REACHED:
                full = True
                text = "%s runs as it is where none of its graphs fits: torch.compile makes no more of them (see "
                logger.warning(text + "torch._dynamo.config.recompile_limit)", name)
        if not hasattr(torch.compiler, "set_stance"):  # before PyTorch 2.6
            return function(*args, **kwargs)
        with torch.compiler.set_stance("eager_on_recompile"):
            return compiled(*args, **kwargs)

    return call


def _is_traced() -> bool:
    """Whether torch.compile or torch.jit.trace records this call; it must then see operations and no compiled code."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _CastCopy:
    """A copy of a layer that shares all tensors with it but those of its linear layers, which it holds in a dtype."""

    def __init__(self, layer: RefinementLayer, dtype: torch.dtype):
        # Whatever the layer is made of: (where it stands, under which name, what it is).
        self._parts = [
            (parts, name, value)
            for module in layer.modules()
            for parts in (module._parameters, module._buffers, module._modules)
            for name, value in parts.items()
        ]
        self._sources = _linear_tensors(layer)
        cast = {id(x) for x in self._sources}
        shared = {id(x): x for x in (*layer.parameters(), *layer.buffers()) if id(x) not in cast}
        with torch.inference_mode(False):  # in which no later call could write to the copy outside of it
            self.layer = copy.deepcopy(layer, shared)
            self._targets = _linear_tensors(self.layer)
            for x in self._targets:
                x.requires_grad_(False).data = x.to(dtype)

    def is_current(self) -> bool:
        """Whether the layer is still made of what it was: a new module, and a move to a device, replace parts."""
        return all(parts.get(name) is value for parts, name, value in self._parts)

    def update(self) -> None:
        """Take over the values that the linear layers have now."""
        if self._targets:
            with torch.no_grad():
                torch._foreach_copy_(self._targets, self._sources)


def _linear_tensors(layer: nn.Module) -> list[Tensor]:
    linear = [x for x in layer.modules() if isinstance(x, (nn.Linear, nn.MultiheadAttention))]
    return [tensor for module in linear for tensor in module.parameters(recurse=False)]
