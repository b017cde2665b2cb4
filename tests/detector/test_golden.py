"""The released implementations' outputs at small random weights, reproduced by ours with the converted weights."""

import json

import pytest
import torch
from torch import nn

from detectron2.structures import Boxes, Instances

from deqdet.checkpoints.conversion import Renaming
from deqdet.checkpoints.kinds import KINDS
from deqdet.inference import top_detections

from helpers.converter import GOLDEN, golden_weights, load_converted, run_tool

# What the checkpoints do not say.
OVERRIDES = {
    "deqdet": """
MODEL.BACKBONE.FREEZE_AT 2 MODEL.DEQDET.PERTURBATION.KIND none
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 5 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 6
MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT 1 MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL 3
""",
    "sparse_rcnn": "MODEL.BACKBONE.FREEZE_AT 2 MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS 4",
}
LOSSES = {"cls": "cls", "bbox": "l1", "iou": "giou", "ce": "cls", "giou": "giou"}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build("deqdet"): converted by the tool and loaded as it says, once again for each test."""
    converted = {}

    def build_one(name: str) -> nn.Module:
        if name not in converted:
            path = tmp_path_factory.mktemp(name) / "model.pth"
            converted[name] = path, run_tool(GOLDEN[name] / "upstream.pth", path)[-1]
        path, pairs = converted[name]
        return load_converted(path, f"{pairs} {OVERRIDES[name]}")

    return build_one


def read(name: str) -> tuple[dict, dict]:
    """Tensors and figures."""
    expected = torch.load(GOLDEN[name] / "expected.pth", weights_only=True)
    return expected, json.loads((GOLDEN[name] / "expected.json").read_text())


def inputs(expected: dict) -> list[dict]:
    batch = []
    for i in range(2):
        image = expected["images"][i] if "images" in expected else expected[f"image{i}"]
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(expected[f"gt_boxes{i}"])
        instances.gt_classes = expected[f"gt_labels{i}"]
        batch.append({"image": image, "instances": instances})
    return batch


def compare_detections(found: list[Instances], expected: dict) -> None:
    for i, instances in enumerate(found):
        assert instances.pred_classes.tolist() == expected[f"labels{i}"].tolist()
        torch.testing.assert_close(instances.scores, expected[f"scores{i}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(instances.pred_boxes.tensor, expected[f"boxes{i}"], rtol=0, atol=1e-3)


def our_loss(name: str, theirs: str) -> str:
    if name == "deqdet":  # init^1_loss_cls
        where, kind = theirs.split("_loss_")
        return f"loss_{LOSSES[kind]}_{where.replace('^', '+').replace('iter', 'step')}"
    _, kind, *layer = theirs.split("_")  # loss_ce_0; without a number the last one's
    return f"loss_{LOSSES[kind]}_layer{int(layer[0]) + 1 if layer else 3}"


def test_neck_features(build):
    expected, _ = read("deqdet")
    model = build("deqdet").eval()
    with torch.no_grad():
        features, _ = model.encode(model.preprocess(inputs(expected)))
    torch.testing.assert_close(features[2], expected["feat2"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[3], expected["feat3"], rtol=1e-4, atol=1e-5)
    for level in (0, 1):
        mean, std = expected[f"feat{level}_mean_std"]
        torch.testing.assert_close(features[level].mean((2, 3)), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[level].std((2, 3)), std, rtol=1e-4, atol=1e-5)


def test_detections_of_deqdet(build):
    """Theirs are not clipped to the image."""
    expected, _ = read("deqdet")
    model = build("deqdet").eval()
    with torch.no_grad():
        images = model.preprocess(inputs(expected))
        features, initial = model.encode(images)
        prediction = model.decoder.decode(initial, features).prediction
    found = top_detections(prediction, images.image_sizes, model.max_detections)
    assert [len(x) for x in found] == [12, 12]
    compare_detections(found, expected)


def test_detections_of_sparse_rcnn(build):
    expected, _ = read("sparse_rcnn")
    with torch.no_grad():
        found = [x["instances"] for x in build("sparse_rcnn").eval()(inputs(expected))]
    assert [len(x) for x in found] == [9, 9]
    compare_detections(found, expected)


@pytest.mark.parametrize("name, checkpointed", [("deqdet", False), ("deqdet", True), ("sparse_rcnn", False)])
def test_losses_and_gradients(build, name, checkpointed):
    expected, figures = read(name)
    model = build(name)
    if checkpointed:
        model.decoder.checkpoint_segments = True
    losses = model.train()(inputs(expected))
    theirs = {our_loss(name, k): v for k, v in figures["losses"].items() if not k.endswith("pos_acc")}
    assert losses.keys() == theirs.keys()
    for key, value in theirs.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-4), key

    sum(losses.values()).backward()
    ours = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.requires_grad}
    renaming = Renaming(KINDS[name].rules(golden_weights(name)))
    norms = {renaming.ours(key): norm for key, norm in figures["grad_norms"].items()}
    assert norms.keys() == ours.keys()
    for key, norm in ours.items():
        assert norm == pytest.approx(norms[key], rel=1e-3, abs=1e-6), key
