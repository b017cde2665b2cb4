"""Numbers that become infinite or NaN in training: what is said, what is kept."""

from types import SimpleNamespace

import pytest
import torch

from detectron2.utils.events import EventStorage

from deqdet.checkpoints.files import read_torch, write_torch
from deqdet.engine import Trainer, UserError, load_weights, setup
from deqdet.engine.health import FiniteGuard, NonFiniteError, nonfinite_names

from helpers.batches import FIXED_STATISTICS
from helpers.engine_toy import IN_PROCESS, parse

pytestmark = IN_PROCESS
NAN = float("nan")


class SpoiledTrainer(Trainer):
    """Does something to itself at the beginning of iteration 3."""

    spoil = None

    def run_step(self):
        if self.iter == 3:
            self.spoil()
        super().run_step()


def spoil_weight(trainer):
    trainer.model.decoder.weight.data[0, 0] = torch.inf


def spoil_activation(trainer):
    trainer.model.backbone[1].register_forward_hook(lambda module, inputs, output: output * NAN)


def spoil_gradient(trainer):
    trainer.model.decoder.bias.register_hook(lambda gradient: gradient * NAN)


def spoil_statistics(trainer):
    trainer.model.backbone[1].running_var[1] = torch.inf


@pytest.mark.parametrize("spoil, what, first", [
    (spoil_weight, "Loss became infinite or NaN at iteration=3", "decoder.weight"),
    (spoil_activation, "Loss became infinite or NaN at iteration=3", "output of backbone.1"),
    (spoil_gradient, "the gradient became infinite or NaN at iteration=3, in 1 parameter: decoder.bias",
     "gradient of decoder.bias"),
    (spoil_statistics, "a statistic became infinite or NaN at iteration=3", "backbone.1.running_var"),
])  # fmt: skip
def test_the_first_bad_tensor_is_named(toy_config, tmp_path, spoil, what, first):
    trainer = SpoiledTrainer(setup(parse(toy_config, "SOLVER.MAX_ITER", 9)))
    trainer.spoil = lambda: spoil(trainer)
    with pytest.raises(NonFiniteError) as raised:
        trainer.train()
    message, out = str(raised.value), tmp_path / "out"
    assert message.startswith(f"{what}; first bad tensor: {first}; images {tmp_path}/")
    assert message.endswith(
        f"see {out}/nonfinite_0000003.pth; the last good checkpoint is {out}/model_0000001.pth: train from it as "
        "MODEL.WEIGHTS in another OUTPUT_DIR, with a lower SOLVER.BASE_LR (docs/training.md, Troubleshooting)"
    )
    assert "\n" not in message
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not list(out.glob("model_0000003*")) and not list(out.glob("model_final*"))
    dump = read_torch(out / "nonfinite_0000003.pth")
    assert dump["iteration"] == 3 and dump["bad_tensors"][0] == first and len(dump["images"]) == len(dump["batch"]) == 2
    assert all(name in message for name in dump["images"])
    assert "loss_side" in dump["last_losses"] or "total_loss" in dump["last_losses"]


def spoil_second_image(model, batch):
    batch[1]["image"] = torch.full((3, 64, 96), NAN)


def spoil_refinement(model, batch):
    model.decoder.refinement.feedforward[0].weight.data[0, 0] = NAN


@pytest.mark.parametrize("spoil, named, first, images", [
    (spoil_second_image, "init, init+1, init+2, step1, step2, step3", "image image 1.jpg", "image 1.jpg"),
    (spoil_refinement, "init+1, init+2, step1, step2, step3", "decoder.refinement.feedforward.0.weight",
     "image 0.jpg, image 1.jpg, image 2.jpg, image 3.jpg, image 4.jpg, image 5.jpg, image 6.jpg, image 7.jpg "
     "and 1 more"),
])  # fmt: skip
def test_each_image_is_named_once(small_model, make_inputs, tmp_path, spoil, named, first, images):
    """However many predictions are not finite; and only those images in which one is not."""
    model = small_model(*FIXED_STATISTICS).train()
    guard = FiniteGuard(str(tmp_path), seed=1, checkpoint_period=1)
    batch = [x | {"file_name": f"image {i}.jpg"} for i, x in enumerate(make_inputs(*[1] * 9))]
    guard.trainer = SimpleNamespace(model=model, iter=7, storage=EventStorage())
    guard.before_train()
    spoil(model, batch)
    with pytest.raises(FloatingPointError) as raised:
        model(batch)
    assert str(guard.explain(raised.value)) == (
        f"Non-finite logits, boxes or matching cost in {named} at iteration=7; first bad tensor: {first}; "
        f"images {images}; see {tmp_path}/nonfinite_0000007.pth; no checkpoint was saved: train again with a lower "
        "SOLVER.BASE_LR (docs/training.md, Troubleshooting)"
    )
    assert len(read_torch(tmp_path / "nonfinite_0000007.pth")["images"]) == 9


def test_names_of_bad_tensors():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1, NAN]), "c": torch.tensor(3), "d": torch.tensor(-torch.inf)}
    assert nonfinite_names(iter(tensors.items())) == ["b", "d"]
    assert nonfinite_names(iter([])) == []


def test_a_model_with_nan_is_not_evaluated_and_not_trained(toy_config, tmp_path):
    cfg = setup(parse(toy_config))
    model = Trainer.build_model(cfg)
    model.backbone[1].running_mean[0] = NAN
    path = tmp_path / "bad.pth"
    write_torch({"model": model.state_dict()}, path)
    words = ["MODEL.WEIGHTS", path, "OUTPUT_DIR", tmp_path / "other"]
    message = "bad.pth has infinite values or NaN in backbone.1.running_mean: take another checkpoint"
    with pytest.raises(UserError, match=message):
        load_weights(Trainer.build_model(cfg), setup(parse(toy_config, "--eval-only", *words)), resume=False)
    with pytest.raises(UserError, match=message):
        Trainer(setup(parse(toy_config, *words))).resume_or_load(resume=False)


def test_a_gpu_without_enough_memory_is_one_line(toy_config):
    def fill(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")

    trainer = SpoiledTrainer(setup(parse(toy_config, "SOLVER.MAX_ITER", 9)))
    trainer.spoil = lambda: trainer.model.backbone.register_forward_hook(fill)
    with pytest.raises(UserError, match="^CUDA out of memory. Tried to allocate 2.00 GiB at iteration=3: set SOLVER"):
        trainer.train()
