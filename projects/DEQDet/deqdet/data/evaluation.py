"""COCO's evaluation of a checked data set, with results under the ids of the user's own file."""

import json
import os
from pathlib import Path

from detectron2.evaluation import COCOEvaluator

from .cache import write_json

RESULTS_NAME = "coco_instances_results.json"


class OriginalIdsEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, whose results file has the ids that the user's annotation file has.

    A checked set may number images and categories anew, where their own ids are not usable; see `checking`.
    """

    def _eval_predictions(self, predictions: list[dict], img_ids: list | None = None) -> None:
        super()._eval_predictions(predictions, img_ids)
        if self._output_dir:
            self._restore_ids(Path(self._output_dir, RESULTS_NAME))

    def _restore_ids(self, path: Path) -> None:
        dataset = self._coco_api.dataset
        images, categories = (
            {record["id"]: record["original_id"] for record in dataset[key] if "original_id" in record}
            for key in ("images", "categories")
        )
        if not images and not categories:
            return
        results = json.loads(path.read_text())
        for result in results:
            result["image_id"] = images.get(result["image_id"], result["image_id"])
            result["category_id"] = categories.get(result["category_id"], result["category_id"])
        write_json(path, results)


def build_coco_evaluator(dataset_name: str, output_dir: str, *, apart: bool) -> COCOEvaluator:
    """The evaluator of box AP with at most 100 detections for each image.

    Args:
        output_dir: the folder of the detections.
        apart: write them into a folder of the set's name within it, so that several sets do not overwrite each other.
    """
    if apart:
        output_dir = os.path.join(output_dir, dataset_name.replace(os.sep, "_"))
    return OriginalIdsEvaluator(dataset_name, output_dir=output_dir)
