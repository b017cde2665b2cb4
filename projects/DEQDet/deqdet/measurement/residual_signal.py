"""Measure whether the residual at the last step predicts how reliable a result is, compared with the confidence.

The detector runs on each image, clean and corrupted. Three signals are compared: the relative residual of the whole
state, that of the contents of the confident queries, and the mean score. A good signal ranks images by their AP, and
right detections before wrong ones.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detectron2.structures import Instances

from ..data import mix_seed
from ..detector import DEQDet
from .accuracy import Accuracy, Evaluation
from .corruptions import BATCHES, CLEAN, CONDITIONS, CORRUPTIONS, Condition, corrupt
from .duplicates import count_confident
from .json_numbers import finite_or_none
from .rank_statistics import Estimate, correlate, correlate_given, estimate, separate
from .verdicts import RIGHT, VERDICTS, name_mistakes

# The signals, with their signs chosen so that a higher value should mean a better result.
SIGNALS = ("residual", "residual of detections", "confidence")


@dataclass(frozen=True)
class Observation:
    """One image under one condition, with its detections and the signals."""

    image_id: int
    condition: Condition
    detections: dict[int, Instances]  # step -> detections in the pixels of the original image, on the CPU
    residual: float  # of the whole state
    content_residual: float  # of the contents of the confident queries together
    confidence: float  # mean score of the confident detections
    query_residuals: Tensor  # (D,) float64, of the content of each confident detection's query


@torch.no_grad()
def observe(model: DEQDet, batches: Iterable[list[dict]], *, steps: int) -> Iterator[Observation]:
    """Run the detector on each image under all conditions, with a fixed number of steps and the decoder's own solver.

    If no detection is confident, content_residual and confidence are those of the best detection.

    Args:
        model: in evaluation mode; its decoder must return the last iterate, not the best one.
        batches: detectron2's inputs with "image_id", as from a test loader.

    Raises:
        UserError: the decoder has no equilibrium.
    """
    for inputs in (inputs for batch in batches for inputs in batch):
        seed = mix_seed(inputs["image_id"])
        for conditions in BATCHES:
            changed = [inputs | {"image": _corrupted(model, inputs["image"], x, seed)} for x in conditions]
            walk = model.walk(changed, steps=steps, rtol=0.0, record=[steps], record_iterates=True)
            found, residuals = walk.detections(steps), walk.trajectory.solution.residuals[-1]
            iterate, output = walk.trajectory.application(steps)
            for row, (condition, instances) in enumerate(zip(conditions, found, strict=True)):
                sure = instances[: max(1, count_confident(instances))]
                before, after = (x.content[row, sure.queries].double().cpu() for x in (iterate, output))
                yield Observation(
                    image_id=inputs["image_id"],
                    condition=condition,
                    detections={steps: instances.to("cpu")},
                    residual=_finite(float(residuals[row])),
                    content_residual=_finite(float(_relative(before.flatten(), after.flatten()))),
                    confidence=float(sure.scores.mean()) if len(sure) else 0.0,
                    query_residuals=_relative(before, after)[: count_confident(instances)],
                )


def _corrupted(model: DEQDet, image: Tensor, condition: Condition, seed: int) -> Tensor:
    if model.input_format == "BGR":  # lower_contrast computes grey from RGB
        return corrupt(image.flip(0), condition, seed=seed).flip(0)
    return corrupt(image, condition, seed=seed)


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """Compute ||after - before|| / ||after|| along the last dimension; inf where this is NaN."""
    quotient = torch.linalg.vector_norm(after - before, dim=-1) / torch.linalg.vector_norm(after, dim=-1)
    return quotient.nan_to_num(nan=math.inf, posinf=math.inf)


def _finite(residual: float) -> float:
    """Replace NaN, the worst residual, by inf."""
    return math.inf if math.isnan(residual) else residual


@dataclass(frozen=True)
class ImageRows:
    """The columns of a table with one row for each image under each condition, n rows in total."""

    image: np.ndarray  # (n,) the id
    condition: np.ndarray  # (n,) index into CONDITIONS
    residual: np.ndarray  # (n,) inf where the states became infinite or NaN
    content_residual: np.ndarray  # (n,)
    confidence: np.ndarray  # (n,)
    AP: np.ndarray  # (n,) of the image alone, 0 to 100; NaN for an image without objects

    def signals(self) -> dict[str, np.ndarray]:
        """Return the signals by name, with signs so that a higher value should mean a higher AP."""
        return dict(zip(SIGNALS, (-self.residual, -self.content_residual, self.confidence), strict=True))


@dataclass(frozen=True)
class DetectionRows:
    """The columns of a table with one row for each confident detection that is not in a crowd, n rows in total."""

    image: np.ndarray  # (n,) the id
    condition: np.ndarray  # (n,) index into CONDITIONS
    image_residual: np.ndarray  # (n,) of the whole state of its image
    residual: np.ndarray  # (n,) of the content of its query
    score: np.ndarray  # (n,)
    verdict: np.ndarray  # (n,) one of VERDICTS

    @property
    def right(self) -> np.ndarray:
        """Whether each detection is right, (n,) bool."""
        return self.verdict == RIGHT

    def signals(self) -> dict[str, np.ndarray]:
        """Return the signals by name, with signs so that a higher value should mean a right detection."""
        return dict(zip(SIGNALS, (-self.image_residual, -self.residual, self.score), strict=True))


def tabulate_images(
    observations: Sequence[Observation], evaluation: Evaluation, truths: Mapping[int, Instances], steps: int
) -> ImageRows:
    """Compute the AP of each single image, and collect all numbers in columns.

    COCO's AP of a single image is the mean over the classes of its objects. It ignores detections of other classes.
    """

    def alone(x: Observation) -> float:
        if not len(x.detections[steps]) and not truths[x.image_id].gt_crowd.all():
            return 0.0  # detectron2 returns no AP without detections
        (accuracy,) = evaluation([x], [(steps,)])
        return math.nan if accuracy.AP is None else accuracy.AP

    return ImageRows(
        image=np.array([x.image_id for x in observations]),
        condition=np.array([CONDITIONS.index(x.condition) for x in observations]),
        residual=np.array([x.residual for x in observations]),
        content_residual=np.array([x.content_residual for x in observations]),
        confidence=np.array([x.confidence for x in observations]),
        AP=np.array([alone(x) for x in observations]),
    )


def tabulate_detections(
    observations: Sequence[Observation], truths: Mapping[int, Instances], steps: int
) -> DetectionRows:
    """Judge all confident detections, and collect all numbers in columns."""
    rows = [
        (x.image_id, CONDITIONS.index(x.condition), x.residual, residual, score, verdict)
        for x in observations
        for residual, score, verdict in zip(
            x.query_residuals.tolist(),
            x.detections[steps].scores.tolist(),  # the confident ones come first
            name_mistakes(x.detections[steps], truths[x.image_id]),
            strict=False,
        )
        if verdict is not None
    ]
    image, condition, image_residual, residual, score, verdict = zip(*rows, strict=True) if rows else ((),) * 6
    return DetectionRows(
        image=np.array(image, dtype=np.int64),
        condition=np.array(condition, dtype=np.int64),
        image_residual=np.array(image_residual, dtype=np.float64),
        residual=np.array(residual, dtype=np.float64),
        score=np.array(score, dtype=np.float64),
        verdict=np.array(verdict, dtype=np.str_),
    )


@dataclass(frozen=True)
class VerdictCell:
    """The detections of one verdict."""

    count: int
    residual: float | None  # median, of the content of their queries; None without detections, or if infinite


@dataclass(frozen=True)
class ConditionRow:
    """All images under one condition."""

    corruption: str
    strength: float
    accuracy: Accuracy  # of all images together
    residual: float | None  # median over the images; None if it is infinite
    content_residual: float | None  # median
    confidence: float  # median
    precision: float | None  # percent of the confident detections that are right
    correlations: dict[str, float | None]  # Spearman's, of each signal with the AP of the image


@dataclass(frozen=True)
class GroupRow:
    """The images of several conditions, pooled."""

    name: str
    images: int  # number of images with objects, once for each condition
    correlations: dict[str, Estimate]  # Spearman's, of each signal with the AP of the image
    image_partial: float | None  # of the residual with AP, given the confidence
    right: int  # number of right confident detections
    wrong: int  # number of wrong ones
    separations: dict[str, Estimate]  # probability that a right detection has the higher signal than a wrong one
    detection_partial: float | None  # rank correlation of the query's residual with being right, given the score
    verdicts: dict[str, VerdictCell]


def make_groups() -> dict[str, tuple[Condition, ...]]:
    """Return the conditions that each group pools, by the name of the group."""
    alike = {name: tuple(x for x in CONDITIONS if x.corruption == name) for name in CORRUPTIONS}
    return {"clean": (CLEAN,), **alike, "all": CONDITIONS}


def summarize_condition(
    condition: Condition, images: ImageRows, detections: DetectionRows, accuracy: Accuracy
) -> ConditionRow:
    """Summarise one condition, given the columns of all conditions."""
    index = CONDITIONS.index(condition)
    mine, known = images.condition == index, (images.condition == index) & ~np.isnan(images.AP)
    right = detections.right[detections.condition == index]
    medians = [float(np.median(x[mine])) for x in (images.residual, images.content_residual, images.confidence)]
    return ConditionRow(
        corruption=condition.corruption,
        strength=condition.strength,
        accuracy=accuracy,
        residual=finite_or_none(medians[0]),
        content_residual=finite_or_none(medians[1]),
        confidence=medians[2],
        precision=100 * float(right.mean()) if len(right) else None,
        correlations={
            name: finite_or_none(correlate(signal[known], images.AP[known]))
            for name, signal in images.signals().items()
        },
    )


def summarize_group(
    name: str, conditions: Sequence[Condition], images: ImageRows, detections: DetectionRows
) -> GroupRow:
    """Summarise one group of conditions, given the columns of all conditions."""
    indices = [CONDITIONS.index(condition) for condition in conditions]
    known = np.isin(images.condition, indices) & ~np.isnan(images.AP)
    mine = np.isin(detections.condition, indices)
    right, AP = detections.right[mine], images.AP[known]
    correlations = {
        key: estimate(correlate, images.image[known], signal[known], AP) for key, signal in images.signals().items()
    }
    separations = {
        key: estimate(separate, detections.image[mine], signal[mine], right)
        for key, signal in detections.signals().items()
    }
    return GroupRow(
        name=name,
        images=int(known.sum()),
        correlations=correlations,
        image_partial=finite_or_none(correlate_given(-images.residual[known], AP, images.confidence[known])),
        right=int(right.sum()),
        wrong=int((~right).sum()),
        separations=separations,
        detection_partial=finite_or_none(
            correlate_given(-detections.residual[mine], right.astype(float), detections.score[mine])
        ),
        verdicts={x: _verdict_cell(detections.residual[mine & (detections.verdict == x)]) for x in VERDICTS},
    )


def _verdict_cell(residuals: np.ndarray) -> VerdictCell:
    return VerdictCell(len(residuals), finite_or_none(float(np.median(residuals))) if len(residuals) else None)
