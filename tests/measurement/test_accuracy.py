"""COCO's AP of detections after different steps, by hand."""

import json

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from deqdet.errors import UserError
from deqdet.measurement.accuracy import Evaluation

from helpers.engine_toy import write_dataset
from helpers.steps import make_path


def detect(*boxes: tuple[float, ...], scores: tuple[float, ...] = (0.9,)) -> Instances:
    found = {"pred_boxes": Boxes(torch.tensor(boxes)), "scores": torch.tensor(scores)}
    return Instances((16, 16), **found, pred_classes=torch.zeros(len(boxes), dtype=torch.int64))


class TestEvaluation:
    LEFT, RIGHT = (0.0, 0.0, 8.0, 16.0), (8.0, 0.0, 16.0, 16.0)

    @pytest.fixture
    def evaluation(self, tmp_path) -> Evaluation:
        """The toy's images 1 to 4 have one object each: left, right, left, right."""
        write_dataset(tmp_path, "steps")
        register_coco_instances(tmp_path.name, {"thing_classes": ["half"]}, f"{tmp_path}/boxes.json", str(tmp_path))
        DatasetCatalog.get(tmp_path.name)  # detectron2 learns the categories' ids
        return Evaluation(tmp_path.name, max_detections=100)

    def test_each_image_counts_with_its_own_step(self, evaluation, capfd):
        paths = [
            make_path(1, [1.0, 0.5], {1: detect(self.RIGHT, scores=(0.3,)), 2: detect(self.LEFT)}),
            make_path(2, [1.0, 0.5], {1: detect(self.RIGHT), 2: detect(self.LEFT, scores=(0.3,))}),
        ]
        first, second, mixed, wrong, again = evaluation(paths, [(1, 1), (2, 2), (2, 1), (1, 2), (1, 1)])
        # Of two objects the surer detection is right: precision 1 at the recalls 0, 0.01, ..., 0.5 of 101.
        assert first.AP == second.AP == pytest.approx(100 * 51 / 101)
        assert (mixed.AP, mixed.AP50, mixed.AP75, mixed.APs) == pytest.approx((100.0,) * 4)  # 8 x 16 px are small
        assert mixed.APm is None and mixed.APl is None
        assert wrong.AP == 0.0 and again == first
        assert capfd.readouterr().out == ""

    def test_equal_choices_are_evaluated_once(self, evaluation, monkeypatch):
        counted = []
        original = evaluation._evaluator.evaluate
        monkeypatch.setattr(evaluation._evaluator, "evaluate", lambda **ids: counted.append(ids) or original(**ids))
        paths = [make_path(3, [1.0, 1.0], {1: detect(self.LEFT), 2: detect(self.RIGHT)})]
        found = evaluation(paths, [(1,), (2,), (1,), (1,)])
        assert [accuracy.AP for accuracy in found] == pytest.approx([100.0, 0.0, 100.0, 100.0])
        assert counted == [{"img_ids": [3]}] * 2

    def test_sets_that_cannot_be_evaluated(self, tmp_path):
        with pytest.raises(UserError, match="no_such_set of DATASETS.TEST is not in COCO format"):
            Evaluation("no_such_set", max_detections=100)
        write_dataset(tmp_path, "bare")
        whole = json.loads((tmp_path / "boxes.json").read_text())
        del whole["annotations"]
        (tmp_path / "boxes.json").write_text(json.dumps(whole))
        register_coco_instances(tmp_path.name, {"thing_classes": ["half"]}, f"{tmp_path}/boxes.json", str(tmp_path))
        with pytest.raises(UserError, match="has no annotations"):
            Evaluation(tmp_path.name, max_detections=100)([make_path(1, [1.0], {1: detect(self.LEFT)})], [(1,)])

    @pytest.mark.parametrize("limit, ap", [(16, 100 * 67 / 101), (100, 100 * 67 / 101), (150, 100.0), (300, 100.0)])
    def test_as_many_detections_count_as_the_model_may_return(self, tmp_path, capfd, limit, ap):
        """All of 150 objects are found. COCO's limit leaves 100: precision 1 at the recalls 0, 0.01, ..., 0.66."""
        corners = [(26.0 * (i % 15), 26.0 * (i // 15)) for i in range(150)]
        annotations = [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [*corner, 20, 20], "area": 400, "iscrowd": 0}
            for i, corner in enumerate(corners)
        ]
        whole = {"images": [{"id": 1, "file_name": "0.png", "height": 400, "width": 400}], "annotations": annotations}
        (tmp_path / "boxes.json").write_text(json.dumps({**whole, "categories": [{"id": 1, "name": "half"}]}))
        register_coco_instances(tmp_path.name, {"thing_classes": ["half"]}, f"{tmp_path}/boxes.json", str(tmp_path))
        DatasetCatalog.get(tmp_path.name)
        found = detect(*((x, y, x + 20, y + 20) for x, y in corners), scores=tuple(1 - i / 200 for i in range(150)))
        (accuracy,) = Evaluation(tmp_path.name, max_detections=limit)([make_path(1, [1.0], {1: found})], [(1,)])
        assert (accuracy.AP, accuracy.AP50) == pytest.approx((ap, ap))
        assert capfd.readouterr().out == ""
