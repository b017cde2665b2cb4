"""The lines of a metrics.json, to which several trainings may have written."""

import json
import logging
import time
from pathlib import Path

import pytest

from deqdet.errors import UserError
from deqdet.measurement.metrics_file import read_lines


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def trained(*iterations: int, loss: float = 1.0) -> list[dict]:
    return [{"iteration": i, "total_loss": loss} for i in iterations]


def test_an_evaluation_has_a_line_beside_the_trainings_own(tmp_path):
    evaluation = {"iteration": 3, "bbox/AP": 5.0}
    first = trained(1, 2, 3)
    assert read_lines(write(tmp_path / "metrics.json", *first, evaluation)) == [*first, evaluation]


def test_a_later_training_replaces_what_it_repeats_and_what_came_after(tmp_path):
    first, second = trained(1, 2, 3), trained(2, 4, loss=9.0)
    stale = {"iteration": 3, "bbox/AP": 5.0}
    assert read_lines(write(tmp_path / "metrics.json", *first, stale, *second)) == [first[0], *second]


@pytest.mark.parametrize("later", [59, 60])
def test_an_evaluation_may_come_after_a_line_of_a_later_iteration_or_before_it(tmp_path, later):
    """detectron2 writes at once what has come since the last line, in the order of the figures' first appearance."""
    first, second = trained(39, later)
    evaluation = {"iteration": 49, "bbox/AP": 5.0}
    for lines in ([first, second, evaluation], [first, evaluation, second]):
        assert read_lines(write(tmp_path / "metrics.json", *lines)) == [first, evaluation, second]


def test_damaged_lines_are_left_out_with_a_warning(tmp_path, caplog):
    """A kill cuts a line off, to which a resumed training may have appended the next one."""
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1}\n{"itera{"iteration": 2}\n[3]\n{"total_loss": 4}\n{"iteration": 5}\n{"itera')
    with caplog.at_level(logging.WARNING):
        assert [line["iteration"] for line in read_lines(path)] == [1, 5]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}, line {number}, is damaged and is left out" for number in (2, 3, 4, 6)
    ]


def test_many_lines_take_no_time(tmp_path):
    """A reader that goes through the earlier lines at each line takes half a minute."""
    path = write(tmp_path / "metrics.json", *trained(*range(0, 600_000, 20)))
    start = time.perf_counter()
    assert len(read_lines(path)) == 30_000
    assert time.perf_counter() - start < 10


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="metrics.json cannot be read .* give the OUTPUT_DIR of a run"):
        read_lines(tmp_path / "metrics.json")
