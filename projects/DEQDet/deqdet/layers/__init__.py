"""Refinement layers, by name in REFINEMENT_LAYER_REGISTRY."""

from .adamixer import AdaMixerLayer
from .base import (
    REFINEMENT_LAYER_REGISTRY,
    RefinementLayer,
    build_refinement_layer,
    look_up,
    set_class_prior,
)
from .compiled import cast_once, compile_layer
from .sparse_rcnn import SparseRCNNLayer

__all__ = [
    "REFINEMENT_LAYER_REGISTRY",
    "AdaMixerLayer",
    "RefinementLayer",
    "SparseRCNNLayer",
    "build_refinement_layer",
    "cast_once",
    "compile_layer",
    "look_up",
    "set_class_prior",
]
