"""Refinement layers, by name in REFINEMENT_LAYER_REGISTRY."""

from .adamixer import AdaMixerLayer
from .base import (
    REFINEMENT_LAYER_REGISTRY,
    RefinementLayer,
    build_refinement_layer,
    look_up,
    set_class_prior,
)
from .compiled import CompiledFunction, cast_once, compile_layer, is_compiled
from .sparse_rcnn import SparseRCNNLayer

__all__ = [
    "REFINEMENT_LAYER_REGISTRY",
    "AdaMixerLayer",
    "CompiledFunction",
    "RefinementLayer",
    "SparseRCNNLayer",
    "build_refinement_layer",
    "cast_once",
    "compile_layer",
    "is_compiled",
    "look_up",
    "set_class_prior",
]
