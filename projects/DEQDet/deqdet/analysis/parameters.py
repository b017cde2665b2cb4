"""Parameters of a model by module."""

from dataclasses import dataclass

from fvcore.nn import parameter_count
from torch import nn


@dataclass(frozen=True)
class Parameters:
    """How many numbers a model has to learn, or keeps frozen."""

    total: int
    modules: dict[str, int]  # by name, those without parameters left out


def count_parameters(model: nn.Module) -> Parameters:
    """Frozen parameters count too, shared ones once. FrozenBatchNorm2d has none: its numbers are buffers."""
    counts = parameter_count(model)
    modules = {name: counts[name] for name, _ in model.named_modules() if name and name in counts}
    return Parameters(counts[""], modules)
