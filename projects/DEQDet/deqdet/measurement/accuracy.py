"""COCO's AP of detections, for any choice of one step of each image."""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from typing import Protocol

from tqdm import tqdm

from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from ..data import EVALUATORS, OriginalIdsEvaluator
from ..errors import UserError


@dataclass(frozen=True)
class Accuracy:
    """COCO's box AP, 0 to 100. A figure is None where it has no value, such as APs on a set without small objects."""

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None


class Detected(Protocol):
    """An image with what was found in it after several steps, such as a steps.ImagePath."""

    image_id: int
    detections: Mapping[int, Instances]


class Evaluation:
    """Compares detections with the annotations of a data set. Only the images that are given count."""

    def __init__(self, dataset: str, *, max_detections: int):
        """
        Args:
            dataset: the name of a registered data set.
            max_detections: the most detections that the model returns for an image (TEST.DETECTIONS_PER_IMAGE). Above
                COCO's limit of 100, AP counts as many, as it does in a training.

        Raises:
            UserError: it is not in COCO's format.
        """
        if not MetadataCatalog.get(dataset).get("json_file"):
            raise UserError(f"{dataset} of DATASETS.TEST is not in COCO format, which this evaluation needs")
        self._dataset = dataset
        with _quiet():
            self._evaluator = OriginalIdsEvaluator(
                dataset, output_dir=None, max_detections=max_detections, library=EVALUATORS[0]
            )

    def __call__(self, paths: Sequence[Detected], choices: Sequence[tuple[int, ...]]) -> list[Accuracy]:
        """Evaluate the detections of B images once for each choice of steps.

        Args:
            choices: each has the step of each image, (B,). Equal choices are evaluated once.

        Raises:
            UserError: the data set has no annotations.
        """
        distinct = tqdm(dict.fromkeys(choices), desc="evaluations", leave=False, disable=None)
        known = {choice: self._evaluate(paths, choice) for choice in distinct}
        return [known[choice] for choice in choices]

    def _evaluate(self, paths: Sequence[Detected], choice: tuple[int, ...]) -> Accuracy:
        self._evaluator.reset()
        for path, step in zip(paths, choice, strict=True):
            self._evaluator.process([{"image_id": path.image_id}], [{"instances": path.detections[step]}])
        with _quiet():
            results = self._evaluator.evaluate(img_ids=[path.image_id for path in paths])
        if "bbox" not in results:
            raise UserError(f"{self._dataset} of DATASETS.TEST has no annotations: choose a set that has some")
        metrics = {field.name: results["bbox"][field.name] for field in fields(Accuracy)}
        return Accuracy(**{name: value if math.isfinite(value) else None for name, value in metrics.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what detectron2 and pycocotools print about every evaluation."""
    logger = logging.getLogger("detectron2.evaluation.coco_evaluation")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
