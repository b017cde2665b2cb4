"""The tools' command lines: a model file in place of a config, as main() and as scripts get it."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deqdet import Predictor
from deqdet.checkpoints import write_model_file
from deqdet.data import ShapesConfig, read_image, register_shapes
from deqdet.data.shapes import CLASSES, generate_shapes
from deqdet.decoders import DecodingGraphs
from deqdet.errors import UserError
from deqdet.measurement.accuracy import Evaluation
from deqdet.measurement.speed_accuracy import Way, measure_ways
from deqdet.tools import analyze_model, evaluate_steps, report, residual_signal, speed_accuracy
from deqdet.tools.trained import choose_test_set

from helpers.batches import TWO_LEVELS
from helpers.engine_toy import IN_PROCESS
from helpers.paths import TOOLS

pytestmark = IN_PROCESS


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> Path:
    """Where the generated images go: in one process their set is registered once."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def trained(monkeypatch, datasets, tmp_path, small_cfg, stir) -> dict[str, list[str]]:
    """The words that say which model a tool is about, once by its config and once by its model file."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    cfg = small_cfg(*TWO_LEVELS, "MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TRAIN", (), "DATASETS.TEST",
                    ("shapes_seed43_3",), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
                    "OUTPUT_DIR", str(tmp_path / "trained"))  # fmt: skip
    (tmp_path / "small.yaml").write_text(cfg.dump())
    (tmp_path / "trained").mkdir()
    torch.manual_seed(0)
    model = build_model(cfg)
    stir(model, size=0.01)
    torch.save({"model": model.state_dict()}, tmp_path / "trained" / "model_final.pth")
    file = tmp_path / "small.safetensors"
    write_model_file(file, weights=model.state_dict(), cfg=cfg, class_names=CLASSES)
    return {"config": ["--config-file", str(tmp_path / "small.yaml")], "file": ["--model", str(file)]}


def test_a_model_file_gives_the_same_figures_as_its_config_and_checkpoint(trained, tmp_path):
    figures = {}
    for name, words in trained.items():
        output = tmp_path / f"steps_{name}"
        options = ["--output", str(output), "--solvers", "plain", "--steps", "2", "5", "--rtols", "0.5", "--opts"]
        evaluate_steps.main([*words, *options, "DATASETS.TEST", "('shapes_seed43_3',)"])
        figures[name] = json.loads((output / "steps.json").read_text())
        cost, drawn = tmp_path / f"{name}.json", tmp_path / f"report_{name}"
        analyze_model.main([*words, "--steps", "2", "--output", str(cost)])
        figures[name]["cost"] = json.loads(cost.read_text())
        weights = ["MODEL.WEIGHTS", str(tmp_path / "trained" / "model_final.pth")] if name == "config" else []
        report.main([*words, "--images", "2", "--steps", "3", *weights, "OUTPUT_DIR", str(drawn)])
        figures[name]["medians"] = json.loads((drawn / "residual.json").read_text())
        assert cv2.imread(str(drawn / "detections.png")).std() > 5
        assert not (drawn / "loss.png").exists()
    config, file = figures["config"], figures["file"]
    for key in ("cost", "medians", "images", "limit"):
        assert config[key] == file[key]
    (of_config,), (of_file,) = config["results"], file["results"]
    assert of_config["median_residuals"] == of_file["median_residuals"]
    for key in ("steps", "tolerances"):
        pairs = zip(of_config[key], of_file[key], strict=True)
        assert all(one["accuracy"] == other["accuracy"] for one, other in pairs)
    assert file["weights"].endswith("small.safetensors") and config["weights"].endswith("model_final.pth")
    assert f"deqdet-evaluate-steps --model {tmp_path}" in file["command"]


class TestGradients:
    """The training set is drawn, or registered, by the tool; no other test of this process names these sets."""

    @pytest.mark.parametrize("kind", ["config", "file"])
    def test_of_a_generated_set(self, trained, kind, tmp_path):
        name = {"config": "shapes_seed44_4", "file": "shapes_seed45_4"}[kind]
        words = ["--tasks", "gradient", "--batches", "1", "--output", str(tmp_path / "out.json"), "DATASETS.TRAIN",
                 f"('{name}',)", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"]  # fmt: skip
        analyze_model.main([*trained[kind], *words])
        found = json.loads((tmp_path / "out.json").read_text())["gradients"]
        assert found.keys() == {"bfloat16", "float16"}
        assert all(len(part["norms"]) == 1 and part["norms"][0] > 0 for part in found["bfloat16"].values())

    def test_of_a_registered_set(self, trained, tmp_path):
        file = generate_shapes(tmp_path / "shapes", ShapesConfig(seed=46, num_images=4))
        entry = [["registered_for_gradients", file, str(tmp_path / "shapes" / "images")]]
        words = ["--tasks", "gradient", "--batches", "1", "--output", str(tmp_path / "out.json"), "DATASETS.REGISTER",
                 str(entry), "DATASETS.TRAIN", "('registered_for_gradients',)", "SOLVER.IMS_PER_BATCH", "2",
                 "INPUT.MIN_SIZE_TRAIN", "(64,)"]  # fmt: skip
        analyze_model.main([*trained["file"], *words])
        assert "gradients" in json.loads((tmp_path / "out.json").read_text())

    @pytest.mark.parametrize("sets, message", [
        ("()", "DATASETS.TRAIN is empty: name a built-in data set or one of DATASETS.REGISTER"),
        ("('shapes_trian',)", "shapes_trian"),
        ("('shapes_seed44_0',)", "the generated set shapes_seed44_0 has no images: end its name in their number"),
    ])  # fmt: skip
    def test_one_line_about_the_training_set(self, trained, sets, message):
        with pytest.raises(SystemExit) as stopped:
            analyze_model.main([*trained["file"], "--tasks", "gradient", "DATASETS.TRAIN", sets])
        error = str(stopped.value.code)
        assert error.startswith("error: ") and message in error and "\n" not in error


def test_one_line_says_which_of_several_test_sets_is_used(small_cfg, capsys):
    cfg = small_cfg("DATASETS.TEST", ("a", "b", "c"))
    assert choose_test_set(cfg) == "a"
    assert capsys.readouterr().out == "DATASETS.TEST has 3 sets: only a is used, not b, c; name the one to use there\n"
    assert choose_test_set(small_cfg("DATASETS.TEST", ("a",))) == "a" and capsys.readouterr().out == ""


def test_the_tools_say_which_test_set_they_use(trained, tmp_path, capsys):
    sets = ["DATASETS.TEST", "('shapes_seed43_3','shapes_seed47_2')"]
    file, output = trained["file"], ["--output", str(tmp_path / "out"), "--limit", "2"]
    short = ["--solvers", "plain", "--steps", "1", "--rtols", "0.5"]
    for tool, words in (
        (evaluate_steps, [*file, *output, *short]),
        (residual_signal, [*file, *output, "--steps", "1"]),
        (speed_accuracy, [file[1], *output, "--steps", "1", "--precisions", "float32", "--modes", "eager"]),
        (report, [*file, "--steps", "1", "--images", "1"]),
    ):
        tool.main([*words, *sets])
        assert "2 sets: only shapes_seed43_3 is used, not shapes_seed47_2" in capsys.readouterr().out, tool.__name__


def test_a_report_of_a_detector_without_an_equilibrium_has_no_residuals(trained, small_cfg, tmp_path, capsys):
    cfg = small_cfg("MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 2, "OUTPUT_DIR", str(tmp_path),
                    "MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TRAIN", (), "DATASETS.TEST", ("shapes_seed43_3",),
                    "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0)  # fmt: skip
    (tmp_path / "stacked.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    report.main(["--config-file", str(tmp_path / "stacked.yaml"), "--images", "2"])
    printed = capsys.readouterr().out
    assert f"Images: {tmp_path}/detections.png\nReport: {tmp_path}/report.md\n" in printed
    assert (tmp_path / "report.md").is_file() and not (tmp_path / "residual.png").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--images", "0"], "--images and --steps must be at least 1, got 0 and 25"),
    (["--steps", "0"], "--images and --steps must be at least 1, got 8 and 0"),
    (["OUTPUT_DIR", "nowhere"], "nowhere/model_final.pth does not exist: train the model, or give a checkpoint"),
])  # fmt: skip
def test_one_line_says_what_is_wrong_with_a_report(trained, arguments, message):
    with pytest.raises(SystemExit, match=message):
        report.main([*trained["config"], *arguments])


def test_ways_are_evaluated_and_timed_in_turns(datasets, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(datasets))
    register_shapes("shapes_seed43_3", ShapesConfig(seed=43, num_images=3))
    records = DatasetCatalog.get("shapes_seed43_3")
    boxes = {read_image(x["file_name"]).tobytes(): [y["bbox"] for y in x["annotations"]] for x in records}
    classes = {read_image(x["file_name"]).tobytes(): [y["category_id"] for y in x["annotations"]] for x in records}
    order = []

    def detect(image: np.ndarray, name: str) -> Instances:
        order.append(name)
        corners = torch.tensor(boxes[image.tobytes()]).reshape(-1, 4)
        corners = torch.cat([corners[:, :2], corners[:, :2] + corners[:, 2:]], dim=1)
        found = torch.tensor(classes[image.tobytes()], dtype=torch.int64)
        found = found if name == "right" else (found + 1) % len(CLASSES)
        return Instances(image.shape[:2], pred_boxes=Boxes(corners), scores=torch.ones(len(found)), pred_classes=found)

    ways = [Way(name, "", "", "", 100, partial(detect, name=name)) for name in ("right", "wrong")]
    right, wrong = measure_ways(ways, records, Evaluation("shapes_seed43_3", max_detections=100), images=2)
    assert right.accuracy.AP == pytest.approx(100) and wrong.accuracy.AP < 50
    # Each image in every way, once untimed and once timed, then the next.
    assert order[-8:] == ["right", "right", "wrong", "wrong"] * 2
    assert all(row.first > 0 and row.time.low > 0 for row in (right, wrong))


def test_speed_and_accuracy_in_every_way(trained, small_cfg, stir, tmp_path, monkeypatch):
    """Each way finds what the Predictor finds with its options, exported or not."""
    pytest.importorskip("onnxruntime")
    cfg = small_cfg(*TWO_LEVELS, "MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 2,
                    "MODEL.DEQDET.NUM_CLASSES", 8, "DATASETS.TEST", ("shapes_seed43_3",),
                    "INPUT.MIN_SIZE_TEST", 64, "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0)  # fmt: skip
    model = build_model(cfg)
    stir(model, size=0.01)
    files = {"small": trained["file"][1], "stack": str(tmp_path / "stack.safetensors")}
    write_model_file(tmp_path / "stack.safetensors", weights=model.state_dict(), cfg=cfg, class_names=CLASSES)
    seen = []

    def measure(ways, *args, **options):
        seen.extend(ways)
        return measure_ways(ways, *args, **options)

    monkeypatch.setattr(speed_accuracy, "measure_ways", measure)
    words = [*files.values(), "--output", str(tmp_path / "out"), "--threads", "1"]
    speed_accuracy.main([*words, "--steps", "1", "4", "--modes", "eager", "onnx"])
    rows = json.loads((tmp_path / "out" / "speed_accuracy.json").read_text())["rows"]
    ways = [(row["model"], row["steps"], row["precision"], row["mode"]) for row in rows]
    each = [("float32", "eager"), ("bfloat16", "eager"), ("float32", "onnx")]
    assert ways == [
        *(("small", f"{n} steps", *way) for way in each for n in (1, 4)),
        *(("stack", "2 layers", *way) for way in each),
    ]
    image = read_image(DatasetCatalog.get("shapes_seed43_3")[0]["file_name"])
    for way in seen:
        predictor = Predictor.from_file(files[way.model], overrides=["TEST.PRECISION", way.precision], threshold=0.0)
        steps = None if way.model == "stack" else int(way.steps.split()[0])
        expected, found = predictor(image, steps=steps).instances, way.detect(image)
        assert len(found) == len(expected) > 5
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)
        best = expected.pred_boxes.tensor[:5]
        distance = (found.pred_boxes.tensor[None] - best[:, None]).abs().amax(dim=2).amin(dim=1)
        assert distance.max() < 0.01  # equal scores may be in another order
    assert all(0 < row["time"]["low"] <= row["time"]["median"] <= row["time"]["high"] for row in rows)
    assert cv2.imread(str(tmp_path / "out" / "speed_accuracy.png")).std() > 5
    table = (tmp_path / "out" / "speed_accuracy.md").read_text()
    assert "AP is that of 3 images of shapes_seed43_3" in table and "    deqdet-speed-accuracy " in table


@pytest.mark.parametrize("tool", [evaluate_steps, residual_signal, speed_accuracy])
def test_ap_counts_as_many_detections_as_the_model_may_return(trained, tmp_path, monkeypatch, tool):
    def stop(dataset: str, *, max_detections: int):
        raise UserError(f"AP of {max_detections} detections")

    monkeypatch.setattr(tool, "Evaluation", stop)
    words = trained["config"] if tool is not speed_accuracy else [trained["file"][1], "--modes", "eager"]
    with pytest.raises(SystemExit, match="AP of 300 detections"):
        tool.main([*words, "--output", str(tmp_path / "out"), "TEST.DETECTIONS_PER_IMAGE", "300"])


def test_graphs_are_replayed_or_refused(trained, tmp_path, monkeypatch):
    """The recorder is one of the tests' own, since there is no GPU."""
    recorded = []

    def record(function):
        recorded.append(function)
        return function(), lambda: None

    class Recording(DecodingGraphs):
        def __init__(self, most):
            super().__init__(most, record)

    words = [trained["file"][1], "--output", str(tmp_path / "out"), "--modes", "graph", "--precisions", "float32"]
    words += ["--steps", "1", "4"]
    monkeypatch.setattr(speed_accuracy, "_check_device", lambda *args: None)
    with pytest.raises(SystemExit, match="--modes graph: no recording, since .* has a tolerance, or the images"):
        speed_accuracy.main(words)
    monkeypatch.setattr(speed_accuracy, "DecodingGraphs", Recording)
    speed_accuracy.main(words)
    rows = json.loads((tmp_path / "out" / "speed_accuracy.json").read_text())["rows"]
    assert [(row["steps"], row["mode"]) for row in rows] == [("1 steps", "graph"), ("4 steps", "graph")]
    assert len(recorded) == 2


@pytest.mark.parametrize("words, message", [
    (["--steps", "5", "0"], "--steps must be at least 1, got 5 0"),
    (["--limit", "1"], "--limit or shapes_seed43_3 leaves one image: quartiles of times need at least two"),
    (["FILE"], "two model files have the same name and the same folder's name, "),
    (["--modes", "graph"], "--modes graph needs a GPU, and .* runs on the device cpu"),
    (["TEST.PRECISION", "bfloat16"], "TEST.PRECISION cannot be overridden here: use --precisions"),
    (["MODEL.DEQDET.COMPILE", "True"], "MODEL.DEQDET.COMPILE cannot be overridden here: use --modes compiled"),
    (["MODEL.DEQDET.CUDA_GRAPHS", "4"], "MODEL.DEQDET.CUDA_GRAPHS cannot be overridden here: use --modes graph"),
    (["FLOAT32_PRECISION", "high"], "FLOAT32_PRECISION is 'high': set it to '', so that the rows of float32 are exact"),
    (["--modes", "onnx", "--precisions", "bfloat16"], "--modes onnx runs in float32 only"),
])  # fmt: skip
def test_one_line_says_what_is_wrong_with_ways(trained, tmp_path, words, message):
    file = trained["file"][1]
    words = [file if word == "FILE" else word for word in words]
    with pytest.raises(SystemExit, match=message):
        speed_accuracy.main(["--output", str(tmp_path / "out"), file, *words])


@pytest.mark.parametrize("name, words", [
    ("analyze_model", []), ("benchmark", []), ("check_data", []), ("convert_checkpoint", ["in.pth", "out.pth"]),
    ("demo", ["--input", "x.png"]), ("evaluate_steps", ["--output", "out"]), ("export_model", ["--output", "out.onnx"]),
    ("predict", ["--input", "images", "--output", "out"]), ("pretrain_backbone", ["--output", "out.pth"]),
    ("publish", ["in.pth", "--output", "out.safetensors"]), ("report", []), ("residual_signal", ["--output", "out"]),
    ("speed_accuracy", ["in.safetensors", "--output", "out"]),
])  # fmt: skip
def test_one_line_says_that_a_tool_works_in_one_process(monkeypatch, name, words):
    """torchrun has started two of it."""
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for key, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(key, value)
    tool = importlib.import_module(f"deqdet.tools.{name}")
    with pytest.raises(SystemExit, match="^error: this command runs in one process, but torchrun has started 2"):
        tool.main(words)


TOOLS_HERE = ["analyze_model", "compare", "evaluate_steps", "report", "residual_signal", "speed_accuracy"]


@pytest.mark.parametrize("tool", TOOLS_HERE)
def test_the_scripts_are_the_tools(tool):
    done = subprocess.run([sys.executable, str(TOOLS / f"{tool}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"deqdet-{tool.replace('_', '-')} " in done.stdout
