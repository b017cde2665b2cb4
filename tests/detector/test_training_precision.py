"""What training in a lower precision computes in float32, and how far its gradients are from float32's."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import deqdet
from deqdet.measurement.gradients import compare_gradients, format_gradients

from helpers.batches import FIXED_STATISTICS, total

PACKAGE = str(Path(deqdet.__file__).parent)
LAYERS = {"AdaMixerLayer": (), "SparseRCNNLayer": ("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone")}
DECODERS = "EquilibriumDecoder", "RecurrentDecoder", "StackedDecoder"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Files of positions, boxes, packed states, matching, losses and the solver, where every result is in float32 or better.
EXACT = (
    "boxes.py", "structures.py", "perturbation.py", "queries.py", "matcher.py", "criterion.py", "equilibrium/solve.py",
    "equilibrium/estimators.py", "equilibrium/records.py", "equilibrium/residuals.py", "equilibrium/solvers.py",
)  # fmt: skip


class Recorder(TorchFunctionMode):
    """Remembers the dtypes of floating-point results, by the file and function of ours that called torch."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, str, str, torch.dtype]] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame and isinstance(result, Tensor) and result.is_floating_point():
            file = frame.f_code.co_filename.removeprefix(PACKAGE)[1:]
            name = getattr(function, "__name__", "")
            self.seen.add((file, frame.f_code.co_name, name, result.dtype))
        return result


def lowered(seen, files) -> list[tuple[str, str, str]]:
    """Calls in these files with a result in a lower precision; reading an argument that has one is none."""
    low = set(DTYPES.values())
    return [x[:3] for x in seen if x[0] in files and x[3] in low and x[2] not in ("__get__", "__getitem__")]


def record(model: nn.Module, inputs: list[dict], dtype: torch.dtype) -> tuple[Recorder, dict[str, Tensor]]:
    with torch.autocast("cpu", dtype=dtype), Recorder() as recorder:
        losses = model(inputs)
    return recorder, losses


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("layer", LAYERS)
def test_what_stays_in_float32(small_model, make_inputs, layer, decoder, precision):
    keys = "MODEL.DEQDET.REFINEMENT_LAYER", layer, *LAYERS[layer], "MODEL.DEQDET.DECODER", decoder
    noise = "MODEL.DEQDET.PERTURBATION.KIND", "multi-step", "MODEL.DEQDET.NUM_LAYERS", 3
    model, states = small_model(*keys, *noise).train(), []
    for module in model.modules():
        if type(module).__name__ == layer:
            module.register_forward_hook(lambda m, given, state: states.extend([given[0], state]))
    recorder, losses = record(model, make_inputs(2, 1), DTYPES[precision])
    assert lowered(recorder.seen, EXACT) == []
    assert {x.dtype for state in states for x in (state.position, state.content)} == {torch.float32}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    # It has seen what there is to see: positions, states, losses; and matrix products that are in the lower precision.
    files = {x[0] for x in recorder.seen}
    wanted = {"boxes.py", "matcher.py", "criterion.py", "queries.py"}
    if decoder == "EquilibriumDecoder":
        wanted |= {"structures.py", "perturbation.py"}
    assert wanted <= files
    products = {x[3] for x in recorder.seen if x[2] == "linear" and x[0].startswith("layers/")}
    assert DTYPES[precision] in products
    if layer == "AdaMixerLayer":
        logs = {x[3] for x in recorder.seen if x[0] == "layers/attention.py" and x[2] == "log"}
        points = {x[3] for x in recorder.seen if x[0] == "layers/sampling.py" and x[2] in ("addcmul", "softmax")}
        assert logs == points == {torch.float32}


def test_gradients_agree_by_part(small_model, make_inputs):
    """Within 10 % and a cosine of 0.95; for bfloat16 in the backbone and the neck, only on trained weights.

    Those two are not asserted here. The true gradient of a small model on eight images of noise is too small beside
    bfloat16's rounding: over 40 steps of training the cosine was anything from 0.34 to 0.98. docs/training.md has
    the figures of a trained model.
    """
    found = compare_gradients(small_model(), [make_inputs(2, 1, 3, 2, 1, 3, 2, 4)])
    assert list(found) == ["bfloat16", "float16"]
    for precision, parts in found.items():
        assert list(parts) == ["backbone", "neck", "queries", "g", "f"]
        for part, agreement in parts.items():
            (norm,), (ratio,), (cosine,) = agreement.norms, agreement.ratios, agreement.cosines
            assert norm > 0 and cosine < 1 - 1e-9  # it is another precision
            if precision == "float16" or part not in ("backbone", "neck"):
                assert abs(ratio - 1) <= 0.1 and cosine >= 0.95, (precision, part)


def test_the_comparison_sees_a_wrong_gradient(small_model, make_inputs):
    """f's gradient doubled and the neck's turned round, in bfloat16 alone."""
    model, inputs = small_model(*FIXED_STATISTICS), make_inputs(2)

    def spoil(factor):
        return lambda grad: grad * factor if model.low else grad

    model.low = False
    model.register_forward_pre_hook(lambda m, x: setattr(model, "low", torch.is_autocast_enabled("cpu")))
    for module, factor in ((model.decoder.refinement, 2.0), (model.backbone.convs, -1.0)):
        for parameter in module.parameters():
            parameter.register_hook(spoil(factor))
    found = compare_gradients(model, [inputs], ["bfloat16"])["bfloat16"]
    assert found["f"].ratios[0] == pytest.approx(2, rel=0.1) and found["f"].cosines[0] > 0.95
    assert found["g"].ratios[0] == pytest.approx(1, rel=0.1)
    table = format_gradients({"bfloat16": found}).splitlines()
    assert table[0].startswith("| part | precision") and [line.split(" | ")[0] for line in table[2:]] == [
        "| backbone", "| neck", "| queries", "| g", "| f",
    ]  # fmt: skip
    assert found["neck"].cosines[0] < 0


@pytest.mark.parametrize("extra", [0, 1])
def test_weights_cast_without_a_gradient_are_cast_again(small_model, make_inputs, monkeypatch, extra):
    """With a cache as in older releases of torch, which keep the first cast of a weight, with a gradient or without."""
    cache: dict[nn.Module, Tensor] = {}

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self not in cache:
            cache[self] = self.weight.to(torch.bfloat16)
        return F.linear(x.to(torch.bfloat16), cache[self], self.bias.to(torch.bfloat16))

    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(torch, "clear_autocast_cache", cache.clear)
    model = small_model("MODEL.DEQDET.EQUILIBRIUM.EXTRA_SUPERVISION", extra).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(make_inputs(2))
    total(losses).backward()
    layers = [x for x in model.decoder.refinement.modules() if isinstance(x, nn.Linear)]
    assert len(layers) > 5 and all(x.weight.grad is not None for x in layers)
