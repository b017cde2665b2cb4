"""The interface of a refinement layer, and the registry in which configs name one."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from ..contract import check_refined, construct, segments_together
from ..structures import Features, Prediction, QueryState, count_images, is_traced

REFINEMENT_LAYER_REGISTRY = Registry("REFINEMENT_LAYER")
REFINEMENT_LAYER_REGISTRY.__doc__ = """
Refinement layers, subclasses of RefinementLayer. The same name builds both f and the initialization layer g, which are
two objects with their own weights. A registered object is called as `obj(cfg, input_shapes, initialization)`, with the
ShapeSpecs of the pyramid's levels, finest first, and True to build g or False to build f. docs/extending.md has a
complete example.
"""

CLASS_PRIOR = 0.01  # the probability that an untrained layer gives every class


class RefinementLayer(nn.Module, ABC):
    """The map y -> f(x, y) that refines the queries y of an image with features x (Eq. 4), and its read-out.

    A subclass implements `forward`, for one state of each image, and `predict`. Training supervises S points of an
    image's solving path at once. By default `refine_segments` calls `forward` once for each of the S, which works for
    any layer. A layer whose `forward` can handle all of them in one call, without copying the features, should set
    `accepts_segments = True`, which is faster.

    The two flags below are promises about `forward`. A subclass of AdaMixerLayer or SparseRCNNLayer inherits them: if
    its own `forward` does not keep a promise, it must set the flag to False.
    """

    # True: forward also takes S * B rows with the features of B images. Row s * B + b is the state s of image b: first
    # all images' first states, then all images' second states, and so on.
    accepts_segments = False
    # True: forward also accepts inf and nan: they raise no error and do not change the results of other rows. Plain
    # iteration then does not check each state before the next step, which saves time.
    accepts_nonfinite = False

    def __call__(self, state: QueryState, features: Features) -> QueryState:
        """Call `forward` and check the type of its result, and its shapes, dtypes and device.

        Raises:
            UserError: `forward` returned another object, or tensors unlike those of its input.
        """
        refined = super().__call__(state, features)
        if not is_traced():  # keep the check out of graphs
            check_refined(self, state, refined)
        return refined

    def prepare(self, features: Features) -> Features:
        """Precompute whatever every step needs from the features of these images; by default nothing.

        The decoders call it once for a batch, and pass its result to `forward` in every step. A layer that precomputes
        something returns PreparedFeatures; its `forward` should accept both these and a plain list of levels.
        """
        return features

    @abstractmethod
    def forward(self, state: QueryState, features: Features) -> QueryState:
        """Refine the queries once.

        Detach the position wherever it is read, except where the box itself is refined, so that the refined position
        alone passes gradient to the given one. The decoders rely on that: they treat f as a map of the content.

        Args:
            state: B rows of N queries.
            features: the pyramid, for each level a tensor (B, C, H_l, W_l), finest first; or the result of `prepare`.

        Returns:
            The refined queries, in the shapes and dtypes of `state`, and on its device. They may be bfloat16 or float16
            in place of float32, as under autocast; then `predict` must accept that too.
        """

    @abstractmethod
    def predict(self, state: QueryState) -> Prediction:
        """Read class logits (B, N, K) and boxes (B, N, 4) out of a state that this layer returned."""

    def refine_segments(self, states: QueryState, features: Features) -> QueryState:
        """Refine S states of each image, each with the features of its own image.

        Args:
            states: S * B rows; row s * B + b is state s of image b.
            features: the features of B images, as for `forward`.

        Raises:
            UserError: `accepts_segments` is True, but `forward` fails on several states of each image.
        """
        segments = len(states.content) // count_images(features)
        if segments == 1:
            return self(states, features)
        if self.accepts_segments:
            with segments_together(self, states, features):
                return self(states, features)
        return QueryState.cat([self(segment, features) for segment in states.chunk(segments)])


def set_class_prior(classifier: nn.Linear) -> None:
    """Set the bias so that every class starts at about the probability CLASS_PRIOR (RetinaNet, Sec. 4.1)."""
    nn.init.constant_(classifier.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))


def build_refinement_layer(cfg: CfgNode, input_shapes: list[ShapeSpec], *, initialization: bool) -> RefinementLayer:
    """Build the layer that MODEL.DEQDET.REFINEMENT_LAYER names, as g if `initialization` is True, else as f."""
    layer = look_up(REFINEMENT_LAYER_REGISTRY, "MODEL.DEQDET.REFINEMENT_LAYER", cfg.MODEL.DEQDET.REFINEMENT_LAYER)
    arguments = cfg, input_shapes, initialization
    return construct(layer, arguments, RefinementLayer, {"forward": 2, "predict": 1, "prepare": 1})


def look_up(registry: Registry, key: str, name: str) -> Any:
    """Return the object that is registered under a name.

    Args:
        key: the config key that holds the name, for the error message.

    Raises:
        ValueError: the name is not registered; the message lists the registered names.
    """
    if name not in registry:
        raise ValueError(
            f"{key} is {name!r}: it must be one of {', '.join(known for known, _ in registry)} (a layer, decoder or "
            "solver of your own must be imported first: give its module with --plugin)"
        )
    return registry.get(name)
