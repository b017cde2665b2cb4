"""Whether the residual at the last step says how far to trust a result, beside the confidence.

Each image is detected clean and corrupted. Three signals are compared: the relative residual of the whole state, that
of the contents of the confident queries, and the mean score. For images the question is whether a signal ranks them as
their AP does, for detections whether it puts the right ones before the wrong ones.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_ioa, pairwise_iou

from ..data import mix_seed
from ..detector import DEQDet
from .accuracy import Accuracy, Evaluation
from .corruptions import BATCHES, CLEAN, CONDITIONS, CORRUPTIONS, Condition, corrupt
from .duplicates import SAME_OBJECT, count_confident

RESAMPLES = 500  # of the bootstrap
LEVEL = 0.95  # of its intervals
# The signals, each turned so that a higher value should mean a better result.
SIGNALS = ("residual", "residual of detections", "confidence")
RIGHT = "right"
VERDICTS = (RIGHT, "double", "class", "box", "nothing")  # see `judge`
NEAR = 0.1  # the lowest IoU with an object at which a detection is a bad box, not a detection of nothing


@dataclass(frozen=True)
class Observation:
    """One image under one condition, with its detections and the signals."""

    image_id: int
    condition: Condition
    detections: dict[int, Instances]  # step -> detections in the pixels of the original image, on the CPU
    residual: float  # of the whole state
    content_residual: float  # of the contents of the confident queries together
    confidence: float  # mean score of the confident detections
    query_residuals: Tensor  # (D,) float64, of the content of the query of each confident detection


@torch.no_grad()
def observe(model: DEQDet, batches: Iterable[list[dict]], *, steps: int) -> Iterator[Observation]:
    """Detect in each image under all conditions, with a fixed number of steps and the decoder's own solver.

    Where no detection is confident, the best one stands for the confident ones.

    Args:
        model: in evaluation mode; its decoder must return the last iterate, not the best one.
        batches: detectron2's inputs with "image_id", as a test loader gives them.

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
    if model.input_format == "BGR":  # what the contrast calls grey depends on the order of the channels
        return corrupt(image.flip(0), condition, seed=seed).flip(0)
    return corrupt(image, condition, seed=seed)


def _relative(before: Tensor, after: Tensor) -> Tensor:
    """||after - before|| / ||after|| along the last dimension; inf where that is no number."""
    quotient = torch.linalg.vector_norm(after - before, dim=-1) / torch.linalg.vector_norm(after, dim=-1)
    return quotient.nan_to_num(nan=math.inf, posinf=math.inf)


def _finite(residual: float) -> float:
    """The residual, where NaN counts as the largest one."""
    return math.inf if math.isnan(residual) else residual


@dataclass(frozen=True)
class Objects:
    """The annotated objects of an image."""

    boxes: Tensor  # (M, 4)  xyxy, pixels
    classes: Tensor  # (M,)
    crowd: Tensor  # (M,)  bool


def read_objects(dataset: str) -> dict[int, Objects]:
    """The objects of each image of a registered data set, by the image's id."""
    return {record["image_id"]: _objects(record.get("annotations", ())) for record in DatasetCatalog.get(dataset)}


def _objects(annotations: Sequence[dict]) -> Objects:
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    return Objects(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        classes=torch.tensor([x["category_id"] for x in annotations], dtype=torch.int64),
        crowd=torch.tensor([bool(x.get("iscrowd", 0)) for x in annotations], dtype=torch.bool),
    )


def judge(found: Instances, objects: Objects) -> list[str | None]:
    """Say of each confident detection whether it is right, and what is wrong with it otherwise.

    Best first, each takes the object of its class that it overlaps most among those not yet taken, if their IoU is
    SAME_OBJECT or more, and is "right". A wrong one is a "double" if its IoU with an object of its class that is taken
    is so large, has the wrong "class" if that holds for an object of another class, has a bad "box" if its IoU with any
    object is NEAR or more, and is a detection of "nothing" otherwise.

    Returns:
        One verdict for each; None for a detection that takes no object and lies in a crowd of its class, by COCO's rule
        that the intersection is then divided by the area of the detection.
    """
    sure = found[: count_confident(found)]
    same = sure.pred_classes[:, None] == objects.classes
    # detectron2's IoA divides by the area of the second box.
    inside = pairwise_ioa(Boxes(objects.boxes), sure.pred_boxes).T.where(same & objects.crowd, 0.0)
    overlaps = pairwise_iou(sure.pred_boxes, Boxes(objects.boxes)).where(~objects.crowd, 0.0)
    free = overlaps.where(same, 0.0)
    verdicts: list[str | None] = []
    for index in range(len(sure)):
        best = int(free[index].argmax()) if len(objects.classes) else None
        if best is not None and free[index, best] >= SAME_OBJECT:
            free[:, best] = 0.0  # taken
            verdicts.append(RIGHT)
        elif (inside[index] >= SAME_OBJECT).any():
            verdicts.append(None)
        elif (overlaps[index][same[index]] >= SAME_OBJECT).any():
            verdicts.append("double")
        elif (overlaps[index] >= SAME_OBJECT).any():
            verdicts.append("class")
        else:
            verdicts.append("box" if (overlaps[index] >= NEAR).any() else "nothing")
    return verdicts


@dataclass(frozen=True)
class ImageRows:
    """All images under all conditions: n rows of numbers."""

    image: np.ndarray  # (n,) the id
    condition: np.ndarray  # (n,) index into CONDITIONS
    residual: np.ndarray  # (n,) inf where the states became infinite or NaN
    content_residual: np.ndarray  # (n,)
    confidence: np.ndarray  # (n,)
    AP: np.ndarray  # (n,) of the image alone, 0 to 100; NaN for an image without objects

    def signals(self) -> dict[str, np.ndarray]:
        """The signals by name, turned so that a higher value should mean a higher AP."""
        return dict(zip(SIGNALS, (-self.residual, -self.content_residual, self.confidence), strict=True))


@dataclass(frozen=True)
class DetectionRows:
    """All confident detections of all images under all conditions, those in crowds left out: n rows of numbers."""

    image: np.ndarray  # (n,) the id
    condition: np.ndarray  # (n,) index into CONDITIONS
    image_residual: np.ndarray  # (n,) of the whole state of its image
    residual: np.ndarray  # (n,) of the content of its query
    score: np.ndarray  # (n,)
    verdict: np.ndarray  # (n,) one of VERDICTS

    @property
    def right(self) -> np.ndarray:
        """(n,) bool."""
        return self.verdict == RIGHT

    def signals(self) -> dict[str, np.ndarray]:
        """The signals by name, turned so that a higher value should mean a right detection."""
        return dict(zip(SIGNALS, (-self.image_residual, -self.residual, self.score), strict=True))


def tabulate_images(
    observations: Sequence[Observation], evaluation: Evaluation, objects: dict[int, Objects], steps: int
) -> ImageRows:
    """Compute the AP of each image alone, and put all numbers into columns.

    COCO's AP of one image is the mean over the classes of its objects. A wrong detection of another class does not
    count.
    """

    def alone(x: Observation) -> float:
        if not len(x.detections[steps]) and not objects[x.image_id].crowd.all():
            return 0.0  # detectron2 gives no AP where there are no detections
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
    observations: Sequence[Observation], objects: dict[int, Objects], steps: int
) -> DetectionRows:
    """Judge all confident detections, and put all numbers into columns."""
    rows = [
        (x.image_id, CONDITIONS.index(x.condition), x.residual, residual, score, verdict)
        for x in observations
        for residual, score, verdict in zip(
            x.query_residuals.tolist(),
            x.detections[steps].scores.tolist(),  # the confident ones come first
            judge(x.detections[steps], objects[x.image_id]),
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
class Estimate:
    """A statistic with its bootstrap interval. A figure is None where it has no value, as that of equal numbers."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class VerdictCell:
    """The detections of one verdict."""

    count: int
    residual: float | None  # of the content of their queries, median; None if there are none, or it is infinite


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
    correlations: dict[str, float | None]  # of each signal with the AP of the image: Spearman's


@dataclass(frozen=True)
class GroupRow:
    """The images of several conditions, pooled."""

    name: str
    images: int  # with objects, each condition counted
    correlations: dict[str, Estimate]  # of each signal with the AP of the image: Spearman's
    image_partial: float | None  # of the residual with AP, given the confidence
    right: int  # confident detections
    wrong: int
    separations: dict[str, Estimate]  # probability that a right detection has the higher signal than a wrong one
    detection_partial: float | None  # rank correlation of the query's residual with being right, given the score
    verdicts: dict[str, VerdictCell]


def make_groups() -> dict[str, tuple[Condition, ...]]:
    """The conditions that are pooled, by the name of the group."""
    alike = {name: tuple(x for x in CONDITIONS if x.corruption == name) for name in CORRUPTIONS}
    return {"clean": (CLEAN,), **alike, "all": CONDITIONS}


def summarize_condition(
    condition: Condition, images: ImageRows, detections: DetectionRows, accuracy: Accuracy
) -> ConditionRow:
    """Make the row of one condition from the columns of all."""
    index = CONDITIONS.index(condition)
    mine, known = images.condition == index, (images.condition == index) & ~np.isnan(images.AP)
    right = detections.right[detections.condition == index]
    medians = [float(np.median(x[mine])) for x in (images.residual, images.content_residual, images.confidence)]
    return ConditionRow(
        corruption=condition.corruption,
        strength=condition.strength,
        accuracy=accuracy,
        residual=_number(medians[0]),
        content_residual=_number(medians[1]),
        confidence=medians[2],
        precision=100 * float(right.mean()) if len(right) else None,
        correlations={
            name: _number(correlate(signal[known], images.AP[known])) for name, signal in images.signals().items()
        },
    )


def summarize_group(
    name: str, conditions: Sequence[Condition], images: ImageRows, detections: DetectionRows
) -> GroupRow:
    """Make the row of one group of conditions from the columns of all."""
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
        image_partial=_number(correlate_given(-images.residual[known], AP, images.confidence[known])),
        right=int(right.sum()),
        wrong=int((~right).sum()),
        separations=separations,
        detection_partial=_number(
            correlate_given(-detections.residual[mine], right.astype(float), detections.score[mine])
        ),
        verdicts={x: _verdict_cell(detections.residual[mine & (detections.verdict == x)]) for x in VERDICTS},
    )


def _verdict_cell(residuals: np.ndarray) -> VerdictCell:
    return VerdictCell(len(residuals), _number(float(np.median(residuals))) if len(residuals) else None)


def correlate(signal: np.ndarray, AP: np.ndarray) -> float:
    """Spearman's rank correlation, -1 to 1; NaN where all values of a column are equal, or there are fewer than two."""
    if len(AP) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(signal, AP).statistic)


def correlate_given(signal: np.ndarray, AP: np.ndarray, known: np.ndarray) -> float:
    """Spearman's partial rank correlation of signal and AP, given a signal that is known already.

    It is the correlation of what is left of the ranks of both when the part that is linear in the ranks of `known` has
    been taken away: (r_sa - r_sk r_ak) / sqrt((1 - r_sk^2) (1 - r_ak^2)).
    """
    r_sa, r_sk, r_ak = correlate(signal, AP), correlate(signal, known), correlate(AP, known)
    left = (1 - r_sk**2) * (1 - r_ak**2)
    return (r_sa - r_sk * r_ak) / math.sqrt(left) if left > 1e-12 else math.nan


def separate(signal: np.ndarray, right: np.ndarray) -> float:
    """The probability that a right detection has a higher signal than a wrong one, where a tie counts one half.

    It is the area under the ROC curve, by Mann and Whitney's U / (n1 n2): 1 if all right ones come first, 0.5 if the
    signal says nothing. NaN where there are no right or no wrong ones.
    """
    if right.all() or not right.any():
        return math.nan
    higher = stats.mannwhitneyu(signal[right], signal[~right], method="asymptotic").statistic
    return float(higher / (right.sum() * (~right).sum()))


def estimate(
    statistic: Callable[[np.ndarray, np.ndarray], float], image: np.ndarray, *columns: np.ndarray
) -> Estimate:
    """A statistic of the rows with its interval by the bootstrap over images.

    Whole images are drawn, with all their conditions and detections, because the rows of one image resemble each other.

    Args:
        image: (n,) the image of each row.
        columns: each (n,).
    """
    value = statistic(*columns)
    rows = [np.flatnonzero(image == i) for i in np.unique(image)]
    if math.isnan(value) or len(rows) < 2:
        return Estimate(_number(value), None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # a resample without a value: no interval
        interval = stats.bootstrap(
            (np.arange(len(rows)),),
            partial(_resampled, statistic, rows, columns),
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            vectorized=False,
            random_state=np.random.default_rng(0),
        ).confidence_interval
    return Estimate(value, _number(float(interval.low)), _number(float(interval.high)))


def _resampled(
    statistic: Callable, rows: Sequence[np.ndarray], columns: Sequence[np.ndarray], drawn: np.ndarray
) -> float:
    taken = np.concatenate([rows[index] for index in drawn])
    return statistic(*(column[taken] for column in columns))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
