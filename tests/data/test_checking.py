"""The check of data sets: headers, formats of boxes, classes by name, the cache, the report and the tool."""

import json
import logging
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from deqdet import add_deqdet_config
from deqdet.checkpoints import write_model_file
from deqdet.data import (
    CheckOptions,
    annotations,
    build_coco_evaluator,
    build_train_loader,
    cache,
    check_coco_file,
    checking,
    coco_file,
    find_class_names,
    image_headers,
    prepare_datasets,
)
from deqdet.data.contact_sheet import draw_contact_sheet, draw_inputs, find_first_inputs
from deqdet.engine import check_run
from deqdet.errors import UserError
from deqdet.tools import check_data

from helpers.damaged_sets import HEIGHT, WIDTH, make_set

pytestmark = pytest.mark.usefixtures("own_catalogs")


@pytest.fixture
def reads(monkeypatch):
    """The names of the images whose headers are read."""
    names, read = [], image_headers.read_header

    def note(path):
        names.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(image_headers, "read_header", note)
    return names


def saved(folder, names=("red", "green", "blue"), reorder=False):
    """A sound set, with `reorder` under ids that put the classes in the order of the alphabet."""
    s = make_set(folder, names)
    if reorder:
        new = {name: i + 1 for i, name in enumerate(sorted(names))}
        old = {category["id"]: category["name"] for category in s.data["categories"]}
        for annotation in s.annotations:
            annotation["category_id"] = new[old[annotation["category_id"]]]
        s.data["categories"] = [{"id": number, "name": name} for name, number in new.items()]
    s.save()
    return s


def check(s, options=None, **more):
    return check_coco_file("mine", str(s.json_file), str(s.image_root), options or CheckOptions(), **more)


def make_cfg(sets, train=(), test=(), num_classes=3):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.MODEL.DEQDET.NUM_CLASSES = num_classes
    cfg.DATASETS.REGISTER = [[name, str(s.json_file), str(s.image_root)] for name, s in sets.items()]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    return cfg


def labels_of(name):
    """The class names of the boxes by image, as the training sees them."""
    names = MetadataCatalog.get(name).thing_classes
    return {Path(record["file_name"]).name: [names[box["category_id"]] for box in record["annotations"]]
            for record in DatasetCatalog.get(name)}  # fmt: skip


# --- headers


@pytest.mark.parametrize("orientation, size", [(1, (30, 20)), (3, (30, 20)), (6, (20, 30)), (8, (20, 30))])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_size_is_that_of_the_upright_image(tmp_path, suffix, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"a.{suffix}")
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    header = image_headers.read_header(path)
    assert (header.width, header.height, header.problem) == (*size, "")


def test_pixels_are_decoded_only_in_doubt(tmp_path, monkeypatch):
    for name in ("a.jpg", "a.png", "a.tif", "half.jpg"):
        Image.new("RGB", (300, 200)).save(tmp_path / name)
    whole = (tmp_path / "half.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    decoded, read = [], image_headers.read_image

    def count(path):
        decoded.append(Path(path).name)
        return read(path)

    monkeypatch.setattr(image_headers, "read_image", count)
    for path in sorted(tmp_path.glob("*.*")):
        image_headers.read_header(str(path))
    assert decoded == ["a.tif", "half.jpg"]


def test_a_jpeg_with_bytes_behind_its_end_is_whole(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    for tail in (b"\0" * 1000, b"a camera's own data"):
        path = tmp_path / f"{len(tail)}.jpg"
        path.write_bytes((tmp_path / "a.jpg").read_bytes() + tail)
        assert image_headers.read_header(str(path)).problem == ""


def test_a_fifo_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    found = []
    thread = threading.Thread(
        target=lambda: found.append(image_headers.read_header(str(tmp_path / "a.png"))), daemon=True
    )
    thread.start()
    thread.join(10)
    assert found and found[0].problem.startswith("is a FIFO")


# --- boxes


EXTENT = np.array([[100.0, 80.0]])


@pytest.mark.parametrize("box_format, numbers", [
    ("xywh", [10, 20, 30, 40]),
    ("xyxy", [10, 20, 40, 60]),
    ("xywh_relative", [0.1, 0.25, 0.3, 0.5]),
    ("xyxy_relative", [0.1, 0.25, 0.4, 0.75]),
])  # fmt: skip
def test_formats_of_boxes(box_format, numbers):
    boxes = annotations.to_xywh(np.array([numbers], dtype=float), EXTENT, box_format)
    np.testing.assert_allclose(boxes, [[10, 20, 30, 40]])


def random_boxes(seed, count):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * EXTENT[0]  # (count, low and high, x and y)
    return np.concatenate([corners[:, 0], corners[:, 1] - corners[:, 0]], 1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [5, 100])
def test_random_boxes_are_taken_for_what_they_are(seed, count):
    extent, right = np.tile(EXTENT, (count, 1)), random_boxes(seed, count)
    annotations.refuse_other_formats("a.json", right, extent)
    corners = np.concatenate([right[:, :2], right[:, :2] + right[:, 2:]], 1)
    with pytest.raises(UserError, match=rf"a.json: the boxes look like two corners .* {count} of {count} lie within"):
        annotations.refuse_other_formats("a.json", corners, extent)
    with pytest.raises(UserError, match=f"none of the numbers of {count} boxes is above 1"):
        annotations.refuse_other_formats("a.json", right / np.tile(extent, 2), extent)


def test_boxes_of_a_pixel_or_of_tiny_images_are_no_fractions():
    annotations.refuse_other_formats("a.json", np.array([[0.0, 0, 1, 1], [5, 5, 1, 1]]), np.tile(EXTENT, (2, 1)))
    annotations.refuse_other_formats("a.json", np.array([[0.0, 0, 1, 1]]), np.array([[2.0, 2.0]]))


def test_a_set_whose_boxes_all_leave_the_image_a_little_is_cut_not_refused(tmp_path):
    s = make_set(tmp_path / "a")
    for annotation in s.annotations:
        annotation["bbox"] = [60, 30, 50, 20]  # corners (60, 30, 50, 20) would be no box
    s.save()
    checked = check(s)
    copy = json.loads(Path(checked.json_file).read_text())
    assert {tuple(annotation["bbox"]) for annotation in copy["annotations"]} == {(60.0, 30.0, 36.0, 20.0)}
    assert max(annotation["area"] for annotation in copy["annotations"]) <= 36 * 20


def test_ids_that_differ_only_in_type_are_not_mixed_up():
    table = {7: 0, "7": 1, "8": 2, 9: 3}
    assert [coco_file.look_up(value, table) for value in (7, "7", 8, "9", 7.0, "x", None, True)] == [
        0, 1, 2, 3, 0, None, None, None,
    ]  # fmt: skip


# --- classes


def test_two_training_sets_in_another_order_are_matched_by_name(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", reorder=True)
    prepare_datasets(make_cfg({"a": first, "b": second}, train=("a", "b")))
    assert MetadataCatalog.get("b").thing_classes == ["red", "green", "blue"]
    truth = {name: [label for label, _ in boxes] for name, boxes in first.truth.items()}
    assert labels_of("a") == labels_of("b") == truth


def test_an_evaluation_takes_the_order_of_the_training_set_that_is_there(tmp_path):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", reorder=True)
    cfg = make_cfg({"a": first, "b": second}, train=("a",), test=("b",))
    prepare_datasets(cfg, eval_only=True)
    assert MetadataCatalog.get("b").thing_classes == ["red", "green", "blue"]
    assert find_class_names(cfg) == ["red", "green", "blue"]


@pytest.mark.parametrize("reason", ["the file is gone", "another number of classes"])
def test_an_evaluation_without_the_training_set_takes_the_test_sets_order(tmp_path, reason):
    first, second = saved(tmp_path / "a", names=("x", "y", "z")), saved(tmp_path / "b", reorder=True)
    if reason == "the file is gone":
        first.json_file.unlink()
    else:
        first.data["categories"].append({"id": 9, "name": "w"})
        first.save()
    prepare_datasets(make_cfg({"a": first, "b": second}, train=("a",), test=("b",)), eval_only=True)
    assert MetadataCatalog.get("b").thing_classes == ["blue", "green", "red"]


def test_a_model_file_knows_its_classes(tmp_path):
    s = saved(tmp_path / "a", reorder=True)
    cfg = make_cfg({"a": s}, test=("a",))
    cfg.INPUT.FORMAT, cfg.MODEL.WEIGHTS = "RGB", str(tmp_path / "m.safetensors")
    write_model_file(cfg.MODEL.WEIGHTS, weights={}, cfg=cfg, class_names=["green", "red", "blue"])
    args = SimpleNamespace(eval_only=True, resume=False, num_gpus=1, num_machines=1)
    check_run(cfg, args)
    assert MetadataCatalog.get("a").thing_classes == ["green", "red", "blue"]
    assert labels_of("a")["1.png"] == ["red", "green"]
    write_model_file(cfg.MODEL.WEIGHTS, weights={}, cfg=cfg, class_names=["green", "red", "grey"])
    with pytest.raises(UserError, match="other class names than the model file: it lacks grey, and it alone has blue"):
        check_run(cfg, args)


def test_a_builtin_set_goes_through_the_check(tmp_path):
    """detectron2's COCO sets are registered with a file, a root and evaluator_type coco."""
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", reorder=True)
    DatasetCatalog.register("built_in", lambda: pytest.fail("loaded unchecked"))
    MetadataCatalog.get("built_in").set(
        json_file=str(second.json_file), image_root=str(second.image_root), evaluator_type="coco",
        thing_classes=["blue", "green", "red"],
    )  # fmt: skip
    cfg = make_cfg({"a": first}, train=("a",), test=("built_in",))
    prepare_datasets(cfg)
    assert MetadataCatalog.get("built_in").thing_classes == ["red", "green", "blue"]
    assert labels_of("built_in") == labels_of("a")
    second.picture().unlink()
    cfg.DATASETS.SKIP_BROKEN = True  # other options: checked anew
    prepare_datasets(cfg)
    assert sorted(labels_of("built_in")) == ["1.png", "3.png", "4.png"]


def test_a_set_that_a_function_loads_must_have_the_models_order(tmp_path):
    for name, classes in (("same", ["red", "green", "blue"]), ("other", ["blue", "green", "red"])):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(thing_classes=classes)
    first = saved(tmp_path / "a")
    prepare_datasets(make_cfg({"a": first}, train=("a",), test=("same",)))
    with pytest.raises(UserError, match="'other' of DATASETS.TEST has the classes of 'a' of DATASETS.TRAIN in another"):
        prepare_datasets(make_cfg({"a": first}, train=("a",), test=("other",)))


def test_the_coco_file_that_an_evaluation_makes_of_a_functions_set(tmp_path):
    """The file holds the current records, whether the file of an earlier training still exists or not."""
    records, out = [], tmp_path / "out"
    json_file = out / "made_coco_format.json"
    DatasetCatalog.register("made", lambda: records)
    MetadataCatalog.get("made").set(thing_classes=["red"])
    cfg = make_cfg({}, train=("made",), test=("made",))
    for count in (1, 2, 3):
        prepare_datasets(cfg)
        records.append({"file_name": "a.png", "image_id": count, "height": 9, "width": 9, "annotations": []})
        evaluator = build_coco_evaluator("made", str(out), apart=False)
        assert len(evaluator._coco_api.dataset["images"]) == len(json.loads(json_file.read_text())["images"]) == count
        if count == 2:
            shutil.rmtree(out)


def test_drawn_shapes_are_matched_by_name_without_a_look_at_their_images(tmp_path, monkeypatch, reads):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    checked = prepare_datasets(make_cfg({}, test=("shapes_seed3_2",)), eval_only=True)
    assert checked["shapes_seed3_2"].findings == ()
    right = labels_of("shapes_seed3_2")
    names = MetadataCatalog.get("shapes_seed3_2").thing_classes
    prepare_datasets(make_cfg({}, test=("shapes_seed3_2",)), eval_only=True, class_names=sorted(names))
    assert MetadataCatalog.get("shapes_seed3_2").thing_classes == sorted(names) != names
    assert labels_of("shapes_seed3_2") == right and reads == []


# --- the same images in two sets


def shared_images(train, test, caplog) -> list[str]:
    """The warnings of shared images when one set is trained on and another one is evaluated on."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="deqdet.data.registration"):
        checked = prepare_datasets(make_cfg({"t": train, "v": test}, train=("t",), test=("v",)))
    assert [finding.kind for finding in checked["t"].findings] == []
    lines = [finding.line() for finding in checked["v"].findings if finding.kind == "trained on"]
    assert [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()] == [
        f"DATASETS.REGISTER[1] ('v'): {test.json_file}: {line}" for line in lines
    ]
    return lines


def test_images_in_both_sets_are_told(tmp_path, reads, caplog):
    """Under other names too; an image of the same size with another middle is another one."""
    train, test = saved(tmp_path / "a"), make_set(tmp_path / "b", seed=1)
    for i in (1, 3):
        test.picture(i).write_bytes(train.picture(2 - i // 2).read_bytes())  # 2.png is the others' 3.png, 4.png 2.png
    content = bytearray(Image.new("RGB", (WIDTH, HEIGHT)).tobytes())
    for s, colour in ((train, 0), (test, 9)):
        content[len(content) // 2] = colour
        s.images[0]["file_name"] = "frame.bmp"
        Image.frombytes("RGB", (WIDTH, HEIGHT), bytes(content)).save(s.image_root / "frame.bmp")
        s.save()
    (line,) = shared_images(train, test, caplog)
    assert line == (
        f"image 2.png looks the same as {train.image_root}/3.png of 't', which is trained on (and 1 more: image "
        "4.png): the AP will be too high: leave such images out of one of the sets"
    )
    assert len(reads) == 8  # each header once, and the fingerprint with it


def test_the_same_file_in_both_sets_is_told_in_later_runs_too(tmp_path, reads, caplog):
    s = saved(tmp_path / "a")
    again = SimpleNamespace(json_file=tmp_path / "again.json", image_root=s.image_root)
    again.json_file.write_text(json.dumps({**s.data, "images": s.images[2:], "annotations": s.annotations[4:]}))
    (first,) = shared_images(s, again, caplog)
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("t", "v"):
            catalog.remove(name)
    assert shared_images(s, again, caplog) == [first] and len(reads) == 6
    assert first.startswith("image 3.png is trained on too, in 't' (and 1 more: image 4.png): the AP will be too high")


def test_the_same_test_set_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="DATASETS.TEST names 'a' twice"):
        prepare_datasets(make_cfg({"a": saved(tmp_path / "a")}, test=("a", "a")))


# --- the cache


def test_a_second_check_reads_neither_images_nor_annotations(tmp_path, reads, monkeypatch):
    s = saved(tmp_path / "a", reorder=True)
    first = check(s, class_names=["red", "green", "blue"], model="m")
    assert sorted(reads) == ["1.png", "2.png", "3.png", "4.png"] and not first.from_cache
    monkeypatch.setattr(checking, "parse", lambda *_, **__: pytest.fail("parsed again"))
    second = check(s, class_names=["red", "green", "blue"], model="m")
    assert second == replace(first, from_cache=True) and len(reads) == 4


def test_what_has_changed_is_checked_again(tmp_path, reads):
    s = saved(tmp_path / "a")
    check(s)
    del reads[:]
    s.picture().write_bytes(s.picture().read_bytes()[:200])
    with pytest.raises(UserError, match="image 2.png is damaged or truncated"):
        check(s)
    assert reads == ["2.png"]  # of the others, the headers are known
    with pytest.raises(UserError, match="image 2.png is damaged"):  # a refusal is not forgotten
        check(s)
    Image.new("RGB", (WIDTH, HEIGHT)).save(s.picture())
    assert not check(s).from_cache
    s.annotations.pop()
    s.save()
    assert check(s).report.num_boxes == 7
    s.annotations[0]["area"] = None
    s.save()
    Path(check(s).json_file).unlink()
    assert not check(s).from_cache  # the copy is written again


def test_a_remembered_result_names_the_file_that_is_asked_for(tmp_path):
    """Not another file that had these contents when they were checked, and may have others by now."""
    s = saved(tmp_path / "a")
    copy = tmp_path / "copy.json"
    copy.write_bytes(s.json_file.read_bytes())
    check(s)
    s.json_file.write_text("{}")
    second = check_coco_file("mine", str(copy), str(s.image_root), CheckOptions())
    assert second.from_cache and second.json_file == str(copy)


def test_options_are_part_of_what_is_remembered(tmp_path):
    s = saved(tmp_path / "a")
    assert check(s, CheckOptions(num_queries=2)).findings == ()
    (finding,) = check(s, CheckOptions(num_queries=1)).findings
    assert finding.count == 4 and "has 2 boxes, more than the model's 1 queries" in finding.line()


def test_place_of_the_cache(tmp_path, monkeypatch):
    assert cache.find_cache() == tmp_path / "cache" / "deqdet"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert cache.find_cache() == tmp_path / ".cache" / "deqdet"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "file"))
    assert cache.find_cache().name.startswith("deqdet-")


def test_a_damaged_cache_is_made_again(tmp_path):
    s = saved(tmp_path / "a")
    check(s)
    for file in (tmp_path / "cache" / "deqdet").glob("*.json"):
        file.write_text("{")
    assert not check(s).from_cache


def test_the_users_files_stay_as_they_are(tmp_path):
    s = saved(tmp_path / "a")
    s.annotations[0]["area"] = "text"
    s.save()
    before = {path: path.read_bytes() for path in s.folder.rglob("*") if path.is_file()}
    assert check(s).json_file != str(s.json_file)
    assert {path: path.read_bytes() for path in s.folder.rglob("*") if path.is_file()} == before


# --- the tool


def test_report_of_the_tool(tmp_path, capsys):
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b", reorder=True)
    second.picture().unlink()
    words = [str(first.json_file), str(first.image_root), str(second.json_file), str(second.image_root)]
    check_data.main([*words, "--contact-sheet", str(tmp_path / "s.png"), "DATASETS.SKIP_BROKEN", "True"])
    said = capsys.readouterr().out
    assert "images: 4, 0 of them without boxes; 0 left out" in said
    assert "images: 3, 0 of them without boxes; 1 left out" in said
    assert "boxes: 8" in said and "  red    3\n  green  3\n  blue   2\n" in said
    assert "boxes per image (the model has 100 queries): smallest 2, 5% 2, median 2, 95% 2, largest 2" in said
    assert "image width, pixels: smallest 96" in said and "8 small, 0 medium, 0 large" in said
    assert "left out: image 2.png is missing" in said and "they are matched by name" in said
    sheets = sorted(path.name for path in tmp_path.glob("s-*.png"))
    assert sheets == ["s-1-a-boxes.png", "s-2-b-boxes.png"]
    with Image.open(tmp_path / sheets[0]) as sheet:
        assert sheet.size == (4 * 320 + 3 * 4, 213 + 4 + 24)  # images, gaps, the legend


def test_the_tool_remembers(tmp_path, capsys):
    s = saved(tmp_path / "a")
    for expected in (False, True):
        check_data.main([str(s.json_file), str(s.image_root)])
        assert ("cached from an earlier check" in capsys.readouterr().out) == expected
        for catalog in (DatasetCatalog, MetadataCatalog):
            catalog.remove("1-a-boxes")  # as in another process


def test_errors_of_the_tool_are_one_line(tmp_path, capsys):
    s = saved(tmp_path / "a")
    s.picture().unlink()
    with pytest.raises(SystemExit) as end:
        check_data.main([str(s.json_file), str(s.image_root)])
    assert str(end.value).startswith("error: DATASETS.REGISTER[0]") and "2.png is missing" in str(end.value)
    with pytest.raises(SystemExit, match="error: each annotation file must be followed by its image folder"):
        check_data.main([str(s.json_file)])


def test_the_contact_sheet_shows_the_boxes_where_they_are(tmp_path):
    Image.new("RGB", (640, 320), "black").save(tmp_path / "a.png")
    box = {"bbox": [320, 64, 128, 128], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "a.png"), "height": 320, "width": 640, "annotations": [box]}
    sheet = np.asarray(draw_contact_sheet([record], ["cat"])).astype(int)
    assert sheet.shape == (160 + 4 + 24, 320, 3)  # the image, a gap, the legend
    drawn = sheet[:160].max(-1) > 40  # the image is black
    rows, columns = np.nonzero(drawn.any(1))[0], np.nonzero(drawn.any(0))[0]
    assert abs(columns[0] - 160) <= 4 and abs(columns[-1] - 224) <= 4 and abs(rows[-1] - 96) <= 4
    assert (sheet[164:, :20] == [255, 38, 38]).all(-1).sum() > 100  # the colour of the class


def test_the_augmented_images_are_those_that_a_training_gets(tmp_path, monkeypatch):
    """The same pixels and boxes as in the trainer's own loader; a red shape that is flipped has its box around it."""
    s = saved(tmp_path / "a")
    cfg = make_cfg({"a": s}, train=["a"])
    cfg.INPUT.AUGMENTATION, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.FORMAT = "2x", (48, 64), "RGB"
    cfg.INPUT.DETR_CROP.RESIZE, cfg.INPUT.DETR_CROP.SIZE = [56], [30, 40]
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS, cfg.SEED = 3, 0, 5
    prepare_datasets(cfg)
    expected = [sample for batch, _ in zip(build_train_loader(cfg), range(3), strict=False) for sample in batch]
    inputs = find_first_inputs(cfg, 8)
    assert len(inputs) == 8
    for ours, theirs in zip(inputs, expected, strict=False):
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, theirs["instances"].gt_boxes.tensor)
    assert len({tuple(sample["image"].shape) for sample in inputs}) > 2  # they are augmented
    cfg.SEED = 6
    assert any(not torch.equal(one["image"], two["image"])
               for one, two in zip(find_first_inputs(cfg, 8), inputs, strict=True))  # fmt: skip


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_augmented_images_are_drawn_with_their_boxes_in_their_colours(order):
    image = torch.zeros(3, 80, 160, dtype=torch.uint8)
    image[0 if order == "RGB" else 2, 60:] = 200  # a red strip at the bottom
    truth = Instances((80, 160), gt_boxes=Boxes(torch.tensor([[80.0, 8.0, 120.0, 40.0]])), gt_classes=torch.tensor([1]))
    sheet = np.asarray(draw_inputs([{"image": image, "instances": truth}], ["cat", "dog"], order=order)).astype(int)
    assert abs(sheet[150, 20] - [200, 0, 0]).max() < 5
    drawn = sheet[:110].max(-1) > 40
    rows, columns = np.nonzero(drawn.any(1))[0], np.nonzero(drawn.any(0))[0]
    assert abs(columns[0] - 160) <= 4 and abs(columns[-1] - 240) <= 4 and abs(rows[-1] - 80) <= 4
    assert abs(sheet[40, 239] - [38, 255, 255]).max() < 60  # the second of two colours


def test_the_tool_draws_augmented_images(tmp_path, capsys):
    s = saved(tmp_path / "a")
    picture = tmp_path / "augmented.png"
    check_data.main([str(s.json_file), str(s.image_root), "--draw-augmented", str(picture), "--images", "3",
                     "INPUT.MIN_SIZE_TRAIN", "(64,)"])  # fmt: skip
    assert "the first 3 images of a training, as INPUT.AUGMENTATION 1x" in capsys.readouterr().out
    with Image.open(picture) as sheet:
        width, height = sheet.size
    assert width == 3 * 324 - 4 and 213 <= height - 24 - 4 <= 214  # three images of 96 x 64, above the legend
    with pytest.raises(SystemExit, match="--draw-augmented: DATASETS.TRAIN is empty"):
        check_data.main(["--config-file", "deqdet_r50_100q_1x", "--draw-augmented", str(picture),
                         "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])  # fmt: skip
