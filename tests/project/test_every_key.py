"""The tables of docs/config.md against the configs."""

import re
from collections import Counter
from collections.abc import Iterator

from detectron2.config import CfgNode, get_cfg

from deqdet import add_deqdet_config

from helpers.config_files import load, value_of
from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "config.md").read_text()
OURS, DETECTRON2S = PAGE.split("\n## Detectron2's keys that matter most\n")


def leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The keys that hold a value, or a section that is empty at first, with what they hold."""
    for name, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[0] != "key" and set(row[0]) != {"-"}]


def unquote(cell: str) -> str:
    assert re.fullmatch(r"`[^`]+`", cell), f"{cell} is not in backticks"
    return cell.strip("`")


def read_value(cell: str) -> object:
    """The value that a cell stands for, read as a value on a command line is."""
    return CfgNode._decode_cfg_value(unquote(cell))


def is_same(found: object, expected: object) -> bool:
    return type(found) in (type(expected), dict) and found == expected  # an empty section is written as a dict


def test_each_key_of_ours_has_one_row_with_its_default():
    theirs, ours = get_cfg(), get_cfg()
    add_deqdet_config(ours)
    before = dict(leaves(theirs))
    added = {key: value for key, value in leaves(ours) if key not in before or not is_same(value, before[key])}
    table = [(unquote(row[0]), row[1]) for row in rows(OURS)]
    assert Counter(key for key, _ in table) == Counter(list(added))
    assert len(added) > 80
    for key, cell in table:
        assert is_same(read_value(cell), added[key]), f"{key} is {added[key]!r}, not {cell}"


def test_each_row_ends_in_a_sentence():
    for row in rows(PAGE):
        assert len(row) in (3, 5) and len(row[-1].split()) >= 3 and row[-1].endswith((".", ".)")), row


def test_detectron2s_keys_have_its_defaults_and_the_values_of_the_two_configs():
    theirs = get_cfg()
    configs = [load("configs/deqdet_r50_100q_1x.yaml"), load("configs/quick/deqdet_photos.yaml")]
    for head in ("deqdet_r50_100q_1x", "quick/deqdet_photos"):
        assert f"| `{head}` |" in DETECTRON2S
    table = rows(DETECTRON2S)
    assert set(Counter(row[0] for row in table).values()) == {1}
    for row in table:
        key = unquote(row[0])
        default = value_of(theirs, key)
        assert is_same(read_value(row[1]), default), f"{key} is {default!r}, not {row[1]}"
        for cfg, cell in zip(configs, row[2:4], strict=True):
            value = value_of(cfg, key)
            assert (cell == "") == is_same(value, default), key
            assert cell == "" or is_same(read_value(cell), value), f"{key} is {value!r}, not {cell}"
