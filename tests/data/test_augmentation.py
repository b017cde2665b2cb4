"""Augmentation policies, run through detectron2's mapper on images whose boxes are painted."""

import numpy as np
import pytest
from PIL import Image

from detectron2.config import get_cfg
from detectron2.structures import BoxMode

from deqdet import add_deqdet_config
from deqdet.data import build_augmentation, build_mapper

HEIGHT, WIDTH = 96, 128
BOX = (20, 30, 61, 55)  # xyxy, in neither direction symmetric


@pytest.fixture(autouse=True)
def seed():
    np.random.seed(0)


@pytest.fixture
def record(tmp_path) -> dict:
    """Make a black image with one white box, in detectron2's format."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    annotation = {"bbox": list(BOX), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 2, "iscrowd": 0}
    record = {"file_name": str(tmp_path / "a.png"), "height": HEIGHT, "width": WIDTH, "image_id": 1}
    return record | {"annotations": [annotation]}


def make_cfg(policy, flip="none", min_size=(64, 96, 160), crop_resize=(80, 100), crop_size=(40, 60)):
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.INPUT.AUGMENTATION, cfg.INPUT.RANDOM_FLIP = policy, flip
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = min_size, 1000
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 1000
    cfg.INPUT.DETR_CROP.RESIZE, cfg.INPUT.DETR_CROP.SIZE = list(crop_resize), list(crop_size)
    return cfg


def painted(image) -> np.ndarray | None:
    """Return the bounds xyxy of all pixels brighter than half of white, or None if there are none."""
    mask = image[0].numpy() > 127
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


@pytest.mark.parametrize("policy", ["1x", "2x"])
def test_boxes_move_with_the_image(record, policy):
    # Sizes that never enlarge a crop, which would enlarge the rounding at its edge.
    cfg = make_cfg(policy, flip="both", min_size=(40, 48), crop_resize=(96, 144), crop_size=(50, 70))
    mapper = build_mapper(cfg, is_train=True)
    seen = {"whole": 0, "cut or gone": 0}
    for _ in range(150):
        out = mapper(record)
        expected, boxes = painted(out["image"]), out["instances"].gt_boxes.tensor.numpy()
        if expected is None:  # at most a sliver is left, which blurs away when resized
            assert len(boxes) == 0 or (boxes[:, 2:] - boxes[:, :2]).min() < 2
        else:
            assert len(boxes) == 1 and np.abs(boxes[0] - expected).max() <= 1.0
            assert out["instances"].gt_classes.tolist() == [2]
        scale = out["image"].shape[1] / HEIGHT
        whole = expected is not None and np.allclose(expected[2:] - expected[:2], scale * np.array([41, 25]), atol=2)
        seen["whole" if whole else "cut or gone"] += 1
    assert seen["whole"] > 50 and (seen["cut or gone"] > 30) == (policy == "2x")


def test_1x_sizes(record):
    mapper = build_mapper(make_cfg("1x"), is_train=True)
    sizes = {tuple(mapper(record)["image"].shape[1:]) for _ in range(40)}
    assert sizes == {(64, 85), (96, 128), (160, 213)}  # the short side as given, 4:3 rounded


def test_long_side_is_limited(record):
    cfg = make_cfg("1x", min_size=(160,))
    cfg.INPUT.MAX_SIZE_TRAIN = 180
    assert tuple(build_mapper(cfg, is_train=True)(record)["image"].shape[1:]) == (135, 180)


def test_2x_crops_half_of_the_time(record):
    """A crop of 40 to 60 pixels from 4:3 images keeps their aspect by chance only."""
    mapper = build_mapper(make_cfg("2x", min_size=(300,)), is_train=True)
    shapes = np.array([mapper(record)["image"].shape[1:] for _ in range(400)])
    ratios = shapes[:, 1] / shapes[:, 0]
    assert shapes.min() == 300  # the short side of them all
    uncropped = np.isclose(ratios, 4 / 3, atol=1e-9)
    assert 0.42 < uncropped.mean() < 0.6  # 0.5, and some of the crops
    assert ratios.min() >= 40 / 60 - 0.01 and ratios.max() <= 60 / 40 + 0.01
    assert len(np.unique(ratios.round(2))) > 30  # sides are drawn on their own


def test_crop_smaller_than_asked_when_the_image_is(record):
    cfg = make_cfg("2x", min_size=(64,), crop_resize=(32,), crop_size=(384, 600))
    shapes = {tuple(build_mapper(cfg, is_train=True)(record)["image"].shape[1:]) for _ in range(20)}
    assert shapes == {(64, 85), (64, 86)}  # whole images all: directly, and by way of 32 x 43


@pytest.mark.parametrize("flip, count", [("none", 1), ("horizontal", 2), ("vertical", 2), ("both", 4)])
def test_flips(record, flip, count):
    mapper = build_mapper(make_cfg("1x", flip=flip, min_size=(HEIGHT,)), is_train=True)
    boxes = {tuple(mapper(record)["instances"].gt_boxes.tensor[0].tolist()) for _ in range(60)}
    x0, y0, x1, y1 = BOX
    mirrored = {"horizontal": (WIDTH - x1, y0, WIDTH - x0, y1), "vertical": (x0, HEIGHT - y1, x1, HEIGHT - y0)}
    assert len(boxes) == count and BOX in boxes
    assert {flip} - {"none", "both"} <= {name for name, box in mirrored.items() if box in boxes}


@pytest.mark.parametrize("policy", ["1x", "2x"])
def test_image_without_boxes(record, policy):
    record["annotations"] = []
    mapper = build_mapper(make_cfg(policy, flip="both"), is_train=True)
    for _ in range(10):
        instances = mapper(record)["instances"]
        assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)


def test_inference_only_resizes(record):
    out = build_mapper(make_cfg("2x", flip="both"), is_train=False)(record)
    assert tuple(out["image"].shape) == (3, 64, 85)
    assert (out["height"], out["width"]) == (HEIGHT, WIDTH) and "annotations" not in out
    assert np.abs(painted(out["image"]) - np.array(BOX) * 2 / 3).max() <= 1.0


def test_default_sizes_are_detrs():
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.INPUT.AUGMENTATION = "2x"
    flip, crop, resize = build_augmentation(cfg)
    first, second = crop.aug.augs
    assert (flip.horizontal, crop.prob) == (True, 0.5)
    assert (first.short_edge_length, first.is_range) == ([400, 500, 600], False)
    assert (second.crop_type, second.crop_size) == ("absolute_range", [384, 600])
    assert (resize.short_edge_length, resize.max_size) == ((800,), 1333)
