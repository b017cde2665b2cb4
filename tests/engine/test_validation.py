"""The training losses on the test sets, which an evaluation computes and training does not notice."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from deqdet.data import build_mapper, build_validation_loader
from deqdet.engine import UserError, setup
from deqdet.engine.early_stop import EarlyStop
from deqdet.engine.validation import compute_losses

from helpers.engine_toy import IN_PROCESS, parse
from helpers.short_training import in_metrics, in_tensorboard, train
from helpers.two_ranks import run_two_ranks

pytestmark = IN_PROCESS
WORDS = "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 6, "TEST.VALIDATION_LOSS", True


class Weighing(nn.Module):
    """Two losses of an image: one a box, and a tenth of the image's id, divided by the boxes as a criterion does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.modes = []

    def forward(self, batch):
        (record,) = batch
        self.modes.append((self.training, self.inner.training, torch.is_grad_enabled()))
        boxes = max(len(record["instances"]), 1)
        return {"loss_a": self.weight * 3.0, "loss_b": torch.tensor(record["image_id"] / 10 / boxes)}


def test_images_count_by_their_boxes():
    model = Weighing()
    images = (1, 4), (2, 0), (4, 5)  # id, boxes
    found = compute_losses(model, [[{"image_id": i, "instances": [0] * boxes}] for i, boxes in images])
    # (0.1 + 0.2 + 0.4) / (4 + 1 + 5)
    assert found == pytest.approx({"loss_a": 3.0, "loss_b": 0.07, "total_loss": 3.07})
    assert model.modes == 3 * [(True, False, False)]
    assert model.training and model.inner.training


@pytest.mark.parametrize("boxes", [(2, 1, 3), (40, 2)])  # the model has 6 queries
def test_it_is_the_loss_of_one_large_batch(small_model, make_inputs, boxes):
    """Without noise, and with BatchNorm fixed, training divides the sum over all images by all matched boxes."""
    model = small_model("MODEL.DEQDET.FIX_BN_STATISTICS", True)
    batch = [{**record, "image_id": i + 1} for i, record in enumerate(make_inputs(*boxes))]
    expected = {name: loss.item() for name, loss in model(batch).items()}
    found = compute_losses(model, [[record] for record in batch])
    total = found.pop("total_loss")
    assert found == pytest.approx(expected, rel=1e-4) and len(found) > 5
    assert total == pytest.approx(sum(expected.values()), rel=1e-4)


def test_noise_is_the_same_at_every_evaluation_and_training_sees_none_of_it(small_model, make_inputs):
    model = small_model("MODEL.DEQDET.PERTURBATION.KIND", "multi-step", "MODEL.DEQDET.PERTURBATION.PROBABILITY", 1.0)
    quiet = small_model()
    batches = [[{**record, "image_id": i + 1}] for i, record in enumerate(make_inputs(2, 1, 3))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with EventStorage(19) as storage:  # an iteration in which the criterion writes its accuracy
        found = compute_losses(model, batches)
    assert storage.latest() == {}
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.rand(3)
    assert compute_losses(model, batches) == found
    assert compute_losses(model, batches[::-1]) == pytest.approx(found, rel=1e-6)  # of the image, not of the order
    assert compute_losses(quiet, batches)["total_loss"] != pytest.approx(found["total_loss"], rel=1e-4)


def weights(folder) -> dict:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def test_the_losses_are_written_and_the_training_is_the_same(toy_config, tmp_path):
    train(toy_config, *WORDS)
    train(toy_config, *WORDS, "TEST.VALIDATION_LOSS", False, "OUTPUT_DIR", tmp_path / "without")
    for find in (in_metrics, in_tensorboard):
        found = find(tmp_path / "out", "validation/loss_side")
        assert [iteration for iteration, _ in found] == [1, 3, 6] and len({value for _, value in found}) == 3
        assert find(tmp_path / "out", "validation/total_loss") == found
    assert in_metrics(tmp_path / "without", "validation/total_loss") == []
    with_it, without = weights(tmp_path / "out"), weights(tmp_path / "without")
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert in_metrics(tmp_path / "out", "total_loss") == in_metrics(tmp_path / "without", "total_loss") != []


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical", "both"])
def test_its_images_are_not_flipped(toy_config, flip):
    """Neither the flips of training nor an error for "both", which detectron2's own mapper does not know."""
    cfg = setup(parse(toy_config, "INPUT.RANDOM_FLIP", flip))
    plain = [build_mapper(cfg, is_train=False)(x) for x in DatasetCatalog.get(cfg.DATASETS.TEST[0])]
    found = [record for (record,) in build_validation_loader(cfg, cfg.DATASETS.TEST[0])]
    for record, expected in zip(found, plain, strict=True):
        assert torch.equal(record["image"], expected["image"]) and "instances" in record


def test_it_can_end_the_training(toy_config, tmp_path):
    stop = "SOLVER.EARLY_STOP.PATIENCE", 1, "SOLVER.EARLY_STOP.METRIC", "validation_loss"
    trainer = train(toy_config, *WORDS, *stop, "SOLVER.EARLY_STOP.MIN_DELTA", 1e6)
    assert trainer.iter == 4  # the loss of the first evaluation is the best so far, that of the second no better


def test_the_average_has_its_own(toy_config, tmp_path):
    """An early stop watches those of the weights that are published."""
    stop = "SOLVER.EARLY_STOP.PATIENCE", 9, "SOLVER.EARLY_STOP.METRIC", "validation_loss"
    trainer = train(toy_config, *WORDS, *stop, "SOLVER.EMA.ENABLED", True)
    raw, averaged = (in_metrics(tmp_path / "out", f"{where}validation/total_loss") for where in ("", "ema/"))
    assert [iteration for iteration, _ in averaged] == [1, 3, 6] and averaged != raw
    for model, found in ((trainer.model, raw), (trainer.averaging.model, averaged)):
        losses = compute_losses(model, build_validation_loader(trainer.cfg, trainer.cfg.DATASETS.TEST[0]))
        assert losses["total_loss"] == pytest.approx(found[-1][1], rel=1e-6)
    (hook,) = (x for x in trainer._hooks if isinstance(x, EarlyStop))
    assert hook._best == pytest.approx(min(value for _, value in averaged), rel=1e-6)


def share_worker(cfg, batches, output):
    """A rank with two batches, and one with one, which must not wait for a second of the other."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(cfg).train())
    torch.save(compute_losses(model, batches[comm.get_rank() :: 2]), f"{output}{comm.get_rank()}")


def test_ranks_with_different_numbers_of_images(small_cfg, make_inputs, tmp_path):
    cfg = small_cfg()
    batches = [[{**record, "image_id": i + 1}] for i, record in enumerate(make_inputs(2, 0, 3))]
    run_two_ranks(share_worker, cfg, batches, str(tmp_path / "rank"))
    torch.manual_seed(0)
    alone = compute_losses(build_model(cfg).train(), batches)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}", weights_only=True) == pytest.approx(alone, rel=1e-5)


def test_a_test_set_without_annotations_is_one_line(tmp_path, toy_config):
    whole = json.loads((tmp_path / "boxes.json").read_text())
    del whole["annotations"]
    (tmp_path / "info.json").write_text(json.dumps(whole))
    sets = (f"engine_{tmp_path.name}", "boxes.json"), ("bare", "info.json")
    register = str([[name, str(tmp_path / file), str(tmp_path)] for name, file in sets])
    with pytest.raises(UserError, match="TEST.VALIDATION_LOSS is True, but bare has no annotations: set it to False"):
        train(toy_config, *WORDS, "DATASETS.REGISTER", register, "DATASETS.TEST", "('bare',)")
