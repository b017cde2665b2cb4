"""COCO's evaluation of a checked data set, with results under the ids in the user's own file."""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from detectron2.evaluation import COCOEvaluator, coco_evaluation

from ..atomic import write_text
from ..errors import UserError
from ..extras import how_to_install
from .coco_file import find_original_ids

RESULTS_NAME = "coco_instances_results.json"
EVALUATORS = ("pycocotools", "faster-coco-eval")  # TEST.EVALUATOR
COCO_LIMIT = 100  # detections of an image in COCO's own AP, the largest of its maxDets
# The metrics that detectron2 takes from COCO's summary, each as (IoU threshold, index of the range of areas).
_METRICS = {"AP": (None, 0), "AP50": (0.5, 0), "AP75": (0.75, 0), "APs": (None, 1), "APm": (None, 2), "APl": (None, 3)}


class OriginalIdsEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, but the results file has the ids of the user's own annotation file.

    The check of a data set renumbers images and categories whose ids cannot be used; see `checking`.
    """

    def __init__(self, dataset_name: str, *, output_dir: str | None, max_detections: int = COCO_LIMIT, library: str):
        """
        Args:
            dataset_name: a registered and checked data set.
            output_dir: the folder of the results file; None: none is written.
            max_detections: the number of detections per image that count. If it is above 100, it applies to every AP,
                and "AP@100" is added, COCO's AP of the best 100 detections per image.
            library: one of EVALUATORS.

        Raises:
            UserError: the library is missing.
        """
        # Otherwise, detectron2 would use its own fast implementation whenever its C++ code is compiled. If a user's
        # function loads the set, detectron2 converts it to a COCO file; one that an earlier process left may hold the
        # boxes of other records, so it is not reused.
        super().__init__(dataset_name, output_dir=output_dir, use_fast_impl=False, allow_cached_coco=False)
        if max_detections > COCO_LIMIT:
            self._max_dets_per_image = [1, 10, COCO_LIMIT, max_detections]
        self._evaluation = None
        if library == "faster-coco-eval":
            coco, self._evaluation = import_faster_coco_eval()
            self._coco_api = coco(self._coco_api.dataset)

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        with _evaluating_with(self._evaluation):
            super()._eval_predictions(predictions, img_ids)
        if self._output_dir:
            self._restore_ids(Path(self._output_dir, RESULTS_NAME))

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None) -> dict:
        if coco_eval is None:
            results = super()._derive_coco_results(None, iou_type, class_names)
            return results | ({f"AP@{COCO_LIMIT}": float("nan")} if len(self._max_dets_per_image) > 3 else {})
        if len(self._max_dets_per_image) == 3:
            return super()._derive_coco_results(coco_eval, iou_type, class_names)
        # The libraries differ in which of the limits in maxDets their summary uses, so it is recomputed here. The AP
        # per class, which detectron2 computes, already uses the last limit.
        precision, thresholds = coco_eval.eval["precision"], coco_eval.params.iouThrs
        at_100 = _mean_precision(precision[..., self._max_dets_per_image.index(COCO_LIMIT)], thresholds, None, 0)
        at_100 = 100 * at_100 if at_100 >= 0 else float("nan")
        coco_eval.stats[:6] = [_mean_precision(precision[..., -1], thresholds, *metric) for metric in _METRICS.values()]
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        self._logger.info(
            "AP counts %d detections of an image; with COCO's %d it is %.3f",
            self._max_dets_per_image[-1], COCO_LIMIT, at_100,
        )  # fmt: skip
        return {**results, f"AP@{COCO_LIMIT}": at_100}

    def _restore_ids(self, path: Path) -> None:
        images, categories = find_original_ids(self._coco_api.dataset)
        if not images and not categories:
            return
        results = json.loads(path.read_text())
        for result in results:
            result["image_id"] = images.get(result["image_id"], result["image_id"])
            result["category_id"] = categories.get(result["category_id"], result["category_id"])
        write_text(json.dumps(results), path)


def _mean_precision(precision: np.ndarray, thresholds: np.ndarray, iou: float | None, area: int) -> float:
    """Return COCO's average precision, the mean of the entries other than -1, in 0 to 1; -1 if there are none.

    Args:
        precision: (T, R, K, A) for T IoU thresholds, R recalls, K classes and A ranges of areas.
        thresholds: (T,) the IoU thresholds.
        iou: the only threshold to use; None for all of them.
        area: index of the range of areas.
    """
    chosen = precision[:, :, :, area] if iou is None else precision[np.isclose(thresholds, iou), :, :, area]
    chosen = chosen[chosen > -1]
    return float(chosen.mean()) if chosen.size else -1.0


def import_faster_coco_eval() -> tuple[Callable, Callable]:
    """Import the classes COCO and COCOeval_faster of the package faster-coco-eval.

    Raises:
        UserError: it is not installed.
    """
    try:
        coco = importlib.import_module("faster_coco_eval.core.coco").COCO
        return coco, importlib.import_module("faster_coco_eval.core.faster_eval_api").COCOeval_faster
    except ImportError as error:
        raise UserError(
            f"TEST.EVALUATOR is faster-coco-eval, which is not installed: {how_to_install('fast-eval')}, or choose "
            "pycocotools"
        ) from error


@contextmanager
def _evaluating_with(evaluation: Callable | None) -> Iterator[None]:
    """Make detectron2's COCOEvaluator use another class in place of COCOeval; it has no argument for that."""
    original = coco_evaluation.COCOeval
    coco_evaluation.COCOeval = evaluation or original
    try:
        yield
    finally:
        coco_evaluation.COCOeval = original


def build_coco_evaluator(
    dataset_name: str,
    output_dir: str,
    *,
    apart: bool,
    max_detections: int = COCO_LIMIT,
    library: str = EVALUATORS[0],
) -> COCOEvaluator:
    """Build the evaluator of box AP.

    Args:
        dataset_name: a registered and checked data set.
        output_dir: the folder of the detections.
        apart: write them into a subfolder named after the set, so that several sets do not overwrite each other.
        max_detections, library: see OriginalIdsEvaluator.

    Raises:
        UserError: the library is missing.
    """
    if apart:
        output_dir = os.path.join(output_dir, dataset_name.replace(os.sep, "_"))
    return OriginalIdsEvaluator(dataset_name, output_dir=output_dir, max_detections=max_detections, library=library)
