"""The detector's losses, their names and gradients, and what is wrong with a batch or a model."""

import math

import pytest
import torch
from torch import nn

from deqdet.structures import Prediction

from helpers.batches import FIXED_STATISTICS, total

NAMES = ["init", "init+1", "init+2", "step1", "step2", "step3"]


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
    words = str(error.value).replace(",", " ").split()
    assert all(name in words for name in named) and not any(name in words for name in unnamed)


def test_an_image_of_nan_is_named(small_model, make_inputs):
    model, inputs = small_model(*FIXED_STATISTICS).train(), make_inputs(2, 1, 1)
    inputs = [x | {"file_name": f"{i}.jpg"} for i, x in enumerate(inputs)]
    inputs[1]["image"] = torch.full((3, 64, 96), math.nan)
    with pytest.raises(FloatingPointError, match=r"image 1: 1\.jpg") as error:
        model(inputs)
    assert "image 0" not in str(error.value) and "image 2" not in str(error.value)
