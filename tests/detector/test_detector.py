"""The detector's inputs and its detections."""

import math

import pytest
import torch
from torch import nn

from detectron2.evaluation import inference_context
from detectron2.modeling import build_model

from deqdet.errors import UserError
from deqdet.structures import Decoded, Prediction

from helpers.batches import strip


class FixedDecoder(nn.Module):
    """The same prediction whatever the features."""

    def __init__(self, prediction: Prediction):
        super().__init__()
        self.prediction = prediction

    def decode(self, initial, features) -> Decoded:
        finite = self.prediction.logits.isfinite().flatten(1).all(dim=1)
        return Decoded(self.prediction, steps=torch.arange(len(finite)) + 3, finite=finite)


# Preprocessing and initial queries


def test_preprocessing_by_hand(small_model):
    model = small_model()
    first, second = torch.full((3, 50, 70), 100, dtype=torch.uint8), torch.zeros(3, 33, 90)
    first[1, 0, 0] = 200
    images = model.preprocess([{"image": first}, {"image": second}])
    assert images.image_sizes == [(50, 70), (33, 90)]
    assert images.tensor.shape == (2, 3, 64, 96)  # multiples of 32
    expected = [(100 - 123.675) / 58.395, (200 - 116.28) / 57.12, (100 - 103.53) / 57.375]
    assert images.tensor[0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    expected = [-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert images.tensor[1, :, 32, 89].tolist() == pytest.approx(expected, rel=1e-5)
    # Padding, right and below, is the mean colour.
    assert not images.tensor[0, :, 50:].any() and not images.tensor[0, :, :, 70:].any()
    assert not images.tensor[1, :, 33:].any() and not images.tensor[1, :, :, 90:].any()
    assert images.tensor[0, 2, 49, 69] != 0


@pytest.mark.parametrize("dtype, name", [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
@pytest.mark.parametrize("training", [False, True])
def test_a_model_converted_to_16_bits_is_refused(small_model, make_inputs, dtype, name, training):
    model = small_model().train(training)
    inputs = make_inputs(2, 0)
    model.to(dtype)
    with pytest.raises(UserError, match=f"^the model was converted to {name}, .*TEST.PRECISION and SOLVER.AMP.ENABLED"):
        model(inputs)


def test_levels_and_initial_queries_by_hand(small_model):
    model = small_model("MODEL.DEQDET.IN_FEATURES", ["p3", "p5"]).eval()
    images = model.preprocess([{"image": torch.zeros(3, 64, 32)}, {"image": torch.zeros(3, 32, 64)}])
    with torch.no_grad():
        features, initial = model.encode(images)
    assert [tuple(x.shape) for x in features] == [(2, 32, 8, 8), (2, 32, 2, 2)]
    assert model.decoder.refinement.strides == [8, 32]
    # The whole image before padding: z = log2 sqrt(32 * 64) = 5.5, r = log2(h / w).
    expected = torch.tensor([[16.0, 32.0, 5.5, 1.0], [32.0, 16.0, 5.5, -1.0]])
    torch.testing.assert_close(initial.position, expected[:, None].expand(2, 6, 4))
    weight = model.queries.content.weight
    content = (weight - weight.mean(1, keepdim=True)) / weight.std(1, correction=0, keepdim=True)
    torch.testing.assert_close(initial.content, content.expand(2, 6, 32), rtol=1e-4, atol=1e-4)


def test_unknown_levels_are_an_error(small_cfg):
    with pytest.raises(ValueError, match=r"\['p7'\].*\['p2', 'p3', 'p4', 'p5'\]"):
        build_model(small_cfg("MODEL.DEQDET.IN_FEATURES", ["p3", "p7"]))


def test_levels_of_another_width_are_an_error(small_cfg):
    """An FPN has its width from a key of its own."""
    cfg = small_cfg("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 16)
    message = r"level p2 has 16 channels, MODEL.DEQDET.HIDDEN_DIM is 32: they must be equal .*MODEL.FPN.OUT_CHANNELS"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


# Inference


def fixed_model(small_model, boxes: list, logits: list) -> nn.Module:
    model = small_model().eval()
    model.decoder = FixedDecoder(Prediction(torch.tensor([logits]), torch.tensor([boxes])))
    model.criterion.num_classes = len(logits[0])
    return model


@torch.no_grad()
def test_detections_are_scaled_to_the_original_image(small_model, make_inputs):
    boxes = [[8.0, 16.0, 40.0, 48.0], [-10.0, 4.0, 200.0, 30.0]]
    model = fixed_model(small_model, boxes, [[0.0, -9.0, -9.0], [-9.0, -9.0, math.log(3)]])
    (image,) = strip(make_inputs(0))  # 64 high, 96 wide
    detections = model([image | {"height": 128, "width": 288}])[0]["instances"]
    assert detections.image_size == (128, 288)
    assert detections.scores[:2].tolist() == pytest.approx([0.75, 0.5])
    assert detections.pred_classes[:2].tolist() == [2, 0]
    expected = torch.tensor([[0.0, 8.0, 288.0, 60.0], [24.0, 32.0, 120.0, 96.0]])  # x * 3, y * 2, clipped
    torch.testing.assert_close(detections.pred_boxes.tensor[:2], expected)

    unscaled = model([image])[0]["instances"]
    assert unscaled.image_size == (64, 96)
    expected = torch.tensor([[0.0, 4.0, 96.0, 30.0], [8.0, 16.0, 40.0, 48.0]])
    torch.testing.assert_close(unscaled.pred_boxes.tensor[:2], expected)


@torch.no_grad()
def test_detections_of_a_padded_image_end_at_its_own_edge(small_model, make_inputs):
    model = fixed_model(small_model, [[30.0, 20.0, 96.0, 64.0]], [[1.0, -1.0, -2.0]])
    (image,) = strip(make_inputs(0, height=50, width=70))
    detections = model([image | {"height": 100, "width": 140}])[0]["instances"]
    assert len(detections) == 3 and detections.pred_classes.tolist() == [0, 1, 2]
    assert detections.pred_boxes.tensor.tolist() == [[60.0, 40.0, 140.0, 100.0]] * 3


@torch.no_grad()
@pytest.mark.parametrize("most", [2, 6, 100])
def test_the_number_of_detections(small_model, make_inputs, most):
    """The best of 6 queries times 3 classes; at random weights no box is empty."""
    model = small_model("TEST.DETECTIONS_PER_IMAGE", most).eval()
    for found in model(strip(make_inputs(0, 0))):
        scores = found["instances"].scores
        assert len(scores) == min(most, 18)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)


@torch.no_grad()
def test_steps_of_each_image(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 7).eval()
    assert [int(x["steps"]) for x in model(strip(make_inputs(0, 0)))] == [7, 7]
    model.decoder.rtol = 1e9  # above any first residual
    assert [int(x["steps"]) for x in model(strip(make_inputs(0, 0)))] == [1, 1]
    for name in ("StackedDecoder", "RecurrentDecoder"):
        model = small_model("MODEL.DEQDET.DECODER", name, "MODEL.DEQDET.NUM_LAYERS", 4).eval()
        assert [int(x["steps"]) for x in model(strip(make_inputs(0, 0)))] == [3, 3]


@torch.no_grad()
def test_images_that_left_the_finite_numbers_are_counted(small_model, make_inputs, caplog):
    model = fixed_model(small_model, [[0.0, 0.0, 9.0, 9.0]], [[1.0, math.nan, 0.0]])
    model(strip(make_inputs(0)))
    assert "infinite or NaN in 1 of 1 images" in caplog.text
    caplog.clear()
    fixed_model(small_model, [[0.0, 0.0, 9.0, 9.0]], [[1.0, 2.0, 0.0]])(strip(make_inputs(0)))
    assert "NaN" not in caplog.text


def test_one_warning_for_each_evaluation_and_for_each_call_of_infer(small_model, make_inputs, caplog):
    model = fixed_model(small_model, [[0.0, 0.0, 9.0, 9.0]], [[1.0, math.nan, 0.0]])
    batches = [strip(make_inputs(0))] * 3
    for _ in range(2):
        caplog.clear()
        with inference_context(model):
            found = [model(batch) for batch in batches]
        assert [record.getMessage() for record in caplog.records] == [
            "The states became infinite or NaN in 1 of 1 images of a batch: image 0 (said once for each evaluation)."
        ]
    assert not any(output["finite"] for outputs in found for output in outputs)
    caplog.clear()
    with inference_context(model), torch.no_grad():
        for batch in batches:
            model.infer([{**batch[0], "file_name": "a.jpg"}])
    assert [record.getMessage() for record in caplog.records] == 3 * [
        "The states became infinite or NaN in 1 of 1 images of a batch: a.jpg."
    ]


def test_detections_with_gradient(small_model, make_inputs):
    """Scaling to another size is in place; outside torch.no_grad that must not touch a view of the predictions."""
    inputs = [{**x, "height": 2 * x["image"].shape[1], "width": 2 * x["image"].shape[2]} for x in make_inputs(1, 1)]
    found = small_model().eval()(inputs)[0]["instances"]
    assert found.image_size == (2 * inputs[0]["image"].shape[1], 2 * inputs[0]["image"].shape[2])
    assert found.pred_boxes.tensor.requires_grad


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(small_model, make_inputs):
    model, inputs = small_model().eval(), strip(make_inputs(0, 0))
    together = model(inputs)
    for found, single in zip(together, (model([x])[0] for x in inputs), strict=True):
        found, single = found["instances"], single["instances"]
        assert found.pred_classes.tolist() == single.pred_classes.tolist()
        torch.testing.assert_close(found.scores, single.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.pred_boxes.tensor, single.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
    first, second = (x["instances"].scores for x in together)
    assert not torch.allclose(first, second, rtol=1e-3)  # so that neither can stand for the other


@torch.no_grad()
def test_noise_is_for_training_only(small_model, make_inputs):
    kind, probability = "MODEL.DEQDET.PERTURBATION.KIND", "MODEL.DEQDET.PERTURBATION.PROBABILITY"
    clean, noisy = small_model(), small_model(kind, "multi-step", probability, 1.0)
    inputs = make_inputs(2, 1)
    scores = [model.eval()(strip(inputs))[0]["instances"].scores.tolist() for model in (clean, noisy)]
    assert scores[0] == scores[1]
    losses = [model.train()(inputs) for model in (clean, noisy)]
    changed = {name for name in losses[0] if losses[0][name] != losses[1][name]}
    assert {name.split("_")[-1] for name in changed} == {"step1", "step2", "step3"}
