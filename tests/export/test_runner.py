"""The runner as a file of its own: its resize, its solver, and what it needs to be imported."""

import ast
import importlib.util
import json
import re
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from detectron2.data import transforms as T

from deqdet.equilibrium import Anderson

from helpers.paths import ROOT

FILE = ROOT / "projects" / "DEQDet" / "deqdet" / "export" / "runner.py"


@pytest.fixture(scope="module")
def runner():
    """The file, imported by its path."""
    spec = importlib.util.spec_from_file_location("copied_runner", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_it_needs_numpy_and_onnxruntime_only():
    names = set()
    for node in ast.walk(ast.parse(FILE.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would tie the file to the package"
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("source, target", [
    ((60, 80), (64, 85)), ((480, 640), (160, 213)), ((97, 33), (235, 80)), ((50, 51), (50, 75)), ((7, 300), (1, 43)),
])  # fmt: skip
def test_resize_equals_pillow(runner, source, target):
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    want = np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(runner.resize(image, *target), want)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (100, 100), (100, 1000), (333, 500), (427, 641)])
def test_sizes_equal_detectron2s(runner, height, width):
    want = T.ResizeShortestEdge.get_output_shape(height, width, 160, 300)
    assert runner.target_size(height, width, 160, 300) == want
    assert runner.target_size(height, width, 0, 300) == (height, width)


@pytest.mark.parametrize("height, width, target", [(1, 3000, (1, 300)), (3000, 1, (300, 1)), (2, 9000, (1, 300))])
def test_a_side_keeps_one_pixel(runner, height, width, target):
    assert runner.target_size(height, width, 160, 300) == target
    white = np.full((height, width, 3), 255, np.uint8)
    resized = runner.resize(white, *target)
    assert resized.shape == (*target, 3) and resized.min() == 255


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_anderson_equals_the_packages(runner, damping):
    """An affine map in 12 dimensions, of which Anderson must find the fixed point too."""
    generator = torch.Generator().manual_seed(0)
    matrix = 0.2 * torch.randn(12, 12, generator=generator)
    offset = torch.randn(2, 12, generator=generator)
    solver = Anderson(history_size=4, damping=damping)
    iterate = torch.zeros(2, 12)
    state, other, history = solver.init(iterate), iterate.numpy(), []
    for _ in range(12):
        iterate, state = solver.step(iterate, iterate @ matrix + offset, state)
        output = other @ matrix.numpy() + offset.numpy()
        other, history = runner.anderson(other, output, history, 4, damping, solver.regularization)
        np.testing.assert_allclose(other, iterate, atol=2e-3)
    fixed = torch.linalg.solve((torch.eye(12) - matrix).T, offset.T).T
    np.testing.assert_allclose(other, fixed, atol=1e-2)


def test_anderson_takes_a_plain_step_where_nothing_changes(runner):
    same = np.ones((1, 5), np.float32)
    iterate, history = runner.anderson(same, same, [], 4, 1.0, 0.0)
    iterate, _ = runner.anderson(iterate, same, history, 4, 1.0, 0.0)
    np.testing.assert_array_equal(iterate, same)


def test_a_row_without_a_solution_does_not_change_the_others(runner):
    generator = np.random.default_rng(0)
    iterates, outputs = generator.normal(size=(2, 3, 2, 5)).astype(np.float32)
    iterates[:, 0] = outputs[:, 0] = 1.0  # converged exactly: without regularization, its Gram matrix is singular
    history, alone = [], []
    for iterate, output in zip(iterates, outputs, strict=True):
        both, history = runner.anderson(iterate, output, history, 4, 1.0, 0.0)
        one, alone = runner.anderson(iterate[1:], output[1:], alone, 4, 1.0, 0.0)
    np.testing.assert_array_equal(both[0], outputs[-1][0])
    np.testing.assert_array_equal(both[1:], one)
    assert not np.allclose(one, outputs[-1][1:])


NOTES = {
    "deqdet": "0.1.0", "form": "one", "class_names": ["ox", "hen"], "pixel_format": "RGB", "min_size": 64,
    "max_size": 160, "size_divisibility": 32, "steps": 4, "rtol": 0.0, "solver": "plain",
}  # fmt: skip


def write_graph(path, inputs: dict, outputs: dict, notes: dict):
    """A graph of constants, which has the inputs and outputs of an exported detector and finds two objects."""
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, shape, values))
            for name, (kind, shape, values) in outputs.items()
        ],
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape, _) in outputs.items()],
        initializer=[helper.make_tensor("steps", TensorProto.INT64, [], [4])] * ("steps" in inputs),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in notes.items()})
    path.write_bytes(model.SerializeToString())
    return path


IMAGES = {"images": (TensorProto.UINT8, [None, 3, None, None]), "sizes": (TensorProto.INT64, [None, 2])}
ONE_GRAPH = {
    "boxes": (TensorProto.FLOAT, [1, 2, 4], [0, 0, 8, 1, 0, 0, 160, 1]),
    "scores": (TensorProto.FLOAT, [1, 2], [0.75, 0.25]),
    "classes": (TensorProto.INT64, [1, 2], [1, 0]),
    "residual": (TensorProto.FLOAT, [1], [0.5]),
}


@pytest.fixture
def one_graph(tmp_path):
    return write_graph(tmp_path / "one.onnx", {**IMAGES, "steps": (TensorProto.INT64, [])}, ONE_GRAPH, NOTES)


IMAGE = np.zeros((40, 60, 3), np.uint8)


@pytest.mark.parametrize("arguments, message", [
    *(({"threads": x}, f"threads must be a whole number from 0 to 1024, got {x!r}")
      for x in ("x", "2", -1, 1.0, True, None, 10**12)),
    *(({"providers": x}, f", CPUExecutionProvider, got {x!r}")
      for x in ("CPUExecutionProvider", ["GPU"], ["CPUExecutionProvider", 1], [["CPUExecutionProvider"]], [()], [],
                None, [("CPUExecutionProvider",)], [("CPUExecutionProvider", 3)])),
    ({"path": 3}, "path must be the name of a file, got 3"),
    ({"path": None}, "path must be the name of a file, got None"),
    ({"path": b"a.onnx"}, "path must be the name of a file, got b'a.onnx'"),
])  # fmt: skip
def test_arguments_that_onnxruntime_refuses_or_ignores(runner, one_graph, arguments, message):
    with pytest.raises(ValueError, match=rf"^(providers must be a list of some of \w.*)?{re.escape(message)}$"):
        runner.OnnxDetector(**{"path": one_graph, **arguments})


def test_arguments_of_other_types_that_mean_the_same(runner, one_graph):
    options = {"threads": np.int64(1), "providers": [("CPUExecutionProvider", {})]}
    assert runner.OnnxDetector(str(one_graph), **options)(IMAGE).labels == ["hen"]


@pytest.mark.parametrize("options, message", [
    ({"threshold": 1.01}, "threshold must be a number from 0 to 1, got 1.01"),
    ({"threshold": -0.1}, "threshold must be a number from 0 to 1, got -0.1"),
    ({"threshold": float("nan")}, "threshold must be a number from 0 to 1, got nan"),
    ({"threshold": "0.5"}, "threshold must be a number from 0 to 1, got '0.5'"),
    ({"threshold": None}, "threshold must be a number from 0 to 1, got None"),
    ({"steps": 2.5}, "steps must be a whole number of at least 0, got 2.5"),
    ({"steps": 2.0}, "steps must be a whole number of at least 0, got 2.0"),
    ({"steps": -1}, "steps must be a whole number of at least 0, got -1"),
    ({"steps": True}, "steps must be a whole number of at least 0, got True"),
    ({"rtol": -0.1}, "rtol must be a number of at least 0, got -0.1"),
    ({"rtol": float("nan")}, "rtol must be a number of at least 0, got nan"),
    ({"rtol": "small"}, "rtol must be a number of at least 0, got 'small'"),
    ({"solver": "broyden"}, "solver must be plain or anderson, got 'broyden'"),
])  # fmt: skip
def test_options_out_of_range_are_refused(runner, one_graph, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        runner.OnnxDetector(one_graph)(IMAGE, **options)


@pytest.mark.parametrize("images, message", [
    (np.zeros((40, 60), np.uint8), "image 0 is an array (40, 60) of uint8"),
    (np.zeros((1, 40, 60, 3), np.uint8), "image 0 is an array (1, 40, 60, 3) of uint8"),
    (np.zeros((40, 60, 4), np.uint8), "image 0 is an array (40, 60, 4) of uint8"),
    (np.zeros((0, 60, 3), np.uint8), "image 0 is an array (0, 60, 3) of uint8"),
    ([IMAGE, np.zeros((40, 60, 3), np.float32)], "image 1 is an array (40, 60, 3) of float32"),
    ("street.jpg", "image 0 is a str"),
    ([IMAGE, None], "image 1 is a NoneType"),
    (Image.new("RGB", (8, 8)), "image 0 is a Image"),
])  # fmt: skip
def test_other_images_than_arrays_of_uint8_are_refused(runner, one_graph, images, message):
    allowed = "it must be an array (H, W, 3) of uint8, RGB, not empty"
    with pytest.raises(ValueError, match=f"^{re.escape(f'{message}: {allowed}')}$"):
        runner.OnnxDetector(one_graph)(images)


def test_an_empty_list_is_refused(runner, one_graph):
    with pytest.raises(ValueError, match="^images: the list is empty; give at least one image$"):
        runner.OnnxDetector(one_graph)([])


def test_a_line_of_pixels_is_an_image(runner, one_graph):
    """1 x 3000 pixels become 1 x 160, so that boxes are enlarged along the line alone."""
    found = runner.OnnxDetector(one_graph)(np.zeros((1, 3000, 3), np.uint8), threshold=0.0, steps=0)
    np.testing.assert_allclose(found.boxes, [[0, 0, 150, 1], [0, 0, 3000, 1]], rtol=1e-6)
    assert found.labels == ["hen", "ox"] and found.steps == 0


def test_one_graph_has_no_refinement(runner, one_graph):
    """Its loop gives its last result alone."""
    message = r"^refine\(\) needs two graphs: export with --form two; one graph shows its last step only$"
    with pytest.raises(ValueError, match=message):
        runner.OnnxDetector(one_graph).refine(IMAGE)


def test_a_default_of_steps_loads_without_a_warning(runner, one_graph, capfd):
    runner.OnnxDetector(one_graph)
    assert capfd.readouterr().err == ""


class TestFiles:
    """What is no exported detector is refused with the file's name."""

    def refuse(self, runner, path, message: str) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}") as caught:
            runner.OnnxDetector(path)
        assert "\n" not in str(caught.value)

    def test_missing(self, runner, tmp_path):
        self.refuse(runner, tmp_path / "no.onnx", " does not exist: deqdet-export-model writes it")

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 a zip"])
    def test_not_onnx(self, runner, tmp_path, content):
        path = tmp_path / "no.onnx"
        path.write_bytes(content)
        self.refuse(runner, path, " cannot be loaded as an ONNX file: ")

    def test_cut(self, runner, one_graph):
        one_graph.write_bytes(one_graph.read_bytes()[:-40])
        self.refuse(runner, one_graph, " cannot be loaded as an ONNX file: ")

    @pytest.mark.parametrize("notes", [{}, {"author": "me"}])
    def test_of_another_program(self, runner, tmp_path, notes):
        path = write_graph(tmp_path / "other.onnx", IMAGES, ONE_GRAPH, notes)
        self.refuse(runner, path, ": give NAME.onnx or NAME.encoder.onnx, as written by deqdet-export-model")

    def test_two_graphs(self, runner, tmp_path):
        """The step in place of the encoder, and an encoder without its step."""
        notes = NOTES | {"form": "two"}
        step = write_graph(tmp_path / "a.step.onnx", {"state": (TensorProto.FLOAT, [None, 9])}, ONE_GRAPH, notes)
        self.refuse(runner, step, ": give NAME.onnx or NAME.encoder.onnx, as written by deqdet-export-model")
        encoder = write_graph(tmp_path / "b.encoder.onnx", IMAGES, ONE_GRAPH, notes)
        with pytest.raises(ValueError, match=r"/b\.step\.onnx does not exist: deqdet-export-model writes it$"):
            runner.OnnxDetector(encoder)

    @pytest.mark.parametrize("of_encoder, of_step", [("new", "old"), ("new", None), (None, "old")])
    def test_of_two_detectors(self, runner, tmp_path, of_encoder, of_step):
        """None: a file of an older version, which has no checksum of the weights."""
        encoder, step = (
            NOTES | {"form": "two"} | ({} if weights is None else {"weights": weights})
            for weights in (of_encoder, of_step)
        )
        path = write_graph(tmp_path / "a.encoder.onnx", IMAGES, ONE_GRAPH, encoder)
        file = write_graph(tmp_path / "a.step.onnx", {"state": (TensorProto.FLOAT, [None, 9])}, ONE_GRAPH, step)
        self.refuse(runner, path, f" and {file} are of different detectors: export the detector again")
        write_graph(file, {"state": (TensorProto.FLOAT, [None, 9])}, ONE_GRAPH, encoder)
        assert runner.OnnxDetector(path).notes == encoder

    def test_notes_of_other_tools_are_left_out(self, runner, one_graph):
        model = onnx.load(one_graph)
        model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
        onnx.save(model, one_graph)
        assert runner.OnnxDetector(one_graph).notes == NOTES
