"""Tries a decoder or layer of the user's own before the training, so that no fault is found only after it."""

import torch
from torch import Tensor, nn

from detectron2.utils.events import EventStorage

from ..contract import check_decoded, check_trajectory, describe
from ..decoders import EquilibriumDecoder, Trajectory
from ..detector import DEQDet
from ..equilibrium import relative_residual
from ..errors import UserError

# Rounding changes a state by about 1e-6 with the size of its batch, and by up to 1e-2 in 16 bits. The features of
# another image change it by more.
_LARGEST_DIFFERENCE = 5e-2
_SIDES = (256, 384)  # height and width of the images, so that the coarsest level has some cells


@torch.no_grad()
def try_own_parts(model: nn.Module) -> None:
    """Decode two images of noise, if the decoder or its layer is not one of the package.

    Training calls neither `decode` nor `walk`. The trial finds wrong results of both, and a layer that accepts segments
    but mixes up the rows or the features, as far as the weights at the start of the training show it.

    Raises:
        UserError: one of them does not fit; the message names it.
    """
    if not isinstance(model, DEQDet):
        return
    layer = model.decoder.execution().refinement
    if not (_is_own(model.decoder) or _is_own(layer)):
        return
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    images = [{"image": 255 * torch.rand(3, *_SIDES, generator=generator)} for _ in range(2)]
    with EventStorage(), model.autocast():  # a layer may log something
        features, initial = model.encode(model.preprocess(images))
        check_decoded(model.decoder, model.decoder.decode(initial, features), len(images), model.criterion.num_classes)
        if model.decoder.has_equilibrium:
            trajectory = check_trajectory(model.decoder, model.decoder.walk(initial, features, steps=1), Trajectory)
            if layer.accepts_segments and isinstance(model.decoder, EquilibriumDecoder):
                _try_segments(trajectory)
    model.train(training)


def _differ(one: Tensor, other: Tensor) -> bool:
    return not relative_residual(one, other).max() <= _LARGEST_DIFFERENCE


def _is_own(part: object) -> bool:
    return not type(part).__module__.startswith(f"{__name__.partition('.')[0]}.")


def _try_segments(trajectory: Trajectory) -> None:
    """Compare the refinement of two states of each image at once with that of one after the other.

    A layer that also differs from itself, because it is random or returns NaN, is not judged.
    """
    states = [trajectory.start.pack(trajectory.units), trajectory.solution.value]
    apart, again = (torch.cat([trajectory.refine(state) for state in states]) for _ in range(2))
    together = trajectory.refine(torch.cat(states))
    if not _differ(apart, again) and _differ(apart, together):
        raise UserError(
            f"{describe(trajectory.refinement)} sets accepts_segments = True, but its forward refines two states of "
            "each image differently at once than one after the other: it must take row s * B + b as state s of image "
            "b, with the features of image b, or set accepts_segments = False"
        )
