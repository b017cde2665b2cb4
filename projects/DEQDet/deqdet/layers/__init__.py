"""Refinement layers, by name in REFINEMENT_LAYER_REGISTRY."""

from .adamixer import AdaMixerLayer
from .base import (
    REFINEMENT_LAYER_REGISTRY,
    RefinementLayer,
    build_refinement_layer,
    look_up,
    set_class_prior,
)
from .compiled import compile_layer
from .sparse_rcnn import SparseRCNNLayer

__all__ = [
    "REFINEMENT_LAYER_REGISTRY",
    "AdaMixerLayer",
    "RefinementLayer",
    "SparseRCNNLayer",
    "build_refinement_layer",
    "compile_layer",
    "look_up",
    "set_class_prior",
]
