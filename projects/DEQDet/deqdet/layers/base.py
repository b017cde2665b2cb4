"""What the decoders ask of a refinement layer, and the registry that config names choose from."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..structures import Prediction, QueryState

REFINEMENT_LAYER_REGISTRY = Registry("REFINEMENT_LAYER")
REFINEMENT_LAYER_REGISTRY.__doc__ = """
Refinement layers f, from which the initialization layer g is built as well, with its own weights. Called as
`obj(cfg, input_shapes, initialization)`: the pyramid's ShapeSpecs, finest first, and whether it is to be g.
"""


CLASS_PRIOR = 0.01  # the probability that every class starts with


class RefinementLayer(nn.Module, ABC):
    """y -> f(x, y), with the read-out of its predictions.

    The rows of a state may be a multiple S of the images: S * B rows, segment-major, all of one image's segments
    read that image's features. So many states are refined at once without a copy of the features.
    """

    @abstractmethod
    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        """One refinement (Eq. 4).

        Everything but the box refinement reads a detached position, so that gradients reach the given position
        through the refined one only.

        Args:
            state: S * B rows.
            features: per level (B, C, H_l, W_l), finest first.
        """

    @abstractmethod
    def predict(self, state: QueryState) -> Prediction:
        """Class logits and boxes of a state that this layer returned."""


def set_class_prior(classifier: nn.Linear) -> None:
    """Set the bias so that every class starts near CLASS_PRIOR (RetinaNet, Sec. 4.1)."""
    nn.init.constant_(classifier.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))


def build_refinement_layer(cfg: CfgNode, input_shapes: list[ShapeSpec], *, initialization: bool) -> RefinementLayer:
    """The layer that MODEL.DEQDET.REFINEMENT_LAYER names, as f or as g."""
    layer = look_up(REFINEMENT_LAYER_REGISTRY, "MODEL.DEQDET.REFINEMENT_LAYER", cfg.MODEL.DEQDET.REFINEMENT_LAYER)
    return layer(cfg, input_shapes, initialization)


def look_up(registry: Registry, key: str, name: str) -> Any:
    """The object that a config key names.

    Raises:
        ValueError: the registry does not have it.
    """
    if name not in registry:
        raise ValueError(f"{key} is {name!r}: it must be one of {', '.join(known for known, _ in registry)}")
    return registry.get(name)
