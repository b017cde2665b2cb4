"""Registering data sets: what is accepted, what is refused with which message, and the names of the shapes sets."""

import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from deqdet import add_deqdet_config
from deqdet.data import (
    ShapesConfig,
    build_mapper,
    check_datasets,
    prepare_datasets,
    register_shapes,
)
from deqdet.errors import UserError

pytestmark = pytest.mark.usefixtures("own_catalogs")

TINY = {
    "info": {},
    "licenses": [],
    "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
    "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [2.0, 3.0, 10.0, 8.0], "area": 80.0, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [9.0, 9.0, 0.0, 0.0], "area": 0.0, "iscrowd": 0},
    ],
}


@pytest.fixture
def tiny(tmp_path) -> tuple[dict, Path, Path]:
    """A set of one image: the contents of its file, to be changed and written by `write`; its file and image root."""
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "images" / "a.png")
    return copy.deepcopy(TINY), tmp_path / "tiny.json", tmp_path / "images"


def make_cfg(*entries, **datasets):
    """A config that registers the entries; by default, it trains on all of them."""
    datasets = datasets or {"train": tuple(name for name, *_ in entries)}
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.DATASETS.REGISTER = [list(entry) for entry in entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = datasets.get("train", ()), datasets.get("test", ())
    return cfg


def register(tiny, name="tiny", **datasets):
    whole, json_file, image_root = tiny
    json_file.write_text(json.dumps(whole))
    cfg = make_cfg((name, str(json_file), str(image_root)), **datasets)
    prepare_datasets(cfg)
    return cfg


def test_registered_set_loads_and_tells_its_classes(tiny):
    del tiny[0]["annotations"][1]  # nothing is to be repaired
    register(tiny)
    meta = MetadataCatalog.get("tiny")
    assert (meta.evaluator_type, meta.json_file, meta.image_root) == ("coco", str(tiny[1]), str(tiny[2]))
    assert meta.thing_classes == ["dog", "cat"]  # by id, before anything is loaded
    (record,) = DatasetCatalog.get("tiny")
    assert record["file_name"] == str(tiny[2] / "a.png")
    assert [annotation["category_id"] for annotation in record["annotations"]] == [1]


def test_yaml_and_command_line_give_the_same(tiny, tmp_path):
    tiny[1].write_text(json.dumps(tiny[0]))
    (tmp_path / "a.yaml").write_text(f"DATASETS:\n  REGISTER:\n    - [tiny, {tiny[1]}, {tiny[2]}]\n")
    from_yaml, from_command_line = make_cfg(), make_cfg()
    from_yaml.merge_from_file(str(tmp_path / "a.yaml"))
    from_command_line.merge_from_list(["DATASETS.REGISTER", f"[['tiny','{tiny[1]}','{tiny[2]}']]"])
    assert from_yaml.DATASETS.REGISTER == from_command_line.DATASETS.REGISTER
    from_yaml.DATASETS.TRAIN = ("tiny",)
    prepare_datasets(from_yaml)
    assert "tiny" in DatasetCatalog


def test_registering_twice_is_fine_but_not_with_other_paths(tiny, tmp_path):
    register(tiny)
    register(tiny)
    other = tiny[0], tmp_path / "other.json", tiny[2]
    with pytest.raises(UserError, match=r"DATASETS.REGISTER\[0\] \('tiny'\): this name is taken .*tiny.json"):
        register(other)


@pytest.mark.parametrize("name", ["coco_2017_val", "shapes_val"])
def test_names_of_other_sets_are_taken(tiny, name):
    with pytest.raises(UserError, match=rf"REGISTER\[0\] \('{name}'\): this name is taken .* choose another name"):
        register(tiny, name=name)


@pytest.mark.parametrize("entries", [["tiny", "a.json", "images"], [["a", "b"]], [["a", "b", 3]], [["a", "", "c"]]])
def test_entry_must_be_three_strings(entries):
    cfg = make_cfg()
    cfg.DATASETS.REGISTER = entries
    with pytest.raises(UserError, match=r"DATASETS.REGISTER\[0\] is .*: it must be three strings, as in \[\["):
        prepare_datasets(cfg)


def test_missing_file_and_directories(tiny, tmp_path):
    whole, json_file, image_root = tiny
    where = rf"DATASETS.REGISTER\[0\] \('tiny'\): {json_file}"
    with pytest.raises(UserError, match=where + r" cannot be read .* relative to " + os.getcwd()):
        prepare_datasets(make_cfg(("tiny", str(json_file), str(image_root))))
    with pytest.raises(UserError, match=where + rf": its image root {tmp_path}/nowhere is not a directory"):
        register((whole, json_file, tmp_path / "nowhere"))
    with pytest.raises(UserError, match=where + rf": none of its 1 images exists, .* {tmp_path}/a.png"):
        register((whole, json_file, tmp_path))
    assert "tiny" not in DatasetCatalog


def test_file_of_a_set_that_is_not_used_must_be_there(tiny):
    unused = ("unused", "gone.json", str(tiny[2]))
    register(tiny)
    cfg = make_cfg(("tiny", str(tiny[1]), str(tiny[2])), unused, test=("tiny",))
    with pytest.raises(UserError, match=r"REGISTER\[1\] \('unused'\): gone.json cannot be read"):
        prepare_datasets(cfg)
    cfg.DATASETS.TRAIN = ("unused",)
    prepare_datasets(cfg, eval_only=True)
    assert "unused" not in DatasetCatalog


@pytest.mark.parametrize("text, words", [("{", "is not valid JSON"), ("[]", 'has no list "images"')])
def test_file_must_be_a_json_object(tiny, text, words):
    tiny[1].write_text(text)
    with pytest.raises(UserError, match=rf"REGISTER\[0\] \('tiny'\): {tiny[1]} {words}"):
        prepare_datasets(make_cfg(("tiny", str(tiny[1]), str(tiny[2]))))


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_file_must_have_three_lists(tiny, key):
    del tiny[0][key]
    with pytest.raises(UserError, match=f'{tiny[1]} has no list "{key}"'):
        register(tiny)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"bbox": [1, 2, 3]}, r"annotation 1 of a.png has bbox \[1, 2, 3\], which must be four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, r"annotation 1 of a.png has bbox \[1, 2, 3, nan\]"),
        ({"bbox": [1, 2, 3, "four"]}, "annotation 1 of a.png has bbox"),
        ({"bbox": None}, "annotation 1 of a.png has bbox None"),
        ({"image_id": 8}, 'annotation 1 has image_id 8, which "images" lacks'),
        ({"category_id": 1}, 'annotation 1 of a.png has category_id 1, which "categories" lacks'),
        ({"bbox": [2, 3, -1, 8]}, "annotation 1 of a.png has bbox .* whose width or height is negative"),
    ],
)
def test_faulty_annotation_is_named(tiny, change, words):
    tiny[0]["annotations"][0] |= change
    with pytest.raises(UserError, match=rf"{tiny[1]}: {words}"):
        register(tiny)


@pytest.mark.parametrize("list_name, key", [("images", "file_name"), ("categories", "name"), ("annotations", "bbox")])
def test_missing_field_is_named(tiny, list_name, key):
    del tiny[0][list_name][0][key]
    kind, number = {"images": ("image", 7), "categories": ("category", 5), "annotations": ("annotation", 1)}[list_name]
    with pytest.raises(UserError, match=f"{tiny[1]}: {kind} {number}.* has no {key}"):
        register(tiny)


def test_an_area_that_is_missing_is_the_boxs(tiny):
    del tiny[0]["annotations"][0]["area"]
    register(tiny, test=("tiny",))
    copy = json.loads(Path(MetadataCatalog.get("tiny").json_file).read_text())
    assert [annotation["area"] for annotation in copy["annotations"]] == [80.0]


def test_box_without_area_is_reported_and_left_out(tiny, caplog):
    with caplog.at_level(logging.WARNING, logger="deqdet.data.registration"):
        cfg = register(tiny)
    assert "annotation 2 of a.png has bbox [9.0, 9.0, 0.0, 0.0], which has no area: it is left out" in caplog.text
    (record,) = DatasetCatalog.get("tiny")
    assert build_mapper(cfg, is_train=True)(record)["instances"].gt_classes.tolist() == [1]  # only the cat


def test_box_without_area_is_no_object_to_find(tiny):
    """The one box with an area found exactly is all there is to find."""
    register(tiny)
    evaluator = COCOEvaluator("tiny", tasks=("bbox",), distributed=False)
    evaluator.reset()
    result = {"image_id": 7, "category_id": 1, "score": 0.9, "bbox": tiny[0]["annotations"][0]["bbox"]}
    evaluator._predictions.append({"image_id": 7, "instances": [result]})
    results = evaluator.evaluate()["bbox"]
    assert (results["AP"], results["AP-cat"]) == (pytest.approx(100.0), pytest.approx(100.0))
    assert np.isnan(results["AP-dog"])


def test_num_classes(tiny):
    cfg = register(tiny, train=("tiny",), test=("tiny",))
    cfg.MODEL.DEQDET.NUM_CLASSES = 2
    check_datasets(cfg)
    cfg.MODEL.DEQDET.NUM_CLASSES = 3
    words = r"'tiny' of DATASETS.TRAIN has 2 categories \(dog, cat\), but the model has 3"
    with pytest.raises(UserError, match=words + ": set MODEL.DEQDET.NUM_CLASSES to 2"):
        check_datasets(cfg)
    with pytest.raises(UserError, match="'tiny' of DATASETS.TEST has 2 categories"):
        check_datasets(cfg, eval_only=True)


def test_a_builtin_set_that_is_not_there_is_an_error():
    with pytest.raises(UserError, match="'coco_2017_val' of DATASETS.TEST is not there.*DETECTRON2_DATASETS"):
        check_datasets(make_cfg(test=("coco_2017_val",)), eval_only=True)


@pytest.mark.parametrize(("eval_only", "key"), [(False, "TRAIN"), (True, "TEST")])
def test_no_data_set_at_all_is_an_error(eval_only, key):
    with pytest.raises(UserError, match=f"DATASETS.{key} is empty"):
        check_datasets(make_cfg(), eval_only=eval_only)


def test_unregistered_name_is_an_error():
    with pytest.raises(UserError, match="'unheard_of' of DATASETS.TRAIN is not registered"):
        check_datasets(make_cfg(train=("unheard_of",)))
    with pytest.raises(UserError) as error:
        check_datasets(make_cfg(test=("animals-val",)), eval_only=True)
    assert str(error.value) == (
        "'animals-val' of DATASETS.TEST is not registered: if deqdet-train --data has made it, give --config-file "
        "OUTPUT_DIR/data/config.yaml of that training, which registers it (with MODEL.WEIGHTS FILE in place of --model "
        "FILE); else add it to DATASETS.REGISTER, as in [[name, json file, image root], ...]"
    )


def test_prepared_shapes_can_be_evaluated_before_they_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = make_cfg(train=("shapes_seed5_3",), test=("shapes_seed6_2",))
    cfg.MODEL.DEQDET.NUM_CLASSES = 8
    prepare_datasets(cfg, eval_only=True)
    assert sorted(path.name for path in (tmp_path / "shapes").iterdir() if path.is_dir()) == ["shapes_seed6_2"]
    prepare_datasets(cfg)
    check_datasets(cfg)
    COCOEvaluator("shapes_seed6_2", tasks=("bbox",), distributed=False)
    records = DatasetCatalog.get("shapes_seed5_3")
    assert len(records) == 3
    assert all(Path(record["file_name"]).parent == tmp_path / "shapes/shapes_seed5_3/images" for record in records)


def test_names_of_freely_turned_shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    prepare_datasets(make_cfg(train=("shapes_free_seed7_2", "shapes_seed7_2")))
    free, upright = (MetadataCatalog.get(name).shapes_config for name in ("shapes_free_seed7_2", "shapes_seed7_2"))
    assert (free.max_rotation, upright.max_rotation) == (180.0, 10.0)
    assert (free.seed, free.num_images) == (7, 2)


def test_shapes_are_drawn_when_loaded(tmp_path):
    config = ShapesConfig(num_images=2, seed=9)
    register_shapes("my_shapes", config, root=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert len(DatasetCatalog.get("my_shapes")) == 2
    register_shapes("my_shapes", config, root=tmp_path / "mine")
    with pytest.raises(ValueError, match="'my_shapes' is taken"):
        register_shapes("my_shapes", ShapesConfig(num_images=3, seed=9), root=tmp_path / "mine")


@pytest.mark.parametrize("name, num_images, seed", [("shapes_train", 6000, 1), ("shapes_val", 400, 2)])
def test_builtin_shapes(name, num_images, seed):
    meta = MetadataCatalog.get(name)
    assert name in DatasetCatalog and len(meta.thing_classes) == 8 and meta.evaluator_type == "coco"
    assert (meta.shapes_config.num_images, meta.shapes_config.seed) == (num_images, seed)
    assert meta.json_file.endswith(f"/shapes/{name}/annotations.json")
