import math

import pytest
import torch
from torchvision.ops import generalized_box_iou_loss

from detectron2.config import get_cfg
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from deqdet.config import add_deqdet_config
from deqdet.criterion import Criterion, giou_loss
from deqdet.matcher import HungarianMatcher
from deqdet.structures import Prediction, Targets

from helpers.two_ranks import run_two_ranks

NUMBERS = {"focal_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0, "focal_alpha": 0.25, "focal_gamma": 2.0}
LN2, LN3, LN4_3 = math.log(2), math.log(3), math.log(4 / 3)
# Focal loss of a negative: 0.75 p^2 (-ln(1 - p)); of a positive: 0.25 (1 - p)^2 (-ln p).
NEGATIVE_HALF = 0.75 / 4 * LN2
NEGATIVE_QUARTER = 0.75 / 16 * LN4_3
POSITIVE_THREE_QUARTERS = 0.25 / 16 * LN4_3


def make_criterion(num_classes=2, **changed):
    numbers = {**NUMBERS, **changed}
    return Criterion(matcher=HungarianMatcher(**numbers), num_classes=num_classes, **numbers)


def make_targets(*images, size=(100.0, 200.0)):
    """Make targets from a list of (label, box) for each image."""
    most = max(len(x) for x in images)
    labels, boxes = torch.zeros(len(images), most, dtype=torch.int64), torch.zeros(len(images), most, 4)
    for i, image in enumerate(images):
        for j, (label, box) in enumerate(image):
            labels[i, j], boxes[i, j] = label, torch.tensor(box)
    valid = torch.arange(most) < torch.tensor([len(x) for x in images])[:, None]
    return Targets(labels, boxes, valid, torch.tensor([size]).repeat(len(images), 1))


def tiny_prediction(images=1):
    """Predict two queries of scores (3/4, 1/2) and (1/2, 1/4) in each image, as leaf tensors with gradients."""
    logits = torch.tensor([[[LN3, 0.0], [0.0, -LN3]]]).repeat(images, 1, 1)
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [50.0, 50.0, 60.0, 60.0]]]).repeat(images, 1, 1)
    return Prediction(logits.requires_grad_(), boxes.requires_grad_())


TINY_BOX = (0, (1.0, 1.0, 3.0, 3.0))  # query 0's
TINY_FOCAL = POSITIVE_THREE_QUARTERS + 2 * NEGATIVE_HALF + NEGATIVE_QUARTER
TINY_NO_BOX_FOCAL = 0.75 * 9 / 16 * math.log(4) + 2 * NEGATIVE_HALF + NEGATIVE_QUARTER
TINY_L1 = 2 * (1 / 100 + 1 / 200)
TINY_GIOU = 1 - (1 / 7 - 2 / 9)  # overlap 1, union 7, hull 9


def random_prediction(images, queries, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = 80 * torch.rand(images, queries, 2, generator=generator)
    sides = 1 + 20 * torch.rand(images, queries, 2, generator=generator)
    logits = torch.randn(images, queries, classes, generator=generator)
    return Prediction(logits, torch.cat([corners, corners + sides], dim=-1))


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


def test_each_loss_by_hand():
    losses = make_criterion()({"init": tiny_prediction()}, make_targets([TINY_BOX]))
    expected = {"loss_cls_init": 2 * TINY_FOCAL, "loss_l1_init": 5 * TINY_L1, "loss_giou_init": 2 * TINY_GIOU}
    assert values(losses) == pytest.approx(expected, rel=1e-5)


def test_the_class_of_the_box_is_the_positive_one():
    # Query 0's second class, at 1/2, is the positive one: 0.25 (1/2)^2 ln 2.
    losses = make_criterion()({"init": tiny_prediction()}, make_targets([(1, TINY_BOX[1])]))
    expected = TINY_NO_BOX_FOCAL - NEGATIVE_HALF + 0.25 / 4 * LN2
    assert losses["loss_cls_init"].item() == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("key", ["focal_weight", "l1_weight", "giou_weight"])
def test_each_weight_scales_its_own_loss(key):
    changed = values(make_criterion(**{key: 7.0})({"init": tiny_prediction()}, make_targets([TINY_BOX])))
    weights = {**NUMBERS, key: 7.0}
    assert changed == pytest.approx(
        {
            "loss_cls_init": weights["focal_weight"] * TINY_FOCAL,
            "loss_l1_init": weights["l1_weight"] * TINY_L1,
            "loss_giou_init": weights["giou_weight"] * TINY_GIOU,
        },
        rel=1e-5,
    )


def test_alpha_and_gamma():
    # alpha 0.5, gamma 1: 0.5 (1/4) ln(4/3) for the positive; negatives 0.5 p (-ln(1 - p)).
    expected = 0.5 * (LN4_3 / 4 + 2 * LN2 / 2 + LN4_3 / 4)
    criterion = make_criterion(focal_alpha=0.5, focal_gamma=1.0)
    losses = criterion({"init": tiny_prediction()}, make_targets([TINY_BOX]))
    assert losses["loss_cls_init"].item() == pytest.approx(2 * expected, rel=1e-5)


def test_stacked_predictions_equal_separate_ones():
    criterion = make_criterion(num_classes=3)
    boxes = (10.0, 10.0, 30.0, 40.0), (50.0, 20.0, 70.0, 90.0), (5.0, 5.0, 9.0, 9.0)
    targets = make_targets([(2, boxes[0]), (0, boxes[1])], [(1, boxes[2])])
    first, second = random_prediction(2, 4, 3, seed=0), random_prediction(2, 4, 3, seed=1)
    together = values(criterion({"init": first, "iter1": second, "iter3": first}, targets))
    separate = {**criterion({"init": first}, targets), **criterion({"iter1": second}, targets)}
    separate |= criterion({"iter3": first}, targets)
    assert together == pytest.approx(values(separate), rel=1e-5)
    assert list(together)[:4] == ["loss_cls_init", "loss_l1_init", "loss_giou_init", "loss_cls_iter1"]
    assert together["loss_l1_init"] == pytest.approx(together["loss_l1_iter3"])
    assert together["loss_l1_init"] != pytest.approx(together["loss_l1_iter1"])


def test_an_image_without_boxes_counts_as_background_only():
    losses = make_criterion()({"init": tiny_prediction(2)}, make_targets([], [TINY_BOX]))
    # Divided by one matched box, not by two images.
    assert values(losses) == pytest.approx(
        {
            "loss_cls_init": 2 * (TINY_FOCAL + TINY_NO_BOX_FOCAL),
            "loss_l1_init": 5 * TINY_L1,
            "loss_giou_init": 2 * TINY_GIOU,
        },
        rel=1e-5,
    )


def test_a_batch_without_boxes_still_reaches_logits_and_boxes():
    prediction = tiny_prediction(2)
    losses = make_criterion()({"init": prediction, "iter1": prediction}, make_targets([], []))
    assert losses["loss_cls_iter1"].item() == pytest.approx(2 * 2 * TINY_NO_BOX_FOCAL, rel=1e-5)
    for name in ("loss_l1_init", "loss_giou_init", "loss_l1_iter1", "loss_giou_iter1"):
        assert losses[name].item() == 0 and losses[name].requires_grad
    (losses["loss_l1_init"] + losses["loss_giou_init"]).backward(retain_graph=True)
    assert prediction.boxes.grad is not None and not prediction.boxes.grad.any()
    sum(losses.values()).backward()
    assert not prediction.boxes.grad.any()
    assert (prediction.logits.grad > 0).all()  # every score is pushed down


def test_gradients_reach_matched_boxes_only():
    prediction = tiny_prediction()
    make_criterion()({"init": prediction}, make_targets([TINY_BOX]))["loss_l1_init"].backward()
    # 5 / width and 5 / height, towards the box at +1.
    expected = torch.tensor([[[-0.05, -0.025, -0.05, -0.025], [0.0, 0.0, 0.0, 0.0]]])
    torch.testing.assert_close(prediction.boxes.grad, expected)


def test_duplicate_boxes_take_a_query_each():
    losses = make_criterion()({"init": tiny_prediction()}, make_targets([TINY_BOX, TINY_BOX]))
    # Query 1 at (50, 50, 60, 60) takes the copy: 49 + 49 + 57 + 57 pixels; overlap 0, union 104, hull 59^2.
    l1 = (49 + 57) * (1 / 100 + 1 / 200)
    giou = 1 + (59**2 - 104) / 59**2
    assert losses["loss_l1_init"].item() == pytest.approx(5 * (TINY_L1 + l1) / 2, rel=1e-5)
    assert losses["loss_giou_init"].item() == pytest.approx(2 * (TINY_GIOU + giou) / 2, rel=1e-5)


def test_more_boxes_than_queries_divides_by_the_queries():
    apart = (1, (80.0, 150.0, 90.0, 190.0))
    losses = make_criterion()({"init": tiny_prediction()}, make_targets([TINY_BOX, apart, TINY_BOX]))
    # Both queries are matched to the copies, as above: the third box is far from either.
    assert losses["loss_l1_init"].item() == pytest.approx(5 * (TINY_L1 + 106 * 0.015) / 2, rel=1e-5)


def test_half_precision_is_computed_in_float32():
    prediction = tiny_prediction()
    large = Prediction(prediction.logits.half(), prediction.boxes.detach().half())
    large.boxes[0, 1] = torch.tensor([0.0, 0.0, 300.0, 300.0])  # an area of 90000 overflows float16
    targets = make_targets([(0, (0.0, 0.0, 300.0, 300.0))], size=(300.0, 300.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = make_criterion()({"init": large}, targets)
    assert all(x.dtype == torch.float32 for x in losses.values())
    assert losses["loss_giou_init"].item() == pytest.approx(0.0, abs=1e-5)


def test_a_non_finite_prediction_is_named():
    broken = random_prediction(2, 4, 2, seed=0)
    broken.logits[1, 0, 0] = math.nan
    predictions = {"init": random_prediction(2, 4, 2, seed=0), "iter3": broken}
    with pytest.raises(FloatingPointError, match=r"iter3 \(image 1: b\.jpg\)"):
        make_criterion()(predictions, make_targets([TINY_BOX], []), ["a.jpg", "b.jpg"])


def test_wrong_number_of_classes():
    with pytest.raises(ValueError, match="logits of 3 classes, got 2"):
        make_criterion(num_classes=3)({"init": tiny_prediction()}, make_targets([TINY_BOX]))


def test_matched_accuracy_of_the_last_prediction():
    # The queries' best classes are 0 and 1, which are their boxes'. Under "init" the boxes are the other way
    # round and both queries say class 0: half of them are right.
    targets = make_targets([TINY_BOX, (1, (50.0, 50.0, 60.0, 61.0))])
    last = Prediction(torch.eye(2)[None], tiny_prediction().boxes)
    first = Prediction(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), last.boxes.flip(1))
    for iteration, logged in ((18, False), (19, True)):
        with EventStorage(iteration) as storage:
            make_criterion()({"init": first, "iter1": last}, targets)
            assert ("matched_accuracy" in storage.latest()) == logged
    assert storage.latest()["matched_accuracy"] == (1.0, 19)
    with EventStorage(19) as storage:
        make_criterion()({"iter1": last, "init": first}, targets)
    assert storage.latest()["matched_accuracy"] == (0.5, 19)
    with EventStorage(19) as storage:
        make_criterion()({"init": last}, make_targets([]))
    assert "matched_accuracy" not in storage.latest()


def test_from_config():
    cfg = get_cfg()
    add_deqdet_config(cfg)
    defaults = Criterion(cfg)
    assert defaults.matcher == HungarianMatcher(**NUMBERS)
    assert defaults.num_classes == 80
    cfg.MODEL.DEQDET.NUM_CLASSES = 3
    for i, key in enumerate(("FOCAL_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT", "FOCAL_ALPHA", "FOCAL_GAMMA")):
        cfg.MODEL.DEQDET.LOSS[key] = 0.1 * (i + 1)
    criterion = Criterion(cfg)
    expected = {key: 0.1 * (i + 1) for i, key in enumerate(NUMBERS)}
    assert criterion.matcher == HungarianMatcher(**expected)
    assert {key: getattr(criterion, key) for key in NUMBERS} == expected
    assert criterion.num_classes == 3


def losses_of_rank(rank):
    """Rank 0 has three boxes, rank 1 none."""
    box = (10.0, 10.0, 30.0, 40.0)
    targets = make_targets([(0, box), (1, box), (1, (50.0, 20.0, 70.0, 90.0))] if rank == 0 else [])
    return make_criterion()({"init": random_prediction(1, 4, 2, seed=rank)}, targets)


def save_losses(folder):
    rank = comm.get_rank()
    torch.save(losses_of_rank(rank), f"{folder}/{rank}.pt")


def test_divisor_is_averaged_over_the_ranks(tmp_path):
    run_two_ranks(save_losses, str(tmp_path))
    # Alone, rank 0 divides by 3 and rank 1 by 1 (the least); together both divide by (3 + 0) / 2.
    for rank, alone in ((0, 3.0), (1, 1.0)):
        shared = values(torch.load(tmp_path / f"{rank}.pt"))
        expected = {name: value * alone / 1.5 for name, value in values(losses_of_rank(rank)).items()}
        assert shared == pytest.approx(expected, rel=1e-5)


def test_giou_loss_is_torchvisions_with_its_gradients():
    """Boxes that overlap, touch along a side, lie apart, lie within one another, are equal, or have no area."""
    generator = torch.Generator().manual_seed(0)
    low = 100 * torch.rand(2, 400, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([low, low + 60 * torch.rand(2, 400, 2, generator=generator, dtype=torch.float64)], dim=2)
    pairs = [[[0, 0, 10, 10], [10, 0, 20, 10]], [[0, 0, 10, 10], [0, 10, 10, 30]], [[0, 0, 10, 10], [2, 2, 4, 5]],
             [[5, 5, 9, 9], [5, 5, 9, 9]], [[3, 3, 3, 3], [1, 1, 8, 8]], [[0, 0, 1, 1], [50, 60, 70, 80]]]  # fmt: skip
    boxes = torch.cat([boxes, torch.tensor(pairs, dtype=torch.float64).transpose(0, 1)], dim=1)
    found = []
    for loss in (giou_loss, lambda a, b: generalized_box_iou_loss(a, b, reduction="none")):
        predicted = boxes[0].clone().requires_grad_()
        value = loss(predicted, boxes[1])
        found.append((value, torch.autograd.grad(value.sum(), predicted)[0]))
    (value, grad), (expected, expected_grad) = found
    assert (value < 1).sum() > 20 and (value > 1).sum() > 20
    torch.testing.assert_close(value, expected, rtol=0, atol=2e-9)
    equal = torch.ones(len(grad), dtype=torch.bool)
    equal[-3] = False  # equal boxes: the maximum of two equal numbers has two derivatives
    torch.testing.assert_close(grad[equal], expected_grad[equal], rtol=0, atol=2e-9)
    assert giou_loss(boxes[0][:0], boxes[1][:0]).shape == (0,)
