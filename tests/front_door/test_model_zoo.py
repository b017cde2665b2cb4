"""Configs by name, and what goes wrong with names, files and overrides."""

import re

import pytest

from deqdet import model_zoo
from deqdet.errors import UserError

from helpers.config_files import COMPLETE, load, value_of


def test_every_config_of_the_repository_is_listed():
    assert [f"configs/{name}.yaml" for name in model_zoo.list_configs()] == sorted(COMPLETE)


@pytest.mark.parametrize("name", model_zoo.list_configs())
def test_get_config_is_the_file(name):
    assert model_zoo.get_config(name) == load(f"configs/{name}.yaml")


@pytest.mark.parametrize("name", [
    "quick/deqdet_shapes", "quick/deqdet_shapes.yaml", "deqdet_shapes", "configs/quick/deqdet_shapes.yaml",
])  # fmt: skip
def test_ways_to_say_a_name(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert model_zoo.get_config(name).MODEL.DEQDET.NUM_QUERIES == 16


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("MODEL:\n  DEQDET:\n    NUM_QUERIES: 7\nVERSION: 2\n")
    assert model_zoo.get_config(tmp_path / "mine.yaml").MODEL.DEQDET.NUM_QUERIES == 7


def test_overrides():
    key = "MODEL.DEQDET.SOLVER.OPTIONS.WINDOW"
    own = "MODEL.DEQDET.PLUGIN.NUM_POINTS"
    cfg = model_zoo.get_config("deqdet_r50_100q_1x", ["MODEL.DEQDET.NUM_QUERIES", 7, "SEED", "3", key, "5", own, "8"])
    assert cfg.MODEL.DEQDET.PLUGIN.NUM_POINTS == 8
    assert (cfg.MODEL.DEQDET.NUM_QUERIES, cfg.SEED, cfg.MODEL.DEQDET.SOLVER.OPTIONS.WINDOW) == (7, 3, 5)


@pytest.mark.parametrize("name, overrides, message", [
    ("deqdet_r50_100q_2x", [], "config file deqdet_r50_100q_2x does not exist.*did you mean .*deqdet_r50_100q_1x"),
    ("quick/deqdet_shape", [], "did you mean quick/deqdet_shapes"),
    ("zzz", [], r"list_configs\(\) lists them"),
    ("deqdet_shapes", ["MODEL.DEQDET.NUM_QUERY", "3"], "unknown config key MODEL.DEQDET.NUM_QUERY; did you"),
    ("deqdet_shapes", ["SEED"], "overrides must be KEY VALUE pairs"),
    ("deqdet_shapes", ["SEED", "1", "--resume", "x"], "--resume must come before the KEY VALUE pairs"),
])  # fmt: skip
def test_wrong_names_and_overrides(name, overrides, message):
    with pytest.raises(UserError, match=message):
        model_zoo.get_config(name, overrides)


@pytest.mark.parametrize("key, value, message", [
    ("SOLVER.MAX_ITER", "abc", "abc (type str): it must be a whole number, such as SOLVER.MAX_ITER 1200"),
    ("SOLVER.MAX_ITER", "1e3", "1000.0 (type float): it must be a whole number, such as SOLVER.MAX_ITER 1200"),
    ("SEED", "'7'", "7 (type str): it must be a whole number, such as SEED 1"),
    ("SOLVER.BASE_LR", "1", "1 (type int): it must be a number with a decimal point, such as SOLVER.BASE_LR 1.0"),
    ("SOLVER.AMP.ENABLED", "yes", "yes (type str): it must be True or False, such as SOLVER.AMP.ENABLED False"),
    ("OUTPUT_DIR", "2026", "2026 (type int): it must be a string in quotes, such as OUTPUT_DIR \"'2026'\""),
    ("SOLVER.STEPS", "100", '100 (type int): it must be a tuple, such as SOLVER.STEPS "(100,)"'),
    ("DATASETS.TRAIN", "cards", "cards (type str): it must be a tuple, such as DATASETS.TRAIN \"('cards',)\""),
    ("MODEL.PIXEL_STD", "[1,", '[1, (type str): it must be a list, such as MODEL.PIXEL_STD "[58.395, 57.12, 57.375]"'),
])  # fmt: skip
def test_a_value_of_another_type(key, value, message):
    with pytest.raises(UserError, match=f"^{re.escape(f'the command line: {key} cannot be {message}')}$"):
        model_zoo.get_config("deqdet_shapes", [key, value])
    example = message.partition(f"such as {key} ")[2].strip('"')
    cfg = model_zoo.get_config("deqdet_shapes", [key, example])  # what the message says to write is taken
    assert type(value_of(cfg, key)) is type(value_of(model_zoo.get_config("deqdet_shapes"), key))


def test_a_section_takes_no_value():
    message = "SOLVER is a section, and cannot be 3 (type int): set one of its keys, such as MODEL.DEQDET.SOLVER.NAME"
    with pytest.raises(UserError, match=f"MODEL.DEQDET.{re.escape(message)}$"):
        model_zoo.get_config("deqdet_shapes", ["MODEL.DEQDET.SOLVER", "3"])


def test_a_config_runs_no_code(tmp_path):
    canary = tmp_path / "canary"
    bad = tmp_path / "bad.yaml"
    bad.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {canary}']\n")
    child = tmp_path / "child.yaml"
    child.write_text(f"_BASE_: {bad}\n")
    for file in (bad, child):
        with pytest.raises(UserError, match="plain values only, no Python objects"):
            model_zoo.get_config(file)
    assert not canary.exists()


@pytest.mark.parametrize("word, key", [
    ("MODEL.WEIGHTS", True), ("SEED", True), ("OUTPUT_DIR", True), ("MODLE.WEIGHTS", True),
    ("MODEL.DEQDET.SOLVER.OPTIONS.window", True), ("MODEL.DEQDET.PLUGIN.points", True),
    ("IMG.JPG", False), ("street.jpg", False), ("anderson4", False), ("1E-2", False), ("--steps", False), ("", False),
])  # fmt: skip
def test_what_counts_as_a_key(word, key):
    assert model_zoo.is_key(word) is key


def test_the_output_folder_may_be_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a.yaml").write_text("OUTPUT_DIR: ~/runs/a\nVERSION: 2\n")
    assert model_zoo.get_config(tmp_path / "a.yaml").OUTPUT_DIR == "/home/me/runs/a"
    assert model_zoo.get_config("quick/deqdet_shapes", ["OUTPUT_DIR", "~/b"]).OUTPUT_DIR == "/home/me/b"
