"""The tables of steps as text, JSON and a picture, by hand."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from deqdet.measurement.accuracy import Accuracy
from deqdet.measurement.duplicates import Duplicates
from deqdet.measurement.steps import Plan, summarize
from deqdet.measurement.steps_report import Report, format_report, write_report
from deqdet.measurement.timing import Latency

from helpers.steps import COST, NAN, PATHS, make_path, make_results

HEAD = (
    "multiply-adds (G) | steps | AP | AP50 | AP75 | APs | APm | APl | duplicates (%) | distance | AP, NMS | residual | "
    "s / image"
)


@pytest.fixture
def report() -> Report:
    results = [make_results(), make_results("anderson2", PATHS[:2])]
    return Report(command="python tool", weights="w.pth", dataset="some_val", images=4, device="a CPU", limit=4,
                  cost=COST, results=results)  # fmt: skip


class TestReport:
    def test_markdown_by_hand(self, report):
        text = format_report(report)
        assert "\n".join([
            "## Steps of plain iteration",
            "",
            f"| {HEAD} |",
            "| ---:" + 12 * " | ---:" + " |",
            "| 101.00 | 1 | 10.0 | 11.0 | 12.0 | 13.0 | - | - | 10.0 | 0.25 | 51.0 | 1.5 | 0.52 |",
            "| 107.00 | 3 | 30.0 | 31.0 | 32.0 | 33.0 | - | - | 30.0 | 0.25 | 53.0 | 0.6 | 0.56 |",
            "| 113.00 | 5 | 50.0 | 51.0 | 52.0 | 53.0 | - | - | 50.0 | - | 55.0 | 0.15 | 0.6 |",
            "",
            "## Steps of other solvers",
            "",
            f"| solver | {HEAD} |",
            "| ---" + 13 * " | ---:" + " |",
            "| anderson2 | 101.00 | 1 | 10.0 | 11.0 | 12.0 | 13.0 | - | - | 10.0 | 0.25 | 51.0 | 1 | 0.52 |",
        ]) in text  # fmt: skip
        assert "\n".join([
            "| plain | 0 | 4.0 | 4.0 | 4.0 | 0.0 | - | 40.0 | +0.0 | 40.0 |",
            "| plain | 0.5 | 3.0 | 3.0 | 3.8 | 25.0 | 50.0 | 32.5 | -7.5 | 30.0 |",
            "| plain | 0.01 | 3.8 | 4.0 | 4.0 | 6.2 | 0.0 | 40.0 | +0.0 | 37.5 |",
            "| anderson2 | 0 | 4.0 | 4.0 | 4.0 | 0.0 | - | 40.0 | +0.0 | 40.0 |",
            "| anderson2 | 0.5 | 2.5 | 2.5 | 3.0 | 37.5 | 100.0 | 25.0 | -15.0 | 25.0 |",
        ]) in text  # fmt: skip
        never = replace(report.results[0].tolerances[2], difference=-0.04)
        text += format_report(replace(report, results=[replace(report.results[0], tolerances=[never])]))
        assert "| plain | 0.01 | 3.8 | 4.0 | 4.0 | 6.2 | 0.0 | 40.0 | +0.0 | 37.5 |" in text and "-0.0 |" not in text
        assert "plain: Some(plain), anderson2: Some(anderson2)" in text
        assert "infinite or NaN, and that keep the last finite one: 1 with plain." in text
        assert "120 x 160 pixels, the size of the first one, padded to 128 x 160" in text

    def test_a_small_model_shows_more_decimals_and_solvers_their_own_tables(self, report):
        results = make_results("broyden")
        rows = [replace(row, multiply_adds=148_324_000) for row in results.steps]
        text = format_report(replace(report, results=[replace(results, steps=rows, nonfinite=0)]))
        assert "| broyden | 0.1483 | 1 | 10.0 |" in text
        assert "plain iteration" not in text and "NaN" not in text

    def test_files(self, report, tmp_path):
        """JSON has the same figures, plain ones; the picture depends on what it shows."""
        pictures = []
        for index, paths in enumerate([PATHS, PATHS[:2], PATHS[:2]]):
            folder = tmp_path / "new" / str(index)
            write_report(replace(report, results=[*report.results, make_results("broyden", paths)]), folder)
            pictures.append(cv2.imread(str(folder / "steps.png")))
        found = json.loads((tmp_path / "new" / "0" / "steps.json").read_text())
        assert found["cost"]["linear"]["per_step"] == 3 * 10**9 and found["limit"] == 4
        (plain, _, broyden) = found["results"]
        assert (plain["name"], plain["solver"], broyden["name"]) == ("plain", "Some(plain)", "broyden")
        assert plain["steps"][1]["accuracy"] == {"AP": 30.0, "AP50": 31.0, "AP75": 32.0, "APs": 33.0, "APm": None,
                                                 "APl": None}  # fmt: skip
        assert plain["latency"] == {"fixed": 0.5, "per_step": 0.02} and plain["nonfinite"] == 1
        assert plain["tolerances"][1]["saved"] == 25.0
        assert pictures[0].shape[1] == 1800 and (pictures[0] != pictures[1]).any()
        assert np.array_equal(pictures[1], pictures[2])

    def test_axes(self, report, tmp_path, monkeypatch):
        """The residuals' axis has ticks up to its end, beyond --steps; AP of 0 lies on an axis from 0 on."""
        figures = []
        monkeypatch.setattr("deqdet.measurement.steps_report.save_figure", lambda figure, path: figures.append(figure))
        nothing = Accuracy(AP=0.0, AP50=0.0, AP75=0.0, APs=0.0, APm=None, APl=None)
        results = summarize("plain", "Plain()", [make_path(1, [0.5] * 49)], plan=Plan((2, 8), (0.1,), 49), cost=COST,
                            evaluate=lambda paths, choices: [nothing] * len(choices),
                            count_duplicates=lambda paths, step: Duplicates(0, None, None, None),
                            latency=Latency(0.1, 0.1))  # fmt: skip
        write_report(replace(report, results=[results]), tmp_path)
        accuracy, residual, tolerance = figures[0].axes
        assert list(accuracy.get_xticks()) == [2, 8]
        assert list(residual.get_xticks()) == [1, 2, 5, 8, 10, 20, 49]
        assert accuracy.get_ylim() == tolerance.get_ylim() == (0, 3)

    def test_a_number_has_its_noun(self, report):
        assert "- 4 images of some_val" in format_report(report)
        assert "- 1 image of some_val" in format_report(replace(report, images=1))

    @pytest.mark.filterwarnings("error")
    def test_a_report_without_any_number_can_be_drawn(self, report, tmp_path):
        """One image of NaN, one step, no rtol, no AP."""
        nothing = Accuracy(AP=None, AP50=None, AP75=None, APs=None, APm=None, APl=None)
        results = summarize("plain", "Plain()", [make_path(1, [NAN], steps=1)], plan=Plan((1,), (), 1), cost=COST,
                            evaluate=lambda paths, choices: [nothing] * len(choices),
                            count_duplicates=lambda paths, step: Duplicates(0, None, None, None),
                            latency=Latency(0.1, 0.1))  # fmt: skip
        write_report(replace(report, results=[results]), tmp_path)
        assert "| 101.00 | 1 | - | - | - | - | - | - | - | - | - | - | 0.2 |" in (tmp_path / "steps.md").read_text()
        assert cv2.imread(str(tmp_path / "steps.png")) is not None
