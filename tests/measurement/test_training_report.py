"""The page about a training: its figures, from files whose mistakes are known, and its pictures."""

import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detectron2.config import get_cfg

from deqdet import add_deqdet_config
from deqdet.data import prepare_datasets
from deqdet.measurement.mistakes_sheet import COLOURS, Outcome
from deqdet.measurement.training_report import find_last_results, write_training_report
from deqdet.tools import check_data, report

from helpers.damaged_sets import make_set
from helpers.engine_toy import IN_PROCESS

pytestmark = [*IN_PROCESS, pytest.mark.usefixtures("own_catalogs")]
AP = {"bbox/AP": 61.25, "bbox/AP50": 80.0, "bbox/APs": float("nan"), "bbox/AP-red": 70.5, "bbox/AP-green": 40.0,
      "bbox/AP-blue": 73.25}  # fmt: skip
METRICS = [{"iteration": 19, "total_loss": 8.0}, {"iteration": 39, "total_loss": 3.5}, {"iteration": 40, **AP}]


@pytest.fixture
def small_set(tmp_path):
    """The set of 4 images with 8 boxes: red, green in 1.png, blue, red in 2.png, green, blue in 3.png, red, green."""
    s = make_set(tmp_path / "set")
    s.save()
    return s


def perfect(s) -> list[dict]:
    return [{key: box[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.8} for box in s.annotations]


def flawed(s) -> list[dict]:
    """One missed in 1.png; in 3.png a false red one, a green one found as blue, and one missed; an unsure false one."""
    found = perfect(s)
    false = {"image_id": 3, "category_id": 1, "bbox": [70, 40, 10, 10], "score": 0.9}
    unsure = {"image_id": 4, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.1}
    found[4]["category_id"] = 3
    return [found[0], *found[2:5], *found[6:], false, unsure]


def make_run(tmp_path, s, found, name="mine", metrics=METRICS, config=None) -> Path:
    """A folder as a training leaves it, whose test set is registered."""
    cfg = config or get_cfg()
    if config is None:
        add_deqdet_config(cfg)
    cfg.MODEL.DEQDET.NUM_CLASSES = 3
    cfg.DATASETS.REGISTER = [[name, str(s.json_file), str(s.image_root)]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), (name,)
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    prepare_datasets(cfg, eval_only=True)
    folder = tmp_path / "out"
    (folder / "inference").mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    if found is not None:
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    if metrics:
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return folder


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the tables by the first one."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_the_page_tells_ap_and_mistakes_of_each_class(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, flawed(small_set))
    (folder / "model_final.safetensors").touch()
    page = write_training_report(folder, ["mine"])
    assert page == folder / "report.md"
    text = page.read_text()
    # AP, boxes, found, missed, as another class, false detections. All but the unsure one count at 0.80 and below it.
    table = rows(text)
    assert table["red"] == ["70.5", "3", "3", "0", "0", "1"]
    assert table["green"] == ["40.0", "3", "1", "1", "1", "0"]
    assert table["blue"] == ["73.2", "2", "1", "1", "0", "0"]
    assert "after 40 iterations" in text and table["AP"] == ["AP50"] and table["61.2"] == ["80.0"]
    assert "a score of at least 0.80" in text and "`threshold=0.80` gives the best F1" in text
    assert "After 40 iterations the loss is 3.500" in text
    worst = re.findall(r"- `(.*)`: (.*)", text)
    assert [(Path(file).name, words) for file, words in worst] == [
        ("3.png", "1 missed, 1 false, 1 of another class"), ("1.png", "1 missed")
    ]  # fmt: skip
    code = re.search(r"```python\n(.*)\n```", text, re.DOTALL)[1].splitlines()
    assert code == ["from deqdet import Predictor",
                    f'predictor = Predictor.from_file("{(folder / "model_final.safetensors").resolve()}")',
                    'found = predictor("image.jpg")']  # fmt: skip


def test_the_sheet_shows_the_worst_images_in_the_colours_of_the_mistakes(tmp_path, small_set):
    """Two pairs side by side: grey images of 96 x 64 pixels are drawn 5 times as large."""
    for index in range(4):
        Image.new("L", (96, 64), 128).save(small_set.picture(index))
    folder = make_run(tmp_path, small_set, flawed(small_set))
    write_training_report(folder, ["mine"])
    sheet = np.asarray(Image.open(folder / "worst.jpg")).astype(int)
    assert sheet.shape == (60 + 24 + 320, 2 * (2 * 480 + 8) + 16, 3)

    def drawn(x, colour):
        """Whether more than a few pixels of the half that begins at x, in rows below the caption, are of a colour."""
        half = sheet[84:404, x : x + 480]
        return (np.abs(half - COLOURS[colour]).max(axis=2) < 40).sum() > 50

    of_three, of_one = 0, 2 * 480 + 24
    assert [drawn(of_three, outcome) for outcome in (Outcome.ALONE, Outcome.CONFUSED)] == [True, True]
    assert [drawn(of_three + 488, outcome) for outcome in (Outcome.ALONE, Outcome.CONFUSED)] == [True, True]
    assert [drawn(of_one, outcome) for outcome in (Outcome.ALONE, Outcome.CONFUSED)] == [True, False]
    assert [drawn(of_one + 488, outcome) for outcome in (Outcome.ALONE, Outcome.CONFUSED)] == [False, False]


def test_a_given_threshold_counts_what_is_below_the_best_one(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, flawed(small_set))
    text = write_training_report(folder, ["mine"], threshold=0.05).read_text()
    assert rows(text)["red"][-1] == "2" and "4.png`: 1 false" in text and "best F1" not in text
    text = write_training_report(folder, ["mine"], threshold=0.85, num_images=1).read_text()
    assert rows(text)["red"] == ["70.5", "3", "0", "3", "0", "1"]
    assert len(re.findall(r"- `.*`: ", text)) == 1


def test_given_results_take_the_place_of_metrics_json(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, flawed(small_set))
    text = write_training_report(folder, ["mine"], results={"mine": {"AP": 12.5, "AP-red": 1.5}}).read_text()
    assert rows(text)["red"][0] == "1.5" and rows(text)["green"][0] == "-" and "12.5" in text


def test_averaged_weights_are_reported_where_there_are_some(tmp_path, small_set):
    """Since the model file holds them: their AP, and the mistakes in their detections, which are none here."""
    average = {f"ema/{key}": value + 10 for key, value in AP.items()}
    folder = make_run(tmp_path, small_set, flawed(small_set), metrics=[*METRICS[:2], {**METRICS[2], **average}])
    (folder / "ema" / "inference").mkdir(parents=True)
    (folder / "ema" / "inference" / "coco_instances_results.json").write_text(json.dumps(perfect(small_set)))
    text = write_training_report(folder, ["mine"]).read_text()
    assert rows(text)["green"] == ["50.0", "3", "3", "0", "0", "0"]
    assert "AP of the averaged weights in the last evaluation, after 40 iterations" in text
    with (folder / "metrics.json").open("a") as file:  # resumed without the average
        file.write(json.dumps({**METRICS[2], "iteration": 60}) + "\n")
    text = write_training_report(folder, ["mine"]).read_text()
    assert rows(text)["green"] == ["40.0", "3", "1", "1", "1", "0"] and "averaged weights" not in text


def test_a_perfect_detector_has_no_sheet_and_removes_an_older_one(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, perfect(small_set))
    (folder / "worst.jpg").touch()
    text = write_training_report(folder, ["mine"]).read_text()
    assert "No image has a mistake" in text and not (folder / "worst.jpg").exists()
    assert rows(text)["blue"] == ["73.2", "2", "2", "0", "0", "0"]


def test_without_detections_no_threshold_is_the_best(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, [])
    (folder / "model_final.safetensors").touch()
    text = write_training_report(folder, ["mine"]).read_text()
    assert "There are no detections, so every box in 4 images is missed:" in text
    assert rows(text)["red"] == ["70.5", "3", "0", "3", "0", "0"]
    assert "0.50" not in text and "best F1" not in text


def test_where_no_detection_is_right_no_threshold_is_the_best(tmp_path, small_set):
    """They are counted at 0.5, which is not called a choice."""
    false = {"image_id": 3, "category_id": 1, "bbox": [70, 40, 10, 10], "score": 0.9}
    folder = make_run(tmp_path, small_set, [false, false | {"score": 0.4}])
    (folder / "model_final.safetensors").touch()
    text = write_training_report(folder, ["mine"]).read_text()
    assert "a score of at least 0.50:" in text and "best F1" not in text
    assert rows(text)["red"] == ["70.5", "3", "0", "3", "0", "1"]


def test_parts_whose_files_are_missing_are_left_out(tmp_path, small_set):
    small_set.data["annotations"] = []
    small_set.save()
    folder = make_run(tmp_path, small_set, [], metrics=())
    text = write_training_report(folder, ["mine"]).read_text()
    assert "There is no AP" in text and not rows(text)
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "inference", "report.md"]
    (folder / "inference" / "coco_instances_results.json").unlink()
    (folder / "metrics.json").write_text(json.dumps(METRICS[0]) + "\n" + json.dumps(METRICS[2]) + "\n")
    assert rows(write_training_report(folder, ["mine"]).read_text())["red"] == ["70.5"]  # no table of mistakes
    assert (folder / "curves.png").is_file()


def test_last_results_of_one_set_and_of_several():
    lines = [{"iteration": 5, "bbox/AP": 1.0}, {"iteration": 9, "bbox/AP": 2.0, "lr": 1}, {"iteration": 10, "lr": 1}]
    assert find_last_results(lines, "a", several=False) == ({"AP": 2.0}, 10)
    lines = [{"iteration": 9, "a/bbox/AP": 2.0, "ab/bbox/AP": 3.0}]
    assert find_last_results(lines, "a", several=True) == ({"AP": 2.0}, 10)
    assert find_last_results(lines, "a", several=False) == ({}, None)
    lines[-1]["ema/a/bbox/AP"] = 3.0
    assert find_last_results(lines, "a", several=True, averaged=True)[0] == {"AP": 3.0}


@pytest.mark.parametrize("evaluation", [
    {"iteration": 199, "total_loss": 3.5, **AP},  # within a training that goes on
    {"iteration": 200, **AP},  # after its last iteration, which has the number 199
])  # fmt: skip
def test_an_evaluation_after_200_iterations(tmp_path, small_set, evaluation):
    lines = [{"iteration": 179, "total_loss": 4.0}, {"iteration": 199, "total_loss": 3.5}, evaluation]
    folder = make_run(tmp_path, small_set, flawed(small_set), metrics=lines)
    assert "in the last evaluation, after 200 iterations:" in write_training_report(folder, ["mine"]).read_text()


def test_names_that_are_not_utf_8(tmp_path, small_set):
    """Of an image, and of the folder of the training."""
    name = os.fsdecode(b"3\xff.png")
    small_set.picture(2).rename(small_set.image_root / name)
    small_set.images[2]["file_name"] = name
    small_set.save()
    folder = make_run(tmp_path / os.fsdecode(b"run\xff"), small_set, flawed(small_set))
    (folder / "model_final.safetensors").touch()
    text = write_training_report(folder, ["mine"]).read_text()
    assert r"/3\udcff.png`: 1 missed, 1 false, 1 of another class" in text
    assert r"/run\udcff/out/model_final.safetensors` holds weights" in text


def test_the_tool_writes_the_page_of_any_run(tmp_path, small_set, small_cfg, capsys, monkeypatch):
    folder = make_run(tmp_path, small_set, flawed(small_set), config=small_cfg())
    monkeypatch.chdir(tmp_path / "set")
    report.main(["--run", str(folder), "--page-only"])
    assert capsys.readouterr().out == f"Report: {folder}/report.md\n"
    assert rows((folder / "report.md").read_text())["green"] == ["40.0", "3", "1", "1", "1", "0"]
    for words, message in [
        (["--run", "nowhere"], "--run nowhere: nowhere/config.yaml does not exist: give the OUTPUT_DIR of a training"),
        (["--run", str(folder), "--config-file", "x"], "--run uses the config.yaml in its folder"),
    ]:
        with pytest.raises(SystemExit, match=message):
            report.main(words)


class TestDrawResults:
    """deqdet-check-data --draw-results."""

    def test_the_worst_images_are_told_and_drawn(self, tmp_path, small_set, capsys):
        (tmp_path / "found.json").write_text(json.dumps(flawed(small_set)))
        words = [str(small_set.json_file), str(small_set.image_root)]
        picture = tmp_path / "worst.png"
        check_data.main([*words, "--draw-results", str(tmp_path / "found.json"), str(picture), "--images", "1"])
        printed = capsys.readouterr().out
        assert "2 of 4 images have mistakes at a score of 0.80, that of the best F1" in printed
        assert "3.png: 1 missed, 1 false, 1 of another class" in printed and "1.png: 1 missed" not in printed
        assert cv2.imread(str(picture)).shape == (404, 968, 3)
        check_data.main([*words, "--draw-results", str(tmp_path / "found.json"), str(picture), "--threshold", "0.05"])
        assert "3 of 4 images have mistakes at a score of 0.05\n" in capsys.readouterr().out
        (tmp_path / "found.json").write_text("[]")
        check_data.main([*words, "--draw-results", str(tmp_path / "found.json"), str(picture)])
        assert "4 of 4 images have mistakes since there are no detections\n" in capsys.readouterr().out

    @pytest.mark.parametrize("words, message", [
        (["--draw-results", "nowhere.json", "x.png"], "nowhere.json cannot be read"),
        (["--draw-results", "found.json", "x.bad"], "x.bad is no name for an image: let it end in .jpg or .png"),
        (["--draw-results", "found.json", "x.png", "--threshold", "2"], "--threshold must lie between 0 and 1, got 2"),
        (["--images", "0"], "--images must be at least 1, got 0"),
        (["--draw-augmented", "x.bad"], "x.bad is no name for an image: let it end in .jpg or .png"),
    ])  # fmt: skip
    def test_errors_are_one_line(self, tmp_path, small_set, monkeypatch, words, message):
        monkeypatch.chdir(tmp_path)
        Path("found.json").write_text(json.dumps(flawed(small_set)))
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            check_data.main([str(small_set.json_file), str(small_set.image_root), *words])


def test_a_damaged_line_of_metrics_json_is_left_out(tmp_path, small_set):
    folder = make_run(tmp_path, small_set, flawed(small_set))
    (folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 7.0}\n{"itera')  # as a kill leaves it
    assert "After 2 iterations the loss is 7.000" in write_training_report(folder, ["mine"]).read_text()
