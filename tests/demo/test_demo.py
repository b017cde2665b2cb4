"""tools/demo.py with a small model of random weights: images, videos, errors, the exit code."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.structures import Boxes, Instances

from deqdet.checkpoints import write_model_file
from deqdet.data import find_class_names
from deqdet.demo import GIF, PLOT, STRIP, ImageDemo, video
from deqdet.detections import Detections
from deqdet.detector import DEQDet
from deqdet.equilibrium import Broyden
from deqdet.errors import UserError
from deqdet.predictor import Predictor

from helpers.paths import TOOLS

TOOL = TOOLS / "demo.py"
SIZES = ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96]
EXTRAS = ("--refinement-gif", "--refinement-strip", "--convergence-plot")


@pytest.fixture(scope="module")
def weights(small_model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": small_model().state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def config(small_cfg, weights) -> str:
    path = Path(weights).with_name("config.yaml")
    path.write_text(small_cfg("MODEL.WEIGHTS", weights, "DATASETS.TEST", (), *SIZES).dump())
    return str(path)


@pytest.fixture(scope="module")
def make_predictor(small_cfg, weights) -> Callable[..., Predictor]:
    """make_predictor("KEY", value, ...): every detection counts."""

    def make(*overrides) -> Predictor:
        cfg = small_cfg("MODEL.WEIGHTS", weights, "DATASETS.TEST", (), *SIZES, *overrides)
        return Predictor.from_config(cfg, threshold=0.0)

    return make


@pytest.fixture
def demo(config, monkeypatch, capsys) -> Callable[..., tuple[object, list[str], list[str]]]:
    """demo(word, ...): the exit code (None or 0: done) and the lines of stdout and stderr."""

    def run(*words, config_file: str | None = config) -> tuple[object, list[str], list[str]]:
        model = [] if config_file is None else ["--config-file", config_file]
        monkeypatch.setattr(sys, "argv", ["demo.py", *model, *map(str, words)])
        code = None
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.splitlines()

    return run


def save(path: Path, height: int = 60, width: int = 80, colour: str | int | tuple = "gray", mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), colour).save(path)
    return path


def write_video(path: Path, frames: int = 6, width: int = 64, height: int = 48, fps: float = 12.5) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    for i in range(frames):
        writer.write(np.full((height, width, 3), (0, 0, 40 * i), np.uint8))  # ever more red
    writer.release()
    return path


class TestColours:
    @pytest.mark.parametrize("order", ["RGB", "BGR"])
    def test_the_model_gets_its_own_order(self, make_predictor, tmp_path, monkeypatch, order):
        """A red image: red is the first channel of an RGB model and the last of a BGR one, and red in the picture."""
        predictor = make_predictor("INPUT.FORMAT", order)
        seen, preprocess = [], predictor.model.preprocess
        monkeypatch.setattr(predictor.model, "preprocess", lambda x: seen.append(x[0]["image"]) or preprocess(x))
        source = save(tmp_path / "red.png", colour=(250, 20, 0))
        ImageDemo(predictor).write([source], [tmp_path / "out.png"])
        (tensor,) = seen
        assert tensor.shape == (3, 64, 85)  # as INPUT.MIN_SIZE_TEST says
        channels = [250.0, 20.0, 0.0] if order == "RGB" else [0.0, 20.0, 250.0]
        assert [tensor[i].unique().tolist() for i in range(3)] == [[value] for value in channels]
        picture = np.array(cv2.imread(str(tmp_path / "out.png")))[:, :, ::-1].reshape(-1, 3)
        colours, counts = np.unique(picture, axis=0, return_counts=True)
        assert colours[counts.argmax()].tolist() == [250, 20, 0]

    def test_the_order_changes_the_detections(self, make_predictor, tmp_path):
        """RGB pixels in an RGB model are the same to it as BGR ones in a BGR model with the same weights."""
        image = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        rgb, bgr = make_predictor("INPUT.FORMAT", "RGB"), make_predictor("INPUT.FORMAT", "BGR")
        scores = [detector(x).instances.scores for detector, x in
                  ((rgb, image), (bgr, image[:, :, ::-1]), (bgr, image))]  # fmt: skip
        assert torch.equal(scores[0], scores[1])
        assert not torch.equal(scores[0], scores[2])


class TestImages:
    def test_odd_files(self, demo, tmp_path):
        """Those that can be read are done, each of the others has its line, and the exit code says so."""
        odd, out = tmp_path / "odd", tmp_path / "out"
        save(odd / "grey.png", mode="L", colour=90)
        cv2.imwrite(str(odd / "deep.png"), np.full((60, 80), 60000, np.uint16))
        save(odd / "rgba.png", mode="RGBA", colour=(9, 99, 199, 100))
        save(odd / "cmyk.jpg", mode="CMYK", colour=(0, 255, 255, 0))
        save(odd / "one.png", 1, 1)
        save(odd / "line.png", 1, 4000)
        save(odd / "large.jpg", 3000, 4000)
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (700, 500)).save(odd / "turned.jpg", exif=exif)
        whole = (odd / "large.jpg").read_bytes()
        (odd / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (odd / "text.jpg").write_text("no image")
        (tmp_path / "empty").mkdir()
        missing = [tmp_path / "empty", tmp_path / "gone.jpg", tmp_path / "*.bmp"]
        code, lines, errors = demo("--input", odd, *missing, "--output", out, "--confidence-threshold", 0)
        assert code == 1
        expected = {"grey.png": (480, 640), "deep.png": (480, 640), "rgba.png": (480, 640), "cmyk.jpg": (480, 640),
                    "one.png": (16, 16), "large.jpg": (3000, 4000), "turned.jpg": (700, 500)}  # fmt: skip
        assert {x.name: cv2.imread(str(x)).shape[:2] for x in out.iterdir()} == expected
        assert sorted(lines) == sorted(line for name in expected for line in lines if line.startswith(f"{odd / name}:"))
        for line, name in zip(sorted(lines), sorted(expected), strict=True):
            words = line.split()
            assert words[1:6] == ["6", "detections,", "4", "steps,", words[5]] and line.endswith(f"-> {out / name}")
        starts = [*missing, odd / "cut.jpg", odd / "line.png", odd / "text.jpg"]
        assert [line.split(": ")[:2] for line in errors] == [["error", str(start)] for start in starts]
        assert "4000 x 1 pixels" in errors[4]

    def test_all_is_well(self, demo, tmp_path):
        code, lines, errors = demo("--input", save(tmp_path / "a.jpg"), "--output", tmp_path / "new" / "b.png")
        assert not code and not errors
        assert lines[0].startswith(f"{tmp_path}/a.jpg: 0 detections, 4 steps, ")
        assert [x.name for x in (tmp_path / "new").iterdir()] == ["b.png"]

    def test_same_names_and_older_results(self, demo, tmp_path):
        first, second = save(tmp_path / "a" / "x.png", colour="red"), save(tmp_path / "b" / "x.png", colour="blue")
        out = tmp_path / "out"
        for old in ("", " (replaced)"):
            code, lines, _ = demo("--input", first, second, "--output", out)
            assert not code
            assert [line.split(" -> ")[1] for line in lines] == [f"{out}/x.png{old}", f"{out}/x_2.png{old}"]
        assert cv2.imread(str(out / "x.png"))[0, 0].tolist() == [0, 0, 255]
        assert cv2.imread(str(out / "x_2.png"))[0, 0].tolist() == [255, 0, 0]

    def test_an_input_is_not_written_over(self, demo, tmp_path):
        source = save(tmp_path / "x.png")
        before = source.read_bytes()
        code, lines, _ = demo("--input", source, "--output", tmp_path)
        assert not lines and f"the input {source} would be overwritten" in code
        assert source.read_bytes() == before

    def test_a_picture_that_cannot_be_written(self, demo, tmp_path):
        sources = [save(tmp_path / name) for name in ("x.png", "y.png")]
        (tmp_path / "out" / "x.png").mkdir(parents=True)
        code, lines, errors = demo("--input", *sources, "--output", tmp_path / "out")
        assert code == 1 and len(lines) == 1 and lines[0].endswith("out/y.png")
        assert errors == [f"error: {tmp_path}/out/x.png: cannot be written: Is a directory"]

    def test_odd_names(self, demo, tmp_path):
        """A formula that is none, one that is not UTF-8, and one to which .png cannot be added."""
        names = ["a$^$b.png", os.fsdecode(b"\xff.png"), "x" * 255]
        image = save(tmp_path / "image.png").read_bytes()
        for name in names:
            (tmp_path / name).write_bytes(image)
        sources = [tmp_path / name for name in (*reversed(names), "image.png")]
        code, lines, errors = demo("--input", *sources, "--output", tmp_path / "out", "--convergence-plot")
        assert code == 1
        assert errors == [f"error: {tmp_path}/out/{'x' * 255}.png: cannot be written: File name too long"]
        assert [line.split(" -> ")[1] for line in lines] == [
            f"{tmp_path}/out/{stem}.png, {stem}_convergence.png" for stem in (r"\udcff", "a$^$b", "image")
        ]
        assert len(list((tmp_path / "out").iterdir())) == 6

    @pytest.mark.parametrize("suffix", [".gif", ".webp"])
    def test_a_picture_that_its_format_cannot_hold(self, tmp_path, capsys, suffix):
        def detect_nothing(image: np.ndarray) -> Detections:
            found = Instances(image.shape[:2], pred_boxes=Boxes(torch.zeros(0, 4)))
            found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
            return Detections(found, ("thing",), 1, None)

        demo = ImageDemo(detect_nothing)
        wide, normal = tmp_path / f"wide{suffix}", tmp_path / "normal.png"
        demo.write([save(tmp_path / "1.png", 1, 70000), save(tmp_path / "2.png")], [wide, normal])
        assert demo.faults == 1 and normal.exists()
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: {wide}: cannot be written: ")

    def test_refinement_files(self, demo, tmp_path):
        source = save(tmp_path / "x.jpg", 200, 300)
        words = ("--input", source, "--output", tmp_path / "out", *EXTRAS, "--confidence-threshold", 0, "--steps", 7)
        code, lines, errors = demo(*words, "--solver", "anderson3")
        assert not code and not errors
        names = ["x.jpg", "x_refinement.gif", "x_strip.png", "x_convergence.png"]
        assert sorted(x.name for x in (tmp_path / "out").iterdir()) == sorted(names)
        assert lines[0].endswith(f"-> {tmp_path}/out/{', '.join(names)}") and " 7 steps" in lines[0]
        with Image.open(tmp_path / "out" / "x_refinement.gif") as gif:
            assert gif.n_frames == 2 + 7 and gif.width == 640
            frames = []
            for index in range(gif.n_frames):
                gif.seek(index)
                frames.append(np.array(gif.convert("RGB"))[24:-24])  # without the text
        assert all((a != b).any() for a, b in zip(frames[:4], frames[1:4], strict=False))
        assert cv2.imread(str(tmp_path / "out" / "x_strip.png")).shape[1] == 6 * (256 + 8) - 8  # 0, 1, 2, 3, 5, 7
        assert cv2.imread(str(tmp_path / "out" / "x_convergence.png")).shape == (480, 1080, 3)

    def test_no_image_is_encoded_a_third_time(self, make_predictor, tmp_path, monkeypatch):
        predictor = make_predictor()
        calls, encode = [], predictor.model.encode
        monkeypatch.setattr(predictor.model, "encode", lambda images: calls.append(1) or encode(images))
        source = save(tmp_path / "x.png")
        for extras, expected in (((), 1), ((GIF, STRIP, PLOT), 2)):
            calls.clear()
            ImageDemo(predictor).write([source], [tmp_path / "out.png"], extras)
            assert len(calls) == expected

    def test_steps_rtol_and_solver_reach_the_model(self, demo, tmp_path, monkeypatch):
        seen = []
        infer = DEQDet.infer
        monkeypatch.setattr(DEQDet, "infer", lambda *args, **kw: seen.append(kw) or infer(*args, **kw))
        words = ("--input", save(tmp_path / "x.png"), "--output", tmp_path / "out")
        code, _, errors = demo(*words, "--steps", 11, "--rtol", 0.25, "--solver", "Broyden(history_size=3)")
        assert not code and not errors
        assert seen == [{"steps": 11, "rtol": 0.25, "solver": Broyden(history_size=3)}]

    def test_a_model_file_needs_no_config(self, demo, small_cfg, small_model, tmp_path, monkeypatch):
        """Its class names are written beside the boxes."""
        names = ["ox", "ass", "hen"]
        cfg, seen = small_cfg(*SIZES, "DATASETS.TEST", ()), []
        write_model_file(tmp_path / "m.safetensors", weights=small_model().state_dict(), cfg=cfg, class_names=names)
        monkeypatch.setattr(Detections, "draw", lambda found, image: seen.append(found.labels) or image)
        words = ("--input", save(tmp_path / "x.png"), "--output", tmp_path / "out", "--confidence-threshold", 0)
        for model in (["--model", tmp_path / "m.safetensors"], [*words, "MODEL.WEIGHTS", tmp_path / "m.safetensors"]):
            code, lines, errors = demo(*([] if "--input" in model else words), *model, config_file=None)
            assert not code and not errors and " 6 detections, 4 steps, " in lines[0]
        assert len(seen) == 2 and seen[0] == seen[1] and set(seen[0]) <= set(names)

    @pytest.mark.parametrize("opts", [["--opts"], []])
    def test_overrides_at_the_end(self, demo, tmp_path, opts):
        """With and without the older --opts, also directly behind the images."""
        words = ("--output", tmp_path / "out", "--input", save(tmp_path / "x.png"), save(tmp_path / "y.png"))
        code, lines, errors = demo(*words, *opts, "MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", 2)
        assert not code and not errors and all(", 2 steps, " in line for line in lines) and len(lines) == 2


class TestErrors:
    """Each is one line that names the argument or key."""

    @pytest.mark.parametrize("words, message", [
        (["--input", "X", "--refinement-gif"], "--refinement-gif: --output is needed"),
        (["--video-input", "X", *EXTRAS[1:]], "--refinement-strip, --convergence-plot: only with --input"),
        (["--input", "X", "--output", "o", "--confidence-threshold", "1.5"], "must lie between 0 and 1, got 1.5"),
        (["--input", "X", "--output", "o", "--steps", "0"], "steps must be at least 1 and a whole number, got 0"),
        (["--input", "X", "--output", "o", "--rtol", "-1"], "rtol must be 0 or a positive number, got -1"),
        (["--input", "X", "--output", "o", "--solver", "Newton"], "unknown solver Newton: choose plain, Fixed"),
        (["--input", "X", "--output", "o", "--opts", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
        (["--input", "X", "--output", "o", "--opts", "MODEL.WEIGHTS", "gone"], "MODEL.WEIGHTS gone does not exist"),
        (["--input", "X", "--output", "o", "--opts", "MODEL.META_ARCHITECTURE", "RetinaNet"], "it must be DEQDet"),
        (["--input", "X", "--output", "o", "--opts", "MODEL.DEVICE", "foo"], "MODEL.DEVICE is 'foo': it must be cpu, "),
        (["--input", "X", "--output", "o", "--opts", "MODEL.BACKBONE.NAME", "Y"], "BACKBONE.NAME is 'Y': it must be"),
        (["--input", "X", "--output", "o", "--opts", "INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L': it must be RGB or"),
        (["--input", "X", "--output", "o", "--opts", "MODEL.DEQDET.NUM_QUERYS", "3"], "unknown config key"),
        (["--input", "X", "--opts", "A", "1", "--output", "o"], "--output must come before the KEY VALUE pairs"),
        (["--input", "X", "--output", "X/out"], "cannot make the folder X/out"),
        (["--input", "X"], "no window can be opened, since there is no display: give --output"),
        (["--video-input", "text"], "--video-input text is not a video"),
        (["--video-input", "gone.mp4", "--output", "o"], "--video-input gone.mp4 does not exist"),
        (["--video-input", ".", "--output", "o"], "--video-input . is not a file"),
        (["--webcam", "97", "--output", "o"], "--webcam 97: this camera cannot be opened"),
    ])  # fmt: skip
    def test_message(self, demo, tmp_path, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        for name in ("DISPLAY", "WAYLAND_DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        save(tmp_path / "X.png").rename("X")
        Path("text").write_text("no video")
        code, lines, errors = demo(*words)
        assert isinstance(code, str) and code.startswith("error: ") and "\n" not in code
        assert message in code and not lines and not errors

    @pytest.mark.parametrize("words", [["--steps", "3"], ["--rtol", "0.1", "--solver", "Anderson"], EXTRAS])
    @pytest.mark.parametrize("decoder", ["StackedDecoder", "RecurrentDecoder"])
    def test_what_takes_an_equilibrium(self, demo, small_model, tmp_path, words, decoder):
        """It fails before any image is done, and before the folder of the results is made."""
        source, overrides = save(tmp_path / "x.png"), ["MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.NUM_LAYERS", 2]
        torch.save({"model": small_model(*overrides).state_dict()}, tmp_path / "model.pth")
        overrides += ["MODEL.WEIGHTS", tmp_path / "model.pth"]
        code, lines, _ = demo("--input", source, *words, "--output", tmp_path / "out", "--opts", *overrides)
        flags = ", ".join(word for word in words if word.startswith("--"))
        assert not (tmp_path / "out").exists()
        assert code.startswith(f"error: {flags}: only for a decoder with an equilibrium, such as ")
        assert decoder in code and not lines

    def test_other_decoders_detect(self, demo, small_cfg, small_model, tmp_path):
        overrides = ["MODEL.DEQDET.DECODER", "RecurrentDecoder", "MODEL.DEQDET.NUM_LAYERS", 3]
        torch.save({"model": small_model(*overrides).state_dict()}, tmp_path / "model.pth")
        cfg = small_cfg(*overrides, "MODEL.WEIGHTS", str(tmp_path / "model.pth"), "DATASETS.TEST", (), *SIZES)
        (tmp_path / "config.yaml").write_text(cfg.dump())
        words = ("--input", save(tmp_path / "x.png"), "--output", tmp_path / "out", "--confidence-threshold", 0)
        code, lines, errors = demo(*words, config_file=str(tmp_path / "config.yaml"))
        assert not code and not errors and "6 detections, 2 steps, " in lines[0]


class TestClassNames:
    def test_from_the_test_set(self, small_cfg, tmp_path, caplog):
        """Those of generated shapes are known without the images being drawn."""
        shapes = find_class_names(small_cfg("DATASETS.TEST", ("shapes_val",), "MODEL.DEQDET.NUM_CLASSES", 8))
        assert len(shapes) == 8 and "circle" in shapes
        coco = find_class_names(small_cfg("DATASETS.TEST", ("coco_2017_val",), "MODEL.DEQDET.NUM_CLASSES", 80))
        assert coco[0] == "person" and len(coco) == 80 and not caplog.messages

    def test_from_a_registered_set(self, small_cfg, toy_config):
        folder = Path(toy_config).parent
        entry = [f"demo_{folder.name}", str(folder / "boxes.json"), str(folder)]
        broken = [f"other_{folder.name}", "nowhere.json", "nowhere"]
        cfg = small_cfg("DATASETS.REGISTER", [broken, entry], "DATASETS.TEST", (entry[0],))
        cfg.MODEL.DEQDET.NUM_CLASSES = 1
        assert find_class_names(cfg) == ["half"]
        assert cfg.DATASETS.REGISTER == [broken, entry]

    @pytest.mark.parametrize("name, reason", [
        ("coco_2017_val", "it has 80, but the model has 3"), ("demo_unknown_set", "it has none"),
        ("demo_registered", "nowhere.json"),
    ])  # fmt: skip
    def test_numbers_where_there_are_none(self, small_cfg, caplog, name, reason):
        entry = ["demo_registered", "nowhere.json", "nowhere"]
        cfg = small_cfg("DATASETS.TEST", (name,), "DATASETS.REGISTER", [entry])
        assert find_class_names(cfg) == ["class 0", "class 1", "class 2"]
        (message,) = caplog.messages
        assert name in message and reason in message


class TestWindow:
    @pytest.fixture
    def shown(self, monkeypatch) -> list[tuple[np.ndarray, int]]:
        """Pictures (RGB) with the time to wait, from an OpenCV with windows, where Esc is pressed at the second one."""
        found: list[tuple[np.ndarray, int]] = []
        pictures: list[np.ndarray] = []

        def wait(milliseconds: int) -> int:
            found.append((pictures[-1][:, :, ::-1], milliseconds))
            return video.ESCAPE if len(found) == 2 else -1

        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setattr(video.cv2, "namedWindow", lambda name, flags: None)
        monkeypatch.setattr(video.cv2, "imshow", lambda name, picture: pictures.append(picture))
        monkeypatch.setattr(video.cv2, "waitKey", wait)
        return found

    def test_images(self, demo, shown, tmp_path):
        names = [save(tmp_path / f"{name}.png", colour=name) for name in ("red", "blue", "lime")]
        code, lines, _ = demo("--input", *names)
        assert not code and len(lines) == 2
        assert [(picture[5, 5].tolist(), wait) for picture, wait in shown] == [([255, 0, 0], 0), ([0, 0, 255], 0)]

    def test_video(self, demo, shown, tmp_path):
        code, lines, _ = demo("--video-input", write_video(tmp_path / "film.mp4"))
        assert not code and "2 frames" in lines[0] and "->" not in lines[0]
        assert [wait for _, wait in shown] == [1, 1]
        assert shown[1][0].mean(axis=(0, 1)) == pytest.approx([40, 0, 0], abs=8)

    def test_an_opencv_without_windows(self, demo, tmp_path, monkeypatch):
        def fail(name: str, flags: int) -> None:
            raise cv2.error("The function is not implemented")

        monkeypatch.setenv("DISPLAY", ":0")
        monkeypatch.setattr(video.cv2, "namedWindow", fail)
        code, *_ = demo("--input", save(tmp_path / "x.png"))
        assert code == ("error: no window can be opened, since this OpenCV was built without them "
                        "(opencv-python-headless): give --output")  # fmt: skip


class TestVideo:
    def test_a_file(self, demo, tmp_path):
        source = write_video(tmp_path / "film.mp4", frames=6, width=64, height=48, fps=12.5)
        code, lines, errors = demo("--video-input", source, "--output", tmp_path / "out")
        assert not code and not errors
        assert lines[0].startswith(f"{source}: 6 frames; on average 0.0 detections, 4.0 steps, ")
        assert lines[0].endswith(f" -> {tmp_path}/out/film.mp4")
        capture = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
        assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(12.5)
        frames = [capture.read()[1] for _ in range(6)]
        assert capture.read()[0] is False
        assert {frame.shape for frame in frames} == {(48, 64, 3)}
        reds = [frame[:, :, 2].mean() for frame in frames]
        assert reds == pytest.approx([40 * i for i in range(6)], abs=8)
        assert max(frame[:, :, 0].mean() for frame in frames) < 8

    def test_a_file_that_cannot_be_written(self, demo, tmp_path):
        source = write_video(tmp_path / "film.mp4", frames=2)
        (tmp_path / "out" / "film.mp4").mkdir(parents=True)
        code, lines, _ = demo("--video-input", source, "--output", tmp_path / "out")
        assert "cannot write this video (codec mp4v, 64 x 48 px)" in code and not lines

    def test_frames_of_which_the_resize_leaves_nothing(self, demo, tmp_path):
        source = write_video(tmp_path / "film.mp4", frames=2, width=2048, height=2)
        code, lines, _ = demo("--video-input", source, "--output", tmp_path / "out")
        assert "film.mp4: an image of 2048 x 2 pixels cannot be resized" in code and not lines

    def test_a_video_that_breaks_off(self, make_predictor, tmp_path, monkeypatch, capsys):
        film = video.open_video(write_video(tmp_path / "film.mp4", frames=4))
        monkeypatch.setattr(video.Video, "length", property(lambda self: 20))
        with pytest.raises(UserError, match="breaks off: 4 of its 20 frames"):
            video.run_video(make_predictor(), film, tmp_path / "out.mp4")
        assert "4 frames" in capsys.readouterr().out  # and what there is has been done

    def test_a_recording_keeps_to_the_clock(self, tmp_path, monkeypatch):
        """Pictures after 0, 0.1 and 0.6 s at 10 a second: one, one more, then four."""
        now = iter([0.0, 0.0, 0.1, 0.6])
        monkeypatch.setattr(video.time, "perf_counter", lambda: next(now))
        file = video.VideoFile(tmp_path / "webcam.mp4", fps=10.0, live=True)
        for value in (0, 100, 200):
            assert file.write(np.full((48, 64, 3), value, np.uint8))
        file.close()
        capture = cv2.VideoCapture(str(tmp_path / "webcam.mp4"))
        values = []
        while (frame := capture.read()[1]) is not None:
            values.append(round(frame.mean(), -1))
        assert values == [0, 100, 200, 200, 200, 200]
