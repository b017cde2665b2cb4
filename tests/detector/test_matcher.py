import math

import pytest
import torch

from deqdet.matcher import HungarianMatcher, focal_cost, pairwise_giou
from deqdet.structures import Prediction, Targets

NUMBERS = {"focal_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0, "focal_alpha": 0.25, "focal_gamma": 2.0}
PAPER = HungarianMatcher(**NUMBERS)
L1_ONLY = HungarianMatcher(**{**NUMBERS, "focal_weight": 0.0, "l1_weight": 1.0, "giou_weight": 0.0})


def random_boxes(*shape, generator):
    corners = 300 * torch.rand(*shape, 2, generator=generator)
    return torch.cat([corners, corners + 1 + 100 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def random_prediction(rows, queries=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, queries, classes, generator=generator)
    return Prediction(logits, random_boxes(rows, queries, generator=generator))


def random_targets(counts, classes=4, seed=1):
    """Make targets whose padding has the values that from_instances pads with."""
    generator = torch.Generator().manual_seed(seed)
    most = max(counts)
    valid = torch.arange(most) < torch.tensor(counts)[:, None]
    return Targets(
        labels=torch.randint(classes, (len(counts), most), generator=generator) * valid,
        boxes=random_boxes(len(counts), most, generator=generator) * valid[..., None],
        valid=valid,
        image_sizes=torch.tensor([[400.0, 300.0], [320.0, 420.0], [500.0, 500.0]])[: len(counts)],
    )


def only_image(targets, image):
    """Return one image of the targets as a batch of one, without padding."""
    keep = targets.valid[image]
    return Targets(
        targets.labels[image][keep][None],
        targets.boxes[image][keep][None],
        keep[keep][None],
        targets.image_sizes[image][None],
    )


def triples(matches, row_offset=0):
    columns = (matches.rows + row_offset, matches.queries, matches.targets)
    return list(zip(*(x.tolist() for x in columns), strict=True))


def test_focal_cost_by_hand():
    # p = 3/4: as a positive 0.25 (1/4)^2 (-ln 3/4) = 0.0044950; as a negative 0.75 (3/4)^2 ln 4 = 0.5848430.
    cost = focal_cost(torch.tensor([0.75, 0.0, 1.0]), alpha=0.25, gamma=2.0)
    assert cost[0].item() == pytest.approx(0.0044950 - 0.5848430, abs=1e-6)
    # At 0 and 1 the eps of 1e-12 keeps it finite: -ln 1e-12 = 27.631.
    assert cost[1].item() == pytest.approx(0.25 * 27.631, abs=1e-3)
    assert cost[2].item() == pytest.approx(-0.75 * 27.631, abs=1e-3)


def test_pairwise_giou_by_hand():
    point = [5.0, 5.0, 5.0, 5.0]
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], point]])
    others = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0], [3.0, 0.0, 4.0, 2.0], point]])
    giou = pairwise_giou(boxes, others)
    # The same; overlap 1, union 7, hull 9; apart: union 4 + 2, hull 8; a point: union 4, hull 25.
    torch.testing.assert_close(giou[0, 0], torch.tensor([1.0, 1 / 7 - 2 / 9, -2 / 8, -21 / 25]))
    assert giou[0, 1, 3] == 0  # two boxes of no area: finite


def test_total_cost_by_hand():
    prediction = Prediction(torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0.0, 2.0, 2.0]]]))
    targets = Targets(
        labels=torch.tensor([[1]]),
        boxes=torch.tensor([[[1.0, 1.0, 3.0, 3.0]]]),
        valid=torch.tensor([[True]]),
        image_sizes=torch.tensor([[200.0, 100.0]]),
    )
    # p = 1/2: (0.25 - 0.75) / 4 ln 2; L1: (1/200 + 1/100) twice; GIoU: 1/7 - 2/9 = -5/63.
    expected = 2 * (-math.log(2) / 8) + 5 * 0.03 + 2 * 5 / 63
    cost = PAPER.cost(prediction.logits, prediction.boxes, targets)
    assert cost.shape == (1, 1, 1)
    assert cost.item() == pytest.approx(expected, abs=1e-6)


def test_cost_reads_the_class_of_the_box():
    logits = torch.tensor([[[-2.0, 3.0, 0.5]]])
    targets = random_targets([3], classes=3)
    targets.labels[:] = torch.tensor([[2, 0, 1]])
    matcher = HungarianMatcher(**{**NUMBERS, "l1_weight": 0.0, "giou_weight": 0.0})
    cost = matcher.cost(logits, random_prediction(1, queries=1).boxes, targets)
    torch.testing.assert_close(cost[0, 0], 2 * focal_cost(logits[0, 0, [2, 0, 1]].sigmoid(), 0.25, 2.0))


def test_optimal_where_greedy_is_not():
    # Boxes shifted along x: queries at 0 and 4, boxes at 1 and -2. Greedy takes the pair at distance 1 and is
    # left with one at 6; the optimum is 2 + 3.
    base = torch.tensor([40.0, 40.0, 50.0, 50.0])
    shift = torch.tensor([1.0, 0.0, 1.0, 0.0])
    prediction = Prediction(torch.zeros(1, 2, 1), torch.stack([base, base + 4 * shift])[None])
    targets = Targets(
        labels=torch.zeros(1, 2, dtype=torch.int64),
        boxes=torch.stack([base + 1 * shift, base - 2 * shift])[None],
        valid=torch.ones(1, 2, dtype=torch.bool),
        image_sizes=torch.tensor([[100.0, 100.0]]),
    )
    assert triples(L1_ONLY(prediction, targets, ["init"])) == [(0, 0, 1), (0, 1, 0)]


def test_a_batch_equals_its_images_and_padding_is_never_matched():
    targets = random_targets([2, 5, 0])
    prediction = random_prediction(3)
    prediction.boxes[0, 0] = 0  # lies on the padding of image 0, at no cost but for the focal term
    together = PAPER(prediction, targets, ["init"])
    alone = []
    for image in range(3):
        row = Prediction(prediction.logits[image, None], prediction.boxes[image, None])
        alone += triples(PAPER(row, only_image(targets, image), ["init"]), row_offset=image)
    assert triples(together) == alone
    assert together.rows.tolist() == [0] * 2 + [1] * 5


def test_stacked_predictions_equal_separate_ones():
    targets = random_targets([3, 1])
    first, second = random_prediction(2, seed=2), random_prediction(2, seed=3)
    stacked = Prediction(torch.cat([first.logits, second.logits]), torch.cat([first.boxes, second.boxes]))
    separate = triples(PAPER(first, targets, ["a"])) + triples(PAPER(second, targets, ["b"]), row_offset=2)
    assert triples(PAPER(stacked, targets, ["a", "b"])) == separate
    costs = [PAPER.cost(x.logits, x.boxes, targets) for x in (first, second)]
    torch.testing.assert_close(PAPER.cost(stacked.logits, stacked.boxes, targets), torch.cat(costs))
    assert triples(PAPER(first, targets, ["a"])) != triples(PAPER(second, targets, ["b"]))


def test_no_box_at_all():
    matches = PAPER(random_prediction(4), random_targets([0, 0]), ["a", "b"])
    for indices in (matches.rows, matches.queries, matches.targets):
        assert indices.shape == (0,) and indices.dtype == torch.int64


def test_padding_need_not_be_last():
    targets = random_targets([3])
    targets.valid[0, 1] = False
    matches = PAPER(random_prediction(1), targets, ["init"])
    assert sorted(matches.targets.tolist()) == [0, 2]


def test_more_boxes_than_queries():
    matches = PAPER(random_prediction(1, queries=2), random_targets([5]), ["init"])
    assert matches.queries.tolist() == [0, 1]
    assert len(set(matches.targets.tolist())) == 2


def test_half_precision_is_computed_in_float32():
    targets = random_targets([3])
    prediction = random_prediction(1)
    prediction.boxes[0, 0] = torch.tensor([0.0, 0.0, 300.0, 300.0])  # an area of 90000 overflows float16
    half = Prediction(prediction.logits.half(), prediction.boxes.half())
    rounded = Prediction(half.logits.float(), half.boxes.float())
    assert triples(PAPER(half, targets, ["init"])) == triples(PAPER(rounded, targets, ["init"]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["logits", "boxes"])
def test_non_finite_values_are_named_in_images_without_boxes_too(field, value):
    prediction = random_prediction(6)  # 3 predictions of 2 images
    getattr(prediction, field)[3, 2, 1] = value  # iter1, image 1
    for counts in ([2, 0], [0, 0]):
        with pytest.raises(FloatingPointError, match=r"in iter1 \(image 1\)\.$"):
            PAPER(prediction, random_targets(counts), ["init", "iter1", "iter3"])


def test_the_error_names_each_prediction_and_each_file_once():
    prediction = random_prediction(6)
    prediction.logits[0, 0, 0] = math.nan
    prediction.boxes[4:, 0, 0] = -math.inf
    expected = r"cost in init, iter3 \(image 0: a\.jpg, image 1: b\.jpg\)\.$"
    with pytest.raises(FloatingPointError, match=expected):
        PAPER(prediction, random_targets([1, 1]), ["init", "iter1", "iter3"], ["a.jpg", "b.jpg"])


def test_finite_boxes_whose_area_overflows_are_an_error():
    prediction = random_prediction(1)
    prediction.boxes[0, 0] = torch.tensor([0.0, 0.0, 1e30, 1e30])
    with pytest.raises(FloatingPointError, match=r"matching cost in init \(image 0\)"):
        PAPER(prediction, random_targets([1]), ["init"])


@pytest.mark.parametrize("label", [-1, 4])
def test_unknown_label(label):
    targets = random_targets([2, 3])
    targets.labels[1, 2] = label
    with pytest.raises(ValueError, match=rf"Label {label} of image 1 is not in \[0, 4\)"):
        PAPER(random_prediction(2), targets, ["init"])
