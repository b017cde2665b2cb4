"""tools/publish.py and publish_checkpoint: which weights they take, and one clear line for what does not fit."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from deqdet.checkpoints import CheckpointError, load_model_config, publish_checkpoint, read_model_file
from deqdet.tools.publish import main

from helpers.paths import ROOT

NAMES = ["a", "b", "c"]


@pytest.fixture
def saved(small_cfg, small_model, tmp_path):
    """A training's checkpoint of the small model with averaged weights, all one more; and the raw weights."""
    weights = small_model().state_dict()
    average = {name: x + 1 for name, x in weights.items()}
    torch.save({"model": weights, "ema": average, "trainer": {"iteration": 3}}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(small_cfg().dump())
    return tmp_path, weights


def publish(folder, cfg, name: str = "model.pth", **options):
    """The published file and the sentence."""
    target = folder / "published.safetensors"
    done = publish_checkpoint(folder / name, target, cfg=cfg, class_names=NAMES, **options)
    return read_model_file(target), done


def assert_are(found, weights, *, more: int = 0) -> None:
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value + more, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("choice, more", [("auto", 1), ("ema", 1), ("raw", 0)])
def test_the_choice_of_weights(saved, small_cfg, choice, more):
    folder, weights = saved
    found, done = publish(folder, small_cfg(), weights=choice)
    assert_are(found.weights, weights, more=more)
    assert found.metadata["weights"] == ("ema" if more else "raw")
    kind = "averaged" if more else "raw"
    assert done == (
        f"wrote the {kind} weights of {folder / 'model.pth'} ({len(weights)} tensors, as they are) with their config "
        f"and 3 class names to {folder / 'published.safetensors'}"
    )


def test_without_an_average(saved, small_cfg):
    folder, weights = saved
    torch.save({"model": weights}, folder / "model.pth")
    assert_are(publish(folder, small_cfg())[0].weights, weights)
    with pytest.raises(CheckpointError, match=r"model.pth has no averaged weights \(no entry 'ema'\): take the raw"):
        publish(folder, small_cfg(), weights="ema")
    with pytest.raises(ValueError, match="must be one of auto, raw, ema"):
        publish(folder, small_cfg(), weights="best")


def test_an_average_of_parameters_goes_with_the_raw_statistics(saved, small_cfg, small_model):
    folder, weights = saved
    parameters = {name for name, _ in small_model().named_parameters()}
    average = {name: x + 1 for name, x in weights.items() if name in parameters}
    assert 0 < len(average) < len(weights)
    torch.save({"model": weights, "ema": average}, folder / "model.pth")
    assert_are(publish(folder, small_cfg())[0].weights, weights | average)
    del average["queries.content.weight"]  # not taken from the raw weights
    torch.save({"model": weights, "ema": average}, folder / "model.pth")
    with pytest.raises(CheckpointError, match="1 missing key: queries.content.weight"):
        publish(folder, small_cfg())
    torch.save({"model": weights, "ema": [1]}, folder / "model.pth")
    with pytest.raises(CheckpointError, match="model.pth holds a list: a checkpoint is a dict of tensors"):
        publish(folder, small_cfg())


def test_safetensors_and_published_files_are_sources_too(saved, small_cfg):
    folder, weights = saved
    save_file({name: x.clone() for name, x in weights.items()}, folder / "plain.safetensors")
    assert_are(publish(folder, small_cfg(), "plain.safetensors")[0].weights, weights)
    (folder / "published.safetensors").rename(folder / "first.safetensors")
    found, done = publish(folder, small_cfg(), "first.safetensors", half=True)
    assert "float16" in done
    torch.testing.assert_close(found.weights["queries.content.weight"], weights["queries.content.weight"], rtol=1e-3,
                               atol=6e-8)  # fmt: skip


@pytest.mark.parametrize("change, message", [
    (lambda x: x.pop("queries.content.weight"), "1 missing key: queries.content.weight. Give the config"),
    (lambda x: x.update(wings=torch.zeros(2)), "1 unknown key: wings. Give"),
    (
        lambda x: x.update({"queries.boxes": torch.zeros(5, 4)}),
        r"1 misshapen key: queries.boxes \(5, 4\) instead of \(6, 4\). Give",
    ),
])  # fmt: skip
def test_weights_of_another_model(saved, small_cfg, change, message):
    folder, weights = saved
    change(weights)
    torch.save({"model": weights}, folder / "model.pth")
    with pytest.raises(CheckpointError, match=f"model.pth does not fit the config's model: {message}"):
        publish(folder, small_cfg())
    assert not (folder / "published.safetensors").exists()


def test_weights_with_nan_replace_no_older_file(saved, small_cfg):
    folder, weights = saved
    published = folder / "published.safetensors"
    published.write_text("an older file")
    weights["queries.boxes"][2, 1] = float("nan")
    torch.save({"model": weights}, folder / "model.pth")
    with pytest.raises(CheckpointError, match="model.pth has infinite values or NaN in queries.boxes: take another"):
        publish(folder, small_cfg())
    assert published.read_text() == "an older file"


def test_a_config_of_no_model(saved, small_cfg):
    folder, _ = saved
    with pytest.raises(CheckpointError, match="the config describes a detector that cannot be built: .*wings"):
        publish(folder, small_cfg("MODEL.DEQDET.DECODER", "wings"))


def test_counters_may_be_missing(saved, small_cfg):
    folder, weights = saved
    torch.save({"model": {k: v for k, v in weights.items() if "num_batches" not in k}}, folder / "model.pth")
    found, _ = publish(folder, small_cfg())
    assert len(found.weights) == sum("num_batches" not in name for name in weights)


# The tool


def run(folder, *words) -> None:
    config = str(folder / "config.yaml")
    output = str(folder / "out.safetensors")
    main([str(folder / "model.pth"), "--config-file", config, "--output", output, *words])


def test_the_tool(saved, capsys):
    folder, weights = saved
    pairs = ["MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS", "9", "MODEL.DEQDET.PERTURBATION.CONTENT_SIZE", "0.3"]
    run(folder, "--weights", "raw", "--class-names", *NAMES, "--half", *pairs)
    assert capsys.readouterr().out.startswith("wrote the raw weights of ")
    found = read_model_file(folder / "out.safetensors")
    cfg = load_model_config(found)
    assert (cfg.MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS, cfg.MODEL.DEQDET.PERTURBATION.CONTENT_SIZE) == (9, 0.3)
    assert found.class_names == tuple(NAMES)
    run(folder, "--class-names", *NAMES, *pairs)
    assert_are(read_model_file(folder / "out.safetensors").weights, weights, more=1)


def test_class_names_are_those_of_the_test_set(saved):
    folder, _ = saved
    run(folder, "DATASETS.TEST", "()")
    assert read_model_file(folder / "out.safetensors").class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("words, message", [
    (["--class-names", "a"], "error: 1 class names for a model of 3 classes"),
    (["MODEL.WINGS", "2"], "error: the command line: unknown config key"),
    (["MODEL.DEQDET.NUM_QUERIES", "7"], "2 misshapen keys: "),
])  # fmt: skip
def test_the_tools_errors_are_one_line(saved, words, message):
    folder, _ = saved
    with pytest.raises(SystemExit) as ended:
        run(folder, *words)
    assert message in ended.value.code and "\n" not in ended.value.code
    assert ended.value.code.startswith("error: ") and not (folder / "out.safetensors").exists()


def test_the_program(tmp_path):
    """As a program: 1, the line on standard error, nothing on standard output."""
    command = [sys.executable, str(ROOT / "tools" / "publish.py"), "missing.pth", "--output", "x.safetensors"]
    command += ["--config-file", str(ROOT / "tests" / "checkpoints" / "release_0_1" / "config.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("error: missing.pth cannot be read")
    assert list(tmp_path.iterdir()) == []
