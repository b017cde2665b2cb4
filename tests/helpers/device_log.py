"""What a computation on the CPU would do to a GPU: where the host would wait, which tensors would be on the wrong side.

A DeviceLog pretends that the tensors of a model are on a GPU. Tensors that the code makes without a device, those given
as `host`, and what is computed of them alone, count as the host's. Two modes of torch watch: one sees the calls of
Python, such as .cpu(), .tolist() or torch.tensor(), and the other one the operations that reach a device, among them
those of the backward pass.
"""

import re
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.paths import ROOT

# Operations whose result's size, or whose Python result, depends on values on the device.
WAITING = re.compile(r"aten\.(_local_scalar_dense|nonzero|masked_select|_?unique\w*|equal|is_nonzero|bincount)$")
# None of these starts a kernel.
FREE = re.compile(
    r"aten\.(empty\w*|new_empty\w*|detach|alias|lift_fresh|_unsafe_view|_reshape_alias|sym_\w+|promote_types)$"
)
TO_HOST = {"cpu", "numpy", "tolist", "__array__"}
FACTORIES = {torch.arange, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace, torch.rand,
             torch.randn, torch.tensor, torch.as_tensor, torch.from_numpy}  # fmt: skip
TRANSFER = "structures.py", "move"  # the function whose copies do not make the host wait


class DeviceLog:
    """with DeviceLog(host=...) as log: ...; then log.waits, log.mixed and log.launches."""

    def __init__(self, host: Iterable[Tensor] = ()):
        self.waits: list[str] = []  # "file.py:line operation"
        self.mixed: list[str] = []  # the same, of operations on tensors of both sides
        self.launches = Counter()  # operations that start a kernel, by name
        for tensor in host:
            tensor.on_host = True

    def __enter__(self) -> "DeviceLog":
        self._stack = ExitStack()
        self._stack.enter_context(patch.object(torch, "from_numpy", _from_numpy))  # modes do not see it
        self._stack.enter_context(_Dispatched(self))
        self._stack.enter_context(_Called(self))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @property
    def count(self) -> int:
        return sum(self.launches.values())


def _from_numpy(array: np.ndarray, original=torch.from_numpy) -> Tensor:
    result = original(array)
    result.on_host = True
    return result


def _on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "on_host", False)


def _tensors(*parts) -> list[Tensor]:
    return [x for x in tree_leaves(parts) if isinstance(x, Tensor)]


def _where(operation: object) -> str:
    """The innermost line of this repository, helpers and an environment within it left out."""
    others = ("helpers", "site-packages")
    stack = [f for f in traceback.extract_stack() if str(ROOT) in f.filename]
    frames = [f for f in stack if not any(part in f.filename for part in others)]
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} {operation}" if frames else str(operation)


def _in_transfer() -> bool:
    return any(f.filename.endswith(TRANSFER[0]) and f.name == TRANSFER[1] for f in traceback.extract_stack())


class _Called(TorchFunctionMode):
    def __init__(self, log: DeviceLog):
        super().__init__()
        self.log = log

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = _tensors(args, kwargs)
        result = func(*args, **kwargs)
        if func in FACTORIES and not given:
            if kwargs.get("device") is None:
                result.on_host = True
            elif func in (torch.tensor, torch.as_tensor):
                self.log.waits.append(_where(f"{name} from Python numbers"))
        elif name in TO_HOST and not _on_host(args[0]):
            self.log.waits.append(_where(name))
            if isinstance(result, Tensor):
                result = result.clone()
                result.on_host = True
        elif name == "to" and _on_host(args[0]) and any(isinstance(x, torch.device) for x in (*args, *kwargs.values())):
            if not _in_transfer():
                self.log.waits.append(_where("copy to the device from memory that is not pinned"))
            result = args[0].clone()
        elif name == "__setitem__" and not isinstance(args[2], Tensor) and _tensors(args[1]):
            self.log.waits.append(_where("a number written through an index tensor"))
        elif given and name not in ("__get__", "__set__"):
            sides = {_on_host(x) for x in given if x.dim() > 0}
            if sides == {True, False} and name not in ("copy_",):
                self.log.mixed.append(_where(name))
            if sides == {True} or (not sides and all(map(_on_host, given))):
                for tensor in _tensors(result):
                    tensor.on_host = True
        return result


class _Dispatched(TorchDispatchMode):
    def __init__(self, log: DeviceLog):
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = _tensors(args, kwargs)
        if not (given and all(map(_on_host, given))):
            self._see(func, args, kwargs)
        return func(*args, **kwargs)

    def _see(self, func, args, kwargs) -> None:
        name = str(func.overloadpacket)
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and not FREE.match(name):
            self.log.launches[name] += 1
        waits = bool(WAITING.match(name))
        if name in ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"):
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if name == "aten.prod":  # its gradient looks for zeros
            waits = args[0].requires_grad
        if name == "aten.repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits:
            self.log.waits.append(_where(name))
