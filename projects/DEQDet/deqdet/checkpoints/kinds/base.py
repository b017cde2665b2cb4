"""What tells one kind of checkpoint from another."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..renaming import Rule


def _unchanged(name: str, value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint: how to recognise it, how its names become ours, and what its shapes do not show."""

    name: str
    sign: str  # a shell pattern that one of its keys matches; the first kind with a match is the guess
    rules: Callable[[Collection[str]], list[Rule]]  # for a file with these keys
    dead: tuple[str, ...] = ()  # shell patterns of keys that nothing uses
    backbone_only: bool = False
    may_lack: tuple[str, ...] = ()  # shell patterns of our names: weights that start anew if the file lacks them
    config: Mapping[str, object] = field(default_factory=dict)  # what the kind implies, whatever its shapes
    resnet_config: Mapping[str, object] = field(default_factory=dict)  # the same, if its backbone is a ResNet
    convert: Callable[[str, Tensor], Tensor] = _unchanged  # our name and their value -> our value
    notes: tuple[str, ...] = ()  # what a user should know
