"""Count the objects that several queries find, and measure how similar the contents of such queries are.

Without NMS, a detector must distinguish its queries: of those that attend to the same object, one must score high and
the others low. If two queries converge to the same state, nothing distinguishes them, and the object is found twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Protocol

import torch
from torch import Tensor

from detectron2.layers import batched_nms
from detectron2.structures import Instances, pairwise_iou

from ..data import read_truths
from ..detector import DEQDet
from .accuracy import Detected, Evaluation

CONFIDENT = 0.3  # minimum score of a detection that counts
SAME_OBJECT = 0.5  # minimum IoU of a detection with the object that it finds
NMS = 0.6  # IoU above which NMS drops the lower-scoring of two detections of the same class


# Heading, field of Duplicates, format.
DUPLICATE_COLUMNS = (
    ("duplicates (%)", "doubled", ".1f"),
    ("distance", "distance", ".2g"),
    ("AP, NMS", "AP_nms", ".1f"),
)
DUPLICATES_NOTE = (
    "duplicates: the share of the found objects that several queries find. An object is found by a detection of its "
    f"class with a score of at least {CONFIDENT:g} and an IoU of at least {SAME_OBJECT:g}. distance: 2 ||a - b|| / "
    "(||a|| + ||b||) of the contents a, b of two queries that find the same object, median over the pairs; near 0, "
    f"nothing distinguishes them. AP, NMS: AP after NMS with IoU {NMS:g} within each class."
)


class DetectedWithDistances(Detected, Protocol):
    """The detections in one image, and the distances between the contents of their queries."""

    distances: Mapping[int, Tensor]  # step -> (D, D), see `content_distances`; empty if the states are unknown


@dataclass(frozen=True)
class Seen:
    """The detections in one image by step; `see_images` stores the final ones under step 0."""

    image_id: int
    detections: dict[int, Instances]
    distances: dict[int, Tensor]


@dataclass(frozen=True)
class Duplicates:
    """How often a detector finds an object more than once. A field is None if there is nothing to count."""

    found: int  # objects that at least one confident detection of their class finds
    doubled: float | None  # percent of these objects that two or more detections find
    distance: float | None  # between the contents of two queries that find the same object: median over all pairs
    AP_nms: float | None  # COCO's box AP, 0 to 100, after NMS


class DuplicateCounter:
    """Counts the duplicates among the detections in a data set."""

    def __init__(self, dataset: str, evaluation: Evaluation):
        """
        Args:
            dataset: the name of a registered data set.
            evaluation: the evaluation on that data set.
        """
        self._truths = read_truths(dataset)
        self._evaluation = evaluation

    def __call__(self, images: Sequence[DetectedWithDistances], step: int) -> Duplicates:
        """Count the duplicates after a number of steps.

        Args:
            images: with the detections and distances of that step.

        Raises:
            UserError: the data set has no annotations.
        """
        found, doubled, distances = 0, 0, []
        for image in images:
            for finders in find_objects(image.detections[step], self._truths[image.image_id]):
                found += bool(finders)
                doubled += len(finders) > 1
                if image.distances:
                    distances += [float(image.distances[step][i, j]) for i, j in combinations(finders, 2)]
        suppressed = [Seen(image.image_id, {step: suppress(image.detections[step])}, {}) for image in images]
        (accuracy,) = self._evaluation(suppressed, [(step,) * len(images)])
        return Duplicates(
            found=found,
            doubled=100 * doubled / found if found else None,
            distance=median(distances) if distances else None,
            AP_nms=accuracy.AP,
        )


@torch.no_grad()
def see_images(model: DEQDet, batches: Iterable[list[dict]]) -> Iterator[Seen]:
    """Run the detector on each image, and measure the distances between the contents of its queries.

    Args:
        model: in evaluation mode. With a custom decoder that does not return its last state, there are no distances.
        batches: detectron2's inputs, as from a test loader.
    """
    for batch in batches:
        decoded, found = model.decode(batch)
        for row, (inputs, instances) in enumerate(zip(batch, found, strict=True)):
            distances = {}
            if decoded.state is not None:
                distances[0] = content_distances(instances, decoded.state.content[row]).cpu()
            yield Seen(inputs["image_id"], {0: instances.to("cpu")}, distances)


def content_distances(found: Instances, content: Tensor) -> Tensor:
    """Measure the distances between the contents of the queries of confident detections.

    Args:
        found: the detections of an image with their scores and queries, best first.
        content: (N, C), of all queries of that image.

    Returns:
        (D, D), 2 ||a - b|| / (||a|| + ||b||) for each pair of the D confident detections; 0 for two zeros.
    """
    mine = content.double()[found.queries[: count_confident(found)]]
    norms = torch.linalg.vector_norm(mine, dim=1)
    total = norms[:, None] + norms
    differences = torch.linalg.vector_norm(mine[:, None] - mine, dim=2)
    return torch.where(total > 0, 2 * differences / total, 0.0)


def count_confident(found: Instances) -> int:
    """Count the detections with a score of at least CONFIDENT, which come first in the list."""
    return int((found.scores >= CONFIDENT).sum())


def find_objects(found: Instances, truth: Instances) -> list[list[int]]:
    """List the indices of the confident detections that find each object of an image, without crowds.

    A detection finds the object of its own class with the highest IoU, if this IoU is at least SAME_OBJECT. So it finds
    at most one object, and two detections of the same object come from two queries.

    Args:
        found: the detections of an image, best first.
        truth: its true boxes, as read_truth returns them.
    """
    truth = truth[~truth.gt_crowd]
    finders: list[list[int]] = [[] for _ in range(len(truth))]
    if not finders:
        return finders
    sure = found[: count_confident(found)]
    overlaps = pairwise_iou(sure.pred_boxes, truth.gt_boxes)
    overlaps = overlaps.where(sure.pred_classes[:, None] == truth.gt_classes, 0.0)
    for index, (overlap, best) in enumerate(zip(*(x.tolist() for x in overlaps.max(dim=1)), strict=True)):
        if overlap >= SAME_OBJECT:
            finders[best].append(index)
    return finders


def suppress(found: Instances) -> Instances:
    """Apply NMS within each class, and return the remaining detections, best first."""
    return found[batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, NMS)]
