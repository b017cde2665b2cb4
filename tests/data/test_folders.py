"""Folders in COCO's, YOLO's and Pascal VOC's form: recognised, read without dropping anything, divided, written."""

import json
import re
from pathlib import Path

import pytest

from deqdet.data import CheckOptions, check_coco_file
from deqdet.data.folders import FolderData, FoundSet, complete_splits, read_folder, write_coco_folder, write_yolo_folder
from deqdet.data.folders.spelling import find_misspelt
from deqdet.data.folders.splits import divide
from deqdet.data.registration import load_records
from deqdet.errors import UserError

from helpers.folders import (
    CLASSES,
    HEIGHT,
    PICTURES,
    WIDTH,
    coco_content,
    draw,
    voc_xml,
    write,
    write_coco,
    write_voc,
    write_yolo,
    yolo_lines,
)

NAMES = "names: [cat, dog, emu]\n"
SOME, OTHERS = dict(list(PICTURES.items())[:3]), dict(list(PICTURES.items())[3:])


def boxes_of(found: FoundSet) -> dict[str, list]:
    """(class, (left, top, right, bottom)) of each picture, by the stem of its name."""
    content = found.content
    names = {record["id"]: record["name"] for record in content["categories"]}
    pictures = {record["id"]: Path(record["file_name"]).stem for record in content["images"]}
    boxes = {name: [] for name in pictures.values()}
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        corners = tuple(round(value, 6) for value in (x, y, x + w, y + h))
        boxes[pictures[record["image_id"]]].append((names[record["category_id"]], corners))
    return boxes


def check(found: FoundSet, tmp_path: Path, **options):
    file = tmp_path / "checked.json"
    file.write_text(json.dumps(found.content))
    return check_coco_file("the set", str(file), str(found.image_root), CheckOptions(**options))


def roboflow_coco(folder: Path) -> None:
    for split, pictures in (("train", SOME), ("valid", OTHERS)):
        content = coco_content(pictures)
        content["categories"] = [{**record, "supercategory": "animals"} for record in content["categories"]]
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})
        write_coco(folder, f"{split}/_annotations.coco.json", split, pictures, content)


def usual_coco(folder: Path) -> None:
    for year, pictures in (("train2017", SOME), ("val2017", OTHERS)):
        write_coco(folder, f"annotations/instances_{year}.json", year, pictures)
        write(folder / f"annotations/captions_{year}.json", '{"images": [], "annotations": []}')


def flat_coco(folder: Path) -> None:
    write_coco(folder, "train.json", "images", SOME)
    write_coco(folder, "val.json", "images", OTHERS)
    write(folder / "results.json", "[]")


def ultralytics(folder: Path) -> None:
    write_yolo(folder, SOME, "images/train", "labels/train")
    write_yolo(folder, OTHERS, "images/val", "labels/val")
    write(folder / "animals.yaml", f"path: ../datasets/animals\ntrain: images/train\nval: images/val\n{NAMES}")


def roboflow_yolo(folder: Path) -> None:
    write_yolo(folder, SOME, "train/images", "train/labels")
    write_yolo(folder, OTHERS, "valid/images", "valid/labels")
    entries = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\n"
    write(folder / "data.yaml", f"{entries}names:\n  0: cat\n  1: dog\n  2: emu\n")


def listed_yolo(folder: Path) -> None:
    write_yolo(folder, PICTURES, "images", "labels")
    for name, pictures in (("train", SOME), ("val", OTHERS)):
        write(folder / f"{name}.txt", "".join(f"./images/{stem}.png\n" for stem in pictures))
    write(folder / "data.yaml", f"train: train.txt\nval: val.txt\n{NAMES}")


def voc_devkit(folder: Path) -> None:
    year = folder / "VOCdevkit" / "VOC2012"
    write_voc(year, PICTURES, "JPEGImages", "Annotations")
    main = year / "ImageSets" / "Main"
    write(main / "train.txt", "".join(f"{name}\n" for name in SOME))
    write(main / "val.txt", "".join(f"{name}\n" for name in OTHERS))
    write(main / "trainval.txt", "".join(f"{name}\n" for name in PICTURES))
    write(main / "cat_train.txt", "a 1\nb -1\n")


def roboflow_voc(folder: Path) -> None:
    write_voc(folder, SOME, "train", "train")
    write_voc(folder, OTHERS, "valid", "valid")


@pytest.mark.parametrize("form, make", [
    ("coco", roboflow_coco), ("coco", usual_coco), ("coco", flat_coco),
    ("yolo", ultralytics), ("yolo", roboflow_yolo), ("yolo", listed_yolo),
    ("voc", voc_devkit), ("voc", roboflow_voc),
])  # fmt: skip
def test_layouts_with_splits(form, make, tmp_path):
    make(tmp_path)
    data = read_folder(tmp_path)
    assert data.format == form
    assert [found.split for found in data.sets] == ["train", "val"]
    for found, pictures in zip(data.sets, (SOME, OTHERS), strict=True):
        assert boxes_of(found) == pictures
        assert [record["name"] for record in found.content["categories"]] == list(CLASSES)
        assert check(found, tmp_path).report.num_images == len(pictures)
    assert complete_splits(data, seed=1, val_fraction=0.2).sets == data.sets


def flat_voc(folder: Path) -> None:
    write_voc(folder, PICTURES, "", "")


def labelimg_yolo(folder: Path) -> None:
    write_yolo(folder, PICTURES, "images", "labels")
    write(folder / "labels" / "classes.txt", "cat\ndog\nemu\n")


def single_coco(folder: Path) -> None:
    write_coco(folder, "annotations/instances_default.json", "images/default", PICTURES)


def utf16_voc(folder: Path) -> None:
    write_voc(folder)
    for path in (folder / "annotations").iterdir():
        path.write_bytes(f'<?xml version="1.0" encoding="utf-16"?>{path.read_text()}'.encode("utf-16"))


@pytest.mark.parametrize("make", [write_voc, flat_voc, utf16_voc, labelimg_yolo, single_coco])
def test_layouts_without_splits(make, tmp_path):
    make(tmp_path)
    data = read_folder(tmp_path)
    assert len(data.sets) == 1 and boxes_of(data.sets[0]) == PICTURES
    assert check(data.sets[0], tmp_path).report.num_boxes == 7


def test_vocs_pixels_count_from_one(tmp_path):
    """The first pixel alone is the box from 1 to 1; the whole picture is from 1 to its size."""
    objects = [("cat", (0, 0, 1, 1)), ("dog", (0, 0, 100, 40))]
    assert "<xmin>1</xmin><ymin>1</ymin><xmax>1</xmax><ymax>1</ymax>" in voc_xml("a", objects)
    data = read_folder(write_voc(tmp_path, {"a": objects}))
    boxes = [record["bbox"] for record in data.sets[0].content["annotations"]]
    assert boxes == [[0, 0, 1, 1], [0, 0, 100, 40]]


def test_a_coordinate_of_zero_means_borders_from_zero_in_the_whole_set(tmp_path):
    write_voc(tmp_path)
    write(tmp_path / "annotations" / "b.xml", voc_xml("b", [("emu", (0, 4, 70, 24))], first=0))
    data = read_folder(tmp_path)
    assert "counted from 0" in data.remarks[0]
    boxes = boxes_of(data.sets[0])
    assert boxes["b"] == [("emu", (0, 4, 70, 24))]
    assert boxes["e"] == [("cat", (11, 11, 40, 30))]  # as written


def test_a_line_of_yolo(tmp_path):
    """Centre (50, 10), 20 x 4 pixels; and the box around an outline."""
    write_yolo(tmp_path)
    write(tmp_path / "data.yaml", NAMES)
    write(tmp_path / "labels/train/c.txt", "1 0.5 0.25 0.2 0.1\n\n2 0.1 0.5 0.3 0.25 0.2 0.75\n")
    data = read_folder(tmp_path)
    assert boxes_of(data.sets[0])["c"] == [("dog", (40, 8, 60, 12)), ("emu", (10, 10, 30, 30))]
    assert data.remarks == ("train: 1 lines are outlines; the boxes around them are used",)


@pytest.mark.parametrize("write_as", [write_coco_folder, write_yolo_folder])
def test_three_formats_give_the_same_training_set(write_as, tmp_path):
    """Image by image and box by box, from VOC's files by hand and from what the writers make of them."""
    sets = []
    voc = read_folder(write_voc(tmp_path / "voc"))
    write_as(voc, tmp_path / "other")
    for data in (voc, read_folder(tmp_path / "other")):
        for found in complete_splits(data, seed=3, val_fraction=0.4).sets:
            file = tmp_path / "set.json"
            file.write_text(json.dumps(found.content))
            sets.append(load_records(str(file), str(found.image_root)))
    assert [len(records) for records in sets] == [3, 2, 3, 2]
    for expected, records in ((sets[0], sets[2]), (sets[1], sets[3])):
        for one, other in zip(expected, records, strict=True):
            assert Path(one["file_name"]).read_bytes() == Path(other["file_name"]).read_bytes()
            assert [(box["category_id"], box["iscrowd"]) for box in one["annotations"]] == [
                (box["category_id"], box["iscrowd"]) for box in other["annotations"]
            ]
            for box, same in zip(one["annotations"], other["annotations"], strict=True):
                assert same["bbox"] == pytest.approx(box["bbox"], abs=1e-8)


@pytest.mark.parametrize("write_as", [write_coco_folder, write_yolo_folder])
@pytest.mark.parametrize("name, left", [
    ("../../a.png", "set/images"), ("{folder}/a.png", "set/images"), ("", "set/images"),
    ("../../set/images/a.png", "out/images/train"), ("{folder}/set/images/a.png", "out/images/train"),
])  # fmt: skip
def test_names_that_lead_out_of_a_folder_are_not_written(write_as, name, left, tmp_path):
    """Out of the one that the images are read from, or of the one they are written to."""
    for place in (tmp_path, tmp_path / "set" / "images"):
        draw(place / "a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    image = {"id": 1, "file_name": name.format(folder=tmp_path), "width": WIDTH, "height": HEIGHT}
    content = {**coco_content({}), "images": [image]}
    data = FolderData("coco", (FoundSet("train", Path("a.json"), tmp_path / "set" / "images", content),))
    with pytest.raises(UserError, match=f"a.json: an image has file_name '.*', which leaves {tmp_path}/{left}: "):
        write_as(data, tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def voc_outside(folder: Path) -> None:
    objects = [*PICTURES["b"], ("emu", (200, 4, 290, 24))]
    write(write_voc(folder) / "annotations" / "b.xml", voc_xml("b", objects))


def voc_text(folder: Path) -> None:
    text = voc_xml("b", [("emu", (50, 4, 70, 24))]).replace("70", "many")
    write(write_voc(folder) / "annotations" / "b.xml", text)


def voc_without_image(folder: Path) -> None:
    (write_voc(folder) / "images" / "b.png").unlink()


def voc_of_another_size(folder: Path) -> None:
    write(write_voc(folder) / "annotations" / "b.xml", voc_xml("b", PICTURES["b"], size=(40, 100)))


def yolo_class(folder: Path) -> None:
    labelimg_yolo(folder)
    write(folder / "labels" / "b.txt", "\n2 0.6 0.35 0.2 0.5\n7 0.5 0.5 0.1 0.1\n")


def yolo_pixels(folder: Path) -> None:
    labelimg_yolo(folder)
    write(folder / "labels" / "b.txt", "2 60 14 20 20\n")


def yolo_short_line(folder: Path) -> None:
    labelimg_yolo(folder)
    write(folder / "labels" / "b.txt", "2 0.5 0.5 0.1\n")


def yolo_words(folder: Path) -> None:
    labelimg_yolo(folder)
    write(folder / "labels" / "b.txt", "emu 0.5 0.5 0.1 0.1\n")


def yolo_without_image(folder: Path) -> None:
    labelimg_yolo(folder)
    (folder / "images" / "b.png").unlink()


def coco_class(folder: Path) -> None:
    content = coco_content()
    content["annotations"][0]["category_id"] = 9
    write_coco(folder, "train.json", "images", content=content)


@pytest.mark.parametrize("make, words", [
    (voc_outside, "object 2 of {}/annotations/b.xml (image b.png) has the box [200, 4, 90, 20] (x, y, width, height) "
                  "in pixels, which lies outside its image of 100 x 40: correct the file"),
    (voc_text, "object 1 of {}/annotations/b.xml (image b.png) has bbox ['51', '5', 'many', '24'], which must be four"),
    (voc_without_image, "image b.png (labels in {}/annotations/b.xml) is missing: {}/images/b.png does not exist"),
    (voc_of_another_size, "image b.png (labels in {}/annotations/b.xml) is 100 x 40 pixels, but {}/annotations/b.xml "
                          "says 40 x 100"),
    (yolo_class, "line 3 of {}/labels/b.txt (image b.png) has class 7, which the list of classes lacks"),
    (yolo_pixels, "line 1 of {}/labels/b.txt (image b.png) has the box [5000, 160, 2000, 800] (x, y, width, height) in "
                  "pixels, which reaches far beyond its image of 100 x 40"),
    (yolo_short_line, "line 1 of {}/labels/b.txt (image b.png) has bbox [0.5, 0.5, 0.1], which must be four finite"),
    (yolo_words, "line 1 of {}/labels/b.txt (image b.png) has class 'emu', which the list of classes lacks"),
    (yolo_without_image, "label file {}/labels/b.txt has no image: {}/images holds no b with one of the endings .jpg, "
                         ".jpeg, .png, .bmp, "),
    (coco_class, 'annotation 1 of a.png has category_id 9, which "categories" lacks'),
])  # fmt: skip
def test_faults_reach_the_check_with_the_place_that_the_user_can_open(make, words, tmp_path):
    make(tmp_path)
    (found,) = read_folder(tmp_path).sets
    with pytest.raises(UserError, match=re.escape(words.replace("{}", str(tmp_path)))):
        check(found, tmp_path, box_format="xywh")
    used = 7 if make in (voc_outside, yolo_class) else 6  # of 7 or 8
    assert check(found, tmp_path, box_format="xywh", skip_broken=True).report.num_boxes == used


def test_remarks_and_repairs_name_the_label_files_too(tmp_path):
    write_voc(tmp_path)
    write(tmp_path / "annotations" / "b.xml", voc_xml("b", [("emu", (50, 4, 70, 24)), ("emu", (60, 8, 120, 30))]))
    write(tmp_path / "annotations" / "f.xml", voc_xml("b", [("emu", (50, 4, 70, 24))]))
    twice, cut = check(read_folder(tmp_path).sets[0], tmp_path, box_format="xywh").findings
    labels = tmp_path / "annotations"
    assert twice.line() == (
        f"b.png has two label files, {labels}/b.xml and {labels}/f.xml: each is used with its own boxes"
    )
    assert cut.line().startswith(f"object 2 of {labels}/b.xml (image b.png) has the box [60, 8, 60, 22] (x, y, ")


@pytest.mark.parametrize("images, labels, prefix", [("images", "annotations", ""), ("train", "train", "train: ")])
def test_vocs_images_without_labels_are_counted(images, labels, prefix, tmp_path):
    write_voc(tmp_path, PICTURES, images, labels)
    draw(tmp_path / "overview.png")  # beside no image that has labels
    assert read_folder(tmp_path).remarks == ()
    for name in ("y", "x"):
        draw(tmp_path / images / f"{name}.png")
    lost = tmp_path / images / "x.png"
    assert read_folder(tmp_path).remarks == (
        f"{prefix}2 of 7 images have no XML file (the first one is {lost}): they are not used",
    )


def test_a_class_that_looks_misspelt_is_asked_about(tmp_path):
    pictures = {f"{i}": [("Platelets", (0, 0, 9, 9)), ("RBC", (20, 20, 30, 30))] for i in range(5)}
    write_voc(tmp_path, {**pictures, "x": [("Plateletes", (0, 0, 9, 9)), ("Plateletes", (20, 20, 30, 30))]})
    remark = f"class 'Plateletes' occurs only in {tmp_path}/annotations/x.xml; is it 'Platelets'?"
    assert read_folder(tmp_path).remarks == (remark,)


@pytest.mark.parametrize("rare, frequent, found", [
    ("platelets", "Platelets", True), ("Plate lets", "Platelets", True), ("Platelet", "Platelets", True),
    ("Plotelets", "Platelets", True), ("Ploteletes", "Platelets", False), ("bat", "cat", False),
    ("type 1", "type 2", False), ("RBC", "rbc", True), ("WBC", "RBC", False), ("zebra", "horse", False),
])  # fmt: skip
def test_which_names_are_alike(rare, frequent, found):
    assert find_misspelt({frequent: 10, rare: 2}) == ({rare: frequent} if found else {})
    assert find_misspelt({frequent: 10, rare: 3}) == find_misspelt({frequent: 9, rare: 2}) == {}


def test_an_object_without_a_box_is_named(tmp_path):
    text = voc_xml("b", [*PICTURES["b"], ("emu", (0, 0, 9, 9))])
    write(write_voc(tmp_path) / "annotations" / "b.xml", text[::-1].replace("bndbox"[::-1], "box"[::-1], 2)[::-1])
    with pytest.raises(UserError, match="annotations/b.xml: object 2 has no bndbox"):
        read_folder(tmp_path)


def test_a_written_coco_folder_does_not_speak_of_the_label_files_before(tmp_path):
    write_coco_folder(read_folder(write_voc(tmp_path / "voc")), tmp_path / "coco")
    text = (tmp_path / "coco/annotations/instances_all.json").read_text()
    assert "b.xml" not in text and len(json.loads(text)["annotations"]) == 7


def test_class_numbers_of_yolo_stay(tmp_path):
    """So that messages, and the detections that an evaluation writes, have the numbers of the label files."""
    labelimg_yolo(tmp_path)
    content = read_folder(tmp_path).sets[0].content
    assert [(record["id"], record["name"]) for record in content["categories"]] == [(0, "cat"), (1, "dog"), (2, "emu")]


def nothing(folder: Path) -> None:
    draw(folder / "a.png")


def two_formats(folder: Path) -> None:
    write_voc(folder)
    flat_coco(folder)


def two_train_files(folder: Path) -> None:
    flat_coco(folder)
    write(folder / "train_new.json", json.dumps(coco_content()))


def no_images(folder: Path) -> None:
    write(folder / "train.json", json.dumps(coco_content()))


def bad_xml(folder: Path) -> None:
    write(write_voc(folder) / "annotations" / "b.xml", "<annotation><object>")


def entities(folder: Path) -> None:
    head = '<!DOCTYPE lolz [<!ENTITY lol "lol">]>'
    write(write_voc(folder) / "annotations" / "b.xml", head + voc_xml("b", PICTURES["b"]))


def entities_in_utf16(folder: Path) -> None:
    """The document type of `entities`, whose bytes are not those of ASCII, before an object with such an entity."""
    head = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE lolz [<!ENTITY lol "emu">]>'
    text = head + voc_xml("b", PICTURES["b"]).replace("emu", "&lol;")
    (write_voc(folder) / "annotations" / "b.xml").write_bytes(text.encode("utf-16"))


def another_xml(folder: Path) -> None:
    write(write_voc(folder) / "annotations" / "b.xml", "<html></html>")


def two_years(folder: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        write_voc(folder / year, PICTURES, "JPEGImages", "Annotations")


def wrong_count(folder: Path) -> None:
    write(write_yolo(folder) / "data.yaml", f"{NAMES}nc: 4\n")


def no_such_folder(folder: Path) -> None:
    write(write_yolo(folder) / "data.yaml", f"train: images/train\nval: images/dev\n{NAMES}")


def no_labels(folder: Path) -> None:
    write_yolo(folder)
    for name in PICTURES:
        (folder / "labels" / "train" / f"{name}.txt").unlink()
    write(folder / "data.yaml", NAMES)


def twice_the_name(folder: Path) -> None:
    write(write_yolo(folder) / "data.yaml", "names: [cat, cat, emu]\n")


def code_in_yaml(folder: Path) -> None:
    write(write_yolo(folder) / "data.yaml", f'{NAMES}train: !!python/object/apply:os.system ["touch canary"]\n')


@pytest.mark.parametrize("make, words", [
    (nothing, "found no labels: looked for annotation files of COCO .*; YOLO's .*; Pascal VOC's"),
    (two_formats, r"ambiguous: it looks like coco \(.*train.json\) and voc \(.*annotations\): choose by --data-format"),
    (two_train_files, "train.json and .*train_new.json are both train sets"),
    (no_images, r"none of its images exists, the first one is a.png \(looked in "),
    (bad_xml, "b.xml is not valid XML"),
    (entities, "b.xml has a document type of its own"),
    (entities_in_utf16, "b.xml has a document type of its own"),
    (another_xml, "b.xml is not a Pascal VOC file: it begins with <html>"),
    (two_years, "ambiguous: it holds VOC2007 and VOC2012"),
    (wrong_count, "nc is 4, but names has 3 classes"),
    (no_such_folder, "val names images/dev, which is not there"),
    (no_labels, "no image of train has a label file: the first one would be .*labels/train/a.txt"),
    (twice_the_name, "must have different names"),
    (code_in_yaml, "data.yaml is not YAML with plain values"),
])  # fmt: skip
def test_folders_that_cannot_be_read(make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert not Path("canary").exists()


def test_the_format_can_be_chosen(tmp_path):
    two_formats(tmp_path)
    assert [read_folder(tmp_path, form).format for form in ("coco", "voc")] == ["coco", "voc"]
    with pytest.raises(UserError, match="found no YOLO labels"):
        read_folder(tmp_path, "yolo")


def test_a_class_that_has_boxes_is_no_placeholder(tmp_path):
    content = coco_content()
    content["categories"] = [{**record, "supercategory": "cat"} for record in content["categories"]]
    write_coco(tmp_path, "train.json", "images", content=content)
    assert [record["name"] for record in read_folder(tmp_path).sets[0].content["categories"]] == list(CLASSES)


def test_ids_and_crowds_of_coco_stay(tmp_path):
    content = coco_content(first_id=7)
    content["annotations"][1]["iscrowd"] = 1
    content["images"][0]["id"] = content["annotations"][0]["image_id"] = content["annotations"][1]["image_id"] = 77
    write_coco(tmp_path, "all.json", "images", content=content)
    assert read_folder(tmp_path).sets[0].content == content


def test_the_xml_files_own_name_tells_the_image(tmp_path):
    """A "filename" is often that of before a renaming."""
    write_voc(tmp_path)
    write(tmp_path / "annotations" / "e.xml", voc_xml("DSC_0001", PICTURES["e"]))
    assert boxes_of(read_folder(tmp_path).sets[0]) == PICTURES


def many(counts: dict[str, int]) -> FoundSet:
    """A set with images of one class each, as many as `counts` says."""
    labels = [name for name, count in counts.items() for _ in range(count)]
    names = list(counts)
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(len(labels))]
    annotations = [{"image_id": i, "category_id": names.index(label)} for i, label in enumerate(labels)]
    return FoundSet("", Path("x"), Path("."), {"images": images, "annotations": annotations, "categories": []})


def names_in(found: FoundSet) -> list[str]:
    return [record["file_name"] for record in found.content["images"]]


@pytest.mark.parametrize("seed", range(20))
def test_every_class_is_in_the_train_set_and_if_it_can_be_in_the_other(seed):
    train, val = divide(many({"often": 30, "twice": 2, "once": 1, "alone": 1}), seed=seed, val_fraction=0.2)
    assert len(names_in(train)) == 27 and len(names_in(val)) == 7  # round(0.2 * 34)
    assert sorted(names_in(train) + names_in(val)) == sorted(names_in(many({"all": 34})))
    classes = [{record["category_id"] for record in found.content["annotations"]} for found in (train, val)]
    assert classes == [{0, 1, 2, 3}, {0, 1}]


def test_a_split_depends_on_names_and_seed_alone():
    found = many({"a": 10, "b": 10})
    train, val = divide(found, seed=1, val_fraction=0.25)
    content = found.content
    turned = FoundSet("", Path("y"), Path("/"), {**content, "images": content["images"][::-1]})
    assert set(names_in(divide(turned, seed=1, val_fraction=0.25)[1])) == set(names_in(val))
    others = [set(names_in(divide(found, seed=seed, val_fraction=0.25)[1])) for seed in range(2, 6)]
    assert any(other != set(names_in(val)) for other in others)
    # One more image moves at most one other.
    more = many({"a": 10, "b": 11})
    assert len(set(names_in(divide(more, seed=1, val_fraction=0.25)[1])) - set(names_in(val))) <= 1


def test_a_test_set_stands_in_for_a_missing_val_set(tmp_path):
    write_coco(tmp_path, "train.json", "images", SOME)
    write_coco(tmp_path, "test.json", "images", OTHERS)
    data = complete_splits(read_folder(tmp_path), seed=1, val_fraction=0.2)
    assert [found.split for found in data.sets] == ["train", "val"]
    assert boxes_of(data.sets[1]) == OTHERS
    assert "test set is evaluated in its place" in data.remarks[0]


def test_a_test_set_without_labels_does_not(tmp_path):
    content = coco_content(OTHERS)
    del content["annotations"]
    write_coco(tmp_path, "train.json", "images", PICTURES)
    write_coco(tmp_path, "image_info_test.json", "images", OTHERS, content)
    data = complete_splits(read_folder(tmp_path), seed=1, val_fraction=0.2)
    assert [found.split for found in data.sets] == ["train", "val", "test"]
    assert [len(names_in(found)) for found in data.sets] == [4, 1, 2]


def test_an_image_alone_cannot_be_divided(tmp_path):
    data = read_folder(write_voc(tmp_path, {"a": PICTURES["a"]}))
    with pytest.raises(UserError, match="lists 1 image: two are needed"):
        complete_splits(data, seed=1, val_fraction=0.2)


def test_images_without_label_files_have_no_box(tmp_path):
    write_yolo(tmp_path)
    write(tmp_path / "data.yaml", NAMES)
    (tmp_path / "labels/train/e.txt").unlink()
    data = read_folder(tmp_path)
    assert boxes_of(data.sets[0])["e"] == []
    assert data.remarks == ("train: 1 of 5 images have no label file, and therefore no boxes",)
    assert yolo_lines(PICTURES["b"]) == "2 0.6 0.35 0.2 0.5\n"
