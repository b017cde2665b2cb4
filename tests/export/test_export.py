"""Exported detectors beside PyTorch: both forms, all six detectors, other sizes and batches than were traced."""

import copy
import functools
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import nn
from torch.export import ExportedProgram

from deqdet import Predictor, UserError
from deqdet.checkpoints import write_model_file
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration
from deqdet.export import Difference, Encoder, OneGraph, OnnxDetector, check_export, export_detector, write
from deqdet.export.check import BATCHES, SIZES
from deqdet.export.graphs import EXPORTED, ExportedSparseRCNNLayer
from deqdet.export.swin import ExportedSwinBlock, ExportedSwinStage
from deqdet.export.write import _trace_images, _trace_step, build_notes
from deqdet.layers import RefinementLayer, SparseRCNNLayer
from deqdet.tools.export_model import main

from helpers.batches import TWO_LEVELS

NAMES = ("ox", "ass", "hen")
TEST_SIZE = "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 160, "DATASETS.TEST", ()
SPARSE = (
    "MODEL.DEQDET.REFINEMENT_LAYER", "SparseRCNNLayer", "MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone",
    "MODEL.DEQDET.QUERIES.NORM_CONTENT", False, "MODEL.DEQDET.QUERIES.LEARN_BOXES", True,
)  # fmt: skip
STACKED = "MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 2
RECURRENT = "MODEL.DEQDET.DECODER", "RecurrentDecoder", "MODEL.DEQDET.NUM_LAYERS", 2
# Three stages, of which the last one has shifted windows. Tracing takes long, so there is no fourth.
SWIN = (
    "MODEL.BACKBONE.NAME", "build_swin_channel_mapper_backbone", "MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS",
    [1, 1, 2], "MODEL.SWIN.NUM_HEADS", [1, 2, 4], "MODEL.DEQDET.IN_FEATURES", ["p2", "p3", "p4"],
    "MODEL.SWIN.WINDOW_SIZE", 2, "MODEL.SWIN.DROP_PATH_RATE", 0.0, "MODEL.BACKBONE.FREEZE_AT", 0,
)  # fmt: skip
TWO_STEPS = ("MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 2)
# Stacked decoders read two levels, since their encoders are traced for them alone; the others read four.
DETECTORS = {
    "DEQDet": ("MODEL.DEQDET.SOLVER.DAMPING", 0.5),
    "RNNDet": RECURRENT,
    "AdaMixer": (*STACKED, *TWO_LEVELS),
    "DEQ Sparse R-CNN": (*SPARSE, *TWO_STEPS),
    "RNN Sparse R-CNN": (*SPARSE, *RECURRENT),
    "Sparse R-CNN": (*SPARSE, *STACKED, *TWO_LEVELS, "MODEL.FPN.IN_FEATURES", ["res2", "res3"]),
}


def spread(model: nn.Module) -> nn.Module:
    """Untrained boxes are the whole image and scores near 0.01; these differ from query to query."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_branch" in name and name.endswith("weight") and parameter.shape[0] == len(NAMES):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "class_branch" in name and name.endswith("bias") and len(parameter) == len(NAMES):
                parameter.zero_()
            if "box_branch" in name and name.endswith("weight") and parameter.shape[0] == 4:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module", autouse=True)
def equal_encoders_once() -> Iterator[None]:
    """Trace and convert an encoder once (30 s): the two forms of a detector's export contain the same one, to the bit.

    What is remembered belongs to the bytes of the module, and each caller gets a copy of the graph.
    """
    traces, graphs = {}, {}
    trace, convert = write._trace_images, write._to_onnx

    def trace_once(module: nn.Module, unit: int) -> tuple[ExportedProgram, list[torch.Tensor]]:
        if not isinstance(module, Encoder):
            return trace(module, unit)
        torch.save(module, stored := io.BytesIO())
        key = stored.getvalue(), unit
        if key not in traces:
            traces[key] = trace(module, unit)
        return traces[key]

    def convert_once(program: ExportedProgram, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        if all(program is not known for known, _ in traces.values()):
            return convert(program, inputs, outputs)
        key = id(program), *inputs, *outputs
        if key not in graphs:
            graphs[key] = convert(program, inputs, outputs)
        return copy.deepcopy(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_trace_images", trace_once)
        patch.setattr(write, "_to_onnx", convert_once)
        yield


@pytest.fixture(scope="module")
def make_predictor(small_cfg, small_model):
    def make(*overrides) -> Predictor:
        model = spread(small_model(*TEST_SIZE, *overrides))
        return Predictor(model, small_cfg(*TEST_SIZE, *overrides), NAMES, threshold=0.0)

    return make


@pytest.fixture(scope="module")
def two_graphs(make_predictor, tmp_path_factory) -> SimpleNamespace:
    """DEQDet in two graphs, with its Predictor."""
    predictor = make_predictor()
    exported = export_detector(predictor, tmp_path_factory.mktemp("two") / "small.onnx", form="two")
    return SimpleNamespace(predictor=predictor, exported=exported, detector=OnnxDetector(exported.files[0], threads=1))


@pytest.fixture(scope="module")
def one_graph(make_predictor, tmp_path_factory) -> Callable[[str], SimpleNamespace]:
    """one_graph(name): one of DETECTORS in one graph, exported once, with its Predictor and the lines of progress."""

    @functools.cache
    def export(name: str) -> SimpleNamespace:
        path, lines = tmp_path_factory.mktemp("one") / "small.onnx", []

        def say(line: str) -> None:
            assert not path.exists()
            lines.append(line)

        predictor = make_predictor(*DETECTORS[name])
        # DEQDet's own number of steps is 4.
        exported = export_detector(predictor, path, form="one", steps=2 if name == "DEQDet" else None, say=say)
        return SimpleNamespace(predictor=predictor, exported=exported, lines=lines)

    return export


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8, RGB: three rectangles on a plain ground."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), rng.integers(60, 120, 3), np.uint8)
    for _ in range(3):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        image[top : top + 18, left : left + 15] = rng.integers(0, 256, 3)
    return image


def assert_agree(differences: list[Difference]) -> None:
    assert len(differences) == len(SIZES) * len(BATCHES)
    for difference in differences:
        assert difference.boxes < 1e-2 and difference.scores < 1e-4, str(difference)
        assert difference.detections >= difference.batch


@pytest.mark.parametrize("name", DETECTORS)
def test_one_graph_agrees_with_pytorch(name, one_graph):
    exported = one_graph(name).exported
    assert [path.name for path in exported.files] == ["small.onnx"]
    assert_agree(check_export(exported))
    assert onnx.load(exported.files[0]).opset_import[0].version == 18


def test_the_steps_of_one_graph_are_an_input(one_graph):
    """With a default, and each weight once, whatever the steps; damping applies between the steps alone."""
    predictor, path = one_graph("DEQDet").predictor, one_graph("DEQDet").exported.files[0]
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node].count("Loop") == 1
    loop = next(node for node in model.graph.node if node.op_type == "Loop").attribute[0].g
    weights = sum(len(x.raw_data) for graph in (model.graph, loop) for x in graph.initializer)
    assert 0.9 < weights / sum(4 * x.numel() for x in predictor.model.parameters()) < 1.1
    session = onnxruntime.InferenceSession(str(path))
    assert [x.name for x in session.get_inputs()] == ["images", "sizes"]
    assert [x.name for x in session.get_overridable_initializers()] == ["steps"]
    images = torch.from_numpy(picture(64, 96)).permute(2, 0, 1)[None]
    inputs = {"images": images.numpy(), "sizes": np.array([[64, 96]])}
    for steps in (1, 3, 25):
        found = session.run(None, inputs | {"steps": np.array(steps)})
        with torch.no_grad():
            want = OneGraph(predictor.model, steps, damping=0.5)(images, torch.tensor([[64, 96]]))
        np.testing.assert_allclose(found[0], want[0], atol=1e-2)
        np.testing.assert_allclose(found[1], want[1], atol=1e-4)
        np.testing.assert_allclose(found[3], want[3], rtol=1e-2, atol=1e-6)
    with torch.no_grad():
        _, _, scores, *_ = Encoder(predictor.model)(images, torch.tensor([[64, 96]]))  # y_0, read out by g
    found = session.run(None, inputs | {"steps": np.array(0)})
    best = scores.flatten().sort(descending=True).values[: found[1].shape[1]]
    np.testing.assert_allclose(found[1][0], best, atol=1e-4)
    assert found[3].tolist() == [float("inf")]
    default = session.run(None, inputs)
    np.testing.assert_array_equal(default[1], session.run(None, inputs | {"steps": np.array(2)})[1])


@pytest.mark.parametrize("name", ["DEQ Sparse R-CNN", "RNN Sparse R-CNN"])
def test_two_sparse_graphs_agree_with_pytorch(name, make_predictor, tmp_path):
    exported = export_detector(make_predictor(*DETECTORS[name]), tmp_path / "small.onnx", form="two")
    assert_agree(check_export(exported))


def test_two_graphs_agree_with_pytorch(two_graphs):
    """DEQDet's; the command's test below has RNNDet's."""
    assert [path.name for path in two_graphs.exported.files] == ["small.encoder.onnx", "small.step.onnx"]
    assert_agree(check_export(two_graphs.exported))


@pytest.mark.parametrize("form", ["one", "two"])
def test_torch_export_agrees_with_pytorch(form, make_predictor, tmp_path):
    predictor = make_predictor(*TWO_STEPS)
    exported = export_detector(predictor, tmp_path / "small.pt2", target="torch-export", form=form)
    assert_agree(check_export(exported))
    extra = {"deqdet.json": ""}
    torch.export.load(exported.files[0], extra_files=extra)
    assert json.loads(extra["deqdet.json"])["class_names"] == list(NAMES)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_the_graphs_are_the_detector(name, make_predictor):
    """The module that is exported, in PyTorch, gives what the detector itself gives for a padded batch."""
    model = make_predictor(*DETECTORS[name]).model
    images = [torch.from_numpy(picture(*size, seed=i)).permute(2, 0, 1) for i, size in enumerate([(60, 90), (64, 80)])]
    want = model.infer([{"image": image} for image in images])
    padded = torch.full((2, 3, 64, 96), 255, dtype=torch.uint8)  # the padding has no effect, whatever it holds
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    graph = OneGraph(model, damping=0.5 if name == "DEQDet" else 1.0)
    boxes, scores, classes, residual = graph(padded, torch.tensor([[60, 90], [64, 80]]))
    for i, output in enumerate(want):
        found = output["instances"]
        clipped = boxes[i].clamp(min=0).minimum(torch.tensor(found.image_size).flip(0).repeat(2))
        kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        torch.testing.assert_close(clipped[kept], found.pred_boxes.tensor, rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i][kept], found.scores, rtol=0, atol=1e-5)
        assert classes[i][kept].tolist() == found.pred_classes.tolist()
        if "residual" in output:
            assert float(residual[i]) == pytest.approx(float(output["residual"]), rel=1e-3)


@torch.no_grad()
def test_pooling_without_lists_equals_roi_pooler(small_model):
    """Boxes of every level, outside the image, without area, infinite."""
    model = small_model(*SPARSE)
    layer: SparseRCNNLayer = model.decoder.refinement
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 32, 512 // s, 512 // s, generator=generator) for s in (4, 8, 16, 32)]
    corner = 600 * torch.rand(2, 40, 2, generator=generator) - 50
    size = 2.0 ** (10 * torch.rand(2, 40, 2, generator=generator))
    boxes = torch.cat([corner, corner + size], dim=2)
    boxes[0, 0] = torch.tensor([100.0, 100.0, 100.0, 100.0])
    boxes[0, 1] = torch.tensor([-torch.inf, 0.0, torch.inf, 10.0])
    boxes[1, 2] = torch.tensor([torch.nan, 3.0, 50.0, 60.0])
    boxes[1, 3] = torch.tensor([2000.0, 2000.0, 2100.0, 2100.0])
    want = layer._pool(features, boxes)
    layer.__class__ = ExportedSparseRCNNLayer
    levels = layer._assign_level(boxes.nan_to_num().clamp(-1e6, 1e6))
    assert levels.unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(layer._pool(features, boxes), want, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3, 7])
def test_the_exported_swin_is_the_same(small_model, window):
    """To the bit; with windows that cover the sides exactly, or reach beyond, or are larger than a level."""
    swin = small_model(*SWIN, "MODEL.SWIN.WINDOW_SIZE", window, "MODEL.SWIN.DEPTHS", [2, 2, 2]).backbone.bottom_up
    swin = swin.eval()
    images = [torch.randn(2, 3, 32 * h, 32 * w) for h, w in ((1, 1), (3, 4), (7, 5))]
    want = [swin(x) for x in images]
    for module in swin.modules():
        module.__class__ = EXPORTED.get(type(module), type(module))
    assert {ExportedSwinStage, ExportedSwinBlock} < {type(x) for x in swin.modules()}
    for x, levels in zip(images, want, strict=True):
        found = swin(x)
        assert found.keys() == levels.keys() and all(torch.equal(found[name], levels[name]) for name in levels)


def test_swin_in_two_graphs(make_predictor, tmp_path):
    exported = export_detector(make_predictor(*SWIN), tmp_path / "swin.onnx", form="two", steps=2)
    assert_agree(check_export(exported))


class Choosy(nn.Module):
    """Adds 1 to images of some sizes alone."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen = chosen

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor]:
        return (images + 1.0 if self.chosen(*images.shape) else images * 1.0,)


@pytest.mark.parametrize("chosen, size", [
    (lambda b, c, h, w: w < 150, "a batch of 1 and images of 64 x 256 pixels"),
    (lambda b, c, h, w: h < w, "a batch of 1 and images of 96 x 64 pixels"),
    (lambda b, c, h, w: h != w, "a batch of 3 and images of 32 x 32 pixels"),
    (lambda b, c, h, w: b > 1, "a batch of 1 and images of 96 x 64 pixels"),
])  # fmt: skip
def test_a_graph_for_some_sizes_only_is_refused(chosen, size):
    """torch.export fixes such a choice as it was for the traced sizes, without an error."""
    with pytest.raises(UserError, match=f"the graph is wrong for {size}|cannot trace this detector"):
        _trace_images(Choosy(chosen), 32)


def loop_over_images(state, level):
    return torch.stack([row + 1 for row in state])


def loop_over_a_count(state, level):
    return torch.cat([state[i : i + 1] for i in range(len(state))])


def unbind_images(state, level):
    return torchvision.ops.roi_align(level, list(state.reshape(len(state), -1, 4).unbind(0)), 1).flatten(1)


def loop_over_rows(state, level):
    return state + sum(row.mean() for row in level.unbind(2))


class Constant(RefinementLayer):
    """A layer whose function treats a size as a constant."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __call__(self, state, features):
        return nn.Module.__call__(self, state, features)

    def forward(self, state, features):
        return self.function(state, features[0])

    def predict(self, state):
        raise NotImplementedError


@pytest.mark.parametrize("function, size, hint", [
    (loop_over_images, "the batch size", "a loop or unbind over the images"),
    (loop_over_a_count, "the batch size", "a loop or unbind over the images"),
    (unbind_images, "the batch size", "a loop or unbind over the images"),
    (loop_over_rows, "a size of the images or levels", "a loop over its elements"),
])  # fmt: skip
def test_a_layer_that_treats_a_size_as_a_constant(function, size, hint, capfd):
    """One line with the class and the place, and nothing of torch's log, whose levels are then as before."""
    names = ("torch", "torch._guards", "torch._dynamo", "torch._dynamo.output_graph")
    levels = [logging.getLogger(name).level for name in names]
    handlers = logging.getLogger("torch").handlers
    stream = io.StringIO()
    handlers.append(handler := logging.StreamHandler(stream))
    try:
        with pytest.raises(UserError) as error:
            _trace_step(Constant(function), [torch.ones(2, 8)], [torch.ones(2, 3, 4, 5)])
    finally:
        handlers.remove(handler)
    line = function.__code__.co_firstlineno + 1
    where = f"{__name__}.Constant treats {size} as a constant ({__file__}, line {line}), for example by {hint} "
    assert str(error.value).startswith(f"the export must hold for all sizes, but {where}")
    assert stream.getvalue() == "" and capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in names] == levels


def test_a_graph_for_all_sizes_is_not_refused():
    program, (example,) = _trace_images(Choosy(lambda b, c, h, w: True), 32)
    assert example.shape == (2, 3, 96, 128) and isinstance(program, ExportedProgram)


def test_swin_has_no_form_for_torch_export(make_predictor, tmp_path):
    with pytest.raises(UserError, match="Swin can be exported as ONNX only"):
        export_detector(make_predictor(*SWIN), tmp_path / "swin.pt2", target="torch-export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    {}, {"steps": 1}, {"steps": 7}, {"rtol": 0.05, "steps": 9}, {"solver": "anderson", "steps": 6},
])  # fmt: skip
def test_the_runner_agrees_with_the_predictor(two_graphs, options):
    """Its own resize, padding, iteration and read-out, at a size that is resized and padded."""
    image = picture(75, 110)
    want = two_graphs.predictor(image, **options)
    found = two_graphs.detector(image, threshold=0.0, **options)
    assert found.steps == want.steps
    assert found.residual == pytest.approx(want.residual, rel=2e-2, abs=1e-6)
    np.testing.assert_allclose(found.boxes, want.instances.pred_boxes.tensor, atol=1e-2)
    np.testing.assert_allclose(found.scores, want.instances.scores, atol=1e-4)
    assert found.labels == want.labels


def test_the_runner_chooses_the_steps_of_one_graph(one_graph):
    """They are an input; a tolerance and another solver need two graphs."""
    predictor, image = one_graph("DEQDet").predictor, picture(75, 110)
    detector = OnnxDetector(one_graph("DEQDet").exported.files[0], threads=1)
    for steps in (None, 1, 7):
        want = predictor(image, steps=steps or 2)
        found = detector(image, steps=steps, rtol=0, solver="plain", threshold=0.0)
        assert found.steps == want.steps == (steps or 2)
        assert found.residual == pytest.approx(want.residual, rel=2e-2)
        np.testing.assert_allclose(found.boxes, want.instances.pred_boxes.tensor, atol=1e-2)
        np.testing.assert_allclose(found.scores, want.instances.scores, atol=1e-4)
    found = detector([image, image], steps=0, threshold=0.0)
    assert [(x.steps, x.residual) for x in found] == [(0, float("inf"))] * 2
    assert detector(image, steps=np.int32(2), threshold=0.0).steps == 2
    for options in ({"rtol": 0.1}, {"solver": "anderson"}):
        with pytest.raises(ValueError, match=r"one graph has neither; export with --form two"):
            detector(image, **options)
    with pytest.raises(ValueError, match="solver must be plain or anderson, got 'newton'"):
        detector(image, solver="newton")
    for steps in (-1, 1.5):
        with pytest.raises(ValueError, match=f"steps must be a whole number of at least 0, got {steps}"):
            detector(image, steps=steps)


def test_the_steps_of_a_stack_are_fixed(one_graph):
    detector = OnnxDetector(one_graph("AdaMixer").exported.files[0], threads=1)
    assert detector(picture(64, 96)).steps == 1  # after the first layer
    with pytest.raises(ValueError, match="steps 3: the layers of this detector have different weights"):
        detector(picture(64, 96), steps=3)


def test_the_runner_follows_the_refinement(two_graphs):
    """Step 0 is the initialization layer's, and each later one what a call with that many steps gives."""
    image = picture(64, 96)
    results = list(two_graphs.detector.refine(image, steps=3, threshold=0.0))
    assert [x.steps for x in results] == [0, 1, 2, 3]
    assert results[0].residual == float("inf")
    walk = two_graphs.predictor.walk(image, steps=3, record=[0, 2])
    for step in (0, 2):
        np.testing.assert_allclose(results[step].boxes, walk.detections(step)[0].pred_boxes.tensor, atol=1e-2)
    np.testing.assert_array_equal(results[2].boxes, two_graphs.detector(image, steps=2, threshold=0.0).boxes)


def test_images_of_a_batch_stop_on_their_own(two_graphs):
    images = [picture(64, 96, seed) for seed in range(3)]
    alone = [list(two_graphs.detector.refine(x, steps=1))[-1].residual for x in images]
    rtol = sorted(alone)[1] * 0.999  # at least one image stops at step 1, and another goes on
    together = two_graphs.detector(images, steps=5, rtol=rtol, threshold=0.0)
    assert min(x.steps for x in together) == 1 < max(x.steps for x in together)
    for image, found in zip(images, together, strict=True):
        single = two_graphs.detector(image, steps=5, rtol=rtol, threshold=0.0)
        assert found.steps == single.steps
        np.testing.assert_allclose(found.boxes, single.boxes, atol=1e-2)


def test_the_file_says_what_it_is(two_graphs):
    notes = two_graphs.detector.notes
    assert notes["class_names"] == list(NAMES)
    assert (notes["min_size"], notes["max_size"], notes["pixel_format"]) == (64, 160, "RGB")
    assert notes["strides"] == [4, 8, 16, 32] and notes["steps"] == 4 and notes["solver"] == "plain"
    props = {x.key: x.value for x in onnx.load(two_graphs.exported.files[1]).metadata_props}
    assert {key: json.loads(value) for key, value in props.items()} == notes and notes["form"] == "two"


def test_the_file_has_a_checksum_of_the_weights(two_graphs, make_predictor):
    other = make_predictor()
    assert build_notes(other, form="two") == two_graphs.detector.notes
    with torch.no_grad():
        other.model.decoder.refinement.box_branch[-1].bias += 0.05
    changed, notes = build_notes(other, form="two"), two_graphs.detector.notes
    assert [key for key in notes if changed[key] != notes[key]] == ["weights"]


def test_defaults_come_from_the_config(make_predictor, tmp_path):
    predictor = make_predictor("MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.MEMORY", 3,
                               "MODEL.DEQDET.SOLVER.RTOL", 0.25)  # fmt: skip
    assert isinstance(predictor.model.decoder.solver, Anderson)
    notes = build_notes(predictor, form="two", steps=6)
    assert (notes["solver"], notes["history_size"], notes["rtol"], notes["steps"]) == ("anderson", 3, 0.25, 6)
    with pytest.raises(UserError, match="cannot be exported with --form one.*FixedPointIteration"):
        export_detector(predictor, tmp_path / "small.onnx", form="one")
    notes = build_notes(predictor, form="one", solver=FixedPointIteration(damping=0.5), rtol=0.5)
    assert (notes["solver"], notes["damping"], notes["rtol"], notes["steps"]) == ("plain", 0.5, 0.0, 4)
    notes = build_notes(predictor, form="two", solver=Anderson(history_size=5), rtol=0.0)
    assert (notes["solver"], notes["history_size"], notes["rtol"]) == ("anderson", 5, 0.0)


@pytest.mark.parametrize("overrides, options, message", [
    (STACKED, {"form": "two"}, "different weights.*--form one"),
    (STACKED, {"form": "one", "steps": 4}, "fixed: give no --steps"),
    (("MODEL.DEQDET.SOLVER.NAME", "Broyden"), {"form": "two"}, "Broyden cannot be exported"),
    (("MODEL.DEQDET.SOLVER.RETURN_BEST", True), {"form": "two"}, "RETURN_BEST cannot be exported"),
    ((), {"form": "one", "steps": 0}, "--steps must be at least 1"),
    (RECURRENT, {"form": "two", "rtol": 0.1}, "RecurrentDecoder, which takes no --rtol and no --solver"),
    ((), {"form": "two", "solver": Broyden()}, "Broyden cannot be exported"),
])  # fmt: skip
def test_what_cannot_be_exported_leaves_no_file(overrides, options, message, make_predictor, tmp_path):
    with pytest.raises(UserError, match=message):
        export_detector(make_predictor(*overrides), tmp_path / "small.onnx", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_export_is_refused(two_graphs, make_predictor):
    """The graphs of one detector beside the modules of another one."""
    other = make_predictor()
    with torch.no_grad():
        other.model.decoder.refinement.box_branch[-1].bias += 0.05
    exported = two_graphs.exported
    step = type(exported.graphs[1][1])(other.model)
    wrong = replace(exported, graphs=(exported.graphs[0], (exported.files[1], step)))
    with pytest.raises(UserError, match=r"small\.encoder\.onnx differs from PyTorch: batch 1, "):
        check_export(wrong)


def test_the_command(make_predictor, tmp_path, capsys):
    """With a model file of an RNNDet, whose two graphs are compared too."""
    predictor = make_predictor(*RECURRENT)
    file = tmp_path / "small.safetensors"
    write_model_file(file, weights=predictor.model.state_dict(), cfg=predictor.cfg, class_names=NAMES)
    main(["--model", str(file), "--output", str(tmp_path / "out.onnx"), "--steps", "3"])
    printed = capsys.readouterr().out
    encoder, step = (tmp_path / f"out.{part}.onnx" for part in ("encoder", "step"))
    stages = [line for line in printed.splitlines() if not line.startswith("  ")]
    assert stages == [
        "Tracing the encoder", f"Writing {encoder}", "Tracing the step", f"Writing {step}",
        f"Comparing {encoder} and {step} with PyTorch after 3 steps:",
        *(f"{file} ({file.stat().st_size / 1e6:.1f} MB)" for file in (encoder, step)),
    ]  # fmt: skip
    pixels = [float(line.split("up to ")[1].split(" px")[0]) for line in printed.splitlines() if "differ by" in line]
    assert len(pixels) == 6 and max(pixels) < 1e-2
    assert OnnxDetector(tmp_path / "out.encoder.onnx").notes["steps"] == 3
    with pytest.raises(SystemExit, match="error: .*out.pt: the output of --to onnx must end in .onnx"):
        main(["--model", str(file), "--output", str(Path(tmp_path, "out.pt"))])
    assert {path.name for path in tmp_path.iterdir()} == {encoder.name, step.name, file.name}


def test_a_wrong_export_replaces_no_older_file(make_predictor, tmp_path, monkeypatch, capsys):
    file, predictor = tmp_path / "small.safetensors", make_predictor(*RECURRENT)
    write_model_file(file, weights=predictor.model.state_dict(), cfg=predictor.cfg, class_names=NAMES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Difference, "is_equal", False)
    older = [Path(f"out.{part}.onnx") for part in ("encoder", "step")]
    for path in older:
        path.write_text("an older export")
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(file), "--output", "out.onnx"])
    message = str(ended.value)
    assert message.startswith("error: out.encoder.onnx differs from PyTorch: batch 1, ")
    assert message.endswith("; it was deleted, and an older file of this name is unchanged")
    printed = capsys.readouterr().out
    assert "\nWriting out.step.onnx\nComparing out.encoder.onnx and out.step.onnx with PyTorch" in printed
    assert "MB" not in printed
    assert [path.read_text() for path in older] == ["an older export"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {file.name, *(path.name for path in older)}


def test_each_line_comes_before_its_stage(one_graph, capfd):
    """Of one graph. Its load for the comparison does not warn of the default of `steps`."""
    exported, lines = one_graph("DEQDet").exported, []
    path = exported.files[0]
    assert one_graph("DEQDet").lines == ["Tracing the encoder", "Converting the encoder to ONNX",
                                         "Tracing the step, and converting it to ONNX", f"Writing {path}"]  # fmt: skip
    capfd.readouterr()
    found = check_export(exported, lines.append)
    assert lines == [f"Comparing {path} with PyTorch after 2 steps:", *(f"  {x}" for x in found)]
    assert "Initializer steps" not in capfd.readouterr().err
