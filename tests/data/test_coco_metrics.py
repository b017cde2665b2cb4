"""AP with more than 100 detections of an image, and the two libraries that compute it."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from deqdet.data import EVALUATORS, build_coco_evaluator
from deqdet.errors import UserError
from deqdet.extras import how_to_install

from helpers.catalogs import catalogs_as_before


def write_set(folder, images: list[list[dict]], classes: int = 2) -> str:
    """A registered set of 400 x 400 images with the annotations of each; the pictures themselves are never read."""
    whole = {"images": [], "annotations": [], "categories": [{"id": k + 1, "name": f"c{k}"} for k in range(classes)]}
    for i, annotations in enumerate(images):
        whole["images"].append({"id": i + 1, "file_name": f"{i}.png", "height": 400, "width": 400})
        for annotation in annotations:
            x, y, w, h = annotation["bbox"]
            number = len(whole["annotations"]) + 1
            whole["annotations"].append({"area": w * h, "iscrowd": 0, **annotation, "id": number, "image_id": i + 1})
    (folder / "boxes.json").write_text(json.dumps(whole))
    return str(folder / "boxes.json")


@pytest.fixture
def evaluate(tmp_path):
    """evaluate(images, detections, ...): the results; detections of an image as (boxes xywh, scores, classes)."""
    with catalogs_as_before():

        def run(images, detections, classes: int = 2, **options) -> dict:
            name = f"made_{len(MetadataCatalog)}"
            ids = {k + 1: k for k in range(classes)}
            MetadataCatalog.get(name).set(
                json_file=write_set(tmp_path, images, classes), thing_classes=[f"c{k}" for k in range(classes)],
                thing_dataset_id_to_contiguous_id=ids,
            )  # fmt: skip
            evaluator = options.pop("make", build_coco_evaluator)(name, str(tmp_path), apart=False, **options)
            evaluator.reset()
            for i, (boxes, scores, labels) in enumerate(detections):
                boxes = torch.tensor(np.array(boxes, dtype=np.float64).reshape(-1, 4))
                boxes[:, 2:] += boxes[:, :2]
                found = Instances((400, 400), pred_boxes=Boxes(boxes), scores=torch.tensor(scores, dtype=torch.float64))
                found.pred_classes = torch.tensor(labels, dtype=torch.int64)
                evaluator.process([{"image_id": i + 1}], [{"instances": found}])
            return evaluator.evaluate()["bbox"]

        yield run


# A grid of 150 objects of 20 x 20 pixels, each of which is found.
GRID = [[26.0 * (i % 15), 26.0 * (i // 15), 20.0, 20.0] for i in range(150)]
OBJECTS = [[{"bbox": box, "category_id": 1} for box in GRID]]
FOUND = [(GRID, np.linspace(0.9, 0.1, 150), [0] * 150)]


@pytest.mark.parametrize("library", EVALUATORS)
def test_no_object_is_lost_beyond_100_detections(evaluate, library):
    # With 100 of 150 objects found and no mistake, the precision is 1 at the 101 recalls 0.00, 0.01, ... up to 2/3,
    # which are 67, and 0 beyond.
    results = evaluate(OBJECTS, FOUND, max_detections=150, library=library)
    at_100 = 100 * 67 / 101
    assert results["AP@100"] == pytest.approx(at_100)
    for name in ("AP", "AP50", "AP75", "APs", "AP-c0"):
        assert results[name] == pytest.approx(100), name
    assert np.isnan(results["APm"]) and np.isnan(results["APl"])
    # detectron2's default, and ours for 100 detections.
    results = evaluate(OBJECTS, FOUND, max_detections=100, library=library)
    assert results["AP"] == pytest.approx(at_100) and "AP@100" not in results


def test_a_limit_between_counts_as_many(evaluate):
    results = evaluate(OBJECTS, FOUND, max_detections=120)
    assert results["AP"] == pytest.approx(100 * 81 / 101) and results["AP@100"] == pytest.approx(100 * 67 / 101)


def random_case(seed: int, images: int, objects: int, detections: int, crowds: float = 0.2):
    rng = np.random.default_rng(seed)
    truth, found = [], []
    for i in range(images):
        count = 0 if i % 5 == 0 else rng.integers(1, objects + 1)
        corners = rng.uniform(0, 250, (count, 2))
        sizes = np.exp(rng.uniform(np.log(6), np.log(150), (count, 2)))  # small, medium and large
        boxes, labels = np.hstack([corners, sizes]), rng.integers(0, 3, count)
        truth.append([
            {"bbox": box.tolist(), "category_id": int(k) + 1, "iscrowd": int(rng.random() < crowds)}
            for box, k in zip(boxes, labels, strict=True)
        ])  # fmt: skip
        hits = rng.integers(0, count, detections) if count else np.zeros(0, int)
        near = boxes[hits] * rng.normal(1, 0.08, (len(hits), 4))
        far = np.hstack([rng.uniform(0, 250, (5, 2)), rng.uniform(5, 120, (5, 2))])
        kinds = np.where(rng.random(len(hits)) < 0.85, labels[hits], rng.integers(0, 3, len(hits)))
        scores = np.round(rng.random(len(hits) + 5), 2)  # with ties
        found.append((np.vstack([near, far]), scores, [*kinds.tolist(), *rng.integers(0, 3, 5).tolist()]))
    found[1] = ([], [], [])  # an image where nothing is found
    return truth, found


@pytest.mark.parametrize("seed, objects, detections, limit", [
    (0, 12, 30, 100), (1, 3, 8, 100), (2, 60, 150, 300), (3, 60, 150, 120),
])  # fmt: skip
def test_the_libraries_agree(evaluate, seed, objects, detections, limit):
    case = random_case(seed, 20, objects, detections)
    slow, fast = (evaluate(*case, 4, max_detections=limit, library=library) for library in EVALUATORS)
    assert list(slow) == list(fast) and "AP-c2" in slow and ("AP@100" in slow) == (limit > 100)
    assert np.isnan(slow["AP-c3"])  # a class without any object
    assert 1 < slow["AP"] < 80 and slow["APs"] != slow["APm"] != slow["APl"]
    for name in slow:
        assert fast[name] == pytest.approx(slow[name], abs=1e-6, nan_ok=True), name


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # detectron2's
@pytest.mark.parametrize("library", EVALUATORS)
def test_nothing_is_found_at_all(evaluate, library):
    results = evaluate(OBJECTS, [([], [], [])], max_detections=150, library=library)
    assert set(results) == {"AP", "AP50", "AP75", "APs", "APm", "APl", "AP@100"}
    assert all(np.isnan(value) for value in results.values())


def test_below_100_it_is_detectron2s(evaluate):
    case = random_case(5, 20, 12, 30)

    def original(name, output_dir, apart):
        return COCOEvaluator(name, output_dir=output_dir, use_fast_impl=False)

    assert evaluate(*case, 3, max_detections=16) == evaluate(*case, 3, make=original)


def test_a_missing_library_names_its_extra(monkeypatch, evaluate):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core.coco", None)
    with pytest.raises(UserError, match=re.escape(f"is not installed: {how_to_install('fast-eval')}, or choose")):
        evaluate(OBJECTS, FOUND, library="faster-coco-eval")
