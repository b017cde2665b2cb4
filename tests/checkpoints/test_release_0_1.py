"""A checkpoint that release 0.1.0 saved while it trained loads unchanged and detects what it detected there."""

import json
import lzma

import pytest
import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from deqdet import add_deqdet_config
from deqdet.checkpoints import CompleteCheckpointer, load_model_config, publish_checkpoint, read_model_file
from deqdet.engine.optimizer import build_optimizer

from helpers.paths import ROOT

RELEASE = ROOT / "tests" / "checkpoints" / "release_0_1"


@pytest.fixture
def checkpoint(tmp_path):
    """The file that PeriodicCheckpointer wrote after two iterations, with the optimizer's state."""
    path = tmp_path / "model_0000001.pth"
    path.write_bytes(lzma.decompress((RELEASE / "model_0000001.pth.xz").read_bytes()))
    return path


def read_config() -> CfgNode:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_file(str(RELEASE / "config.yaml"))
    return cfg


# Of scores, and a hundred times as much of boxes in pixels: the step has been made faster since, and rounds otherwise.
ROUNDING = 1e-5


def assert_same_detections(model: torch.nn.Module, *, atol: float) -> None:
    channel, y, x = torch.meshgrid(torch.arange(3), torch.arange(64), torch.arange(96), indexing="ij")
    image = ((channel + 2) * x + (5 - channel) * y + x * y // 16) % 256
    with torch.no_grad():
        found = model.eval()([{"image": image.to(torch.uint8), "height": 64, "width": 96}])[0]
    expected = json.loads((RELEASE / "detections.json").read_text())
    instances = found["instances"]
    assert int(found["steps"]) == expected["steps"]
    assert instances.pred_classes.tolist() == expected["classes"]
    torch.testing.assert_close(instances.scores, torch.tensor(expected["scores"]), rtol=0, atol=atol)
    boxes = torch.tensor(expected["boxes"])
    assert boxes.shape == (4, 4)
    torch.testing.assert_close(instances.pred_boxes.tensor, boxes, rtol=0, atol=100 * atol)


def test_it_loads_and_detects_the_same(checkpoint):
    model = build_model(read_config())
    extra = CompleteCheckpointer(model).load(str(checkpoint))
    saved = torch.load(checkpoint, weights_only=True)
    weights = model.state_dict()
    assert weights.keys() == saved["model"].keys()
    assert all(torch.equal(weights[name], value) for name, value in saved["model"].items())
    assert_same_detections(model, atol=ROUNDING)

    assert extra["iteration"] == 1
    optimizer = build_optimizer(read_config(), model)
    optimizer.load_state_dict(extra["trainer"]["_trainer"]["optimizer"])
    assert {int(state["step"]) for state in optimizer.state_dict()["state"].values()} == {2}


def test_published_it_needs_no_config(checkpoint, tmp_path):
    output = tmp_path / "model.safetensors"
    publish_checkpoint(checkpoint, output, cfg=read_config(), class_names=["a", "b", "c"])
    cfg = load_model_config(read_model_file(output))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    CompleteCheckpointer(model).load(str(output))
    assert_same_detections(model, atol=ROUNDING)
