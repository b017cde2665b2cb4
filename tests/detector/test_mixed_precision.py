"""The detector under autocast, in bfloat16."""

import pytest
import torch

from detectron2.structures import Boxes

from helpers.batches import FIXED_STATISTICS, strip, total


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
