"""The table of a comparison as text, JSON and a picture, by hand."""

import json
from dataclasses import asdict, replace

import cv2
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deqdet.measurement.checkpoint_cost import Measurement
from deqdet.measurement.comparison_report import summarize, write_report

from helpers.comparison import make_result


def test_means_over_the_seeds():
    results = [
        make_result("A", 1, 20.0, curve=[[10, 1.0], [20, 2.0], [30, 20.0]], seconds_per_iteration=0.5),
        make_result("B", 1, 33.0),
        make_result("A", 2, 30.0, curve=[[10, 4.0], [30, 30.0]], seconds_per_iteration=0.7, APs=None),
    ]
    a, b = summarize(results)
    assert (a["name"], b["name"], a["decoder"]) == ("A", "B", "ADecoder")
    assert (a["AP"], a["APs"]) == (25.0, None)
    assert a["seconds_per_iteration"] == pytest.approx(0.6)
    assert a["curve"] == [[10, 2.5], [30, 25.0]]  # the points that both have
    assert [seed["AP"] for seed in a["seeds"]] == [20.0, 30.0]
    assert b["AP"] == 33.0 and len(b["seeds"]) == 1


@pytest.mark.parametrize("aps, mean, spread, shown", [
    ([20.0], 20.0, None, "20.0"),
    ([20.0, 30.0, 40.0], 30.0, 10.0, "30.0 ± 10.0"),  # sqrt((100 + 0 + 100) / 2)
    ([20.0, 20.0], 20.0, 0.0, "20.0 ± 0.0"),
    ([20.0, None], None, None, "-"),
])  # fmt: skip
def test_spread_over_the_seeds(tmp_path, aps, mean, spread, shown):
    results = [make_result("A", seed, ap) for seed, ap in enumerate(aps, start=1)]
    (row,) = summarize(results)
    assert (row["AP"], row["AP_std"]) == (mean, spread)
    write_report(results, tmp_path, "")
    text = (tmp_path / "comparison.md").read_text()
    assert f"| SomeLayer | {shown} | " in text
    assert ("standard deviation over the seeds" in text) == (len(aps) > 1)


def test_steps_at_test_time(tmp_path):
    """Each row has its own; a run that an earlier version measured has none."""
    results = [make_result("A", 1, 20.0), make_result("B", 1, 20.0), make_result("C", 1, 20.0)]
    measured = asdict(results[1].measurement)
    results[1] = replace(results[1], measurement=Measurement.from_dict({**measured, "steps": 5}))
    del measured["steps"]
    results[2] = replace(results[2], measurement=Measurement.from_dict(measured))
    write_report(results, tmp_path, "")
    lines = [line.split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines() if line[:1] == "|"]
    column = lines[0].index("steps")
    assert [line[column] for line in lines[2:]] == ["25", "5", "-"]
    assert [config["steps"] for config in summarize(results)] == [25, 5, None]


def test_table_and_json(tmp_path):
    results = [make_result("A", 1, 20.0), make_result("B", 1, 33.0, APs=None), make_result("A", 2, 31.0)]
    write_report(results, tmp_path, "the command")
    text = (tmp_path / "comparison.md").read_text()
    cells = "12.0 | 0.25 | 61.0 | 25 | 60.0"
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        f"| A | ADecoder | SomeLayer | 25.5 ± 7.8 | 20.0, 31.0 | {cells} | 10.0 | 2.00 | 3 | 0.5 | 40 | 900 | 50 |",
        f"| B | BDecoder | SomeLayer | 33.0 | 33.0 | {cells} | - | 2.00 | 3 | 0.5 | 40 | 900 | 50 |",
    ]
    for part in ("30 iterations of 16 images of some_train", "160 x 192", "a machine", "`the command`", "some_val"):
        assert part in text
    whole = json.loads((tmp_path / "comparison.json").read_text())
    assert whole["command"] == "the command" and whole["configs"] == summarize(results)


def test_a_report_of_some_trainings_says_so(tmp_path):
    results = [make_result("A", 1, 20.0), make_result("A", 2, 31.0), make_result("B", 1, 33.0)]
    for planned, beginning in ((4, "**Incomplete: 3 of 4 trainings are done.**\n\n| "), (3, "| ")):
        write_report(results, tmp_path, "", planned=planned)
        assert (tmp_path / "comparison.md").read_text().startswith(beginning)
        whole = json.loads((tmp_path / "comparison.json").read_text())
        assert (whole["trainings"], whole["done"]) == (planned, 3)


def test_a_run_whose_duplicates_were_not_counted(tmp_path):
    """Its mean is not known, and a run with no pair has no distance."""
    results = [make_result("A", 1, 20.0), make_result("A", 2, 20.0), make_result("B", 1, 30.0)]
    results[1] = replace(results[1], measurement=replace(results[1].measurement, duplicates=None))
    alone = replace(results[2].measurement.duplicates, distance=None)
    results[2] = replace(results[2], measurement=replace(results[2].measurement, duplicates=alone))
    write_report(results, tmp_path, "")
    a, b = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if line.startswith("|")][2:]
    assert "| 20.0, 20.0 | - | - | - | 25 | 60.0 |" in a and "| 30.0 | 12.0 | - | 61.0 | 25 | 60.0 |" in b


def test_what_differs_from_the_first_config(tmp_path):
    """Not the seed, and not a key that the first one's run did not know."""
    results = [make_result("A", seed, 20.0) for seed in (1, 2)] + [make_result(name, 1, 30.0) for name in "BA"]
    results[3] = replace(results[0], name="C")
    results[0].settings["SEED"] = 1
    results[2].settings.update({"SEED": 5, "SOLVER.MAX_ITER": 40, "SOLVER.NEWER": 1})
    write_report(results, tmp_path, "")
    assert [config["changes"] for config in summarize(results)] == [
        {}, {"MODEL.DEQDET.DECODER": "BDecoder", "SOLVER.MAX_ITER": 40}, {}
    ]  # fmt: skip
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    start = lines.index("- What differs from A:")
    assert lines[start + 1 : start + 3] == [
        "  - B: `MODEL.DEQDET.DECODER` BDecoder, `SOLVER.MAX_ITER` 40",
        "  - C: nothing",
    ]
    write_report(results[:2], tmp_path, "")
    assert "differs" not in (tmp_path / "comparison.md").read_text()


def test_curve_has_a_colour_for_each_config(tmp_path):
    curve = [[10, None], [20, 20.0], [30, 30.0]]  # the first AP has no value
    write_report([make_result("A", 1, 20.0), make_result("B", 1, 30.0, curve=curve)], tmp_path, "")
    picture = cv2.imread(str(tmp_path / "comparison.png"))[..., ::-1]
    for colour in ([31, 119, 180], [255, 127, 14], [255, 255, 255]):  # tab10's first two, the ground
        assert (abs(picture.astype(int) - colour).max(axis=-1) < 3).sum() > 300
    assert (abs(picture.astype(int) - [44, 160, 44]).max(axis=-1) < 3).sum() == 0  # there is no third


def figure_of(monkeypatch, module: str) -> list[Figure]:
    """The list that gets every figure which a module of deqdet.measurement saves from now on."""
    figures = []
    monkeypatch.setattr(f"deqdet.measurement.{module}.save_figure", lambda figure, path: figures.append(figure))
    return figures


def test_axes_of_a_short_training_that_found_nothing(tmp_path, monkeypatch):
    figures = figure_of(monkeypatch, "comparison_report")
    write_report([make_result("A", 1, 0.0, curve=[[1, 0.0], [2, 0.0]])], tmp_path, "")
    (axes,) = figures[0].axes
    assert axes.get_ylim() == (0, 1) and axes.get_xlim()[0] == 0
    ticks = [tick for tick in axes.get_xticks() if tick <= 2]
    assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


def test_numbers_have_their_nouns(tmp_path):
    two, one = make_result("A", 1, 20.0), make_result("A", 2, 20.0)
    one.settings["num_gpus"] = 1
    for results, words in (([two, one], ["seeds 1, 2;", "with 2 processes."]), ([one], ["seed 2;", "with 1 process."])):
        write_report(results, tmp_path, "")
        text = (tmp_path / "comparison.md").read_text()
        assert all(word in text for word in words) and "memory, training (MiB) | memory, inference (MiB)" in text


def test_an_eleventh_curve_is_dashed(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot

    def note(axes, *values, **style):
        drawn.append((style["color"], style["linestyle"]))
        return plot(axes, *values, **style)

    monkeypatch.setattr(Axes, "plot", note)
    write_report([make_result(f"config {index}", 1, 20.0) for index in range(12)], tmp_path, "")
    assert len(set(drawn)) == 12
    assert drawn[10] == (drawn[0][0], "--") and drawn[9][1] == "-"
