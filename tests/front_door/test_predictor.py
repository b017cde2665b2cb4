"""deqdet.Predictor with small models: any kind of image, lists, options of a call, results in other forms."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances

from deqdet import Detections, Predictor, UserError
from deqdet.checkpoints import write_model_file
from deqdet.data import prepare_datasets
from deqdet.data.shapes import CLASSES
from deqdet.engine import Trainer, build_model
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration
from deqdet.extras import how_to_install
from deqdet.model_zoo import find_config, get_config

SIZES = ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 160, "DATASETS.TEST", ()]
NAMES = ("ox", "ass", "hen")
STACKED = ["MODEL.DEQDET.DECODER", "StackedDecoder", "MODEL.DEQDET.NUM_LAYERS", 3]


def spread_scores(model: nn.Module) -> nn.Module:
    """Untrained scores all lie near 0.02; these lie between 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("class_branch.3.weight"):
                parameter.mul_(30)
            if name.endswith("class_branch.3.bias"):
                parameter.add_(3.5)
    return model


@pytest.fixture(scope="module")
def make_cfg(small_cfg) -> Callable[..., CfgNode]:
    return lambda *overrides: small_cfg(*SIZES, *overrides)


@pytest.fixture(scope="module")
def make_predictor(make_cfg, small_model) -> Callable[..., Predictor]:
    """make_predictor("KEY", value, ...): always with the same weights; every detection counts."""

    def make(*overrides) -> Predictor:
        model = spread_scores(small_model(*SIZES, *overrides))
        return Predictor(model, make_cfg(*overrides), NAMES, threshold=0.0)

    return make


@pytest.fixture(scope="module")
def predictor(make_predictor) -> Predictor:
    return make_predictor()


def noise(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: coarse, so that images of different seeds differ at every level."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    return coarse.repeat(10, axis=0).repeat(10, axis=1)[:height, :width].copy()


def save(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def assert_same(found: Detections, expected: Detections) -> None:
    assert_same_instances(found.instances, expected.instances)
    assert (found.steps, found.residual) == (expected.steps, expected.residual)


def assert_same_instances(found: Instances, expected: Instances) -> None:
    assert found.image_size == expected.image_size and len(found) == len(expected) > 0
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_classes, expected.pred_classes)


class TestKindsOfImages:
    def test_all_give_the_same(self, predictor, tmp_path):
        image = noise()
        path = save(tmp_path / "x.png", image)
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = predictor(image)
        assert expected.instances.image_size == (60, 80) and len(expected) == 6
        for same in (path, str(path), Image.fromarray(image), tensor, tensor.float() / 255, tensor.double() / 255):
            assert_same(predictor(same), expected)
        for reversed_channels in (image[:, :, ::-1], cv2.imread(str(path)), tensor.flip(0)):
            assert_same(predictor(reversed_channels, channels="BGR"), expected)
        assert not torch.equal(predictor(image[:, :, ::-1]).instances.scores, expected.instances.scores)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_a_picture_of_a_turned_camera(self, predictor, tmp_path, orientation):
        """Its file and the PIL image that was opened from it are the same upright picture, in a drawing too."""
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise()).save(tmp_path / "x.png", exif=exif)
        expected = predictor(tmp_path / "x.png")
        assert expected.instances.image_size == ((60, 80) if orientation < 5 else (80, 60))
        with Image.open(tmp_path / "x.png") as image:
            assert_same(predictor(image), expected)
            assert np.array_equal(expected.draw(image), expected.draw(tmp_path / "x.png"))

    def test_a_float_tensor_is_rounded(self, predictor):
        values = torch.full((3, 64, 64), 100.6 / 255)
        assert (predictor.prepare(values)["image"] == 101).all()

    def test_greyscale(self, predictor, tmp_path):
        grey = noise()[:, :, 0]
        expected = predictor(np.stack([grey] * 3, axis=2))
        for same in (grey, Image.fromarray(grey), save(tmp_path / "grey.png", grey)):
            assert_same(predictor(same), expected)

    def test_a_model_of_the_other_order(self, make_predictor, predictor):
        """The same weights see the same channels if both the model and the image are the other way round."""
        turned = make_predictor("INPUT.FORMAT", "BGR")
        assert turned.prepare(noise())["image"][0].equal(predictor.prepare(noise())["image"][2])
        assert torch.equal(turned.prepare(noise()[:, :, ::-1])["image"], predictor.prepare(noise())["image"])

    def test_what_the_model_gets(self, predictor):
        """The shorter side has MIN_SIZE_TEST pixels, unless the longer one then had more than MAX_SIZE_TEST."""
        for size, expected in (((60, 80), (64, 85)), ((10, 100), (16, 160))):
            inputs = predictor.prepare(noise(*size))
            assert inputs["image"].shape == (3, *expected) and inputs["image"].dtype == torch.uint8
            assert (inputs["height"], inputs["width"]) == size

    @pytest.mark.parametrize("image, message", [
        (np.zeros((4, 4, 4), np.uint8), r"uint8 of the shape \(H, W, 3\) or \(H, W\), got uint8 \(4, 4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), "must be uint8 .* got float32"),
        (np.zeros((0, 4, 3), np.uint8), r"got uint8 \(0, 4, 3\)"),
        (torch.full((3, 4, 4), 1.5), "must hold values from 0 to 1; for 0 to 255, give uint8"),
        (torch.full((3, 4, 4), torch.nan), "must hold values from 0 to 1"),
        (torch.zeros(4, 4, 3), r"must have the shape \(3, H, W\), got \(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 .* got int64"),
        (Image.fromarray(np.ones((2, 2), np.float32)), "PIL image cannot be converted to RGB: .*more than 16 bits"),
        (noise(1, 4000), "an image of 4000 x 1 pixels cannot be resized"),
        (7, "must be a path, a PIL image, an array or a tensor, got a int"),
        (None, "got a NoneType"),
    ])  # fmt: skip
    def test_a_wrong_image(self, predictor, image, message):
        """Its error says what is wrong, and in a list which one it is."""
        with pytest.raises(UserError, match=message) as single:
            predictor(image)
        with pytest.raises(UserError, match=f"^image 2 of the list: .*{message}"):
            predictor([noise(), noise(), image], batch_size=2)
        assert "of the list" not in str(single.value) and "\n" not in str(single.value)

    def test_a_wrong_file(self, predictor, tmp_path):
        (tmp_path / "text.png").write_text("no image")
        save(tmp_path / "line.png", noise(1, 4000))
        reasons = {
            "gone.png": "No such file", "text.png": "not an image", "line.png": "4000 x 1 pixels cannot be resized"
        }  # fmt: skip
        for name, message in reasons.items():
            for images in (tmp_path / name, [noise(), str(tmp_path / name)]):
                with pytest.raises(UserError, match=message) as raised:
                    predictor(images)
                assert str(raised.value).startswith(f"{tmp_path / name}: ")
                assert str(raised.value).count(name) == 1

    def test_wrong_channels(self, predictor, tmp_path):
        for image in (noise(), save(tmp_path / "x.png", noise())):
            with pytest.raises(UserError, match="channels must be RGB or BGR, got 'GBR'"):
                predictor(image, channels="GBR")

    @pytest.mark.parametrize("error", [
        torch.OutOfMemoryError("too\nlarge"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(),
    ])  # fmt: skip
    def test_a_lack_of_memory_names_the_image(self, make_predictor, tmp_path, monkeypatch, error):
        predictor = make_predictor()

        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr(predictor.model, "encode", fail)
        path = save(tmp_path / "x.png", noise())
        with pytest.raises(UserError, match=f"^{path}: there is not enough memory for 80 x 60 pixels: "):
            predictor(path)
        with pytest.raises(UserError, match=f"^{path}: there is not enough memory for 80 x 60 pixels: "):
            predictor.walk(path)

    def test_an_error_of_the_model_keeps_its_traceback(self, make_predictor, monkeypatch):
        """It is the fault of a layer, of a user's own perhaps, and not of the image."""
        predictor = make_predictor()

        def fail(*args, **kwargs):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(predictor.model, "encode", fail)
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            predictor(noise())


class TestLists:
    def test_each_image_gets_what_it_gets_alone(self, predictor):
        """Three sizes: two are padded to the same size and share a batch, the third one has its own."""
        images = [noise(60, 80, 1), noise(64, 120, 2), noise(62, 84, 3)]
        sizes = [predictor._padded_size(predictor.prepare(image)["image"]) for image in images]
        assert sizes[0] == sizes[2] != sizes[1]
        together = predictor(images)
        for image, found, exact in zip(images, together, (False, True, False), strict=True):
            alone = predictor(image)
            assert found.steps == alone.steps and found.residual == pytest.approx(alone.residual, rel=1e-4)
            assert found.instances.image_size == image.shape[:2]
            if exact:
                assert_same(found, alone)
            sure = alone.instances.scores > 0.3
            assert sure.any()
            assert torch.equal(found.instances.pred_classes[sure], alone.instances.pred_classes[sure])
            torch.testing.assert_close(
                found.instances.pred_boxes.tensor[sure], alone.instances.pred_boxes.tensor[sure], rtol=0, atol=3e-4
            )
            torch.testing.assert_close(found.instances.scores, alone.instances.scores, rtol=0, atol=1e-5)

    def test_batches(self, make_predictor, monkeypatch):
        """Of one padded size, and no larger than batch_size; results come in the order of the images."""
        predictor = make_predictor()
        sizes, infer = [], predictor.model.infer
        monkeypatch.setattr(
            predictor.model, "infer", lambda batch, **kw: sizes.append(len(batch)) or infer(batch, **kw)
        )
        images = [noise(60, 80, seed) if seed % 2 == 0 else noise(64, 120, seed) for seed in range(5)]
        found = predictor(tuple(images), batch_size=4)
        assert sizes == [2, 2, 1]
        assert [x.instances.image_size for x in found] == [image.shape[:2] for image in images]
        for result, image in zip(found, images, strict=True):
            torch.testing.assert_close(result.instances.scores, predictor(image).instances.scores, rtol=0, atol=1e-5)
        assert predictor([]) == []

    def test_a_stream_checks_its_options_at_once(self, predictor):
        with pytest.raises(UserError, match="threshold must lie between 0 and 1, got '0.5'"):
            predictor.stream([noise()], threshold="0.5")
        with pytest.raises(UserError, match=r"got the single path a.png: give \['a.png'\]"):
            predictor.stream("a.png")
        with pytest.raises(UserError, match=r"got a generator; stream\(\) takes iterators of images"):
            predictor(noise() for _ in range(2))

    def test_a_stream_reads_as_it_goes(self, predictor):
        asked = []

        def images():
            for seed in range(100):
                asked.append(seed)
                yield noise(seed=seed)

        stream = predictor.stream(images(), batch_size=2)
        sizes = [next(stream).instances.image_size for _ in range(3)]
        assert sizes == [(60, 80)] * 3 and asked == [0, 1, 2, 3]


class TestOptions:
    @pytest.mark.parametrize("options, overrides", [
        ({"steps": 2}, ["MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 2]),
        ({"steps": 9, "rtol": 0.15},
         ["MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 9, "MODEL.DEQDET.SOLVER.RTOL", 0.15]),
        ({"solver": "broyden"}, ["MODEL.DEQDET.SOLVER.NAME", "Broyden"]),
        ({"solver": "anderson3"}, ["MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.MEMORY", 3]),
        ({"solver": "Anderson(history_size=3)"},
         ["MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.MEMORY", 3]),
        ({"solver": FixedPointIteration(damping=0.5)}, ["MODEL.DEQDET.SOLVER.DAMPING", 0.5]),
    ])  # fmt: skip
    def test_as_in_a_model_configured_so(self, predictor, make_predictor, options, overrides):
        before = predictor(noise())
        found = predictor(noise(), **options)
        assert_same(found, make_predictor(*overrides)(noise()))
        assert not torch.equal(found.instances.scores, before.instances.scores)
        assert_same(predictor([noise()], **options)[0], found)
        assert_same(predictor(noise()), before)  # an option holds for its call only

    def test_tolerance_stops_early_and_the_residual_says_so(self, predictor):
        found = predictor(noise(), steps=50, rtol=0.2)
        assert found.steps < 50 and 0 < found.residual < 0.2

    def test_a_state_that_becomes_nan_is_told(self, make_predictor, monkeypatch, caplog, tmp_path):
        """The second image of three, from the second step on."""
        predictor, images = make_predictor(), [save(tmp_path / f"{i}.png", noise(seed=i)) for i in range(3)]
        before, layer, steps = predictor(images), predictor.model.decoder.refinement, []

        def spoil(module, inputs, output):
            steps.append(1)
            output.content[1, 0, 0] = math.nan if len(steps) > 1 else 0.0

        monkeypatch.setattr(layer, "accepts_nonfinite", False)
        handle = layer.register_forward_hook(spoil)
        found = predictor(images, steps=4)
        handle.remove()
        assert [x.finite for x in found] == [True, False, True] and all(x.finite for x in before)
        (record,) = [x for x in caplog.records if x.levelname == "WARNING"]
        assert record.getMessage() == f"The states became infinite or NaN in 1 of 3 images of a batch: {images[1]}."

    def test_threshold(self, make_cfg, small_model, predictor):
        scores = predictor(noise()).instances.scores
        middle = float((scores[2] + scores[3]) / 2)
        strict = Predictor(spread_scores(small_model(*SIZES)), make_cfg(), NAMES, threshold=middle)
        for found in (predictor(noise(), threshold=middle), strict(noise()), predictor([noise()], threshold=middle)[0]):
            assert torch.equal(found.instances.scores, scores[:3]) and len(found) == len(found.labels) == 3
        assert len(strict(noise(), threshold=0)) == 6

    @pytest.mark.parametrize("options, message", [
        ({"steps": 0}, "steps must be at least 1 and a whole number, got 0"),
        ({"rtol": -0.1}, "rtol must be 0 or a positive number"),
        ({"rtol": float("nan")}, "rtol must be 0"), ({"rtol": float("inf")}, "rtol must be 0"),
        ({"solver": "Newton"}, "unknown solver Newton"), ({"solver": "anderson(size=4)"}, "no option size"),
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, got 1.5"),
    ])  # fmt: skip
    def test_wrong_options(self, predictor, options, message):
        for images in (noise(), [noise()]):
            with pytest.raises(UserError, match=message):
                predictor(images, **options)

    @pytest.mark.parametrize("options", [{"steps": 3}, {"rtol": 0.1}, {"solver": "plain"}])
    def test_a_stack_of_layers_has_none(self, make_predictor, options):
        stacked = make_predictor(*STACKED)
        assert not stacked.has_equilibrium
        found = stacked(noise())
        assert found.steps == 2 and found.residual is None and len(found) == 6
        for call in (lambda: stacked(noise(), **options), lambda: stacked.walk(noise(), **options)):
            with pytest.raises(UserError, match="MODEL.DEQDET.DECODER is StackedDecoder, whose number of steps is"):
                call()

    def test_walk(self, predictor):
        """Its last step is what a call finds, and an earlier one what a call with so many steps finds."""
        walk = predictor.walk(noise(), steps=5, solver="anderson3", record=range(6))
        for steps in (2, 5):
            (instances,) = walk.detections(steps)
            assert_same_instances(instances, predictor(noise(), steps=steps, solver="anderson3").instances)
        assert walk.trajectory.solution.residuals.shape == (5, 1)

    def test_options_ahead_of_any_image(self, predictor):
        options = predictor.options(steps=3, solver="anderson4")
        assert options == {"steps": 3, "rtol": None, "solver": Anderson(history_size=4)}
        assert_same(predictor(noise(), **options), predictor(noise(), steps=3, solver="anderson4"))
        assert predictor.options(solver=Broyden(2))["solver"] == Broyden(2)


@pytest.fixture
def two() -> Detections:
    found = Instances((100, 200), pred_boxes=Boxes(torch.tensor([[10.0, 20.0, 40.0, 60.5], [0.0, 0.0, 200.0, 100.0]])))
    found.scores, found.pred_classes = torch.tensor([0.75, 0.5]), torch.tensor([2, 0])
    return Detections(found, NAMES, steps=4, residual=0.1)


@pytest.fixture
def none() -> Detections:
    found = Instances((100, 200), pred_boxes=Boxes(torch.zeros(0, 4)))
    found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return Detections(found, NAMES, steps=4, residual=0.1)


class TestResults:
    def test_labels(self, two, none):
        assert two.labels == ["hen", "ox"] and none.labels == [] and (len(two), len(none)) == (2, 0)

    def test_to_coco(self, two, none):
        expected = [
            {"image_id": 7, "category_id": 3, "bbox": [10.0, 20.0, 30.0, 40.5], "score": 0.75},
            {"image_id": 7, "category_id": 1, "bbox": [0.0, 0.0, 200.0, 100.0], "score": 0.5},
        ]
        assert two.to_coco(7) == expected
        assert json.loads(json.dumps(two.to_coco(7))) == expected
        assert [x["category_id"] for x in two.to_coco(7, category_ids=[5, 9, 11])] == [11, 5]
        assert two.instances.pred_boxes.tensor[0].tolist() == [10.0, 20.0, 40.0, 60.5]  # left as it was
        assert none.to_coco(7) == []
        with pytest.raises(UserError, match="2 category_ids for 3 classes"):
            two.to_coco(7, category_ids=[1, 2])

    def test_to_supervision_without_the_package(self, two, monkeypatch):
        monkeypatch.setitem(sys.modules, "supervision", None)  # import then fails
        with pytest.raises(UserError, match=re.escape(how_to_install("supervision"))):
            two.to_supervision()

    def test_to_supervision(self, two, none, monkeypatch):
        @dataclass
        class Standin:
            """The fields of supervision.Detections that are given."""

            xyxy: np.ndarray
            confidence: np.ndarray
            class_id: np.ndarray
            data: dict

        module = ModuleType("supervision")
        module.Detections = Standin
        monkeypatch.setitem(sys.modules, "supervision", module)
        found = two.to_supervision()
        assert found.xyxy.tolist() == [[10.0, 20.0, 40.0, 60.5], [0.0, 0.0, 200.0, 100.0]]
        assert found.confidence.tolist() == [0.75, 0.5]
        assert found.class_id.tolist() == [2, 0] and found.class_id.dtype == int
        assert found.data["class_name"].tolist() == ["hen", "ox"]
        empty = none.to_supervision()
        assert empty.xyxy.shape == (0, 4) and empty.class_id.shape == (0,)
        assert empty.data["class_name"].shape == (0,)


class TestLoading:
    @pytest.fixture
    def weights(self, small_model, tmp_path) -> str:
        path = tmp_path / "model.pth"
        torch.save({"model": spread_scores(small_model(*SIZES)).state_dict()}, path)
        return str(path)

    @pytest.fixture
    def model_file(self, small_model, make_cfg, tmp_path) -> Path:
        path = tmp_path / "model.safetensors"
        weights = spread_scores(small_model(*SIZES)).state_dict()
        write_model_file(path, weights=weights, cfg=make_cfg(), class_names=NAMES)
        return path

    def test_a_model_file(self, predictor, model_file):
        expected = predictor(noise())
        for path in (model_file, str(model_file)):
            loaded = Predictor.from_file(path, device="cpu", threshold=0.0)
            assert loaded.class_names == NAMES and not loaded.model.training
            assert_same(loaded(noise()), expected)
        shorter = Predictor.from_file(
            model_file, overrides=["MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 2], device="cpu", threshold=0.0
        )
        assert_same(shorter(noise()), predictor(noise(), steps=2))

    def test_weights_that_are_not_finite_are_refused(self, small_model, make_cfg, tmp_path):
        model = small_model(*SIZES)
        with torch.no_grad():
            model.decoder.refinement.mixing_norm.weight[0] = torch.nan
        path = tmp_path / "model.safetensors"
        write_model_file(path, weights=model.state_dict(), cfg=make_cfg(), class_names=NAMES)
        message = "model.safetensors has infinite values or NaN in decoder.refinement.mixing_norm.weight"
        for load in (Predictor.from_file, lambda path: Predictor.from_config(make_cfg(), path)):
            with pytest.raises(UserError, match=message):
                load(path)

    def test_a_device_that_is_not_there_is_refused(self, make_cfg, model_file, monkeypatch):
        """Only the config's own MODEL.DEVICE falls back to the CPU."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for device in ("cuda", "cuda:3", torch.device("cuda")):
            message = f"device {device}: this machine has no CUDA"
            with pytest.raises(UserError, match=message):
                Predictor.from_file(model_file, device=device)
            with pytest.raises(UserError, match=message):
                Predictor.from_config(make_cfg(), model_file, device=device)
        assert Predictor.from_file(model_file, overrides=["MODEL.DEVICE", "cuda"]).model.device.type == "cpu"

    def test_a_model_file_as_the_weights_of_a_config(self, predictor, make_cfg, model_file):
        """Its class names are known too."""
        loaded = Predictor.from_config(make_cfg(), model_file, device="cpu", threshold=0.0)
        assert loaded.class_names == NAMES
        assert_same(loaded(noise()), predictor(noise()))

    def test_a_config(self, predictor, make_cfg, weights, tmp_path):
        cfg = make_cfg()
        frozen = cfg.clone()
        frozen.freeze()
        (tmp_path / "config.yaml").write_text(cfg.dump())
        expected = predictor(noise())
        for config in (cfg, frozen, tmp_path / "config.yaml", str(tmp_path / "config.yaml")):
            loaded = Predictor.from_config(config, weights, threshold=0.0)
            assert_same(loaded(noise()), expected)
            assert loaded.class_names == ("class 0", "class 1", "class 2")
        assert cfg.MODEL.WEIGHTS == ""  # left as it was
        named = Predictor.from_config(cfg, overrides=["MODEL.WEIGHTS", weights], class_names=NAMES)
        assert named.class_names == NAMES

    def test_a_config_of_the_zoo(self, tmp_path):
        """By its name, its path and the config itself; the class names are those of its test set."""
        torch.manual_seed(0)
        on_cpu = ["MODEL.DEVICE", "cpu"]
        cfg = get_config("deqdet_shapes", on_cpu)
        path = tmp_path / "shapes.pth"
        torch.save({"model": build_model(cfg).state_dict()}, path)
        found = []
        for config in ("deqdet_shapes", "quick/deqdet_shapes", find_config("deqdet_shapes"), cfg):
            loaded = Predictor.from_config(config, path, overrides=on_cpu, threshold=0.0)
            assert loaded.class_names == tuple(CLASSES)
            found.append(loaded(noise(160, 160), steps=2))
        for other in found[1:]:
            assert_same(other, found[0])

    @pytest.mark.parametrize("overrides, message", [
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS gone.pth does not exist"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "META_ARCHITECTURE is RetinaNet: it must be DEQDet"),
        (["MODEL.DEVICE", "foo"], "MODEL.DEVICE is 'foo': it must be cpu, cuda, cuda:N"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L': it must be RGB or BGR"),
        (["MODEL.DEQDET.NUM_QUERIES", 7], "the checkpoint does not fit the model"),
        (["MODEL.DEQDET.NUM_QUERYS", 7], "unknown config key MODEL.DEQDET.NUM_QUERYS; did you mean"),
        (["MODEL.WEIGHTS"], "overrides must be KEY VALUE pairs"),
    ])  # fmt: skip
    def test_errors(self, make_cfg, weights, overrides, message):
        cfg = make_cfg("MODEL.WEIGHTS", weights)
        with pytest.raises(UserError, match=message):
            Predictor.from_config(cfg, overrides=overrides)

    def test_errors_of_model_files(self, model_file, weights, tmp_path):
        with pytest.raises(UserError, match="does not fit .*: 2 misshapen keys: queries.boxes .6, 4."):
            Predictor.from_file(model_file, overrides=["MODEL.DEQDET.NUM_QUERIES", 7], device="cpu")
        for path in (weights, tmp_path / "gone.safetensors"):
            with pytest.raises(UserError, match=str(path)):
                Predictor.from_file(path)

    def test_a_name_for_each_class(self, make_cfg, weights):
        with pytest.raises(UserError, match="2 class names for a model of 3 classes"):
            Predictor.from_config(make_cfg(), weights, class_names=["ox", "ass"])
        with pytest.raises(UserError, match="threshold must lie between 0 and 1, got -1"):
            Predictor.from_config(make_cfg(), weights, threshold=-1)

    def test_a_model_in_training_mode(self, make_predictor):
        """It detects as in evaluation mode, and is left as it was: mode, and statistics of BatchNorm."""
        predictor, image = make_predictor(), noise()
        expected, walked = predictor(image), predictor.walk(image, steps=2).trajectory.solution.value
        before = {name: buffer.clone() for name, buffer in predictor.model.named_buffers()}
        predictor.model.train()
        for found in (predictor(image), *predictor.stream([image])):
            assert torch.equal(found.instances.scores, expected.instances.scores)
        assert torch.equal(predictor.walk(image, steps=2).trajectory.solution.value, walked)
        assert predictor.model.training
        assert all(torch.equal(buffer, before[name]) for name, buffer in predictor.model.named_buffers())

    def test_training_is_left(self, make_cfg, small_model):
        """A model that was in training mode is put in evaluation mode, and no gradient is recorded."""
        model = small_model(*SIZES).train()
        found = Predictor(model, make_cfg(), NAMES, threshold=0.0)(noise())
        assert not model.training and not found.instances.scores.requires_grad


class Collect(DatasetEvaluator):
    """Keeps an evaluation's detections by file name."""

    def reset(self):
        self.found = {}

    def process(self, inputs, outputs):
        self.found |= {x["file_name"]: y["instances"] for x, y in zip(inputs, outputs, strict=True)}

    def evaluate(self):
        return {}


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_three_ways_give_the_same_detections(small_model, make_cfg, tmp_path, order):
    """The Predictor, detectron2's DefaultPredictor and an evaluation, of the same weights and the same file."""
    image = save(tmp_path / "x.png", noise(60, 80))
    record = {"images": [{"id": 1, "file_name": "x.png", "height": 60, "width": 80}]}
    record["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
    ]
    record["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    torch.save({"model": spread_scores(small_model(*SIZES)).state_dict()}, tmp_path / "model.pth")
    name = f"predictor_{tmp_path.name}"
    cfg = make_cfg(
        "DATASETS.REGISTER", [[name, str(tmp_path / "boxes.json"), str(tmp_path)]], "DATASETS.TEST", (name,),
        "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "INPUT.FORMAT", order, "DATALOADER.NUM_WORKERS", 0,
        "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    predictor = Predictor.from_config(cfg, threshold=0.0)
    assert predictor.class_names == NAMES
    found = predictor(image).instances
    with torch.no_grad():
        others = DefaultPredictor(cfg)(cv2.imread(str(image)))["instances"]
    assert_same_instances(others, found)
    prepare_datasets(cfg, eval_only=True)
    evaluation = Collect()
    Trainer.test(cfg, predictor.model, evaluation)
    assert_same_instances(evaluation.found[str(image)], found)


class TestDrawing:
    def test_it_draws_on_the_image_that_was_given(self, make_predictor, tmp_path):
        """From a path, an array and a BGR array the same picture; a small image is enlarged."""
        predictor, image = make_predictor(), noise()
        found = predictor(image)
        picture = found.draw(image)
        assert picture.shape == (480, 640, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, found.draw(save(tmp_path / "x.png", image)))
        assert np.array_equal(picture, found.draw(image[:, :, ::-1], channels="BGR"))
        assert found.draw(image, enlarge=False).shape == image.shape
        with pytest.raises(UserError, match=r"these detections are of an image of \d+ x \d+ pixels, not of 70 x 5"):
            found.draw(image[:5, :70])

    def test_detections_of_any_step_carry_no_gradient(self, make_predictor):
        path = make_predictor().walk(noise(), steps=3, record=range(4))
        for found in (path.detections(2)[0], path.detections()[0]):
            assert not found.scores.requires_grad and not found.pred_boxes.tensor.requires_grad
        with pytest.raises(KeyError, match="step 9 was not recorded: walk with record="):
            path.trajectory.state(9)


@pytest.mark.parametrize("options, message", [
    ({"steps": 2.5}, "steps must be at least 1 and a whole number, got 2.5"),
    ({"steps": "5"}, "steps must be at least 1 and a whole number, got '5'"),
    ({"rtol": "0.1"}, "rtol must be 0 or a positive number, got '0.1'"),
    ({"threshold": "0.5"}, "the threshold must lie between 0 and 1, got '0.5'"),
    ({"solver": 5}, "solver must be a name or an object"),
    ({"solver": Broyden}, "solver must be a name or an object"),
    ({"solver": "anderson(history_size=2.5)"}, "history_size must be a whole number, got 2.5"),
    ({"solver": "anderson(damping='a')"}, "damping must be a number, got 'a'"),
    ({"solver": "anderson(damping=True)"}, "damping must be a number, got True"),
])  # fmt: skip
def test_options_of_a_wrong_type(make_predictor, options, message):
    with pytest.raises(UserError, match=message):
        make_predictor()(noise(), **options)


def test_prepared_images_share_batches_of_one_padded_size(predictor, monkeypatch):
    """Six images of two sizes in turn, at most two at once: each batch has one size, and the results their order."""
    images = [noise(60, 80, seed) if seed % 2 else noise(80, 60, seed) for seed in range(6)]
    batches, infer = [], predictor.model.infer
    monkeypatch.setattr(predictor.model, "infer", lambda batch, **more: batches.append(batch) or infer(batch, **more))
    found = predictor.detect([predictor.prepare(image) for image in images], batch_size=2)
    assert sorted(len(batch) for batch in batches) == [1, 1, 2, 2]
    assert all(len({tuple(x["image"].shape) for x in batch}) == 1 for batch in batches)
    monkeypatch.undo()
    for ours, image in zip(found, images, strict=True):
        alone = predictor(image)
        assert ours.instances.image_size == image.shape[:2]
        assert torch.allclose(ours.instances.scores, alone.instances.scores, atol=1e-5)
    assert predictor.detect([]) == []


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None, "8"])
@pytest.mark.parametrize("detect", [
    lambda predictor, **options: predictor(noise(), **options),
    lambda predictor, **options: predictor([noise()], **options),
    lambda predictor, **options: predictor([], **options),
    lambda predictor, **options: list(predictor.stream([noise()], **options)),
    lambda predictor, **options: predictor.detect([], **options),
])  # fmt: skip
def test_no_form_of_a_call_takes_a_wrong_batch_size(predictor, detect, batch_size):
    message = f"batch_size must be at least 1 and a whole number, got {batch_size!r}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        detect(predictor, batch_size=batch_size)
