"""COCO's AP of detections, where each image may be read out after a different number of steps."""

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from typing import Protocol

from tqdm import tqdm

from detectron2.data import MetadataCatalog
from detectron2.structures import Instances

from ..data import EVALUATORS, OriginalIdsEvaluator
from ..errors import UserError
from .json_numbers import finite_or_none


@dataclass(frozen=True)
class Accuracy:
    """COCO's box AP, 0 to 100. A field is None if it is undefined, such as APs on a data set without small objects."""

    AP: float | None
    AP50: float | None
    AP75: float | None
    APs: float | None
    APm: float | None
    APl: float | None


class Detected(Protocol):
    """The detections in one image after several numbers of steps, for example a steps.ImagePath."""

    image_id: int
    detections: Mapping[int, Instances]  # step -> detections


class Evaluation:
    """Compares detections with the annotations of a data set. Only the images of a call are evaluated."""

    def __init__(self, dataset: str, *, max_detections: int):
        """
        Args:
            dataset: the name of a registered data set.
            max_detections: the model's maximum number of detections per image (TEST.DETECTIONS_PER_IMAGE). It replaces
                COCO's limit of 100 where it is larger, as in the evaluations of a training run.

        Raises:
            UserError: the data set is not in COCO format.
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
            choices: each gives the step at which each image is read out, (B,). Equal choices are evaluated once.

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
        return Accuracy(**{name: finite_or_none(value) for name, value in metrics.items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output of detectron2 and pycocotools for each evaluation."""
    logger = logging.getLogger("detectron2.evaluation.coco_evaluation")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
