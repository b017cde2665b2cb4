"""Compile a refinement layer with torch.compile, and fall back to the eager layer where that fails."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import exc
from torch._dynamo.exc import TorchDynamoException

from ..structures import is_traced
from .base import RefinementLayer

logger = logging.getLogger(__name__)

# torch.compile makes a new graph for each new kind of input. Beyond a limit, it raises one of these exceptions.
_LIMIT_REACHED = tuple(
    getattr(exc, name) for name in ("FailOnRecompileLimitHit", "FailOnCacheLimitHit") if hasattr(exc, name)
)
_Key = tuple[torch.device, torch.dtype]  # where a copy is, and the dtype of its linear layers


def compile_layer(layer: RefinementLayer) -> None:
    """Compile a layer's forward into one graph for images of any size, when it is first called.

    The layer's parameters keep their names. If the layer cannot be compiled, because there is no compiler or because
    its code does not form a single graph, it logs one warning and runs eagerly.
    """
    layer._compiled_call_impl = _CompiledCall(layer)


def is_compiled(layer: RefinementLayer) -> bool:
    """Return True if compile_layer was called for this layer and compilation has not failed so far.

    Compilation is first attempted when the layer is first called.
    """
    call = layer._compiled_call_impl
    return isinstance(call, _CompiledCall) and call.works


def cast_once(layer: RefinementLayer, device: torch.device) -> RefinementLayer:
    """Return the layer that a decode should apply in its steps: the same function with the current weights.

    Under autocast, eager code casts each weight once for a batch, but compiled code casts it again in every step.
    Therefore, at test time, this function returns a copy of a compiled layer whose linear layers have been cast
    beforehand. Every call casts them anew, so that a CUDA graph records the cast. The copy is kept for the next decode.
    It follows changes of the layer's parameters and buffers, but does not get hooks that are added to the layer later.

    Args:
        device: the device of the layer.
    """
    call = layer._compiled_call_impl
    if not isinstance(call, _CompiledCall) or layer.training or torch.is_grad_enabled():
        return layer
    if is_traced() or not torch.is_autocast_enabled(device.type):
        return layer
    return call.cast(device, torch.get_autocast_dtype(device.type))


class CompiledFunction:
    """A function that is compiled into one graph, for tensors of any size, when it is first called.

    If it cannot be compiled, it logs one warning and runs eagerly. It also runs eagerly for inputs that would need more
    graphs than torch.compile keeps for a function, and under torch.jit.trace, which cannot look into compiled code.
    """

    def __init__(self, function: Callable, name: str):
        """
        Args:
            name: the function's name in the warning.
        """
        self.works = True
        self._function, self._name = function, name
        self._compiled = _compile(function, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.works and not is_traced():
            try:
                return self._compiled(*args, **kwargs)
            except TorchDynamoException as error:  # errors of the code generator are subclasses of it
                self.works = False
                logger.warning("%s cannot be compiled and runs eagerly: %s", self._name, _reason(error))
        return self._function(*args, **kwargs)


class _CompiledCall(CompiledFunction):
    """The function that a compiled layer calls in place of its forward."""

    def __init__(self, layer: RefinementLayer):
        super().__init__(layer._call_impl, type(layer).__name__)
        self._layer = layer
        self._copies: dict[_Key, _CastCopy] = {}
        self._broken: set[_Key] = set()  # the keys for which a copy does not work

    def cast(self, device: torch.device, dtype: torch.dtype) -> RefinementLayer:
        """Return a copy of the layer with linear layers of this dtype, or the layer itself if that does not work."""
        key = device, dtype
        if key in self._broken or not self.works:
            return self._layer
        if key not in self._copies or not self._copies[key].is_current():
            try:
                found = _CastCopy(self._layer, dtype)
            except Exception as error:  # a user's layer may hold objects that cannot be copied
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
            except RuntimeError as error:  # some operation may need float32
                self._give_up(key, error)
        return self._layer(*args, **kwargs)

    def _give_up(self, key: _Key, error: Exception) -> None:
        self._broken.add(key)
        text = "The compiled %s casts its weights to %s in every step, because a copy that is cast beforehand fails: %s"
        logger.info(text, self._name, key[1], _reason(error))


def _compile(function: Callable, name: str) -> Callable:
    """Compile a function, without an error when torch.compile's limit of graphs is reached.

    From then on, a call uses one of the existing graphs if it fits the inputs, and runs the function eagerly otherwise.
    """
    compiled, begun, full = torch.compile(function, fullgraph=True, dynamic=True), False, False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun, full
        if not begun:
            begun = True
            logger.info("Compiling %s, which can take some seconds, or in training some minutes", name)
        if not full:
            try:
                return compiled(*args, **kwargs)
            except _LIMIT_REACHED:
                full = True
                text = "%s runs eagerly for inputs that fit none of its compiled graphs: torch.compile has reached its "
                logger.warning(text + "limit of graphs (torch._dynamo.config.recompile_limit)", name)
        if not hasattr(torch.compiler, "set_stance"):  # before PyTorch 2.6
            return function(*args, **kwargs)
        with torch.compiler.set_stance("eager_on_recompile"):
            return compiled(*args, **kwargs)

    return call


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


class _CastCopy:
    """A copy of a layer, with its linear layers cast to another dtype; all other tensors are shared with the layer."""

    def __init__(self, layer: RefinementLayer, dtype: torch.dtype):
        # All parameters, buffers and modules of the layer, as (the dict that holds it, its name, its value).
        self._parts = [
            (parts, name, value)
            for module in layer.modules()
            for parts in (module._parameters, module._buffers, module._modules)
            for name, value in parts.items()
        ]
        self._sources = _linear_tensors(layer)
        cast = {id(x) for x in self._sources}
        shared = {id(x): x for x in (*layer.parameters(), *layer.buffers()) if id(x) not in cast}
        with torch.inference_mode(False):  # a copy made in inference mode could not be updated outside of it
            self.layer = copy.deepcopy(layer, shared)
            self._targets = _linear_tensors(self.layer)
            for x in self._targets:
                x.requires_grad_(False).data = x.to(dtype)

    def is_current(self) -> bool:
        """Whether the layer still has the same parts; replacing a module or moving to another device changes them."""
        return all(parts.get(name) is value for parts, name, value in self._parts)

    def update(self) -> None:
        """Copy the current values of the linear layers, cast to the copy's dtype."""
        if self._targets:
            with torch.no_grad():
                torch._foreach_copy_(self._targets, self._sources)


def _linear_tensors(layer: nn.Module) -> list[Tensor]:
    linear = [x for x in layer.modules() if isinstance(x, (nn.Linear, nn.MultiheadAttention))]
    return [tensor for module in linear for tensor in module.parameters(recurse=False)]
