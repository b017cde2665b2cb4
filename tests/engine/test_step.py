"""The step of training: precision, the gradient's scale, and parts of a batch; and that all of it resumes exactly."""

import math
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from torch import nn

from detectron2.utils.events import EventStorage

from deqdet.checkpoints import publish_checkpoint
from deqdet.checkpoints.files import read_torch
from deqdet.engine import Trainer, setup
from deqdet.engine.health import NonFiniteError
from deqdet.engine.step import StepTrainer
from deqdet.errors import UserError

from helpers.batches import FIXED_STATISTICS, total
from helpers.engine_toy import IN_PROCESS, parse

pytestmark = IN_PROCESS


class StoppedTrainer(Trainer):
    """An interruption comes at iteration `stop_at`, and the gradient's scale starts at `scale`."""

    stop_at = None
    scale = None

    def run_step(self):
        if self.iter == self.stop_at:
            raise KeyboardInterrupt
        super().run_step()


def make_trainer(args, stop_at=None, scale=None) -> Trainer:
    trainer = StoppedTrainer(setup(args))
    trainer.stop_at = stop_at
    if scale:
        trainer._trainer.grad_scaler._init_scale = scale
    trainer.resume_or_load(resume=args.resume)
    return trainer


def steps_of(model, parts: int, batch: list[dict]) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of a batch in parts, and the loss that is logged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = StepTrainer(model, [batch], optimizer, device_type="cpu", parts=parts)
    step.iter = 0
    with EventStorage() as storage:
        step.run_step()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, storage.latest()["total_loss"][0]


@pytest.mark.parametrize("counts", [(2, 1, 0, 8), (0, 0, 0, 1), (0, 0, 0, 0)])  # 8 boxes for 6 queries
def test_the_gradients_of_parts_add_up_to_the_batchs(small_model, make_inputs, counts):
    """In float64, so that no assignment hangs on a rounding."""
    model, batch = small_model(*FIXED_STATISTICS).double().train(), make_inputs(*counts)
    losses = model(batch)
    total(losses).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any(gradient.norm() > 1e-3 for gradient in expected.values())
    for parts in (1, 2, 4):
        found, loss = steps_of(model, parts, batch)
        assert loss == pytest.approx(total(losses).item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-12, name


PRECISION = "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION"


@pytest.mark.parametrize("words, dtype", [
    ((), torch.float32),
    (PRECISION[:2], torch.bfloat16),
    ((*PRECISION, "float16"), torch.float16),
])  # fmt: skip
def test_the_precision_of_training_and_of_evaluation(toy_config, words, dtype):
    """Training follows SOLVER.AMP; the toy's evaluation is in float32."""
    trainer, seen = make_trainer(parse(toy_config, "SOLVER.MAX_ITER", 2, *words)), set()
    trainer.model.decoder.register_forward_hook(lambda module, _, out: seen.add((module.training, out.dtype)))
    trainer.train()
    assert seen == {(True, dtype), (False, torch.float32)}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer._trainer.grad_scaler.is_enabled() == (dtype == torch.float16)


def first_norm(toy_config, tmp_path, *words) -> tuple[float, float]:
    """The norm of the first gradient that is logged, and that of the gradient when the optimizer's step has ended."""
    trainer = make_trainer(parse(toy_config, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / f"{len(words)}", *words))
    trainer.train()
    clipped = math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters()))
    return trainer.storage.latest()["grad_norm"][0], clipped


def test_the_gradient_is_clipped_without_its_scale(toy_config, tmp_path):
    clip = "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01
    exact, clipped = first_norm(toy_config, tmp_path, *clip)
    assert exact > 0.02 and clipped == pytest.approx(0.01, rel=1e-4)
    scaled, clipped = first_norm(toy_config, tmp_path, *clip, *PRECISION, "float16")
    assert scaled == pytest.approx(exact, rel=0.02) and clipped == pytest.approx(0.01, rel=1e-4)


def test_an_overflow_skips_the_step(toy_config):
    trainer = make_trainer(parse(toy_config, "SOLVER.MAX_ITER", 1, *PRECISION, "float16"), scale=2.0**120)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.storage.latest()["grad_scale"][0] == 2.0**119 and "grad_norm" not in trainer.storage.latest()


def test_a_gradient_that_is_infinite_at_every_scale_stops_the_training(toy_config):
    args = parse(toy_config, "SOLVER.MAX_ITER", 50, *PRECISION, "float16")
    trainer = make_trainer(args)
    trainer.model.decoder.bias.register_hook(lambda grad: grad * math.inf)
    message = "the gradient is infinite or NaN in float16 at every scale down to 3.05.*gradient of decoder.bias"
    with pytest.raises(NonFiniteError, match=message):
        trainer.train()
    assert trainer.iter == 30  # 2^16, halved 31 times


def small_detector(config: str, *words):
    """A training of the small detector, without noise, on the toy's images."""
    size = "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "MODEL.DEQDET.NUM_CLASSES", 1
    more = "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 0.001, "DATASETS.TEST", "()"
    return parse(config, *words[:1], *SMALL.split(), *size, *more, *words[1:])


ALL = (*PRECISION, "float16", "SOLVER.ACCUMULATION_STEPS", 2, "SOLVER.EMA.ENABLED", True)


def test_everything_resumes_exactly_and_is_published(toy_config, tmp_path):
    """float16 with overflows at first, two parts, averaged weights: an interrupted training ends as the whole one."""
    scale = 2.0**15
    whole = make_trainer(small_detector(toy_config, "--overwrite", *ALL, "OUTPUT_DIR", tmp_path / "a"), scale=scale)
    whole.train()
    words = *ALL, "OUTPUT_DIR", tmp_path / "b"
    with pytest.raises(KeyboardInterrupt):
        make_trainer(small_detector(toy_config, "--overwrite", *words), stop_at=7, scale=scale).train()
    resumed = make_trainer(small_detector(toy_config, "--resume", *words), scale=scale)
    assert resumed.start_iter == 6
    resumed.train()
    ends = [read_torch(tmp_path / name / "model_final.pth") for name in "ab"]
    for entry in ("model", "ema"):
        assert ends[0][entry].keys() == ends[1][entry].keys()
        assert all(torch.equal(x, ends[1][entry][name]) for name, x in ends[0][entry].items())
    scalers = [end["trainer"]["_trainer"]["grad_scaler"] for end in ends]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] < scale and scalers[0]["_growth_tracker"] > 2
    hooks = [end["trainer"]["hooks"] for end in ends]
    assert hooks[0] == hooks[1] and hooks[0]["AverageWeights"] == {"updates": 8}
    published = tmp_path / "published.safetensors"
    for choice, entry in (("auto", "ema"), ("raw", "model")):
        publish_checkpoint(
            tmp_path / "a/model_final.pth", published, cfg=whole.cfg, class_names=["half"], weights=choice
        )
        weights = load_file(published)
        assert all(torch.equal(x, weights[name]) for name, x in ends[0][entry].items() if name in weights)
        published.unlink()
    assert not torch.equal(*(ends[0][entry]["decoder.refinement.feedforward.0.weight"] for entry in ("model", "ema")))


def test_a_training_may_take_up_and_leave_its_extras(toy_config, tmp_path):
    """A checkpoint without scale and average starts both anew, and one with them serves a plain training."""
    plain = "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", tmp_path / "out"
    extras = (*PRECISION, "float16", "SOLVER.EMA.ENABLED", True)
    make_trainer(parse(toy_config, "--overwrite", *plain, "SOLVER.MAX_ITER", 2)).train()
    make_trainer(parse(toy_config, "--resume", *plain, "SOLVER.MAX_ITER", 2, *extras)).train()  # nothing left to do
    for name in ("model_final.pth", "model_final.safetensors"):
        assert Path(tmp_path, "out", name).is_file()
    raw, average = read_torch(tmp_path / "out/model_final.pth")["model"], load_file(
        tmp_path / "out/model_final.safetensors"
    )
    assert all(torch.equal(raw[name], x) for name, x in average.items())
    trainer = make_trainer(parse(toy_config, "--resume", *plain, "SOLVER.MAX_ITER", 4, *extras))
    trainer.train()
    assert "ema" in read_torch(tmp_path / "out/model_final.pth")
    make_trainer(parse(toy_config, "--resume", *plain, "SOLVER.MAX_ITER", 6)).train()
    assert "ema" not in read_torch(tmp_path / "out/model_final.pth")


def test_a_model_that_is_no_deqdet_is_trained_as_a_whole():
    with pytest.raises(UserError, match="is 3: it must be 1 for MODEL.META_ARCHITECTURE Linear"):
        StepTrainer(nn.Linear(1, 1), [], torch.optim.SGD([torch.zeros(1)], lr=0.1), device_type="cpu", parts=3)


def test_the_learning_rate_is_not_scaled_twice(toy_config, tmp_path, caplog):
    """The checkpoint has the scaled rate, and a resumed training takes it, also with another batch."""
    rule = "SOLVER.LR_RULE", "linear", "SOLVER.REFERENCE_BATCH", 1, "SOLVER.WARMUP_ITERS", 0
    make_trainer(parse(toy_config, *rule, "SOLVER.MAX_ITER", 2)).train()
    for images, last in ((2, 4), (1, 6)):
        words = "SOLVER.IMS_PER_BATCH", images, "SOLVER.MAX_ITER", last
        trainer = make_trainer(parse(toy_config, "--resume", *rule, *words))
        trainer.train()
        assert trainer.storage.latest()["lr"][0] == pytest.approx(0.2)  # 0.1 for one image, and two of them
