"""The released implementation's outputs at small random weights (tests/data/golden_deqdet), reproduced by ours."""

import json
import re
from pathlib import Path

import pytest
import torch

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deqdet import add_deqdet_config

DATA = Path(__file__).parent / "data" / "golden_deqdet"
OVERRIDES = """
MODEL.META_ARCHITECTURE DEQDet MODEL.DEVICE cpu MODEL.MASK_ON False
MODEL.BACKBONE.NAME build_resnet_channel_mapper_backbone MODEL.BACKBONE.FREEZE_AT 2
MODEL.RESNETS.STEM_OUT_CHANNELS 4 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4
MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.NORM BN MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375] INPUT.FORMAT RGB
MODEL.DEQDET.FIX_BN_STATISTICS True MODEL.DEQDET.NECK.KERNEL_SIZE 3 MODEL.DEQDET.HIDDEN_DIM 32
MODEL.DEQDET.NUM_CLASSES 7 MODEL.DEQDET.NUM_QUERIES 12 MODEL.DEQDET.ADAMIXER.NUM_GROUPS 2
MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT 8 MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE 8
MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS 8 MODEL.DEQDET.ADAMIXER.NUM_HEADS 4 MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM 64
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 5 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 6
MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT 1 MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL 3
MODEL.DEQDET.PERTURBATION.KIND none TEST.DETECTIONS_PER_IMAGE 12
"""
# Released name -> ours, in order; the first that matches is taken.
RENAMES = [
    (r"^backbone\.(conv1)\.", r"backbone.bottom_up.stem.\1."),
    (r"^backbone\.bn1\.", r"backbone.bottom_up.stem.conv1.norm."),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.0\.", lambda m: f"{_block(m)}.shortcut."),
    (r"^backbone\.layer(\d)\.(\d+)\.downsample\.1\.", lambda m: f"{_block(m)}.shortcut.norm."),
    (r"^backbone\.layer(\d)\.(\d+)\.bn(\d)\.", lambda m: f"{_block(m)}.conv{m[3]}.norm."),
    (r"^backbone\.layer(\d)\.(\d+)\.", lambda m: f"{_block(m)}."),
    (r"^neck\.convs\.(\d)\.conv\.", r"backbone.convs.\1."),
    (r"^neck\.gn_out\.", "backbone.norm."),
    (r"^rpn_head\.init_proposal_bboxes\.weight$", "queries.boxes"),
    (r"^rpn_head\.init_proposal_features\.", "queries.content."),
    (r"^roi_head\.bbox_head\.(\d)\.", lambda m: f"decoder.{('initialization', 'refinement')[int(m[1])]}."),
]
LAYER_RENAMES = {
    "iof_tau": "attention.iof_scale",
    "attention.attn.": "attention.attention.",
    "ffn.layers.0.0.": "feedforward.0.",
    "ffn.layers.1.": "feedforward.2.",
    "ffn_norm.": "feedforward_norm.",
    "cls_fcs.": "class_branch.",
    "fc_cls.": "class_branch.3.",
    "reg_fcs.": "box_branch.",
    "fc_reg.": "box_branch.3.",
    "sampling_n_mixing.sampling_offset_generator.0.": "points.offsets.",
    "sampling_n_mixing.norm.": "mixing_norm.",
    "sampling_n_mixing.adaptive_mixing.parameter_generator.0.": "mixing.generator.",
    "sampling_n_mixing.adaptive_mixing.out_proj.": "mixing.out.",
}


def _block(match: re.Match) -> str:
    return f"backbone.bottom_up.res{int(match[1]) + 1}.{match[2]}"


def our_name(name: str) -> str | None:
    """Our name of a released parameter, None for one that is never used."""
    if "instance_interactive_conv" in name or name.endswith("num_batches_tracked"):
        return None
    for pattern, replacement in RENAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    prefix = re.match(r"decoder\.\w+\.", name)
    if prefix:
        for old, new in LAYER_RENAMES.items():
            if name.startswith(old, prefix.end()):
                return prefix[0] + new + name[prefix.end() + len(old) :]
    return name


@pytest.fixture(scope="module")
def expected() -> dict:
    return torch.load(DATA / "expected.pth", weights_only=True)


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((DATA / "expected.json").read_text())


@pytest.fixture
def model() -> torch.nn.Module:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list(OVERRIDES.split())
    model = build_model(cfg)
    released = torch.load(DATA / "upstream.pth", weights_only=True)["state_dict"]
    weights = {our_name(name): value for name, value in released.items() if our_name(name)}
    model.load_state_dict(weights | {k: v for k, v in model.state_dict().items() if k.endswith("tracked")})
    return model


def inputs(expected: dict) -> list[dict]:
    batch = []
    for i, image in enumerate(expected["images"]):
        instances = Instances(tuple(image.shape[1:]))
        instances.gt_boxes = Boxes(expected[f"gt_boxes{i}"])
        instances.gt_classes = expected[f"gt_labels{i}"]
        batch.append({"image": image, "instances": instances})
    return batch


def test_neck_features(model, expected):
    with torch.no_grad():
        features, _ = model.eval().encode(model.preprocess(inputs(expected)))
    torch.testing.assert_close(features[2], expected["feat2"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[3], expected["feat3"], rtol=1e-4, atol=1e-5)
    for level in (0, 1):
        mean, std = expected[f"feat{level}_mean_std"]
        torch.testing.assert_close(features[level].mean((2, 3)), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(features[level].std((2, 3)), std, rtol=1e-4, atol=1e-5)


def test_detections(model, expected):
    with torch.no_grad():
        images = model.eval().preprocess(inputs(expected))
        features, initial = model.encode(images)
        prediction = model.decoder.decode(initial, features)
    from deqdet.inference import top_detections

    for i, found in enumerate(top_detections(prediction, images.image_sizes, 12)):
        assert found.pred_classes.tolist() == expected[f"labels{i}"].tolist()
        torch.testing.assert_close(found.scores, expected[f"scores{i}"], rtol=0, atol=1e-5)
        torch.testing.assert_close(found.pred_boxes.tensor, expected[f"boxes{i}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_losses_and_gradients(model, expected, figures, checkpointed):
    model.decoder.checkpoint_segments = checkpointed
    losses = model.train()(inputs(expected))
    theirs = {k: v for k, v in figures["losses"].items() if not k.endswith("pos_acc")}
    assert len(losses) == len(theirs)
    for name, value in theirs.items():
        where, kind = name.split("_loss_")
        where = where.replace("^", "+").replace("iter", "step")
        kind = {"cls": "cls", "bbox": "l1", "iou": "giou"}[kind]
        assert losses[f"loss_{kind}_{where}"].item() == pytest.approx(value, rel=1e-4), name

    sum(losses.values()).backward()
    ours = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    norms = {our_name(name): norm for name, norm in figures["grad_norms"].items() if our_name(name)}
    assert norms.keys() - {"queries.boxes"} == ours.keys()
    for name, norm in ours.items():
        assert norm == pytest.approx(norms[name], rel=1e-3, abs=1e-6), name
