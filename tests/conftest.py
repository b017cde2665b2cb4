"""Small detectors and inputs that several test files share."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from deqdet import add_deqdet_config
from deqdet.decoders import build_decoder

from helpers.catalogs import catalogs_as_before
from helpers.engine_toy import loggers_as_before, write_dataset
from helpers.small_decoders import SHAPES

GPU_TESTS = Path(__file__).resolve().parent / "cuda"
HEIGHT, WIDTH = 64, 96  # of the images, pixels: multiples of 32, so that nothing is padded
# Omega = {1, 2, 3}; no noise.
SMALL = """
MODEL.META_ARCHITECTURE DEQDet MODEL.DEVICE cpu MODEL.WEIGHTS '' MODEL.MASK_ON False
MODEL.BACKBONE.NAME build_basic_resnet_channel_mapper_backbone MODEL.BACKBONE.FREEZE_AT 0
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8
MODEL.RESNETS.NORM BN MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5']
MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375] INPUT.FORMAT RGB
MODEL.DEQDET.HIDDEN_DIM 32 MODEL.DEQDET.NUM_CLASSES 3 MODEL.DEQDET.NUM_QUERIES 6
MODEL.DEQDET.ADAMIXER.NUM_GROUPS 2 MODEL.DEQDET.ADAMIXER.NUM_HEADS 4 MODEL.DEQDET.ADAMIXER.FEEDFORWARD_DIM 64
MODEL.DEQDET.ADAMIXER.NUM_POINTS_INIT 4 MODEL.DEQDET.ADAMIXER.NUM_POINTS_REFINE 4
MODEL.DEQDET.ADAMIXER.NUM_OUT_POINTS 8
MODEL.DEQDET.SPARSE_RCNN.DYNAMIC_DIM 8 MODEL.DEQDET.SPARSE_RCNN.NUM_HEADS 4
MODEL.DEQDET.SPARSE_RCNN.FEEDFORWARD_DIM 64
MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5'] MODEL.FPN.OUT_CHANNELS 32
MODEL.DEQDET.EQUILIBRIUM.TRAIN_STEPS 3 MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 4
MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_COUNT 1 MODEL.DEQDET.EQUILIBRIUM.SUPERVISION_INTERVAL 2
MODEL.DEQDET.PERTURBATION.KIND none MODEL.DEQDET.PERTURBATION.POSITION_SIZE 4.0
TEST.DETECTIONS_PER_IMAGE 6
"""


def _small_cfg(*overrides) -> CfgNode:
    cfg = get_cfg()
    add_deqdet_config(cfg)
    cfg.merge_from_list(SMALL.split())
    cfg.merge_from_list(list(overrides))
    return cfg


def _stir(module: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def _make_instances(boxes: list[list[float]], labels: list[int], height: int, width: int) -> Instances:
    return Instances(
        (height, width),
        gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
        gt_classes=torch.tensor(labels, dtype=torch.int64),
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # on tensors as small as these, threads mostly wait for each other
    paths = [Path(str(argument).split("::")[0]).resolve() for argument in config.args]
    if not all(path.is_relative_to(GPU_TESTS) for path in paths):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that the tests find the same on a machine with a GPU


def pytest_collection_finish() -> None:
    gc.freeze()  # otherwise each full collection visits the libraries' objects, which takes a twentieth of the run


@pytest.fixture(scope="session", autouse=True)
def cache_of_checks(tmp_path_factory) -> Iterator[None]:
    """What checks of data sets remember goes into a temporary folder, also that of processes which a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FVCORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def small_cfg() -> Callable[..., CfgNode]:
    """small_cfg("KEY", value, ...): the small model's config, with overrides."""
    return _small_cfg


@pytest.fixture(scope="session")
def stir() -> Callable[..., None]:
    """stir(module): noise on every parameter, so that no zero of an initialisation hides anything."""
    return _stir


@pytest.fixture
def own_catalogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove from the catalogs what a test registers, and keep the cache of the checks in the test's folder."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    with catalogs_as_before():
        yield


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def small_decoder() -> Callable[..., nn.Module]:
    """small_decoder("KEY", value, ...): of two levels, see small_decoders.py; in float64, stirred."""

    def build(*overrides) -> nn.Module:
        torch.manual_seed(0)
        decoder = build_decoder(_small_cfg(*overrides), SHAPES).double()
        _stir(decoder)
        return decoder

    return build


@pytest.fixture(scope="session")
def small_model() -> Callable[..., nn.Module]:
    """small_model("KEY", value, ...): built from small_cfg, always with the same weights, stirred."""

    def build(*overrides) -> nn.Module:
        torch.manual_seed(0)
        model = build_model(_small_cfg(*overrides))
        _stir(model, size=0.01)  # so little that the boxes stay in the image
        return model

    return build


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., list[dict]]:
    """make_inputs(2, 0): two images of noise, the first with two boxes, the second with none."""

    def make(*counts: int, height: int = HEIGHT, width: int = WIDTH) -> list[dict]:
        generator = torch.Generator().manual_seed(7)
        batch = []
        for count in counts:
            image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
            boxes = [[5.0 + 9 * i, 6.0 + 4 * i, 30.0 + 14 * i, 33.0 + 7 * i] for i in range(count)]
            instances = _make_instances(boxes, [i % 3 for i in range(count)], height, width)
            batch.append({"image": image, "instances": instances})
        return batch

    return make


@pytest.fixture
def loggers() -> Iterator[None]:
    """The loggers are afterwards as they were, whatever a set-up does to them."""
    with loggers_as_before():
        yield


@pytest.fixture
def toy_config(tmp_path) -> str:
    """The config file of the toy detector (engine_toy.py), with its data set beside it."""
    return write_dataset(tmp_path, tmp_path.name)
