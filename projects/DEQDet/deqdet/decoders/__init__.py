"""Decoders: from initial queries and features to predictions, by name in DECODER_REGISTRY.

Each has the same methods: `supervise` for training, `decode` for inference, `execution` for its cost; a decoder with an
equilibrium also has `walk`.
"""

from .base import DECODER_REGISTRY, Decoder, Execution, build_decoder, compile_refinement, prepare_features
from .equilibrium import EquilibriumDecoder, Supervision
from .graphs import DecodingGraphs, record_cuda_graph
from .iteration import iterate, packed_map
from .recurrent import RecurrentDecoder
from .solvers import SOLVER_REGISTRY, build_solver, suggest_keys
from .stacked import StackedDecoder
from .trajectory import ResidualParts, Trajectory

__all__ = [
    "DECODER_REGISTRY",
    "SOLVER_REGISTRY",
    "Decoder",
    "DecodingGraphs",
    "EquilibriumDecoder",
    "Execution",
    "RecurrentDecoder",
    "ResidualParts",
    "StackedDecoder",
    "Supervision",
    "Trajectory",
    "build_decoder",
    "build_solver",
    "compile_refinement",
    "iterate",
    "packed_map",
    "prepare_features",
    "record_cuda_graph",
    "suggest_keys",
]
