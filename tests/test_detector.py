import math

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from deqdet.structures import Prediction

NAMES = ["init", "init+1", "init+2", "step1", "step2", "step3"]
FIXED_STATISTICS = "MODEL.DEQDET.FIX_BN_STATISTICS", True, "MODEL.BACKBONE.FREEZE_AT", 2


class FixedDecoder(nn.Module):
    """The same prediction whatever the features."""

    def __init__(self, prediction: Prediction):
        super().__init__()
        self.prediction = prediction

    def decode(self, initial, features) -> Prediction:
        return self.prediction


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def strip(inputs: list[dict]) -> list[dict]:
    """As a test loader gives them, without ground truth."""
    return [{k: v for k, v in x.items() if k != "instances"} for x in inputs]


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


# Inference


def fixed_model(small_model, boxes: list, logits: list) -> nn.Module:
    model = small_model().eval()
    model.decoder = FixedDecoder(Prediction(torch.tensor([logits]), torch.tensor([boxes])))
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


# Training


def test_loss_names(small_model, make_inputs):
    losses = small_model()(make_inputs(2, 1))
    assert list(losses) == [f"loss_{kind}_{name}" for name in NAMES for kind in ("cls", "l1", "giou")]
    for name, loss in losses.items():
        assert loss.shape == () and loss.requires_grad and loss > 0, name


def test_losses_of_one_shifted_box_by_hand(small_model, make_inputs):
    """Boxes are in pixels; the L1 loss divides by the size before padding."""
    model, inputs = small_model().train(), make_inputs(1, height=50, width=80)
    (box,) = inputs[0]["instances"].gt_boxes.tensor.tolist()
    shifted = torch.tensor([[[box[0] + 8, box[1] + 5, box[2] + 8, box[3] + 5]]])
    model.decoder.supervise = lambda *_: {"only": Prediction(torch.tensor([[[20.0, -20.0, -20.0]]]), shifted)}
    losses = model(inputs)
    assert losses["loss_cls_only"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_l1_only"].item() == pytest.approx(5 * 2 * (8 / 80 + 5 / 50), rel=1e-5)


@pytest.mark.parametrize("counts", [(2, 0), (0, 1), (0, 0)])
def test_images_without_boxes(small_model, make_inputs, counts):
    model, inputs = small_model(), make_inputs(*counts)
    losses = model.train()(inputs)
    assert list(losses) == [f"loss_{kind}_{name}" for name in NAMES for kind in ("cls", "l1", "giou")]
    assert all(loss.isfinite() for loss in losses.values())
    for name in NAMES:
        assert losses[f"loss_cls_{name}"] > 0
        assert (losses[f"loss_l1_{name}"] > 0) == (losses[f"loss_giou_{name}"] > 0) == (sum(counts) > 0)
    total(losses).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    with torch.no_grad():
        found = model.eval()(inputs)
    assert [len(x["instances"]) for x in found] == [6, 6]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("learn_boxes", [False, True])
def test_every_parameter_is_trained(small_model, make_inputs, checkpointed, learn_boxes):
    overrides = "MODEL.DEQDET.EQUILIBRIUM.CHECKPOINT_SEGMENTS", checkpointed
    model = small_model(*overrides, "MODEL.DEQDET.QUERIES.LEARN_BOXES", learn_boxes).train()
    total(model(make_inputs(2, 1))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.any(), name
    assert ("queries.boxes" in dict(model.named_parameters())) == learn_boxes


def test_fixed_statistics_of_batch_norm(small_model, make_inputs):
    model, inputs = small_model(*FIXED_STATISTICS).train(), make_inputs(2, 1)
    norms = {k: m for k, m in model.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {name.split(".")[1] for name in norms} == {"res3", "res4", "res5"}
    statistics = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}
    total(model(inputs)).backward()
    for name, value in statistics.items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, norm in norms.items():
        assert norm.weight.grad.any() and norm.bias.grad.any(), name
        assert not norm.training
    for name, parameter in model.backbone.bottom_up.named_parameters():
        assert parameter.requires_grad == name.startswith(("res3", "res4", "res5")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) == 3  # the stem's, and the two of the block in res2: 8 channels to 8, no shortcut
    # The rest of the model is in training mode, and everything comes back from eval() to where it was.
    assert model.training and model.decoder.refinement.training and model.backbone.bottom_up.res3.training
    assert not model.eval().training and model.train().training
    assert not any(norm.training for norm in norms.values())


def test_statistics_of_batch_norm_that_are_not_fixed(small_model, make_inputs):
    model = small_model().train()
    norm = model.backbone.bottom_up.stem.conv1.norm
    before = norm.running_mean.clone()
    model(make_inputs(2, 1))
    assert norm.training and (norm.running_mean != before).all()


def test_losses_in_training_mode_do_not_depend_on_the_batch(small_model, make_inputs):
    """With fixed statistics two images have the mean of their losses, if each has as many boxes."""
    model, inputs = small_model(*FIXED_STATISTICS).train(), make_inputs(2, 2)
    with torch.no_grad():
        together = model(inputs)
        first, second = (model([x]) for x in inputs)
    for name, loss in together.items():
        assert loss.item() == pytest.approx((first[name] + second[name]).item() / 2, rel=1e-4), name
    assert any(abs(first[name] - second[name]) > 1e-3 for name in first)


@pytest.mark.parametrize(
    "parameter, named, unnamed",
    [
        ("initialization.class_branch.3.bias", ["init"], ["init+1", "step1", "step3"]),
        ("refinement.class_branch.3.bias", ["init+1", "init+2", "step1", "step2", "step3"], ["init"]),
        ("refinement.feedforward.0.weight", ["init+1", "init+2", "step1", "step2", "step3"], ["init"]),
        ("initialization.box_branch.3.bias", NAMES, []),
    ],
)
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_nan_weights_name_their_predictions(small_model, make_inputs, parameter, named, unnamed, counts):
    model = small_model().train()
    nn.init.constant_(model.decoder.get_parameter(parameter), math.nan)
    with pytest.raises(FloatingPointError, match="[Nn]on-finite") as error:
        model(make_inputs(*counts))
    words = str(error.value).replace(";", " ").split()
    assert all(name in words for name in named) and not any(name in words for name in unnamed)


def test_an_image_of_nan_is_named(small_model, make_inputs):
    model, inputs = small_model(*FIXED_STATISTICS).train(), make_inputs(2, 1, 1)
    inputs = [x | {"file_name": f"{i}.jpg"} for i, x in enumerate(inputs)]
    inputs[1]["image"] = torch.full((3, 64, 96), math.nan)
    with pytest.raises(FloatingPointError, match=r"image 1: 1\.jpg") as error:
        model(inputs)
    assert "image 0" not in str(error.value) and "image 2" not in str(error.value)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_mixed_precision(small_model, make_inputs, checkpointed):
    """bfloat16 has 8 bits: losses stay within a few per cent of those in float32."""
    key = "MODEL.DEQDET.EQUILIBRIUM.CHECKPOINT_SEGMENTS"
    model, inputs = small_model(*FIXED_STATISTICS, key, checkpointed).train(), make_inputs(2, 1)
    exact = model(inputs)
    seen = []
    model.decoder.refinement.feedforward[0].register_forward_hook(lambda *x: seen.append(x[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    assert set(seen) == {torch.bfloat16}
    for name, loss in losses.items():
        assert loss.dtype == torch.float32, name
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name
    total(losses).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@torch.no_grad()
def test_mixed_precision_detections(small_model, make_inputs):
    model, inputs = small_model().eval(), strip(make_inputs(0))
    exact = model(inputs)[0]["instances"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(inputs)[0]["instances"]
    assert found.scores.dtype == torch.float32 and isinstance(found.pred_boxes, Boxes)
    assert found.scores.tolist() == pytest.approx(exact.scores.tolist(), abs=0.005)


def test_fixed_statistics_stay_before_any_call_of_train(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.FIX_BN_STATISTICS", True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(make_inputs(1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_detections_with_gradient(small_model, make_inputs):
    """Scaling to another size is in place; outside torch.no_grad that must not touch a view of the predictions."""
    inputs = [{**x, "height": 2 * x["image"].shape[1], "width": 2 * x["image"].shape[2]} for x in make_inputs(1, 1)]
    found = small_model().eval()(inputs)[0]["instances"]
    assert found.image_size == (2 * inputs[0]["image"].shape[1], 2 * inputs[0]["image"].shape[2])
    assert found.pred_boxes.tensor.requires_grad
