"""The six detectors, three decoders by two layers: gradients, noise, mixed precision; training to a checkpoint."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from deqdet.engine import Trainer, setup
from deqdet.engine.trainer import load_weights

from helpers.batches import total
from helpers.engine_toy import IN_PROCESS, parse
from helpers.paths import QUICK_CONFIGS

pytestmark = IN_PROCESS

DECODERS = {
    "StackedDecoder": ["layer1", "layer2", "layer3"],
    "RecurrentDecoder": ["init", "step1", "step2"],
    "EquilibriumDecoder": ["init", "init+1", "init+2", "step1", "step2", "step3"],
}
LAYERS = {
    "AdaMixerLayer": ("MODEL.BACKBONE.NAME", "build_basic_resnet_channel_mapper_backbone"),
    "SparseRCNNLayer": ("MODEL.BACKBONE.NAME", "build_basic_resnet_fpn_backbone"),
}
NOISE = "MODEL.DEQDET.PERTURBATION.KIND", "multi-step", "MODEL.DEQDET.PERTURBATION.PROBABILITY", 1.0
CONFIGS = {
    "adamixer": ("StackedDecoder", "AdaMixerLayer"),
    "rnndet": ("RecurrentDecoder", "AdaMixerLayer"),
    "deqdet": ("EquilibriumDecoder", "AdaMixerLayer"),
    "sparse_rcnn": ("StackedDecoder", "SparseRCNNLayer"),
    "rnn_sparse_rcnn": ("RecurrentDecoder", "SparseRCNNLayer"),
    "deq_sparse_rcnn": ("EquilibriumDecoder", "SparseRCNNLayer"),
}
NARROW = """
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.DEQDET.HIDDEN_DIM 32
MODEL.FPN.OUT_CHANNELS 32 MODEL.DEQDET.NUM_LAYERS 3 MODEL.DEQDET.NUM_QUERIES 8
MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT 16 MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS 8
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 3 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 4
INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 DATASETS.TRAIN ('shapes_seed3_24',) DATASETS.TEST ('shapes_seed4_8',)
SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 12 SOLVER.WARMUP_ITERS 2 TEST.DETECTIONS_PER_IMAGE 8
"""
# RoIAlign reads them for boxes of 112 pixels and more; images of 64 pixels may have none.
COARSE_LEVELS = ("backbone.fpn_output3", "backbone.fpn_output4", "backbone.fpn_output5")


@pytest.fixture(params=[(decoder, layer) for decoder in DECODERS for layer in LAYERS], ids="-".join)
def combination(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def model(small_model, combination):
    """model("KEY", value, ...): the combination's detector."""
    decoder, layer = combination

    def build(*overrides) -> nn.Module:
        keys = "MODEL.DEQDET.DECODER", decoder, "MODEL.DEQDET.REFINEMENT_LAYER", layer, *LAYERS[layer]
        return small_model(*keys, "MODEL.DEQDET.NUM_LAYERS", 3, *overrides).train()

    return build


def loss_names(decoder: str) -> list[str]:
    return [f"loss_{kind}_{name}" for name in DECODERS[decoder] for kind in ("cls", "l1", "giou")]


# Small models


@pytest.mark.parametrize("learn_boxes", [False, True])
def test_every_parameter_is_trained(model, combination, make_inputs, learn_boxes):
    """From boxes of 51 to 512 pixels, so that RoIAlign reads every level."""
    built = model("MODEL.DEQDET.QUERIES.LEARN_BOXES", learn_boxes)
    with torch.no_grad():
        built.queries.boxes[:, 2:] *= torch.tensor([1.0, 0.8, 0.5, 0.4, 0.25, 0.1])[:, None]
    losses = built(make_inputs(2, 1, height=512, width=512))
    assert list(losses) == loss_names(combination[0])
    total(losses).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert ("queries.boxes" in dict(built.named_parameters())) == learn_boxes


def test_a_batch_without_boxes(model, make_inputs):
    """Gradients may be 0 there, but DDP wants one for every parameter."""
    built = model("MODEL.DEQDET.QUERIES.LEARN_BOXES", True)
    losses = built(make_inputs(0, 0))
    assert all((loss > 0) == name.startswith("loss_cls") for name, loss in losses.items())
    total(losses).backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_mixed_precision(model, make_inputs):
    """bfloat16 has 8 bits: losses stay within a few per cent of those in float32, gradients are float32."""
    built, inputs = model("MODEL.DEQDET.FIX_BN_STATISTICS", True), make_inputs(2, 1)
    exact = built(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = built(inputs)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05), name
    total(losses).backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in built.parameters())


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
def test_boxes_stay_valid_under_noise(small_model, make_inputs, layer):
    """25 pixels on every corner before each of 20 steps, in images of 64 x 96."""
    steps = "MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS", 20, "MODEL.DEQDET.PERTURBATION.POSITION_SIZE", 25.0
    built = small_model("MODEL.DEQDET.REFINEMENT_LAYER", layer, *LAYERS[layer], *NOISE, *steps)
    features, initial = built.encode(built.preprocess(make_inputs(2, 1)))
    torch.manual_seed(0)
    noisy = built.decoder.supervise(initial, features)
    built.decoder.perturbation = replace(built.decoder.perturbation, probability=0.0)
    clean = built.decoder.supervise(initial, features)
    for name, prediction in noisy.items():
        boxes = prediction.boxes
        assert boxes.isfinite().all() and (boxes[..., 2:] > boxes[..., :2]).all(), name
        assert prediction.logits.isfinite().all(), name
        moved = (boxes - clean[name].boxes).abs().amax(dim=2)
        assert (moved > 1).all() if name.startswith("step") else not moved.any(), name


# Quick configs


class SteadyTrainer(Trainer):
    """Every batch is the same, so that the loss of one iteration compares with another's."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        batch = next(iter(super().build_train_loader(cfg)))
        while True:
            yield batch


@pytest.fixture
def configure(tmp_path_factory, tmp_path, monkeypatch):
    """configure("deqdet", "KEY", value, ...): the narrowed quick config, writing to tmp_path."""
    shared = tmp_path_factory.getbasetemp() / "combinations"  # the pictures are drawn once
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared))

    def build(name: str, *words, flags: tuple[str, ...] = ()) -> CfgNode:
        config = QUICK_CONFIGS / f"{name}_shapes.yaml"
        return setup(parse(str(config), *flags, *NARROW.split(), "OUTPUT_DIR", tmp_path, *words))

    return build


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_to_a_checkpoint(configure, name, tmp_path):
    cfg = configure(name)
    assert (cfg.MODEL.DEQDET.DECODER, cfg.MODEL.DEQDET.REFINEMENT_LAYER) == CONFIGS[name]
    trainer = SteadyTrainer(cfg)
    trainer.resume_or_load(resume=False)
    before, losses = values(trainer.model), []
    run_step = trainer.run_step

    def observed_step() -> None:
        run_step()
        losses.append(trainer.storage.latest()["total_loss"][0])

    trainer.run_step = observed_step
    trainer.train()
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    for key, value in values(trainer.model).items():
        assert value.isfinite().all(), key
        assert key.startswith(COARSE_LEVELS) or not torch.equal(value, before[key]), key

    written = tmp_path / "inference" / "coco_instances_results.json"
    at_the_end = json.loads(written.read_text())
    # Images x DETECTIONS_PER_IMAGE, less boxes outside the image: how many, depends on what the training draws.
    assert 8 * 4 < len(at_the_end) <= 8 * 8
    written.unlink()
    cfg = configure(name, "MODEL.WEIGHTS", tmp_path / "model_final.pth", flags=("--eval-only",))
    fresh = Trainer.build_model(cfg)
    load_weights(fresh, cfg, resume=False)
    Trainer.test(cfg, fresh)
    assert json.loads(written.read_text()) == at_the_end
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
