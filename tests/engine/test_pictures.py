"""Pictures of detections in TensorBoard, which training does not notice."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage

from deqdet.engine import UserError, setup
from deqdet.engine.pictures import DetectionPictures, build_pictures

from helpers.engine_toy import IN_PROCESS, parse
from helpers.short_training import in_metrics, train

pytestmark = IN_PROCESS
WORDS = "SOLVER.MAX_ITER", 25, "SOLVER.CHECKPOINT_PERIOD", 100, "DATALOADER.NUM_WORKERS", 0


def pictures(folder) -> dict[str, dict[int, np.ndarray]]:
    """By name and iteration, the pictures as TensorBoard shows them, (H, W, 3)."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        name: {x.step: np.array(Image.open(io.BytesIO(x.encoded_image_string))) for x in events.Images(name)}
        for name in events.Tags()["images"]
    }


def test_they_are_in_tensorboard_at_each_period_and_the_end(toy_config, tmp_path):
    train(toy_config, *WORDS, "VIS_PERIOD", 10)
    found = pictures(tmp_path / "out")
    assert sorted(found) == [f"detections/{i}.png" for i in range(4)]
    for steps in found.values():
        assert sorted(steps) == [9, 19, 24]
        assert all(picture.shape == (256, 512, 3) for picture in steps.values())  # 16 times as large, side by side


class Finds(nn.Module):
    """Finds the same two boxes in every image, one of them with a low score."""

    def __init__(self, box: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes = Boxes(torch.tensor([box, [0.0, 0.0, 999.0, 799.0]]))

    def forward(self, batch):
        assert not self.training and not torch.is_grad_enabled()
        scores, classes = torch.tensor([0.9, 0.2]), torch.tensor([0, 0])
        return [{"instances": Instances((800, 1000), pred_boxes=self.boxes, scores=scores, pred_classes=classes)}]


def bounds(changed: np.ndarray) -> tuple[int, int, int, int]:
    """The smallest and largest x, and the largest y, of the pixels that are drawn upon."""
    y, x = np.nonzero(changed)
    return x.min(), x.max(), y.max()


def test_boxes_on_the_left_and_detections_on_the_right(tmp_path):
    """An image of 1,000 x 800 pixels is shrunk to 640 x 512; the label of a box is above its lower side.

    Its name is not UTF-8, which TensorBoard does not take.
    """
    path = tmp_path / os.fsdecode(b"a\xff.png")
    Image.new("RGB", (1000, 800), (128, 128, 128)).save(path)
    truth = {"bbox": [100, 400, 300, 200], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    inputs = {"file_name": str(path), "height": 800, "width": 1000, "annotations": [truth]}
    model = Finds([500.0, 300.0, 900.0, 700.0])
    hook = DetectionPictures(2, model, lambda: [inputs], ["cell"])
    with EventStorage() as storage:
        for iteration in range(3):
            hook.trainer = SimpleNamespace(iter=iteration, max_iter=9, storage=storage)
            hook.after_step()
    ((name, picture, _),) = storage._vis_data
    assert name == r"detections/a\udcff.png" and picture.shape == (3, 512, 1280) and picture.dtype == np.uint8
    changed = (picture != 128).any(0)
    for part, (left, right, bottom) in ((changed[:, :640], (64, 256, 384)), (changed[:, 640:], (320, 576, 448))):
        assert np.allclose(bounds(part), (left, right, bottom), atol=6)


def test_the_training_is_the_same(toy_config, tmp_path):
    train(toy_config, *WORDS, "VIS_PERIOD", 3)
    train(toy_config, *WORDS, "OUTPUT_DIR", tmp_path / "without")
    assert pictures(tmp_path / "without") == {}
    a, b = (torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("out", "without"))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in b["model"])
    assert in_metrics(tmp_path / "out", "total_loss") == in_metrics(tmp_path / "without", "total_loss") != []


def test_random_states_are_put_back(toy_config, tmp_path):
    """A model that draws when it detects, as a stochastic one may."""
    trainer = train(toy_config, *WORDS, "VIS_PERIOD", 1, "SOLVER.MAX_ITER", 1)
    (hook,) = build_pictures(trainer.cfg, trainer.model)
    hook.trainer = trainer
    load = hook._load
    hook._load = lambda: (torch.rand(3), np.random.rand(3), load())[2]
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    trainer.iter = 0
    hook.after_step()
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    assert trainer.model.training


def test_training_images_where_there_is_no_test_set(toy_config, tmp_path):
    train(toy_config, *WORDS, "SOLVER.MAX_ITER", 1, "VIS_PERIOD", 5, "DATASETS.TEST", "()")
    assert len(pictures(tmp_path / "out")) == 4


def test_a_wrong_period(toy_config):
    with pytest.raises(UserError, match="VIS_PERIOD is -1: it must be an integer of at least 0"):
        setup(parse(toy_config, "VIS_PERIOD", -1))
