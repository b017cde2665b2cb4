"""deqdet-predict with a small model of random weights: formats, ids, interruptions, broken images, errors."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from deqdet.checkpoints import write_model_file
from deqdet.detector import DEQDet
from deqdet.predictions.journal import NAME
from deqdet.predictor import Predictor
from deqdet.tools import predict, train_net

from helpers.engine_toy import IN_PROCESS
from helpers.paths import ROOT, TOOLS

pytestmark = IN_PROCESS
CLASSES = ["ox", "ass", "hen"]
SIZES = ["INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "DATALOADER.NUM_WORKERS", 0]


@pytest.fixture(scope="module")
def model_file(small_cfg, small_model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_model_file(
        path, weights=small_model().state_dict(), cfg=small_cfg(*SIZES, "DATASETS.TEST", ()), class_names=CLASSES
    )
    return str(path)


@pytest.fixture(scope="module")
def predictor(model_file) -> Predictor:
    return Predictor.from_file(model_file, threshold=0.0)


@pytest.fixture
def images(tmp_path) -> Path:
    """Ten images of noise in a folder; those of odd number stand upright, and so have another padded size."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        size = (48, 64) if i % 2 else (64, 48)
        pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(model_file, capsys, monkeypatch, tmp_path) -> Callable[..., tuple[object, str, list[str]]]:
    """run(word, ...): the exit code (None: done), stdout, and the lines of stderr that are no progress bar."""
    monkeypatch.chdir(tmp_path)

    def call(*words) -> tuple[object, str, list[str]]:
        code = None
        try:
            predict.main(["--model", model_file, "--confidence-threshold", "0", *map(str, words)])
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith(("error:", "interrupted"))]
        return code, printed.out, lines

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_info(path: Path, names: list[str], categories: tuple = ((7, "hen"), (8, "ox"), (9, "ass"))) -> Path:
    """A file without annotations, of images 100, 101, ..."""
    images = [{"id": 100 + i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "categories": [{"id": i, "name": n} for i, n in categories]}))
    return path


class TestFormats:
    """Each holds the Predictor's detections of each image alone, up to the rounding of batches."""

    def test_coco(self, run, images, predictor, tmp_path):
        code, out, _ = run("--input", images, "--output", "out")
        assert code is None and "out/predictions.json, out/images.json: 60 detections in 10 images" in out
        coco = COCO(str(tmp_path / "out" / "images.json"))
        found = coco.loadRes(str(tmp_path / "out" / "predictions.json"))
        assert {x["id"]: x["name"] for x in coco.dataset["categories"]} == {1: "ox", 2: "ass", 3: "hen"}
        for number, name in enumerate(sorted(images.iterdir()), start=1):
            image = coco.imgs[number]
            size = (48, 64) if number % 2 == 0 else (64, 48)  # the second one, 1.png, stands upright
            assert image["file_name"] == str(name) and (image["width"], image["height"]) == size
            expected = predictor(name)
            ours = found.loadAnns(found.getAnnIds([number]))
            assert [x["category_id"] - 1 for x in ours] == expected.instances.pred_classes.tolist()
            assert [x["score"] for x in ours] == pytest.approx(expected.instances.scores.tolist(), abs=1e-5)
            boxes = torch.tensor([x["bbox"] for x in ours])
            boxes[:, 2:] += boxes[:, :2]
            assert (boxes - expected.instances.pred_boxes.tensor).abs().max() < 0.01

    def test_yolo(self, run, images, predictor, tmp_path):
        code, out, _ = run("--input", images, "--output", "out", "--format", "yolo")
        assert code is None and "out/labels, out/classes.txt: 60 detections in 10 images" in out
        assert (tmp_path / "out" / "classes.txt").read_text() == "ox\nass\nhen\n"
        assert sorted(x.name for x in (tmp_path / "out" / "labels").iterdir()) == [f"{i}.txt" for i in range(10)]
        expected = predictor(images / "3.png")
        rows = np.loadtxt(tmp_path / "out" / "labels" / "3.txt")
        x0, y0, x1, y1 = expected.instances.pred_boxes.tensor.T
        columns = [expected.instances.pred_classes, (x0 + x1) / 2 / 48, (y0 + y1) / 2 / 64, (x1 - x0) / 48,
                   (y1 - y0) / 64, expected.instances.scores]  # fmt: skip
        assert np.abs(rows - torch.stack(columns, 1).numpy()).max() < 2e-4

    def test_csv(self, run, images, predictor, tmp_path):
        assert run("--input", images / "2.png", images / "1.png", "--output", "out", "--format", "csv")[0] is None
        with open(tmp_path / "out" / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        expected = predictor(images / "2.png")
        assert [row["image"] for row in rows] == [str(images / "2.png")] * 6 + [str(images / "1.png")] * 6
        assert [row["class"] for row in rows[:6]] == expected.labels
        assert [int(row["class_id"]) for row in rows[:6]] == expected.instances.pred_classes.tolist()
        numbers = np.array([[float(row[key]) for key in ("x0", "y0", "x1", "y1", "score")] for row in rows[:6]])
        assert np.abs(numbers[:, :4] - expected.instances.pred_boxes.tensor.numpy()).max() < 0.01
        assert np.abs(numbers[:, 4] - expected.instances.scores.numpy()).max() < 1e-5
        assert {row["frame"] for row in rows} == {""}

    def test_images_of_one_name_have_labels_of_their_own(self, run, images, tmp_path):
        (tmp_path / "b").mkdir()
        for name in ("1.png", "1.jpg"):
            Image.new("RGB", (64, 48)).save(tmp_path / "b" / name)
        assert run("--input", images / "1.png", tmp_path / "b", "--output", "out", "--format", "yolo")[0] is None
        assert sorted(x.name for x in (tmp_path / "out" / "labels").iterdir()) == ["1.txt", "1_2.txt", "1_3.txt"]

    def test_the_threshold_and_the_steps_count(self, run, images, tmp_path, predictor):
        scores = predictor(images / "0.png", steps=1).instances.scores
        middle = float(scores[2:4].mean())
        code, _, _ = run("--input", images / "0.png", "--output", "out", "--confidence-threshold", middle, "--steps", 1)
        found = json.loads((tmp_path / "out" / "predictions.json").read_text())
        assert code is None and [x["score"] for x in found] == pytest.approx(scores[:3].tolist(), abs=1e-6)

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # with a byte order mark, as some editors write it
    def test_a_list_of_paths(self, run, images, tmp_path, encoding):
        (tmp_path / "list.txt").write_text(f"{images}/3.png\n\n{images}/[12].png\n", encoding=encoding)
        assert run("--input-list", "list.txt", "--output", "out")[0] is None
        listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
        assert [Path(x["file_name"]).name for x in listed] == ["3.png", "1.png", "2.png"]


class TestOverwrite:
    def test_labels_of_the_run_before_are_deleted(self, run, images, tmp_path):
        """Those of other images, and those of an image that is skipped this time."""
        words = "--output", "out", "--format", "yolo"
        run("--input", *(images / f"{i}.png" for i in range(4)), *words)
        (tmp_path / "out" / "labels" / "3.txt").write_bytes(b"")  # as of an image without detections
        (images / "2.png").write_text("no image")
        code, out, _ = run("--input", images / "1.png", images / "2.png", *words, "--overwrite", "--skip-broken")
        assert code == 1 and out.endswith(": 6 detections in 1 image, 1 skipped\n")
        assert sorted(contents(tmp_path / "out")) == ["classes.txt", "labels/1.txt"]
        code, out, _ = run("--input", images / "1.png", *words, "--overwrite")
        assert code is None and "6 detections in 1 image\n" in out

    @pytest.mark.parametrize("files", [
        {"3.txt": "0 0.5 0.5 0.1 0.2\n"},  # for training: without a score
        {"3.txt": "0 0.5 0.5 0.1 0.2 0.9\n"},  # of another program
        {"3.txt": "0 0.500000 0.500000 0.100000 0.200000 0.900000\nlook at this one\n"},
        {"classes.txt": "ox\nass\nhen\n", "3.txt": ""},  # an image without boxes, beside files of others
        {"deeper/3.txt": "0 0.500000 0.500000 0.100000 0.200000 0.900000\n"},
        {"3.label": "0 0.500000 0.500000 0.100000 0.200000 0.900000\n"},
        {"3.txt": "\xff"},
    ])  # fmt: skip
    def test_labels_of_others_stay(self, run, images, tmp_path, files):
        words = "--output", "out", "--format", "yolo"
        run("--input", images / "0.png", images / "1.png", *words)
        for name, text in files.items():
            path = tmp_path / "out" / "labels" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode("latin-1"))
        assert run("--input", images / "1.png", *words, "--overwrite")[0] is None
        left = contents(tmp_path / "out" / "labels")
        assert sorted(left) == sorted(["1.txt", *files])
        assert all(left[name] == text.encode("latin-1") for name, text in files.items())

    def test_a_folder_of_empty_labels_stays(self, run, images, tmp_path):
        (tmp_path / "out" / "labels").mkdir(parents=True)
        (tmp_path / "out" / "labels" / "a.txt").touch()
        assert run("--input", images / "1.png", "--output", "out", "--format", "yolo", "--overwrite")[0] is None
        assert sorted(x.name for x in (tmp_path / "out" / "labels").iterdir()) == ["1.txt", "a.txt"]

    def test_a_stale_images_file_is_deleted(self, run, images, tmp_path):
        run("--input", images / "1.png", "--output", "out")
        info = write_info(tmp_path / "info.json", ["5.png"])
        assert run("--input", images, "--images-from", info, "--output", "out", "--overwrite")[0] is None
        assert sorted(contents(tmp_path / "out")) == ["predictions.json"]

    def test_an_images_file_that_is_needed_stays(self, run, images, tmp_path):
        """This run has its ids from the one that the run before wrote."""
        words = "--input", images, "--output", "out"
        assert run(*words)[0] is None
        before = contents(tmp_path / "out")
        assert run(*words, "--images-from", "out/images.json", "--overwrite")[0] is None
        assert contents(tmp_path / "out") == before

    def test_an_images_file_of_others_stays(self, run, images, tmp_path):
        (tmp_path / "out").mkdir()
        write_info(tmp_path / "out" / "images.json", ["1.png"])
        info = write_info(tmp_path / "info.json", ["5.png"])
        assert run("--input", images, "--images-from", info, "--output", "out", "--overwrite")[0] is None
        assert sorted(contents(tmp_path / "out")) == ["images.json", "predictions.json"]


class TestImageInfo:
    def test_ids_are_those_of_the_file(self, run, images, predictor, tmp_path):
        """Of images and of categories, in the order of the file, and only its images."""
        info = write_info(tmp_path / "info.json", ["5.png", "2.png"])
        assert run("--input", images, "--images-from", info, "--output", "out")[0] is None
        assert sorted(contents(tmp_path / "out")) == ["predictions.json"]
        found = json.loads((tmp_path / "out" / "predictions.json").read_text())
        assert [x["image_id"] for x in found] == [100] * 6 + [101] * 6
        ids = {"ox": 8, "ass": 9, "hen": 7}
        assert [x["category_id"] for x in found[:6]] == [ids[name] for name in predictor(images / "5.png").labels]

    def test_the_file_is_what_an_evaluation_of_the_unlabelled_set_writes(self, run, images, model_file, tmp_path):
        """With every score and one image at a time, as in an evaluation, to the last bit."""
        names = [f"{i}.png" for i in range(0, 10, 2)]
        info = write_info(tmp_path / "info.json", names, categories=((7, "ox"), (8, "ass"), (9, "hen")))
        assert run("--input", images, "--images-from", info, "--output", "out", "--batch-size", 1)[0] is None
        register = f"[['{tmp_path.name}','{info}','{images}']]"
        train_net.main(["--model", model_file, "--eval-only", "DATASETS.REGISTER", register, "DATASETS.TEST",
                        f"('{tmp_path.name}',)", "OUTPUT_DIR", str(tmp_path / "eval")])  # fmt: skip
        (evaluated,) = (tmp_path / "eval" / "inference").rglob("coco_instances_results.json")
        assert json.loads(evaluated.read_text()) == json.loads((tmp_path / "out" / "predictions.json").read_text())

    @pytest.mark.parametrize("categories, words, message", [
        (((1, "ox"), (2, "hen")), [], "--images-from info.json lacks the model's classes ass among its categories"),
        (((1, "ox"),), ["--input", "nowhere"], "--images-from: --input must be the one folder"),
    ])  # fmt: skip
    def test_errors(self, run, images, tmp_path, categories, words, message):
        write_info(tmp_path / "info.json", ["1.png"], categories=categories)
        code, _, _ = run("--input", images, "--images-from", "info.json", "--output", "out", *words)
        assert str(code).startswith(f"error: {message}")
        assert not (tmp_path / "out").exists()


class TestInterruptions:
    """Batches of one: groups of four images, of which ten make two whole ones and a part."""

    WORDS = ("--batch-size", "1", "--format")

    @pytest.mark.parametrize("form", ["coco", "yolo", "csv"])
    def test_a_killed_run_goes_on_and_ends_with_the_same_files(self, run, images, model_file, tmp_path, form):
        """The process is killed by SIGKILL while it writes down its second group of images."""
        assert run("--input", images, "--output", "whole", *self.WORDS, form)[0] is None
        words = ["--model", model_file, "--plugin", str(ROOT / "tests" / "helpers" / "kill_prediction.py"),
                 "--confidence-threshold", "0", "--input", str(images), "--output", "killed"]  # fmt: skip
        paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "projects" / "DEQDet")])
        environment = {**os.environ, "KILL_PREDICTION": "3", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, str(TOOLS / "predict.py"), *words, *self.WORDS, form], cwd=tmp_path,
                              env=environment, capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert list(contents(tmp_path / "killed")) == [NAME]
        code, out, _ = run("--input", images, "--output", "killed", *self.WORDS, form)
        assert code is None and "an earlier run completed 4 of 10 images" in out
        assert contents(tmp_path / "killed") == contents(tmp_path / "whole")

    def test_ctrl_c_at_any_group(self, run, images, tmp_path, monkeypatch):
        """In batches of up to two, so that the images of a batch must be the same ones after the interruption."""
        words = ["--input", images, "--batch-size", 2, "--format", "coco"]
        assert run(*words, "--output", "whole")[0] is None
        original, calls = DEQDet.infer, [0]

        def infer(self, batch, **options):
            calls[0] += 1
            if calls[0] == 6:  # 8 images in batches of two are the first four
                raise KeyboardInterrupt
            return original(self, batch, **options)

        monkeypatch.setattr(DEQDet, "infer", infer)
        code, _, lines = run(*words, "--output", "part")
        assert code == 130 and lines == ["interrupted: run the same command again to continue"]
        calls[0] = 10
        code, out, _ = run(*words, "--output", "part")
        assert code is None and "8 of 10 images" in out
        assert calls[0] == 10 + 2  # the last two images, of two sizes
        assert contents(tmp_path / "part") == contents(tmp_path / "whole")

    def interrupt(self, run, monkeypatch, *words) -> None:
        """Do the first group of four, and no more."""
        original, calls = DEQDet.infer, [0]

        def infer(self, batch, **options):
            calls[0] += 1
            if calls[0] > 4:
                raise KeyboardInterrupt
            return original(self, batch, **options)

        monkeypatch.setattr(DEQDet, "infer", infer)
        assert run("--batch-size", 1, *words)[0] == 130
        monkeypatch.setattr(DEQDet, "infer", original)

    def test_another_format_may_take_over(self, run, images, tmp_path, monkeypatch):
        self.interrupt(run, monkeypatch, "--input", images, "--output", "out")
        code, out, _ = run("--batch-size", 1, "--input", images, "--output", "out", "--format", "csv")
        assert code is None and "completed 4 of 10" in out and sorted(contents(tmp_path / "out")) == ["predictions.csv"]

    def test_changed_images_are_done_again_from_their_group_on(self, run, images, tmp_path, monkeypatch):
        self.interrupt(run, monkeypatch, "--input", images, "--output", "out")
        Image.new("RGB", (64, 48), "red").save(images / "2.png")
        code, out, _ = run("--batch-size", 1, "--input", images, "--output", "out")
        assert str(code).startswith("error: out/.predictions.unfinished is from an unfinished run on other images")
        code, out, _ = run("--batch-size", 1, "--input", images, "--output", "out", "--overwrite")
        assert code is None and "an earlier run" not in out
        run("--batch-size", 1, "--input", images, "--output", "anew")
        assert contents(tmp_path / "out") == contents(tmp_path / "anew")

    def test_more_images_may_come_at_the_end(self, run, images, tmp_path, monkeypatch):
        self.interrupt(run, monkeypatch, "--input", images, "--output", "out")
        shutil.copy(images / "0.png", images / "last.png")
        (images / "9.png").unlink()
        code, out, _ = run("--batch-size", 1, "--input", images, "--output", "out")
        assert code is None and "completed 4 of 10" in out

    @pytest.mark.parametrize("words, name", [
        (["--steps", 2], "--steps"), (["--solver", "anderson"], "--solver"), (["--batch-size", 2], "--batch-size"),
        (["--confidence-threshold", 0.5], "--confidence-threshold"), (["INPUT.MIN_SIZE_TEST", 32], "INPUT"),
        (["MODEL.DEQDET.SOLVER.RTOL", 0.1], "model"),
    ])  # fmt: skip
    def test_other_settings_are_refused_and_named(self, run, images, monkeypatch, words, name):
        self.interrupt(run, monkeypatch, "--input", images, "--output", "out")
        code, _, _ = run("--batch-size", 1, "--input", images, "--output", "out", *words)
        message = f"error: out/{NAME} is from an unfinished run with another {name}: use the same as before"
        assert str(code).startswith(message)

    def test_finished_files_are_replaced_only_if_told_so(self, run, images):
        assert run("--input", images / "0.png", "--output", "out")[0] is None
        code, _, _ = run("--input", images / "0.png", "--output", "out")
        assert str(code) == "error: out/predictions.json already exists: choose another --output, or give --overwrite"

    @pytest.mark.parametrize("form, name", [("yolo", "classes.txt"), ("coco", "images.json")])
    def test_a_file_of_the_users_is_not_replaced(self, run, images, tmp_path, form, name):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        code, _, _ = run("--input", images, "--output", "out", "--format", form)
        assert str(code) == f"error: out/{name} already exists: choose another --output, or give --overwrite"
        assert contents(tmp_path / "out") == {name: b"mine"}

    def test_training_labels_are_not_replaced(self, run, images, tmp_path):
        (tmp_path / "out" / "labels").mkdir(parents=True)
        (tmp_path / "out" / "labels" / "3.txt").write_text("0 0.5 0.5 0.1 0.1\n")
        words = "--input", images, "--output", "out", "--format", "yolo", "--overwrite"
        code, _, _ = run(*words)
        assert str(code).startswith("error: out/labels/3.txt was not written by this command, and may be a training")
        assert (tmp_path / "out" / "labels" / "3.txt").read_text() == "0 0.5 0.5 0.1 0.1\n"
        (tmp_path / "out" / "labels").rename(tmp_path / "mine")
        assert run(*words)[0] is None and len(list((tmp_path / "out" / "labels").iterdir())) == 10
        assert run("--input", images / "0.png", "--output", "out", "--overwrite")[0] is None

    def test_two_runs_at_once_are_refused(self, run, images, tmp_path, model_file, monkeypatch):
        codes = []
        original = DEQDet.infer

        def infer(self, batch, **options):
            if not codes:
                codes.append(None)
                codes[0] = run("--input", images, "--output", "out")[0]
            return original(self, batch, **options)

        monkeypatch.setattr(DEQDet, "infer", infer)
        assert run("--input", images, "--output", "out")[0] is None
        assert codes == ["error: --output out is in use by another run: wait until it has finished"]


def test_images_without_a_finite_state_are_counted_even_after_an_interruption(run, images, monkeypatch):
    """One such image is in the group that the first run finishes, another in the rest."""
    infer, seen = DEQDet.infer, []

    def count(self, batch, **options):
        outputs = infer(self, batch, **options)
        seen.extend(outputs)
        if len(seen) > 6 and len(seen) - len(outputs) <= 6:
            raise KeyboardInterrupt
        return [output | {"finite": len(seen) not in (2, 9)} for output in outputs]

    monkeypatch.setattr(DEQDet, "infer", count)
    words = "--input", images, "--output", "out", "--batch-size", 1
    assert run(*words)[0] == 130
    code, out, _ = run(*words)
    assert code is None and "completed 4 of 10 images" in out
    assert out.splitlines()[-1] == (
        "The states became infinite or NaN in 2 of 10 images: their detections may be useless "
        "(docs/equilibrium.md, When it does not converge)"
    )


class TestBrokenImages:
    def test_the_first_one_ends_the_run_with_one_line(self, run, images, tmp_path):
        (images / "5.png").write_text("no image")
        code, _, lines = run("--input", images, "--output", "out", "--batch-size", 1)
        assert str(code).startswith(f"error: {images}/5.png: not an image") and "--skip-broken continues" in str(code)
        (images / "5.png").unlink()  # and what was done before it is not lost
        code, out, _ = run("--input", images, "--output", "out", "--batch-size", 1)
        assert code is None and "completed 4 of 9 images" in out

    def test_skipped_ones_are_named_and_the_others_done(self, run, images, tmp_path):
        (images / "5.png").write_text("no image")
        (images / "6.png").write_bytes((images / "7.png").read_bytes()[:100])
        code, out, lines = run("--input", images, "--output", "out", "--skip-broken", "--format", "yolo")
        assert code == 1 and out.endswith(": 48 detections in 8 images, 2 skipped\n")
        first = lines[0].removeprefix("error: ")
        assert len(lines) == 3 and lines[-1] == f"error: 2 of 10 images skipped; the first: {first}"
        assert [line.split(":")[1].strip() for line in lines[:2]] == [f"{images}/5.png", f"{images}/6.png"]
        assert sorted(x.stem for x in (tmp_path / "out" / "labels").iterdir()) == list("01234789")

    def test_those_of_an_interrupted_run_count_too(self, run, images, monkeypatch):
        """The second run does not read the image again that the first one has skipped."""
        (images / "1.png").write_text("no image")
        words = "--input", images, "--output", "out", "--skip-broken", "--batch-size", 1
        original = Predictor.prepare

        def prepare(self, image, **options):
            if image.name == "6.png":
                raise KeyboardInterrupt
            return original(self, image, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Predictor, "prepare", prepare)
            assert run(*words)[0] == 130
        code, out, lines = run(*words)
        assert code == 1 and "an earlier run completed 4 of 10 images (1 skipped); continuing from there" in out
        assert out.endswith(": 54 detections in 9 images, 1 skipped\n")
        assert len(lines) == 1
        assert lines[0].startswith(f"error: 1 of 10 images skipped; the first: {images}/1.png: not an image")

    def test_ids_stay_those_of_the_list(self, run, images, tmp_path):
        (images / "0.png").write_text("no image")
        assert run("--input", images, "--output", "out", "--skip-broken")[0] == 1
        listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
        assert [x["id"] for x in listed] == list(range(2, 11))

    def test_a_path_that_is_not_there(self, run, images, tmp_path):
        words = ["--input", images / "0.png", "nowhere", "--output", "out"]
        code, _, _ = run(*words)
        assert str(code) == "error: nowhere: does not exist; --skip-broken continues without it"
        code, _, lines = run(*words, "--skip-broken")
        assert code == 1 and lines == ["error: nowhere: does not exist"]
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 6
        assert str(run("--input", "nowhere", "--output", "o", "--skip-broken")[0]) == "error: nowhere: does not exist"


class TestVideo:
    @pytest.fixture
    def video(self, tmp_path) -> Path:
        """Ten frames that differ."""
        path = tmp_path / "clip.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12.5, (64, 48))
        for i in range(10):
            writer.write(np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1))
        writer.release()
        return path

    def test_frames_are_numbered_from_one_on(self, run, video, predictor, tmp_path):
        assert run("--video-input", video, "--output", "out", "--format", "csv")[0] is None
        with open(tmp_path / "out" / "predictions.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["frame"]) for row in rows] == [i for i in range(1, 11) for _ in range(6)]
        capture = cv2.VideoCapture(str(video))
        frames = [capture.read()[1][:, :, ::-1] for _ in range(10)]
        capture.release()
        expected = predictor(frames[6]).instances
        scores = [float(row["score"]) for row in rows if row["frame"] == "7"]
        assert scores == pytest.approx(expected.scores.tolist(), abs=1e-4)
        assert run("--video-input", video, "--output", "out", "--format", "yolo")[0] is None
        assert (tmp_path / "out" / "labels" / "clip_000010.txt").is_file()
        assert run("--video-input", video, "--output", "out")[0] is None
        listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
        assert listed[1] == {"id": 2, "file_name": f"{video}#2", "width": 64, "height": 48}

    def test_an_interrupted_video_goes_on(self, run, video, tmp_path, monkeypatch):
        words = ["--video-input", video, "--batch-size", 1]
        assert run(*words, "--output", "whole")[0] is None
        TestInterruptions().interrupt(run, monkeypatch, "--video-input", video, "--output", "part")
        code, out, _ = run(*words, "--output", "part")
        assert code is None and "completed 4 of 10 frames" in out
        assert contents(tmp_path / "part") == contents(tmp_path / "whole")

    def test_a_video_that_breaks_off_is_written_as_far_as_it_goes(self, run, video, tmp_path, monkeypatch):
        monkeypatch.setattr("deqdet.demo.video.Video.length", 40)
        code, _, _ = run("--video-input", video, "--output", "out")
        assert str(code) == f"error: {video} breaks off: 10 of its 40 frames can be read"
        assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())) == 60


@pytest.mark.parametrize("words, message", [
    (["--confidence-threshold", 2], "--confidence-threshold must lie between 0 and 1, got 2.0"),
    (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
    (["--output", "list.txt"], "--output list.txt is a file: give a folder"),
    (["--solver", "magic"], ".*magic"),
    (["--images-from", "list.txt"], "--images-from: --input must be the one folder that contains its images"),
])  # fmt: skip
def test_mistakes_are_one_line(run, images, tmp_path, words, message):
    (tmp_path / "list.txt").write_text("\n")
    code, _, _ = run("--input", images / "0.png", "--output", "out", *words)
    assert str(code).startswith("error: ") and "\n" not in str(code)
    assert re.match(f"error: {message}", str(code)), code


def test_an_empty_list_and_a_missing_one(run, tmp_path):
    (tmp_path / "list.txt").write_text("\n")
    code, _, _ = run("--input-list", "list.txt", "--output", "out")
    assert str(code) == "error: --input-list list.txt is empty: write one path per line"
    assert "nowhere.txt cannot be read" in str(run("--input-list", "nowhere.txt", "--output", "out")[0])
