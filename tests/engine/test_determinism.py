"""DETERMINISTIC: what torch is told, what is said of an operation without a deterministic form, equal trainings."""

import os

import pytest
import torch
from torch import nn

from detectron2.modeling import META_ARCH_REGISTRY

from deqdet.engine import Trainer, UserError, load_config, run, setup
from deqdet.engine.determinism import explained_determinism, set_determinism
from deqdet.tools.train_net import work

from helpers.engine_toy import IN_PROCESS, EngineToy, parse

pytestmark = IN_PROCESS


@META_ARCH_REGISTRY.register()
class PuttingToy(EngineToy):
    """An EngineToy that uses put_, which has no deterministic implementation on any device."""

    def forward(self, batched_inputs):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))
        return super().forward(batched_inputs)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """torch is afterwards as it was."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_what_torch_is_told(mode):
    torch.backends.cudnn.benchmark = True
    set_determinism("")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    set_determinism(mode)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() == (mode == "warn")
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_is_given_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    set_determinism("strict")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_form_is_one_line(toy_config, tmp_path):
    words = ["MODEL.META_ARCHITECTURE", "PuttingToy", "DETERMINISTIC"]
    with pytest.raises(SystemExit) as stop:
        run(work, parse(toy_config, *words, "strict"))
    assert str(stop.value) == ("error: DETERMINISTIC is strict, but put_ has no deterministic implementation on this "
                               "device: set DETERMINISTIC warn to run it anyway, or train on a CPU")  # fmt: skip
    assert "Traceback" not in (tmp_path / "out" / "log.txt").read_text()
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        run(work, parse(toy_config, *words, "warn", "DATASETS.TEST", "()"))


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="size"), explained_determinism():
        raise RuntimeError("size mismatch")


def test_the_error_of_cublas():
    text = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but this "
        "operation is not deterministic because it uses CuBLAS"
    )
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is ':0:0' .*: unset it"), explained_determinism():
        raise RuntimeError(text)


@pytest.mark.parametrize("changed, message", [
    (["CUDNN_BENCHMARK", True], "CUDNN_BENCHMARK is True: it must be False with DETERMINISTIC strict"),
    (["SEED", -1], "SEED is -1: with DETERMINISTIC strict"),
    (["DETERMINISTIC", "yes"], "DETERMINISTIC is 'yes': it must be one of"),
])  # fmt: skip
def test_keys_that_contradict_it(toy_config, changed, message):
    with pytest.raises(UserError, match=message):
        load_config(parse(toy_config, "DETERMINISTIC", "strict", *changed))


def test_equal_seeds_give_equal_weights(toy_config, tmp_path):
    finals = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        cfg = setup(parse(toy_config, "DETERMINISTIC", "strict", "OUTPUT_DIR", tmp_path / name, "SEED", seed))
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        finals.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach())
    assert torch.equal(finals[0], finals[1])
    assert not torch.equal(finals[0], finals[2])


def find_gradients(model, inputs) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    sum(model(inputs).values()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("layer", ["AdaMixerLayer", "SparseRCNNLayer"])
def test_deqdet_trains_strictly_with_the_same_gradients(small_model, make_inputs, monkeypatch, layer):
    """AdaMixer samples in another way then, since the backward pass of grid_sample is not deterministic on a GPU."""
    model, inputs = small_model("MODEL.DEQDET.REFINEMENT_LAYER", layer).double().train(), make_inputs(2, 1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    calls, sample = [], nn.functional.grid_sample
    monkeypatch.setattr(nn.functional, "grid_sample", lambda *args, **words: calls.append(1) or sample(*args, **words))
    expected = find_gradients(model, inputs)
    assert bool(calls) == (layer == "AdaMixerLayer")
    calls.clear()
    set_determinism("strict")
    found = find_gradients(model, inputs)
    assert not calls
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-7 * gradient.norm().clamp(min=1e-6), name
