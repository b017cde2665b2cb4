import pytest
import torch

from deqdet.inference import top_detections
from deqdet.structures import Prediction

BOXES = torch.tensor([[[-5.0, 0.0, 10.0, 20.0], [30.0, 40.0, 900.0, 60.0]]])


def test_top_pairs_by_hand():
    # Query 0 has classes at logits 2 and -1, query 1 at 0 and 1: (0, 0), (1, 1), (1, 0), then (0, 1).
    logits = torch.tensor([[[2.0, -1.0], [0.0, 1.0]]])
    (detections,) = top_detections(Prediction(logits, BOXES), [(64, 96)], 3)
    assert detections.image_size == (64, 96)
    assert detections.pred_classes.tolist() == [0, 1, 0]
    assert detections.scores.tolist() == pytest.approx([0.880797, 0.731059, 0.5], abs=1e-6)
    # Query 1 twice; not clipped to 96 x 64.
    assert torch.equal(detections.pred_boxes.tensor, BOXES[0, [0, 1, 1]])


def test_one_class():
    (detections,) = top_detections(Prediction(torch.tensor([[[-1.0], [1.0]]]), BOXES), [(64, 96)], 1)
    assert detections.pred_classes.tolist() == [0]
    assert torch.equal(detections.pred_boxes.tensor, BOXES[0, 1:])


def test_no_more_than_all_pairs():
    logits = torch.tensor([[[2.0, -1.0, 3.0], [0.0, 1.0, -2.0]]])
    (detections,) = top_detections(Prediction(logits, BOXES), [(64, 96)], 100)
    assert detections.pred_classes.tolist() == [2, 0, 1, 0, 1, 2]
    assert torch.equal(detections.pred_boxes.tensor, BOXES[0, [0, 0, 1, 1, 0, 1]])


def test_each_image_of_a_batch_has_its_own():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3, generator=generator), torch.rand(2, 5, 4, generator=generator)
    prediction = Prediction(logits, boxes)
    sizes = [(64, 96), (80, 50)]
    together = top_detections(prediction, sizes, 4)
    for image, detections in enumerate(together):
        row = Prediction(prediction.logits[image, None], prediction.boxes[image, None])
        (alone,) = top_detections(row, [sizes[image]], 4)
        assert detections.image_size == alone.image_size == sizes[image]
        assert torch.equal(detections.pred_boxes.tensor, alone.pred_boxes.tensor)
        assert torch.equal(detections.scores, alone.scores)
        assert torch.equal(detections.pred_classes, alone.pred_classes)


def test_half_precision_logits_are_ranked_in_float32():
    # In float16 both scores round to the same number.
    logits = torch.tensor([[[8.0], [8.0078125]]], dtype=torch.float16)
    assert logits.sigmoid().unique().numel() == 1
    (detections,) = top_detections(Prediction(logits, BOXES.half()), [(64, 96)], 2)
    assert detections.scores.dtype == detections.pred_boxes.tensor.dtype == torch.float32
    assert torch.equal(detections.pred_boxes.tensor, BOXES[0, [1, 0]])
