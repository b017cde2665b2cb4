"""A toy detector, its data set and its config, for the tests of the engine."""

import argparse
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances

from deqdet.engine import argument_parser

from helpers.paths import TOOLS

TRAIN_NET = TOOLS / "train_net.py"
# For tests that set up a run without a process of its own.
IN_PROCESS = [
    pytest.mark.usefixtures("loggers"),
    # detectron2's default_setup reads the config file without closing it.
    pytest.mark.filterwarnings(r"ignore:unclosed file .*\.yaml:ResourceWarning"),
]
CONFIG = """
MODEL:
  META_ARCHITECTURE: "EngineToy"
  DEVICE: "cpu"
  DEQDET:
    NUM_CLASSES: 1
DATASETS:
  REGISTER: [["engine_{tag}", "{root}/boxes.json", "{root}"]]
  TRAIN: ("engine_{tag}",)
  TEST: ("engine_{tag}",)
INPUT:
  MIN_SIZE_TRAIN: (16,)
  MIN_SIZE_TEST: 16
DATALOADER:
  NUM_WORKERS: 0
SOLVER:
  IMS_PER_BATCH: 2
  BASE_LR: 0.1
  MAX_ITER: 4
  WARMUP_ITERS: 3
  CHECKPOINT_PERIOD: 2
  CLIP_GRADIENTS:
    ENABLED: True
    CLIP_TYPE: "full_model"
SEED: 1
VERSION: 2
OUTPUT_DIR: "{root}/out"
"""


@META_ARCH_REGISTRY.register()
class EngineToy(nn.Module):
    """Finds the brighter half of an image: two candidates, the left and the right half.

    An image takes as many "steps" as its id says.
    """

    def __init__(self, cfg):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.BatchNorm2d(2))
        self.decoder = nn.Linear(2, 2)

    def forward(self, batched_inputs):
        images = torch.stack([x["image"] for x in batched_inputs]).float() / 255
        scores = self.decoder(self.backbone(images).mean((2, 3)))
        if self.training:
            right = torch.tensor([float(x["instances"].gt_boxes.tensor[0, 0] >= 8) for x in batched_inputs])
            return {"loss_side": (scores.diff()[:, 0] - right).square().mean()}
        pairs = zip(batched_inputs, scores, strict=True)
        return [{"instances": self.detections(x, row), "steps": torch.tensor(x["image_id"])} for x, row in pairs]

    @staticmethod
    def detections(inputs, scores):
        height, width = inputs["height"], inputs["width"]
        boxes = torch.tensor([[0.0, 0.0, width / 2, height], [width / 2, 0.0, width, height]])
        found = {"pred_boxes": Boxes(boxes), "pred_classes": torch.zeros(2, dtype=torch.long)}
        return Instances((height, width), **found, scores=scores.sigmoid())


@META_ARCH_REGISTRY.register()
class WiderToy(EngineToy):
    """An EngineToy whose layers have other sizes."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4))
        self.decoder = nn.Linear(4, 2)


def write_dataset(root: Path, tag: str) -> str:
    """Four images of 16 x 16 pixels with a box on one half; returns the config file."""
    images, annotations = [], []
    rng = np.random.default_rng(0)
    for i in range(4):
        left = 8 * (i % 2)
        image = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        image[:, left : left + 8] += np.uint8(20 * (i + 1))
        cv2.imwrite(f"{root}/{i}.png", image)
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": 16, "width": 16})
        box = {"bbox": [left, 0, 8, 16], "area": 128, "iscrowd": 0}
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1} | box)
    whole = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "half"}]}
    Path(root, "boxes.json").write_text(json.dumps(whole))
    config = Path(root, "toy.yaml")
    config.write_text(CONFIG.format(root=root, tag=tag))
    return str(config)


def parse(config: str, *words) -> argparse.Namespace:
    return argument_parser().parse_args(["--config-file", config, *map(str, words)])


@contextmanager
def loggers_as_before() -> Iterator[None]:
    """Undo what default_setup does to the loggers."""
    known = [logging.getLogger(name) for name in ("detectron2", "fvcore", "deqdet")]
    before = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in known]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
