"""Mistakes in images worked out by hand, and the pairs that pycocotools makes of random boxes."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.structures import Boxes, Instances

from deqdet.measurement.mistakes import Outcome, Tally, best_threshold, judge, judge_all, sort_by_error, tally

R, C, A, I = Outcome  # right, confused, alone, ignored  # noqa: E741


def truth(*rows: tuple) -> Instances:
    """Of (x0, y0, x1, y1, class, crowd)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    instances = Instances((100, 100))
    instances.gt_boxes, instances.gt_classes = Boxes(table[:, :4]), table[:, 4].long()
    instances.gt_crowd = table[:, 5] > 0
    return instances


def found(*rows: tuple) -> Instances:
    """Of (x0, y0, x1, y1, class, score)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    instances = Instances((100, 100))
    instances.pred_boxes, instances.pred_classes = Boxes(table[:, :4]), table[:, 4].long()
    instances.scores = table[:, 5]
    return instances


TRUTH = truth(
    (0, 0, 10, 10, 0, 0),
    (20, 0, 30, 10, 1, 0),
    (40, 0, 50, 10, 0, 0),
    (60, 0, 100, 40, 0, 1),
)
FOUND = found(
    (40, 0, 50, 4, 0, 0.6),  # IoU 0.4 with the third
    (0, 0, 10, 10, 0, 0.9),  # the first
    (0, 0, 10, 8, 0, 0.8),  # the first again
    (20, 0, 30, 10, 0, 0.7),  # the second as another class
    (70, 10, 80, 20, 0, 0.5),  # in the crowd
    (70, 10, 80, 20, 1, 0.4),  # in a crowd of another class
    (40, 0, 50, 10, 0, 0.2),  # the third, below the threshold
)


def test_mistakes_of_an_image():
    judged = judge(TRUTH, FOUND, 0.3)
    assert judged.found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    assert judged.found_outcomes.tolist() == [R, A, C, A, I, A]
    assert judged.truth_outcomes.tolist() == [R, C, A, I]
    assert (judged.right, judged.missed, judged.false, judged.confused, judged.error) == (1, 1, 3, 1, 5)
    assert judged.doubt == pytest.approx(0.8 + 0.7 + 0.6 + 0.4)


def test_a_lower_threshold_finds_the_third_box():
    judged = judge(TRUTH, FOUND, 0.2)
    assert judged.truth_outcomes.tolist() == [R, C, R, I]
    assert (judged.right, judged.missed, judged.false, judged.confused) == (2, 0, 3, 1)


def test_the_surest_detection_takes_the_box_that_it_overlaps_most():
    """It has an IoU of 10/11 with the first and 11/12 with the second; the other one then takes the first."""
    two = truth((0, 0, 10, 10, 0, 0), (0, 0, 10, 12, 0, 0))
    judged = judge(two, found((0, 0, 10, 12, 0, 0.8), (0, 0, 10, 11, 0, 0.9)), 0.5)
    assert judged.error == 0 and judged.right == 2
    assert judge(truth((0, 0, 10, 10, 0, 0), (0, 0, 10, 12, 0, 0)), found((0, 0, 10, 11, 0, 0.9)), 0.5).missed == 1


@pytest.mark.parametrize("truths, detections, counts", [
    ((), (), (0, 0, 0, 0)),
    ((), [(0, 0, 9, 9, 0, 0.9)], (0, 0, 1, 0)),
    ([(0, 0, 9, 9, 0, 0)], (), (0, 1, 0, 0)),
    ([(0, 0, 9, 9, 0, 1)], (), (0, 0, 0, 0)),  # a crowd need not be found
    ([(0, 0, 9, 9, 0, 1)], [(0, 0, 9, 9, 1, 0.9)], (0, 0, 1, 0)),  # and is not confused with another class
    ([(0, 0, 10, 10, 0, 0)], [(0, 0, 10, 5, 0, 0.9)], (1, 0, 0, 0)),  # an IoU of just 0.5 is enough
    ([(0, 0, 10, 10, 0, 0)], [(0, 0, 10, 4.9, 0, 0.9)], (0, 1, 1, 0)),
])  # fmt: skip
def test_small_cases(truths, detections, counts):
    judged = judge(truth(*truths), found(*detections), 0.5)
    assert (judged.right, judged.missed, judged.false, judged.confused) == counts


def test_images_are_sorted_by_error_and_then_by_the_scores_of_what_is_wrong():
    far = [(80, 80, 90, 90, 0, 0.6), (60, 80, 70, 90, 0, 0.5), (80, 60, 90, 70, 0, 0.5)]
    images = [
        found(),
        found(*far[:2]),
        found(*far[1:]),
        found(*far),
        found(*far[1:]),
    ]
    judged = judge_all([truth() for _ in images], images, 0.5)
    assert [x.error for x in judged] == [0, 2, 2, 3, 2]
    assert sort_by_error(judged) == [3, 1, 2, 4, 0]


def test_counts_of_each_class():
    """Twice the image above; the confused box counts for its own class, a false detection for the one it claims."""
    assert tally(judge_all([TRUTH] * 2, [FOUND] * 2, 0.3), 3) == [
        Tally(boxes=4, right=2, missed=2, confused=0, false=4),
        Tally(boxes=2, right=0, missed=0, confused=2, false=2),
        Tally(boxes=0, right=0, missed=0, confused=0, false=0),
    ]


def test_the_best_threshold():
    """With 3 true boxes, F1 is 4/7 up to 0.2, 4/6 up to 0.6, 2/5 up to 0.7, and 2/4 up to 0.9."""
    boxes = truth(*((20 * i, 0, 20 * i + 10, 10, 0, 0) for i in range(3)))
    right = [(0, 0, 10, 10, 0, 0.9), (20, 0, 30, 10, 0, 0.6)]
    wrong = [(0, 50, 10, 60, 0, 0.7), (20, 50, 30, 60, 0, 0.2)]
    assert best_threshold([boxes], [found(*right, *wrong)]) == 0.6
    assert best_threshold([boxes, truth()], [found(*right), found(*wrong)]) == 0.6
    assert best_threshold([boxes], [found(*wrong)]) is None
    assert best_threshold([boxes], [found()]) is None
    assert best_threshold([], []) is None
    # A third false detection of 0.65 makes the middle one 4/7 and so no worse than the others: 0.6 is still highest.
    assert best_threshold([boxes], [found(*right, *wrong, (40, 50, 50, 60, 0, 0.65))]) == 0.6
    # With another two of 0.65, only the surest detection is worth keeping: 2/4 against 4/9.
    more = [(x, 70, x + 10, 80, 0, 0.65) for x in (0, 20, 40)]
    assert best_threshold([boxes], [found(*right, *wrong, *more)]) == 0.9


@pytest.mark.parametrize("seed", range(5))
def test_pairs_of_one_class_are_those_of_pycocotools(seed):
    """Of random boxes close together, some of them crowds: which detections are right, false and ignored."""
    rng = np.random.default_rng(seed)

    def boxes(count):
        corner, size = rng.uniform(0, 40, (count, 2)), rng.uniform(10, 30, (count, 2))
        return np.concatenate([corner, corner + size], axis=1)

    truths = [(*box, rng.integers(2), rng.random() < 0.35) for box in boxes(12)]
    detections = [(*box, rng.integers(2), score) for box, score in zip(boxes(40), rng.random(40), strict=True)]
    coco = COCO()
    records = [{"id": i + 1, "image_id": 1, "category_id": int(c), "iscrowd": int(crowd),
                "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
               for i, (x0, y0, x1, y1, c, crowd) in enumerate(truths)]  # fmt: skip
    coco.dataset = {"info": {}, "images": [{"id": 1}], "categories": [{"id": 0}, {"id": 1}], "annotations": records}
    results = [{"image_id": 1, "category_id": int(c), "bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(score)}
               for x0, y0, x1, y1, c, score in detections]  # fmt: skip
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
    whole = [x for x in evaluation.evalImgs if x is not None and x["aRng"] == [0, 1e10]]
    expected = {}
    for of_class in whole:
        columns = of_class["dtScores"], of_class["dtMatches"][0], of_class["dtIgnore"][0]
        for score, match, ignored in zip(*columns, strict=True):
            expected[round(score, 6)] = I if ignored else R if match else A
    judged = judge(truth(*truths), found(*detections), 0.0)
    ours = {round(float(s), 6): (A if outcome == C else outcome)
            for s, outcome in zip(sorted((row[5] for row in detections), reverse=True), judged.found_outcomes,
                                  strict=True)}  # fmt: skip
    assert {R, A, I} <= set(expected.values())
    assert ours == expected
