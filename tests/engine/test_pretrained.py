"""A training whose backbone starts from ImageNet weights: which, when, and what is refused. No test has a network."""

import logging
import os
import pickle
import re

import pytest
import safetensors.torch
import torch

from detectron2.modeling import build_model

from deqdet.checkpoints import read_model_file
from deqdet.engine import Trainer, UserError
from deqdet.engine.pretrained import check_backbone_weights, load_backbone_weights
from deqdet.tools.train_net import main

from helpers.engine_toy import IN_PROCESS, write_dataset

timm = pytest.importorskip("timm")
pytestmark = [*IN_PROCESS, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SMALL = "test_efficientnet"
BACKBONE = "MODEL.BACKBONE.NAME", "build_timm_channel_mapper_backbone"
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


def classifier(name, seed=5):
    """The whole network of timm, with random weights that are not those of a model which a test builds."""
    torch.manual_seed(seed)
    return timm.create_model(name).eval()


@pytest.fixture
def file(tmp_path):
    """file("resnet18"): the weights of a network, as timm saves them."""

    def write(name=SMALL, **changed):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({**classifier(name).state_dict(), **changed}, path)
        return str(path)

    return write


@pytest.fixture
def make(small_cfg):
    """make("KEY", value, ...): the config with a small model of timm, and the detector."""

    def build(*overrides):
        cfg = small_cfg(*BACKBONE, "MODEL.TIMM.NAME", SMALL, *overrides)
        torch.manual_seed(0)
        return cfg, build_model(cfg)

    return build


@pytest.mark.parametrize("name", [SMALL, "test_convnext", "test_resnet"])
def test_a_file_with_timms_names(make, file, name):
    """The levels are those of the whole network. Its ConvNeXt has other names as a feature extractor."""
    cfg, model = make("MODEL.TIMM.NAME", name, "MODEL.TIMM.WEIGHTS", file(name))
    load_backbone_weights(model, cfg)
    with torch.no_grad():
        levels = model.eval().backbone.bottom_up(IMAGES)
        expected = classifier(name).forward_intermediates(IMAGES, intermediates_only=True)[-4:]
    for level, reference in zip(levels.values(), expected, strict=True):
        torch.testing.assert_close(level, reference)


def test_only_the_backbone_changes(make, file):
    cfg, model = make("MODEL.TIMM.WEIGHTS", file())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_backbone_weights(model, cfg)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("backbone.bottom_up.net.") for key in changed)


def test_frozen_parts_take_the_weights_too(make, file):
    cfg, model = make("MODEL.TIMM.WEIGHTS", file(), "MODEL.BACKBONE.FREEZE_AT", 2)
    load_backbone_weights(model, cfg)
    stem = model.backbone.bottom_up.net.conv_stem.weight
    assert torch.equal(stem, classifier(SMALL).conv_stem.weight) and not stem.requires_grad


def test_timms_own_weights(make, monkeypatch):
    """As timm downloads them, but from a file at hand."""
    state = classifier(SMALL).state_dict()
    calls = []

    def download(model_id, *_, **__):
        calls.append(model_id)
        return dict(state)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    cfg, model = make("MODEL.TIMM.NAME", f"{SMALL}.r160_in1k", "MODEL.TIMM.PRETRAINED", True)
    load_backbone_weights(model, cfg)
    assert len(calls) == 1 and "test_efficientnet.r160_in1k" in str(calls)
    assert torch.equal(model.backbone.bottom_up.net.conv_stem.weight, state["conv_stem.weight"])


def test_a_download_that_fails_is_one_line(make, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host\nor none")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", fail)
    cfg, model = make("MODEL.TIMM.PRETRAINED", True)
    message = f"MODEL.TIMM.NAME {SMALL} cannot be created with its weights: no route to host or none"
    with pytest.raises(UserError, match=f"^{message}$"):
        load_backbone_weights(model, cfg)


def test_weights_of_the_whole_detector_come_instead(make, tmp_path):
    """Then nothing is looked for: the model may be trained further where the file is not."""
    cfg, model = make("MODEL.TIMM.WEIGHTS", str(tmp_path / "gone.safetensors"), "MODEL.WEIGHTS", "whole.pth")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_backbone_weights(cfg)
    load_backbone_weights(model, cfg)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def test_no_code_in_a_file_runs(make, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(Code(str(canary))))
    torch.save({"conv_stem.weight": Code(str(canary))}, tmp_path / "code.pth")
    for name in ("code.pkl", "code.pth"):
        cfg, model = make("MODEL.TIMM.WEIGHTS", str(tmp_path / name))
        with pytest.raises(UserError, match=f"^MODEL.TIMM.WEIGHTS: .*{name} .*can run code") as error:
            load_backbone_weights(model, cfg)
        assert "\n" not in str(error.value) and not canary.exists()


def test_weights_of_another_model_are_refused(make, file):
    """Also where timm takes what fits and says nothing of the rest."""
    cfg, model = make("MODEL.TIMM.WEIGHTS", file("test_convnext"))
    with pytest.raises(UserError, match=f"test_convnext.safetensors does not hold the weights of {SMALL}: it lacks "):
        load_backbone_weights(model, cfg)
    cfg, model = make("MODEL.TIMM.NAME", "test_resnet", "MODEL.TIMM.WEIGHTS", file(SMALL))
    with pytest.raises(UserError, match="MODEL.TIMM.NAME test_resnet cannot be created with its weights: ") as error:
        load_backbone_weights(model, cfg)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_one_missing_weight_is_named(make, tmp_path):
    weights = classifier(SMALL).state_dict()
    del weights["blocks.2.0.conv_pwl.weight"]
    safetensors.torch.save_file(weights, tmp_path / "cut.safetensors")
    cfg, model = make("MODEL.TIMM.WEIGHTS", str(tmp_path / "cut.safetensors"))
    with pytest.raises(UserError, match="it lacks 1 of them, blocks.2.0.conv_pwl.weight first"):
        load_backbone_weights(model, cfg)


IMAGENET = "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "MODEL.PIXEL_STD", [58.395, 57.12, 57.375]
HALVES = "MODEL.PIXEL_MEAN", [127.5, 127.5, 127.5], "MODEL.PIXEL_STD", [127.5, 127.5, 127.5]


@pytest.mark.parametrize("name, images, fits", [
    ("mobilenetv2_100", IMAGENET, True),
    ("mobilenetv2_100", HALVES, False),
    ("mobilenetv2_100", [*IMAGENET, "INPUT.FORMAT", "BGR"], False),
    ("tf_efficientnet_lite0", HALVES, True),
    ("tf_efficientnet_lite0", IMAGENET, False),
])  # fmt: skip
def test_the_images_that_weights_expect(small_cfg, file, caplog, name, images, fits):
    """Another normalization is refused with timm's own weights, and a warning with a file, which may differ."""
    message = f"MODEL.TIMM.NAME {name}: its weights expect INPUT.FORMAT RGB, MODEL.PIXEL_MEAN "
    cfg = small_cfg(*BACKBONE, "MODEL.TIMM.NAME", name, "MODEL.TIMM.PRETRAINED", True, *images)
    if fits:
        check_backbone_weights(cfg)
    else:
        with pytest.raises(UserError, match=re.escape(message)):
            check_backbone_weights(cfg)
    cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, file()
    with caplog.at_level(logging.WARNING):
        check_backbone_weights(cfg)
    assert [record.message.startswith(message) for record in caplog.records] == [True] * (not fits)
    cfg.MODEL.TIMM.WEIGHTS = ""  # random weights expect nothing
    check_backbone_weights(cfg)
    assert len(caplog.records) == (not fits)


@pytest.fixture
def training(tmp_path, small_cfg, file):
    """The command line of a training of one iteration."""
    write_dataset(tmp_path, tmp_path.name)
    cfg = small_cfg(
        *BACKBONE, "MODEL.TIMM.NAME", SMALL, "MODEL.TIMM.WEIGHTS", file(), "MODEL.DEQDET.NUM_CLASSES", 1,
        "DATASETS.REGISTER", [[tmp_path.name, f"{tmp_path}/boxes.json", str(tmp_path)]],
        "DATASETS.TRAIN", (tmp_path.name,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2,
        "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.BASE_LR", 1e-7, "OUTPUT_DIR", f"{tmp_path}/out",
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return ["--config-file", str(tmp_path / "config.yaml")]


def test_a_training_starts_from_them_and_a_resumed_one_does_not(training, tmp_path, monkeypatch):
    stem = classifier(SMALL).conv_stem.weight
    main(training)
    done = read_model_file(tmp_path / "out" / "model_final.safetensors").weights
    torch.testing.assert_close(done["backbone.bottom_up.net.conv_stem.weight"], stem, rtol=0, atol=1e-5)
    whole = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    # Nothing but the last checkpoint is read now.
    (tmp_path / f"{SMALL}.safetensors").unlink()
    main([*training, "--resume", "SOLVER.MAX_ITER", "3"])
    after = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    assert after.keys() == whole.keys()
    torch.testing.assert_close(after["decoder.refinement.points.offsets.bias"],
                               whole["decoder.refinement.points.offsets.bias"], rtol=0, atol=1e-5)
    # The model file needs neither the file nor a network.
    main(["--model", str(tmp_path / "out" / "model_final.safetensors"), "--eval-only", "DATASETS.TEST",
          f"('{tmp_path.name}',)", "OUTPUT_DIR", str(tmp_path / "evaluated")])  # fmt: skip


def test_a_missing_file_is_one_line_before_anything_starts(training, tmp_path):
    (tmp_path / f"{SMALL}.safetensors").unlink()
    with pytest.raises(SystemExit) as end:
        main(training)
    message = str(end.value.code)
    assert message.startswith(f"error: MODEL.TIMM.WEIGHTS {tmp_path}/{SMALL}.safetensors does not exist")
    assert "\n" not in message


def test_every_way_of_training_loads_them(training, tmp_path, small_cfg):
    """Also detectron2's own, without our command."""
    cfg = small_cfg()
    cfg.merge_from_file(training[1])
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert torch.equal(trainer.model.backbone.bottom_up.net.conv_stem.weight, classifier(SMALL).conv_stem.weight)
