"""BatchNorm in the detector's backbone: trained, or with the statistics of its checkpoint."""

import torch
from torch import nn

from detectron2.layers import FrozenBatchNorm2d

from helpers.batches import FIXED_STATISTICS, total


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


def test_fixed_statistics_stay_before_any_call_of_train(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.FIX_BN_STATISTICS", True)
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(make_inputs(1, 1))
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
