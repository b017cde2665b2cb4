"""What the decoders ask of a refinement layer, and the registry from which configs choose one by name."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..contract import check_refined, construct
from ..structures import Features, Prediction, QueryState, count_images

REFINEMENT_LAYER_REGISTRY = Registry("REFINEMENT_LAYER")
REFINEMENT_LAYER_REGISTRY.__doc__ = """
Refinement layers, subclasses of RefinementLayer. One name serves both f and the initialization layer g, which are two
objects with their own weights. A registered object is called as `obj(cfg, input_shapes, initialization)`: the
ShapeSpecs of the pyramid's levels, finest first, and True if g is wanted, False for f. docs/extending.md has a complete
example.
"""

CLASS_PRIOR = 0.01  # the probability with which every class starts


class RefinementLayer(nn.Module, ABC):
    """The map y -> f(x, y) that refines the queries y of an image with features x (Eq. 4), and its read-out.

    A subclass needs `forward`, for one state of each image, and `predict`. Training supervises S points of an image's
    solving path at once; `refine_segments` then calls `forward` once for each of the S, which is right for any layer.
    A layer whose forward can do all of them in one call, without a copy of the features, is faster if it says so with
    `accepts_segments = True`.

    The two flags below make promises about `forward`. A subclass of AdaMixerLayer or SparseRCNNLayer inherits them: if
    it overrides `forward`, it must set those to False that its own does not keep.
    """

    # True: forward also takes S * B rows with the features of B images. Row s * B + b is the state s of image b: first
    # all images' first states, then all images' second states, and so on.
    accepts_segments = False
    # True: forward also accepts inf and nan: it raises no error, and they do not change the results of the other rows.
    # Then plain iteration without damping need not test each state before it hands it on, which saves time.
    accepts_nonfinite = False

    def __call__(self, state: QueryState, features: Features) -> QueryState:
        """As `forward`, whose result is checked.

        Raises:
            UserError: `forward` returned another object or other shapes.
        """
        refined = super().__call__(state, features)
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # the check is no part of a graph
            check_refined(self, state, refined)
        return refined

    def prepare(self, features: Features) -> Features:
        """Compute once what all steps on these images read of their features; by default nothing.

        The decoders call it once for a batch, and hand what it returns to `forward` in every step. A layer that has
        something to compute returns PreparedFeatures, and `forward` should take both these and a plain list of levels.
        """
        return features

    @abstractmethod
    def forward(self, state: QueryState, features: Features) -> QueryState:
        """Refine the queries once.

        Read only a detached position in everything but the refinement of the box itself, so that a gradient reaches the
        given position through the refined one alone. The decoders rely on that: they treat f as a map of the content.

        Args:
            state: B rows of N queries.
            features: the pyramid, for each level a tensor (B, C, H_l, W_l), finest first; or what `prepare` made of it.

        Returns:
            The refined queries, in the shapes of `state`.
        """

    @abstractmethod
    def predict(self, state: QueryState) -> Prediction:
        """Class logits (B, N, K) and boxes (B, N, 4) of a state that this layer returned."""

    def refine_segments(self, states: QueryState, features: Features) -> QueryState:
        """Refine S states of each image, each with the features of its own image.

        Args:
            states: S * B rows; row s * B + b is the state s of image b.
            features: as in `forward`, of B images.
        """
        segments = len(states.content) // count_images(features)
        if segments == 1 or self.accepts_segments:
            return self(states, features)
        return QueryState.cat([self(segment, features) for segment in states.chunk(segments)])


def set_class_prior(classifier: nn.Linear) -> None:
    """Set the bias so that every class starts near the probability CLASS_PRIOR (RetinaNet, Sec. 4.1)."""
    nn.init.constant_(classifier.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))


def build_refinement_layer(cfg: CfgNode, input_shapes: list[ShapeSpec], *, initialization: bool) -> RefinementLayer:
    """Build the layer that MODEL.DEQDET.REFINEMENT_LAYER names, as g if `initialization` is True, else as f."""
    layer = look_up(REFINEMENT_LAYER_REGISTRY, "MODEL.DEQDET.REFINEMENT_LAYER", cfg.MODEL.DEQDET.REFINEMENT_LAYER)
    arguments = cfg, input_shapes, initialization
    return construct(layer, arguments, RefinementLayer, {"forward": 2, "predict": 1, "prepare": 1})


def look_up(registry: Registry, key: str, name: str) -> Any:
    """The object that a registry has under a name.

    Args:
        key: the config key that holds the name, for the error.

    Raises:
        ValueError: the registry does not have it; the message lists what it has.
    """
    if name not in registry:
        raise ValueError(
            f"{key} is {name!r}: it must be one of {', '.join(known for known, _ in registry)} (a layer, decoder or "
            "solver of your own must be imported first: give its module with --plugin)"
        )
    return registry.get(name)
