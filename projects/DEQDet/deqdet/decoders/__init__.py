"""Decoders: from initial queries and features to predictions, by name in DECODER_REGISTRY.

Each has the same two methods: `supervise` for training and `decode` for inference.
"""

from .base import DECODER_REGISTRY, build_decoder
from .equilibrium import EquilibriumDecoder, Supervision
from .recurrent import RecurrentDecoder
from .solvers import SOLVER_REGISTRY, build_solver
from .stacked import StackedDecoder

__all__ = [
    "DECODER_REGISTRY",
    "SOLVER_REGISTRY",
    "EquilibriumDecoder",
    "RecurrentDecoder",
    "StackedDecoder",
    "Supervision",
    "build_decoder",
    "build_solver",
]
