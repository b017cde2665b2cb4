"""Duplicates among hand-made detections of hand-made objects, counted by hand."""

import json

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances

from deqdet.measurement.accuracy import Evaluation
from deqdet.measurement.duplicates import (
    DuplicateCounter,
    Seen,
    content_distances,
    see_images,
    suppress,
)

# Image 1: a cup on the left, a spoon on the right. Image 2: two cups that overlap, and a crowd of cups on the right.
CUP, SPOON = 0, 1
OBJECTS = {
    1: [((0, 0, 40, 40), CUP, 0), ((60, 0, 40, 40), SPOON, 0)],
    2: [((0, 0, 40, 40), CUP, 0), ((10, 0, 40, 40), CUP, 0), ((60, 0, 40, 40), CUP, 1)],
}


@pytest.fixture
def counter(tmp_path) -> DuplicateCounter:
    annotations = [
        {"image_id": image, "bbox": box, "category_id": label + 1, "iscrowd": crowd, "area": 1600}
        for image, objects in OBJECTS.items()
        for box, label, crowd in objects
    ]
    whole = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 100} for i in OBJECTS],
        "annotations": [x | {"id": i} for i, x in enumerate(annotations, start=1)],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "spoon"}],
    }
    (tmp_path / "set.json").write_text(json.dumps(whole))
    register_coco_instances(tmp_path.name, {}, f"{tmp_path}/set.json", str(tmp_path))
    DatasetCatalog.get(tmp_path.name)
    return DuplicateCounter(tmp_path.name, Evaluation(tmp_path.name, max_detections=100))


def see(image_id: int, *found: tuple[tuple[float, ...], int, float], contents: list[list[float]]) -> Seen:
    """Detections (xyxy, class, score), best first, of the queries 0, 1, ... with these contents."""
    boxes, classes, scores = zip(*found, strict=True)
    instances = Instances(
        (100, 100),
        pred_boxes=Boxes(torch.tensor(boxes)),
        pred_classes=torch.tensor(classes),
        scores=torch.tensor(scores),
        queries=torch.arange(len(boxes)),
    )
    return Seen(image_id, {7: instances}, {7: content_distances(instances, torch.tensor(contents))})


class TestDuplicateCounter:
    def test_by_hand(self, counter):
        first = see(
            1,
            ((0.0, 0.0, 40.0, 40.0), CUP, 0.9),  # finds the cup
            ((0.0, 0.0, 40.0, 38.0), CUP, 0.8),  # finds it again, IoU 0.95
            ((60.0, 0.0, 100.0, 40.0), CUP, 0.7),  # a cup where the spoon is: finds nothing
            ((60.0, 0.0, 100.0, 40.0), SPOON, 0.6),  # finds the spoon
            ((60.0, 0.0, 100.0, 40.0), SPOON, 0.2),  # not confident
            contents=[[3.0, 0.0], [0.0, 1.0], [9.0, 9.0], [5.0, 5.0], [5.0, 5.0]],
        )
        second = see(
            2,
            ((0.0, 0.0, 40.0, 40.0), CUP, 0.9),  # IoU 1 with the left cup, 0.6 with the right one: finds the left one
            ((10.0, 0.0, 50.0, 40.0), CUP, 0.8),  # finds the right one
            ((60.0, 0.0, 100.0, 40.0), CUP, 0.7),  # in the crowd, twice
            ((60.0, 0.0, 100.0, 40.0), CUP, 0.7),
            contents=[[1.0, 0.0]] * 4,
        )
        found = counter([first, second], 7)
        # Four objects found, the first cup twice. Its contents have the norms 3 and 1, and are sqrt(10) apart.
        assert (found.found, found.doubled) == (4, 25.0)
        assert found.distance == pytest.approx(2 * 10**0.5 / (3 + 1))

    def test_ap_with_nms(self, counter):
        """The second detection of the first cup goes, and so does the false one only if it has the same class."""
        image = see(
            1,
            ((0.0, 0.0, 40.0, 40.0), CUP, 0.9),
            ((0.0, 0.0, 40.0, 38.0), CUP, 0.8),
            ((60.0, 0.0, 100.0, 40.0), CUP, 0.7),
            ((60.0, 0.0, 100.0, 40.0), SPOON, 0.6),
            contents=[[1.0, 0.0]] * 4,
        )
        left = suppress(image.detections[7])
        assert left.queries.tolist() == [0, 2, 3]
        assert counter([image], 7).AP_nms == pytest.approx(100.0)  # both objects come first in their classes

    def test_three_finders_make_three_pairs(self, counter):
        cup = ((0.0, 0.0, 40.0, 40.0), CUP)
        contents = [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]
        found = counter([see(1, (*cup, 0.9), (*cup, 0.8), (*cup, 0.7), contents=contents)], 7)
        assert found.doubled == 100.0
        assert found.distance == pytest.approx(2.0)  # of 0, 2 and 2 the median

    def test_nothing_found(self, counter):
        found = counter([see(1, ((0.0, 0.0, 40.0, 40.0), CUP, 0.1), contents=[[1.0, 0.0]])], 7)
        assert (found.found, found.doubled, found.distance) == (0, None, None)


def test_contents_that_are_zero_are_no_distance_apart():
    found = Instances((9, 9), scores=torch.tensor([0.9, 0.8]), queries=torch.tensor([1, 0]))
    assert content_distances(found, torch.zeros(3, 4)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("decoder", ["EquilibriumDecoder", "RecurrentDecoder", "StackedDecoder"])
def test_contents_are_those_of_the_queries_that_were_detected(small_model, make_inputs, decoder):
    """The class read-out of a query's content gives the score of the detection that names the query."""
    model = small_model("MODEL.DEQDET.DECODER", decoder).eval()
    inputs = [x | {"image_id": i} for i, x in enumerate(make_inputs(0, 0))]
    with torch.no_grad():
        decoded, found = model.decode(inputs)
        logits = model.decoder.execution().refinement.predict(decoded.state).logits
    for instances, row in zip(found, logits, strict=True):
        expected = row[instances.queries, instances.pred_classes].sigmoid()
        torch.testing.assert_close(instances.scores, expected, rtol=0, atol=0)
    seen = list(see_images(model, [inputs]))
    assert [x.image_id for x in seen] == [0, 1]
    assert all(x.distances[0].shape[0] == (x.detections[0].scores >= 0.3).sum() for x in seen)
