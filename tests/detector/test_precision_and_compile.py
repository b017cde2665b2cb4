"""TEST.PRECISION and MODEL.DEQDET.COMPILE."""

import functools
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from deqdet.errors import UserError
from deqdet.layers import AdaMixerLayer, RefinementLayer, attention, cast_once, compile_layer
from deqdet.precision import _warn_if_slow
from deqdet.structures import Prediction, QueryState

from helpers.batches import strip
from helpers.small_layers import ADAMIXER, CASES

CPU = torch.device("cpu")
LAYERS = {"AdaMixerLayer": (), "SparseRCNNLayer": ("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone")}


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("solver", ["FixedPointIteration", "Anderson", "Broyden"])
def test_bfloat16_at_test_time(small_model, make_inputs, layer, solver):
    """Matrix products are in bfloat16; states, boxes, scores and residuals in float32, and near those in float32."""
    keys = "MODEL.DEQDET.REFINEMENT_LAYER", layer, *LAYERS[layer], "MODEL.DEQDET.SOLVER.NAME", solver
    inputs, found, seen = strip(make_inputs(0, 0)), [], []
    for precision in ("float32", "bfloat16"):
        model = small_model(*keys, "TEST.PRECISION", precision).eval()
        model.decoder.refinement.feedforward[0].register_forward_hook(lambda *x: seen.append(x[2].dtype))
        found.append(model.decode(inputs))
        path = model.walk(inputs, steps=3, record=[1, 3]).trajectory
        states = [path.start, path.state(1), path.state()]
        assert {x.dtype for state in states for x in (state.position, state.content)} == {torch.float32}
        assert path.solution.residual.dtype == torch.float32
    assert set(seen[: len(seen) // 2]) == {torch.float32} and set(seen[len(seen) // 2 :]) == {torch.bfloat16}
    # The scores of all queries: how many detections are left depends on boxes at the border of the image.
    exact, rough = (decoded.prediction.logits.float().sigmoid() for decoded, _ in found)
    torch.testing.assert_close(rough, exact, rtol=0, atol=0.005)
    for instances in found[1][1]:
        assert instances.scores.dtype == instances.pred_boxes.tensor.dtype == torch.float32
    assert not torch.equal(rough, exact)


def test_training_does_not_read_the_precision_of_test_time(small_model, make_inputs):
    seen = []
    model = small_model("TEST.PRECISION", "bfloat16").train()
    model.decoder.refinement.feedforward[0].register_forward_hook(lambda *x: seen.append(x[2].dtype))
    model(make_inputs(1))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("instructions, is_slow", [("AVX2", True), ("NO AVX", True), ("AVX512", False)])
def test_a_processor_without_bfloat16_is_pointed_out_once(
    small_model, make_inputs, monkeypatch, caplog, instructions, is_slow
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    for chosen in ("float32", "bfloat16"):
        model = small_model("TEST.PRECISION", chosen).eval()
        _warn_if_slow.cache_clear()
        for _ in range(2):
            model.infer(strip(make_inputs(0)))
        seen = [x.getMessage() for x in caplog.records if x.levelno == logging.WARNING]
        assert len(seen) == (is_slow and chosen == "bfloat16")
    start = f"PyTorch has no fast convolutions in bfloat16 and float16 for this processor ({instructions}), so that"
    assert not seen or seen[0].startswith(start)


def test_an_unknown_precision_is_an_error(small_model):
    with pytest.raises(ValueError, match="TEST.PRECISION is 'int8': it must be one of float32, bfloat16"):
        small_model("TEST.PRECISION", "int8")


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces, but generates no code, which would take a minute."""
    torch._dynamo.reset()
    counters.clear()  # of other tests in this process
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_one_graph_serves_all_sizes(name, traced, caplog):
    """fullgraph=True would raise at a graph break. The first two sizes may each make a graph, the others none."""
    case, graphs = CASES[name], []
    eager, compiled = case.make(), case.make()
    compile_layer(compiled)
    assert set(compiled.state_dict()) == set(eager.state_dict())
    for scale, images in ((1, 2), (2, 3), (3, 2), (4, 5)):
        sizes = [(x.shape[1], x.shape[2] * scale + 1, x.shape[3] * scale) for x in case.features()]
        features = [torch.randn(images, *size) for size in sizes]
        state = case.state(rows=images)
        found, expected = (layer(state, layer.prepare(features)) for layer in (compiled, eager))
        torch.testing.assert_close(found.content, expected.content, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.position, expected.position, rtol=0, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"] and graphs[1] == graphs[-1] >= 1, graphs
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]


class HostLayer(RefinementLayer):
    """Its forward needs a number on the host, of which no graph can be made."""

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        return QueryState(state.position, state.content + (1 if state.content.sum().item() > 0 else -1))

    def predict(self, state: QueryState) -> Prediction:
        return Prediction(state.content, state.position)


def test_a_layer_that_cannot_be_compiled_runs_as_it_is(caplog):
    layer = HostLayer()
    compile_layer(layer)
    state = QueryState(torch.zeros(1, 2, 4), torch.ones(1, 2, 3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert layer(state, []).content.tolist() == [[[2.0] * 3] * 2]
    (record,) = caplog.records  # it says so once
    assert record.getMessage().startswith("HostLayer cannot be compiled and runs eagerly: ")


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_steps_of_a_compiled_layer_do_not_cast_its_weights(name, traced, stir):
    """The copy has the layer's results, also after the weights have changed, and after a call in inference mode."""
    case = CASES[name]
    layer, features, state = case.make().eval(), case.features(), case.state()
    stir(layer, size=0.3)
    compile_layer(layer)
    assert cast_once(layer, CPU) is layer  # without autocast, there is nothing to cast
    for context in (torch.inference_mode, torch.no_grad):
        with context(), torch.autocast("cpu", dtype=torch.bfloat16):
            copy = cast_once(layer, CPU)
            found, expected = (x(state, layer.prepare(features)) for x in (copy, layer))
        torch.testing.assert_close(found.content, expected.content, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.position, expected.position, rtol=0, atol=1e-5)
        stir(layer, size=0.3)
    weights = dict(copy.named_parameters())
    assert weights["feedforward.0.weight"].dtype == weights["box_branch.0.weight"].dtype == torch.bfloat16
    assert weights["feedforward_norm.weight"].dtype == torch.float32
    assert {x.dtype for name, x in weights.items() if "in_proj" in name} == {torch.bfloat16}
    assert {x.dtype for x in layer.parameters()} == {torch.float32} and set(weights) == set(layer.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.enable_grad():
            assert cast_once(layer, CPU) is layer
        assert cast_once(layer.train(), CPU) is layer


class ExactLayer(RefinementLayer):
    """Computes in float32 whatever autocast says, so that weights in bfloat16 do not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        with torch.autocast("cpu", enabled=False):
            return QueryState(state.position, self.linear(state.content))

    def predict(self, state: QueryState) -> Prediction:
        return Prediction(state.content, state.position)


@torch.no_grad()
def test_a_layer_whose_weights_must_not_be_cast_keeps_them(traced, monkeypatch, caplog):
    # As inductor does, aot_eager traces autocast away. The eager backend would enter it and fail before it leaves it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    layer, state = ExactLayer().eval(), QueryState(torch.zeros(1, 2, 4), torch.ones(1, 2, 3))
    compile_layer(layer)
    expected = layer.linear(state.content)
    with torch.autocast("cpu", dtype=torch.bfloat16), caplog.at_level(logging.INFO, "deqdet"):
        for _ in range(2):
            assert torch.equal(cast_once(layer, CPU)(state, []).content, expected)
        assert cast_once(layer, CPU) is layer
    of_copy, message, of_layer = [x.getMessage() for x in caplog.records if x.name.startswith("deqdet")]
    assert of_copy == of_layer == "Compiling ExactLayer, which can take some seconds, or in training some minutes"
    assert message.startswith("The compiled ExactLayer casts its weights to torch.bfloat16 in every step, because ")


class AttentiveLayer(RefinementLayer):
    """Holds what a user's layer may hold: attention without biases, and a tensor that cannot be deep-copied."""

    def __init__(self, copies: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False, kdim=4, vdim=4, batch_first=True)
        self.kept = None if copies else (torch.ones(3, requires_grad=True) * 2)

    def forward(self, state: QueryState, features: list[Tensor]) -> QueryState:
        keys = state.content[..., :4]
        return QueryState(state.position, self.attention(state.content, keys, keys, need_weights=False)[0])

    def predict(self, state: QueryState) -> Prediction:
        return Prediction(state.content, state.position)


@torch.no_grad()
@pytest.mark.parametrize("copies", [True, False])
def test_the_layer_of_a_user_is_copied_or_left_alone(copies, traced):
    with torch.enable_grad():
        layer = AttentiveLayer(copies).eval()
    state = QueryState(torch.zeros(1, 2, 4), torch.ones(1, 2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(state, []).content
        compile_layer(layer)
        used = cast_once(layer, CPU)
        assert (used is not layer) == copies
        torch.testing.assert_close(used(state, []).content, expected, rtol=0, atol=1e-2)
        if copies:
            assert {x.dtype for x in used.parameters()} == {torch.bfloat16}
            layer.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=4, vdim=4)
            assert len(list(cast_once(layer, CPU).parameters())) == len(list(layer.parameters()))  # another copy


@torch.no_grad()
def test_a_lack_of_memory_does_not_give_the_copy_up(traced):
    layer = ADAMIXER.make().eval()
    compile_layer(layer)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("as large an image as this")

    with torch.autocast("cpu", dtype=torch.bfloat16):
        copy = cast_once(layer, CPU)
        call = copy._compiled_call_impl
        copy._compiled_call_impl = functools.partial(call.func, fail, *call.args[1:])
        with pytest.raises(torch.OutOfMemoryError):
            copy(ADAMIXER.state(), ADAMIXER.features())
        assert cast_once(layer, CPU) is copy


@torch.no_grad()
def test_a_compiled_layer_in_a_larger_graph(traced):
    """As in torch.compile or torch.export of a whole decoder: the layer is a part of it, and nothing is copied."""
    layer, state = ADAMIXER.make().eval(), ADAMIXER.state()
    prepared = layer.prepare(ADAMIXER.features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(state, prepared).content
        compile_layer(layer)
        found = torch.compile(lambda x: cast_once(layer, CPU)(x, prepared).content, fullgraph=True)(state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert layer._compiled_call_impl._copies == {}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_compiled_attention_for_a_gpu_is_that_of_eager_code(name, monkeypatch):
    """The kernel is chosen by hand, since there is no GPU."""
    torch._dynamo.reset()
    case = CASES[name]
    layer, state = case.make(), case.state()
    expected = layer(state, layer.prepare(case.features()))
    monkeypatch.setattr(attention, "_attention_kernel", lambda query: sdpa_kernel(SDPBackend.MATH))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = compiled(state, layer.prepare(case.features()))
    torch.testing.assert_close(found.content, expected.content, rtol=0, atol=1e-4)


@pytest.mark.parametrize("changed, chosen", [
    ({}, True), ({"dtype": torch.bfloat16}, False), ({"shape": (2, 8, 300, 32)}, False), ({"is_cuda": False}, False),
])  # fmt: skip
def test_one_image_in_float32_on_a_gpu_is_attended_to_by_products(monkeypatch, changed, chosen):
    query = SimpleNamespace(**{"is_cuda": True, "dtype": torch.float32, "shape": (1, 8, 300, 32)} | changed)
    with torch.no_grad():
        assert isinstance(attention._attention_kernel(query), nullcontext)  # in eager code
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert isinstance(attention._attention_kernel(query), nullcontext) != chosen
    assert isinstance(attention._attention_kernel(query), nullcontext)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["EquilibriumDecoder", "RecurrentDecoder"])
def test_a_compiled_decoder_casts_once(small_model, make_inputs, decoder, traced):
    found, inputs = [], strip(make_inputs(0))
    for compiled in (False, True):
        model = small_model("MODEL.DEQDET.DECODER", decoder, "TEST.PRECISION", "bfloat16",
                            "MODEL.DEQDET.COMPILE", compiled).eval()  # fmt: skip
        found.append(model.decode(inputs)[0].prediction)
        refinement = model.decoder.refinement
    assert list(refinement._compiled_call_impl._copies) == [(torch.device("cpu"), torch.bfloat16)]
    torch.testing.assert_close(found[1].boxes, found[0].boxes, rtol=0, atol=0.05)
    torch.testing.assert_close(found[1].logits, found[0].logits, rtol=0, atol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["EquilibriumDecoder", "RecurrentDecoder"])
def test_the_layer_itself_reads_a_compiled_decode_out(small_model, make_inputs, decoder, traced, monkeypatch):
    """And not its cast copy, for which only the steps have a fallback."""
    read, predict = [], AdaMixerLayer.predict
    monkeypatch.setattr(AdaMixerLayer, "predict", lambda layer, state: read.append(layer) or predict(layer, state))
    keys = "MODEL.DEQDET.DECODER", decoder, "TEST.PRECISION", "bfloat16", "MODEL.DEQDET.COMPILE", True
    model = small_model(*keys).eval()
    model.decode(strip(make_inputs(0)))
    assert len(read) == 1 and read[0] is model.decoder.refinement


@torch.no_grad()
@pytest.mark.parametrize("rtol", [0.0, 1e-9])
def test_all_steps_of_a_compiled_decode_run_the_copy(small_model, make_inputs, rtol, traced):
    """Also when images leave the batch; and what is computed on the path later runs the layer itself."""
    keys = "TEST.PRECISION", "bfloat16", "MODEL.DEQDET.COMPILE", True, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 3
    model = small_model(*keys, "MODEL.DEQDET.SOLVER.RTOL", rtol).eval()
    called, layer = [], model.decoder.refinement
    layer.register_forward_pre_hook(lambda module, _: called.append(module is layer))  # copied with the layer
    torch.compiler.set_stance("force_eager")
    try:
        path = model.walk(strip(make_inputs(0, 0))).trajectory
        assert called == [False] * 3
        with model.autocast():
            path.refine(path.start.pack())
    finally:
        torch.compiler.set_stance("default")
    assert called == [False] * 3 + [True]


def test_the_key_compiles_f_alone(small_model):
    decoder = small_model("MODEL.DEQDET.COMPILE", True).decoder
    assert decoder.refinement._compiled_call_impl is not None and decoder.initialization._compiled_call_impl is None
    stack = small_model("MODEL.DEQDET.COMPILE", True, "MODEL.DEQDET.DECODER", "StackedDecoder").decoder
    first, *others = stack.layers
    assert first._compiled_call_impl is None and others and all(x._compiled_call_impl is not None for x in others)


@torch.no_grad()
def test_the_whole_detector_compiles(small_model, make_inputs):
    """With graph breaks where the host reads sizes; the detections are those of the eager detector."""
    torch._dynamo.reset()
    model, inputs = small_model("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 1).eval(), strip(make_inputs(0))
    expected, found = model(inputs), torch.compile(model, backend="eager")(inputs)
    for one, other in zip(expected, found, strict=True):
        assert list(one) == list(other) == ["instances", "steps", "finite", "residual"]
        boxes = [x["instances"].pred_boxes.tensor for x in (one, other)]
        torch.testing.assert_close(*boxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(one["instances"].scores, other["instances"].scores, rtol=0, atol=1e-5)


def test_training_needs_boxes(small_model, make_inputs):
    """What a detector says that something, such as an exporter, has put back into training mode."""
    inputs = [*make_inputs(1), *strip(make_inputs(0))]
    with pytest.raises(UserError, match=r'image 1 of the batch has no "instances" with its boxes: call model.eval\(\)'):
        small_model().train()(inputs)
