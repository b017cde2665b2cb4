"""Damaged data sets: each is refused with one line, repaired or used, and what is used is used rightly."""

import json
import logging
import re
import signal

import numpy as np
import pytest
import torch

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from deqdet import add_deqdet_config
from deqdet.data import build_coco_evaluator, build_mapper, check_datasets, prepare_datasets
from deqdet.errors import UserError

from helpers.damaged_sets import BEGIN, DAMAGES, END, LEFT_OUT, REFUSED, USED, SmallSet, format_table, make_set
from helpers.paths import ROOT


@pytest.fixture(autouse=True)
def apart(own_catalogs):
    """Catalogs as before, a cache of the test's own, and an end to whatever hangs."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def make_cfg(train: SmallSet, test: SmallSet, *options: str):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list(["MODEL.DEQDET.NUM_CLASSES", 3, "INPUT.FORMAT", "RGB", *options])
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (64,), "none"
    cfg.DATASETS.REGISTER = [["t", str(train.json_file), str(train.image_root)],
                             ["v", str(test.json_file), str(test.image_root)]]  # fmt: skip
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("t",), ("v",)
    return cfg


def make_pair(tmp_path, row):
    """A damaged set and a sound one."""
    damaged, sound = make_set(tmp_path / "damaged", row.names), make_set(tmp_path / "sound", row.names, seed=1)
    row.change(damaged)
    damaged.save()
    if "DATASETS.BOX_FORMAT" in row.options:  # it holds for both
        row.change(sound)
    sound.save()
    return damaged, sound


def prepare(cfg, caplog) -> str:
    """The warnings of a check."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="deqdet.data.registration"):
        prepare_datasets(cfg)
        check_datasets(cfg)
    return caplog.text


def box_rows(pairs, names) -> list:
    """Boxes as sortable rows: class, and corners to the nearest pixel of a hundredth."""
    return sorted((names.index(name), *np.round([x, y, x + w, y + h], 2).tolist()) for name, (x, y, w, h) in pairs)


def assert_trained_on(name, truth, cfg):
    """The boxes that the training's mapper gives out are those of the truth, each in its class."""
    names, mapper = MetadataCatalog.get(name).thing_classes, build_mapper(cfg, is_train=True)
    records = DatasetCatalog.get(name)
    assert {file_name(record) for record in records} == set(truth)
    for record in records:
        instances = mapper(record)["instances"]
        boxes = instances.gt_boxes.tensor.numpy() * (record["height"] / instances.image_size[0])
        got = sorted((int(c), *np.round(box.astype(float), 2).tolist())
                     for c, box in zip(instances.gt_classes, boxes, strict=True))  # fmt: skip
        np.testing.assert_allclose(got, box_rows(truth[file_name(record)], names), atol=0.02)


def file_name(record):
    return record["file_name"].partition("/images/")[2]


def evaluate_perfect(name, truth, folder):
    """The results of a detector that finds what is true, in the order of the classes that the training has."""
    names = MetadataCatalog.get("t").thing_classes
    evaluator = build_coco_evaluator(name, str(folder), apart=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        found = truth.get(file_name(record), [])
        boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h) in found], dtype=torch.float32).reshape(-1, 4)
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes, instances.scores = Boxes(boxes), torch.full((len(found),), 0.9)
        instances.pred_classes = torch.tensor([names.index(label) for label, _ in found], dtype=torch.long)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def assert_perfect(name, s: SmallSet, folder):
    """AP 100 in every class, and a file of results under the set's own ids."""
    results = evaluate_perfect(name, s.truth, folder)["bbox"]
    assert results["AP"] == pytest.approx(100.0), results
    per_class = [value for key, value in results.items() if key.startswith("AP-")]
    assert len(per_class) == 3 and np.nanmin(per_class) == pytest.approx(100.0)
    written = json.loads((folder / "coco_instances_results.json").read_text())
    own = {image["id"]: image["file_name"] for image in s.images}
    labels = {category["id"]: str(category["name"]) for category in s.data["categories"]}
    got = {(own[row["image_id"]], labels[row["category_id"]]) for row in written}
    assert got == {(file, label) for file, found in s.truth.items() for label, _ in found}


ROLES = [
    *(pytest.param(row, "train", id=f"{row.title}, trained on") for row in DAMAGES if row.as_training),
    *(pytest.param(row, "test", id=f"{row.title}, evaluated") for row in DAMAGES if row.as_test),
]


@pytest.mark.parametrize("row, role", ROLES)
def test_outcome(row, role, tmp_path, caplog):
    damaged, sound = make_pair(tmp_path, row)
    pair = (damaged, sound) if role == "train" else (sound, damaged)
    cfg = make_cfg(*pair, *row.options)
    if row.outcome in (REFUSED, LEFT_OUT):
        with pytest.raises(UserError) as error:
            prepare(cfg, caplog)
        assert row.words in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).startswith("DATASETS.REGISTER[")
        assert ("SKIP_BROKEN" in str(error.value)) == (row.outcome == LEFT_OUT)
        cfg.DATASETS.SKIP_BROKEN = True
        if row.outcome == REFUSED:
            with pytest.raises(UserError):
                prepare(cfg, caplog)
            return
    said = prepare(cfg, caplog)
    assert row.words in re.sub(r" \(and \d+ more: .*\)", "", said)
    if row.outcome == USED and not row.words and role == "test":
        assert not said
    assert_trained_on("t", pair[0].truth, cfg)
    if damaged.truth:
        assert_perfect("v", pair[1], tmp_path / role)
    else:
        assert evaluate_perfect("v", {}, tmp_path / role) == {}
        assert (tmp_path / role / "coco_instances_results.json").read_text() == "[]"


def test_there_are_enough_damages():
    assert len(DAMAGES) >= 40 and len({row.title for row in DAMAGES}) == len(DAMAGES)


def test_the_table_in_the_documentation_is_this_one():
    text = (ROOT / "docs" / "data.md").read_text()
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == format_table()
