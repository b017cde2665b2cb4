"""deqdet-check-data --data FOLDER: what a training with the folder would find, without the training."""

import argparse
import re
import tempfile
from pathlib import Path

import pytest

from detectron2.data import DatasetCatalog

from deqdet.engine.own_data import use_own_data
from deqdet.tools import check_data

from helpers.folders import PICTURES, voc_xml, write, write_coco, write_voc, write_yolo


@pytest.fixture(autouse=True)
def here(own_catalogs, tmp_path, monkeypatch):
    """The working directory and a folder for temporary files, both of the test's own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def coco(folder: Path) -> None:
    write_coco(folder, "all.json", "images")


def yolo(folder: Path) -> None:
    write_yolo(folder)
    write(folder / "data.yaml", "names: [cat, dog, emu]\n")
    (folder / "labels/train/e.txt").unlink()  # which is worth a remark


def prepare_training(folder: str) -> str:
    """Prepare a training with the folder, and return its config file."""
    args = argparse.Namespace(
        data=folder, data_format="", size=None, val_fraction=None, config_file="", model="", plugin=[], opts=[],
        eval_only=False, resume=False, overwrite=False, num_gpus=1, num_machines=1, machine_rank=0,
    )  # fmt: skip
    use_own_data(args)
    return args.config_file


@pytest.mark.parametrize("make", [coco, yolo, write_voc])
def test_the_same_findings_as_before_a_training_and_nothing_left_behind(make, tmp_path, capsys):
    make(tmp_path / "animals")
    before = set(tmp_path.rglob("*"))
    check_data.main(["--data", "../animals"])
    said = capsys.readouterr().out
    left = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")}
    assert left == before and "animals-train" not in DatasetCatalog
    said = re.sub(r" \(the model has \d+ queries\)", "", said)
    prepare_training("../animals")
    lines = capsys.readouterr().out.partition("== settings")[0].splitlines()
    assert [line for line in said.splitlines() if not line.startswith("(cached")] == lines
    assert any("the images are divided by SEED 1" in line for line in lines)
    assert ("  train: 1 of 5 images have no label file, and therefore no boxes" in lines) == (make is yolo)


def test_pictures_are_those_of_the_training(tmp_path, capsys):
    write_voc(tmp_path / "animals")
    pictures = ["--contact-sheet", "sheet.png", "--draw-augmented", "ours.png", "--images", "3"]
    check_data.main(["--data", "../animals", *pictures])
    assert sorted(path.name for path in Path().iterdir()) == [
        "ours.png", "sheet-animals-train.png", "sheet-animals-val.png"
    ]  # fmt: skip
    file = prepare_training("../animals")
    check_data.main(["--config-file", file, "--draw-augmented", "theirs.png", "--images", "3"])
    assert Path("ours.png").read_bytes() == Path("theirs.png").read_bytes()


def test_a_folder_that_cannot_be_used(tmp_path):
    write(write_voc(tmp_path / "animals") / "annotations" / "b.xml", voc_xml("b", [("emu", (200, 4, 290, 24))]))
    with pytest.raises(SystemExit, match="^error: /.*/animals/annotations: .* lies outside its image") as end:
        check_data.main(["--data", "../animals"])
    assert str(tmp_path / "temporary") not in str(end.value) and not list((tmp_path / "temporary").iterdir())
    check_data.main(["--data", "../animals", "DATASETS.SKIP_BROKEN", "True"])


def test_the_format_can_be_chosen(tmp_path, capsys):
    write_voc(write_coco(tmp_path / "animals", "all.json", "images", {name: PICTURES[name] for name in "ab"}))
    with pytest.raises(SystemExit, match="ambiguous: it looks like coco .* and voc .*: choose by --data-format"):
        check_data.main(["--data", "../animals"])
    check_data.main(["--data", "../animals", "--data-format", "voc"])
    assert "animals: VOC format" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["a.json", "images", "--data", "../animals"], "--data FOLDER brings its own annotation files: omit a.json images"),
    (["--data", "../animals", "--config-file", "deqdet_shapes"], "--data chooses a config by --size: omit"),
    (["--data", "../animals", "DATASETS.TRAIN", "('a',)"], "--data sets DATASETS.TRAIN"),
    (["--data-format", "voc"], "--data-format needs --data FOLDER, which is missing"),
])  # fmt: skip
def test_command_lines_that_cannot_be(words, message):
    with pytest.raises(SystemExit, match=message):
        check_data.main(words)
