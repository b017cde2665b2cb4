"""Files of detections: whose image and class each one is, whatever the ids, and what is refused."""

import json

import pytest
import torch

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from deqdet import add_deqdet_config
from deqdet.data import find_results, prepare_datasets, read_results, read_truth
from deqdet.errors import UserError

from helpers.damaged_sets import make_set

pytestmark = pytest.mark.usefixtures("own_catalogs")


def register(s) -> str:
    s.save()
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.MODEL.DEQDET.NUM_CLASSES = 3
    cfg.DATASETS.REGISTER = [["mine", str(s.json_file), str(s.image_root)]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("mine",)
    prepare_datasets(cfg, eval_only=True)
    return "mine"


def detection(image_id=1, category_id=1, bbox=(10, 20, 30, 10), score=0.5) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


def read(s, tmp_path, *detections):
    (tmp_path / "found.json").write_text(json.dumps(detections))
    return read_results(tmp_path / "found.json", register(s))


def test_each_detection_goes_to_its_image_as_corners_the_surest_first(tmp_path):
    found = read(make_set(tmp_path / "set"), tmp_path,
                 detection(3, 1, score=0.25), detection(3, 2, (0, 1, 2, 3), 0.75), detection(2, 3))  # fmt: skip
    assert [len(x) for x in found] == [0, 1, 2, 0]
    assert found[2].pred_boxes.tensor.tolist() == [[0, 1, 2, 4], [10, 20, 40, 30]]
    assert found[2].scores.tolist() == [0.75, 0.25] and found[2].pred_classes.tolist() == [1, 0]
    assert found[0].image_size == (64, 96)


def test_ids_are_those_of_the_users_own_file(tmp_path):
    """Image ids 2, 3, 4 and "x" make the check number the images anew, so that its ids 2 to 4 mean others."""
    s = make_set(tmp_path / "set")
    new = {1: 2, 2: 3, 3: 4, 4: "x"}
    for image in s.images:
        image["id"] = new[image["id"]]
    for annotation in s.annotations:
        annotation["image_id"] = new[annotation["image_id"]]
        annotation["category_id"] = f"c{annotation['category_id']}"
    for category in s.data["categories"]:
        category["id"] = f"c{category['id']}"
    given = [detection(number, "c1", (i, 0, 5, 5), 0.5) for i, number in enumerate([2, 3, 4, "x"])]
    found = read(s, tmp_path, *given, detection("x", "c3", (9, 0, 5, 5), 0.25))
    corner = {}
    for record, instances in zip(DatasetCatalog.get("mine"), found, strict=True):
        corner[record["file_name"].rpartition("/")[2]] = instances.pred_boxes.tensor[:, 0].tolist()
    assert corner == {"1.png": [0], "2.png": [1], "3.png": [2], "4.png": [3, 9]}
    assert found[3].pred_classes.tolist() == [0, 2]


@pytest.mark.parametrize("content, words", [
    ("{", "found.json is not valid JSON"),
    ('{"image_id": 1}', "found.json is not a list of detections"),
    ("[7]", "detection 0 lacks one of image_id, category_id, bbox, score"),
    ([detection(), {"image_id": 1}], "detection 1 lacks one of"),
    ([detection(image_id=9)], "detection 0 has image_id 9, which the data set lacks: give the data set of these"),
    ([detection(image_id=[1])], r"detection 0 has image_id \[1\]"),
    ([detection(category_id=4)], "detection 0 has category_id 4, which the data set lacks"),
    ([detection(bbox=[1, 2, 3])], r"detection 0 has bbox \[1, 2, 3\] and score 0.5: five numbers are needed"),
    ([detection(score=None)], "and score None: five numbers are needed"),
    ([detection(score=float("nan"))], "and score nan: five numbers are needed"),
])  # fmt: skip
def test_what_is_refused(tmp_path, content, words):
    name = register(make_set(tmp_path / "set"))
    (tmp_path / "found.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_results(tmp_path / "found.json", name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="found.json cannot be read .No such file or directory."):
        read_results(tmp_path / "found.json", register(make_set(tmp_path / "set")))


def test_true_boxes_are_corners_and_crowds_are_marked():
    items = [{"bbox": [10, 20, 30, 10], "bbox_mode": 1, "category_id": 2, "iscrowd": 1},
             {"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": 0}]  # fmt: skip
    truth = read_truth({"height": 64, "width": 96, "annotations": items})
    assert truth.gt_boxes.tensor.tolist() == [[10, 20, 40, 30], [1, 2, 3, 4]]
    assert truth.gt_classes.tolist() == [2, 0] and truth.gt_crowd.tolist() == [True, False]
    none = read_truth({"height": 64, "width": 96})
    assert none.gt_boxes.tensor.shape == (0, 4) and none.gt_crowd.dtype == torch.bool


def test_where_an_evaluation_has_put_its_detections(tmp_path):
    assert find_results(tmp_path, "a") is None
    alone, own = (tmp_path / "inference" / part / "coco_instances_results.json" for part in ("", "a"))
    own.parent.mkdir(parents=True)
    alone.write_text("[]")
    assert find_results(tmp_path, "a") == alone
    own.write_text("[]")
    assert find_results(tmp_path, "a") == own
