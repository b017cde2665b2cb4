"""Compare training gradients in lower precision with those in float32, for each part of the detector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data import seed_all
from ..detector import DEQDet
from ..errors import UserError
from ..matcher import Matches
from .tables import format_table

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = 2.0**16  # loss scale in float16: the initial value of GradScaler
# The prefixes of parameter names that belong to each part; the first match counts.
PARTS = {
    "backbone": ("backbone.bottom_up.",),
    "neck": ("backbone.",),
    "queries": ("queries.",),
    "g": ("decoder.initialization.",),
    "f": ("decoder.",),
}


@dataclass(frozen=True)
class Agreement:
    """How far two gradients of one part agree, with one entry per batch."""

    norms: list[float]  # of the gradient in float32
    ratios: list[float]  # norm in the lower precision / norm in float32
    cosines: list[float]  # of the angle between the two gradients


class _RepeatedMatches:
    """Calls the given matcher once, and returns the same matches in all later calls.

    In another precision, two predictions of nearly equal cost may swap their boxes. Their gradient is then that of a
    different, equally valid loss, and the comparison would say nothing about rounding.
    """

    def __init__(self, matcher: object):
        self._matcher = matcher
        self._matches: Matches | None = None

    def __call__(self, *args: object) -> Matches:
        if self._matches is None:
            self._matches = self._matcher(*args)
        return self._matches


def compare_gradients(
    model: DEQDet, batches: Sequence[list[dict]], precisions: Sequence[str] = tuple(PRECISIONS)
) -> dict[str, dict[str, Agreement]]:
    """Compare the gradients of the training loss on the same images, with the same noise and the same matches.

    The loss in float16 is scaled as torch's GradScaler does: by 2^16, which is halved until no gradient overflows. The
    weights do not change, but BatchNorm's running statistics do.

    Args:
        batches: with "image" and "instances", see DEQDet.forward.
        precisions: names of PRECISIONS.

    Returns:
        The agreement by precision and by part, for the parts with trainable parameters.

    Raises:
        UserError: the gradient is not finite at any scale.
    """
    model.train()
    found: dict[str, dict[str, Agreement]] = {name: {} for name in precisions}
    matcher = model.criterion.matcher
    try:
        for seed, batch in enumerate(batches):
            model.criterion.matcher = _RepeatedMatches(matcher)
            exact = _gradient(model, batch, seed, None)
            for name in precisions:
                rough = _gradient(model, batch, seed, PRECISIONS[name])
                for part, vector in exact.items():
                    agreement = found[name].setdefault(part, Agreement([], [], []))
                    agreement.norms.append(vector.norm().item())
                    agreement.ratios.append((rough[part].norm() / vector.norm()).item())
                    agreement.cosines.append(torch.cosine_similarity(rough[part], vector, dim=0).item())
    finally:
        model.criterion.matcher = matcher
        model.zero_grad()
    return found


def _gradient(model: DEQDet, batch: list[dict], seed: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Compute the gradient of each part as one float64 vector."""
    scale = SCALE if dtype == torch.float16 else 1.0
    while scale >= 1:
        model.zero_grad()
        seed_all(seed)
        with torch.autocast(model.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            losses = model(batch)
        (sum(losses.values()) * scale).backward()
        gradient = _by_part(model, scale)
        if all(vector.isfinite().all() for vector in gradient.values()):
            return gradient
        scale /= 2
    raise UserError(f"the gradient in {str(dtype or torch.float32).removeprefix('torch.')} is infinite or NaN")


def _by_part(model: DEQDet, scale: float) -> dict[str, Tensor]:
    vectors: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = next(part for part, starts in PARTS.items() if name.startswith(starts))
            vectors.setdefault(part, []).append(parameter.grad.double().flatten() / scale)
    return {part: torch.cat(vectors[part]) for part in PARTS if part in vectors}


def format_gradients(found: Mapping[str, Mapping[str, Agreement]]) -> str:
    """Format a table of the means over the batches, with the worst batch in parentheses."""
    rows = [["part", "precision", "norm in float32", "ratio of the norms", "cosine"]]
    for part in next(iter(found.values())):
        for precision, agreements in found.items():
            x = agreements[part]
            count, worst = len(x.norms), max(x.ratios, key=lambda ratio: abs(ratio - 1))
            ratio = f"{sum(x.ratios) / count:.3f} ({worst:.3f})"
            cosine = f"{sum(x.cosines) / count:.4f} ({min(x.cosines):.4f})"
            rows.append([part, precision, f"{sum(x.norms) / count:.3g}", ratio, cosine])
    return format_table(rows, names=2)
