"""The generated shapes: what is drawn, and that a set on disk is either whole or made again."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deqdet.data import ShapesConfig, generate_shapes, shapes
from deqdet.data.shapes import CLASSES, box_overlap, draw_scene

CONFIG = ShapesConfig(num_images=400, seed=2)
FLAT = replace(CONFIG, max_objects=1, empty_fraction=0.0, max_texture=0.0, max_noise=0.0)


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(CONFIG, index) for index in range(CONFIG.num_images)]


def read_all(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_box_overlap_is_over_the_smaller_box():
    # 2 x 4 of a 4 x 4 box lie in a 10 x 10 one; then boxes that only touch.
    assert box_overlap((0, 0, 10, 10), (8, 3, 4, 4)) == 0.5
    assert box_overlap((8, 3, 4, 4), (0, 0, 10, 10)) == 0.5
    assert box_overlap((0, 0, 10, 10), (10, 0, 5, 5)) == 0


def test_boxes_have_the_promised_sizes_inside_the_image(scenes):
    boxes = np.array([shape.box for scene in scenes for shape in scene.shapes])
    longer = boxes[:, 2:].max(1)
    assert longer.min() >= 8 - 1e-6 and longer.max() <= 80 + 1e-6
    assert np.mean(longer < np.sqrt(8 * 80)) == pytest.approx(0.5, abs=0.06)  # log-uniform's median
    assert boxes[:, :2].min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 160 + 1e-6


def test_shapes_overlap_at_most_by_half(scenes):
    pairs = [pair for scene in scenes for pair in itertools.combinations(scene.shapes, 2)]
    overlaps = [box_overlap(a.box, b.box) for a, b in pairs]
    assert 0.4 < max(overlaps) <= 0.5
    assert np.mean(np.array(overlaps) > 0) > 0.05  # they do overlap


def test_later_shapes_leave_half_of_earlier_ones(monkeypatch):
    masks, place = [], shapes._place

    def record(rng, config, *others):
        placed = place(rng, config, *others)
        if placed is not None:
            mask = np.zeros((config.image_size, config.image_size), bool)
            mask[placed[1]] = placed[2] > 0.5
            masks.append(mask)
        return placed

    monkeypatch.setattr(shapes, "_place", record)
    left = []
    for index in range(100):
        masks.clear()
        draw_scene(replace(CONFIG, max_objects=8, min_size=30.0), index)
        for number, mask in enumerate(masks[:-1]):
            covered = np.logical_or.reduce(masks[number + 1 :])
            left.append((mask & ~covered).sum() / mask.sum())
    assert 0.48 <= min(left) < 0.65  # a mask's pixels, whole ones, are not quite its area


def test_number_of_objects(scenes):
    counts = np.bincount([len(scene.shapes) for scene in scenes], minlength=7)
    assert len(counts) == 7 and 0.04 <= counts[0] / len(scenes) <= 0.12
    assert counts[1:].min() > 30  # of the 61 expected
    assert counts[1:] @ np.arange(1, 7) / counts[1:].sum() == pytest.approx(3.5, abs=0.3)


def test_every_class_is_equally_likely(scenes):
    counts = np.bincount([shape.label for scene in scenes for shape in scene.shapes], minlength=len(CLASSES))
    assert len(counts) == len(CLASSES) == 8
    assert counts.min() > 0.75 * counts.mean() and counts.max() < 1.25 * counts.mean()


def test_low_and_high_contrast(scenes):
    spread = np.array([scene.image.astype(float).std((0, 1)).max() for scene in scenes])
    assert np.quantile(spread, 0.1) < 10 < 30 < np.quantile(spread, 0.9)


@pytest.mark.parametrize("rotation", [10.0, 180.0])
def test_box_is_tight_around_the_drawing(rotation):
    seen = set()
    for index in range(100):
        scene = draw_scene(replace(FLAT, max_rotation=rotation, min_contrast=100), index)
        (shape,) = scene.shapes
        # A single shape covers the majority of no border, so the border's median is the background.
        border = np.concatenate([scene.image[0], scene.image[-1], scene.image[:, 0], scene.image[:, -1]])
        changed = (scene.image != np.median(border, axis=0)).any(-1)
        rows, columns = np.nonzero(changed.any(1))[0], np.nonzero(changed.any(0))[0]
        drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        box = np.array([*shape.box[:2], shape.box[0] + shape.box[2], shape.box[1] + shape.box[3]])
        assert np.abs(drawn - box).max() <= 1.0, (index, CLASSES[shape.label])
        seen.add(shape.label)
    assert seen == set(range(8))


def test_area_is_that_of_the_outline():
    areas = {label: [] for label in range(8)}
    for index in range(200):
        (shape,) = draw_scene(replace(FLAT, max_rotation=0.0, min_size=40.0), index).shapes
        areas[shape.label].append(shape.area / (shape.box[2] * shape.box[3]))
    # Of the box: pi/4; all; half; 5 of 9 squares; pi/4 (1 - 0.55^2); pi/4 (1 - 0.3); mean width 5 of 8.
    expected = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 5 / 9, "ring": 0.548}
    expected |= {"crescent": 0.55, "hourglass": 0.625}
    for name, fraction in expected.items():
        assert np.mean(areas[CLASSES.index(name)]) == pytest.approx(fraction, rel=0.02), name


def test_rotation_is_limited():
    """A square turned by a has a side's worth of cos a + sin a, and its area tells the side."""
    turns = []
    for index in range(300):
        (shape,) = draw_scene(replace(FLAT, min_size=60.0), index).shapes
        if CLASSES[shape.label] == "square":
            factor = min(shape.box[2] / np.sqrt(shape.area), np.sqrt(2))
            turns.append(np.degrees(np.arcsin(min(factor / np.sqrt(2), 1)) - np.pi / 4))
    assert len(turns) > 20 and max(turns) <= 10.2 and max(turns) > 7


def test_image_depends_on_seed_and_index_only():
    first = draw_scene(CONFIG, 5)
    assert np.array_equal(draw_scene(replace(CONFIG, num_images=6), 5).image, first.image)
    assert draw_scene(CONFIG, 5).shapes == first.shapes
    for other in (draw_scene(CONFIG, 6), draw_scene(replace(CONFIG, seed=3), 5)):
        assert not np.array_equal(other.image, first.image)


@pytest.mark.parametrize(
    "field, value",
    [("num_images", 0), ("max_objects", 9), ("min_size", 90.0), ("max_size", 161.0), ("max_contrast", 128.0)],
)
def test_impossible_parameters_are_refused(field, value):
    with pytest.raises(ValueError, match=f"need .*{field}={value}"):
        replace(CONFIG, **{field: value})


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    config = ShapesConfig(num_images=5, seed=11)
    for name, seed in (("a", 11), ("b", 11), ("c", 12)):
        path = generate_shapes(tmp_path / name, replace(config, seed=seed))
        assert path == str(tmp_path / name / "annotations.json")
    a, b, c = (read_all(tmp_path / name) for name in "abc")
    assert len(a) == 6 and a == b
    assert all(a[name] != c[name] for name in a)


def test_annotations_tell_what_was_drawn(tmp_path):
    config = ShapesConfig(num_images=12, seed=4)
    whole = json.loads(Path(generate_shapes(tmp_path / "set", config)).read_text())
    assert [category["name"] for category in whole["categories"]] == list(CLASSES)
    assert [image["id"] for image in whole["images"]] == list(range(1, 13))
    assert [record["id"] for record in whole["annotations"]] == list(range(1, len(whole["annotations"]) + 1))
    for image in whole["images"]:
        records = [record for record in whole["annotations"] if record["image_id"] == image["id"]]
        scene = draw_scene(config, image["id"] - 1)
        assert [record["category_id"] for record in records] == [shape.label + 1 for shape in scene.shapes]
        for record, shape in zip(records, scene.shapes, strict=True):
            assert np.abs(np.subtract(record["bbox"], shape.box)).max() <= 0.005 + 1e-9
            assert record["iscrowd"] == 0 and abs(record["area"] - shape.area) <= 0.005 + 1e-9


def test_complete_set_is_used_again(tmp_path, monkeypatch):
    config = ShapesConfig(num_images=3, seed=1)
    generate_shapes(tmp_path / "set", config)
    monkeypatch.setattr(shapes, "draw_scene", lambda *_: pytest.fail("drawn again"))
    generate_shapes(tmp_path / "set", config)


def test_set_with_other_parameters_or_too_few_images_is_made_again(tmp_path):
    root, config = tmp_path / "set", ShapesConfig(num_images=3, seed=1)
    generate_shapes(root, config)
    before = read_all(root)
    generate_shapes(root, replace(config, max_rotation=180.0))
    assert read_all(root) != before
    generate_shapes(root, config)
    assert read_all(root) == before
    (root / "images" / "000002.jpg").unlink()
    generate_shapes(root, config)
    assert read_all(root) == before


def test_interrupted_run_leaves_no_set_and_is_cleaned_up(tmp_path, monkeypatch):
    root, config = tmp_path / "set", ShapesConfig(num_images=4, seed=1)

    def interrupt(config, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw_scene(config, index)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate_shapes(root, config)
    assert not root.exists()
    (tmp_path / ".set.partial" / "images" / "stale.jpg").write_bytes(b"")
    generate_shapes(root, config)
    assert {path.name for path in (root / "images").iterdir()} == {f"00000{i}.jpg" for i in (1, 2, 3, 4)}
    assert not (tmp_path / ".set.partial").exists()


def test_other_peoples_files_are_left_alone(tmp_path):
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    (root / "images" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="set holds no shapes set"):
        generate_shapes(root, ShapesConfig(num_images=1, seed=1))
    (root / "annotations.json").write_text('{"info": {"generator": "someone else"}}')
    with pytest.raises(FileExistsError, match="set holds no shapes set"):
        generate_shapes(root, ShapesConfig(num_images=1, seed=1))
    assert (root / "images" / "holiday.jpg").read_bytes() == b"mine"


# Loads the module by itself, which is faster than the package, and waits until both processes are there.
TWO_AT_ONCE = """
import pathlib, sys, time
me, directory, root = *sys.argv[1:3], pathlib.Path(sys.argv[3])
sys.path.insert(0, directory)
import shapes
draw_scene = shapes.draw_scene
def count(config, index):
    with open(root.parent / "drawn.txt", "a") as file:
        file.write("x")
    time.sleep(0.05)
    return draw_scene(config, index)
shapes.draw_scene = count
(root.parent / f"ready{me}").touch()
while len(list(root.parent.glob("ready*"))) < 2:
    time.sleep(0.001)
shapes.generate_shapes(root, shapes.ShapesConfig(num_images=20, seed=1))
print(len(list((root / "images").iterdir())))
"""


def test_two_processes_at_once_draw_once(tmp_path):
    rest = str(Path(shapes.__file__).parent), str(tmp_path / "set")
    commands = [[sys.executable, "-c", TWO_AT_ONCE, me, *rest] for me in "ab"]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [worker.communicate(timeout=120)[0].strip() for worker in workers] == ["20", "20"]
    assert (tmp_path / "drawn.txt").read_text() == "x" * 20
