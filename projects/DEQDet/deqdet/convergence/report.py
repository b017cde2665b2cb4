"""The tables of all solvers, as markdown and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

from ..analysis import Cost
from ..tables import format_table, format_value
from .accuracy import Accuracy
from .plots import plot_results
from .rows import Results

METRICS = tuple(field.name for field in fields(Accuracy))
PLAIN = "plain"  # its rows make the paper's Tables 7 and 8, those of the others Table 9


@dataclass(frozen=True)
class Report:
    """What was evaluated, and what came of it."""

    command: str  # for the reader to repeat
    weights: str
    dataset: str
    images: int
    device: str
    limit: int  # TEST_STEPS, the most steps with an rtol
    cost: Cost  # of an image as large as the first one
    results: list[Results]


def write_report(report: Report, folder: Path) -> None:
    """Write steps.md, steps.json and steps.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.md").write_text(format_report(report))
    content = asdict(report) | {"cost": report.cost.to_dict()}
    (folder / "steps.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    plot_results(report.results, folder / "steps.png")


def format_report(report: Report) -> str:
    """Markdown: AP against steps, of plain iteration and of the other solvers; AP against rtol; what it all means."""
    plain = [results for results in report.results if results.name == PLAIN]
    others = [results for results in report.results if results.name != PLAIN]
    parts = []
    if plain:
        parts.append("## Steps of plain iteration\n\n" + _steps_table(plain, named=False))
    if others:
        parts.append("## Steps of other solvers\n\n" + _steps_table(others, named=True))
    parts.append("## Stopping at a relative residual\n\n" + _tolerance_table(report.results))
    parts.append("![AP and residual against steps, AP against mean steps with an rtol](steps.png)")
    parts.append("\n".join(f"- {note}" for note in _notes(report)))
    return "\n\n".join(parts) + "\n"


def _steps_table(several: Sequence[Results], *, named: bool) -> str:
    """The columns of Tables 7 and 8, then residual and latency; with the solver in front as Table 9 has it."""
    first = ["solver"] if named else []
    rows = [[*first, "multiply-adds (G)", "steps", *METRICS, "residual", "s / image"]]
    for results in several:
        for row in results.steps:
            cells = [_billions(row.multiply_adds), str(row.steps), *_metrics(row.accuracy)]
            cells += [format_value(row.residual, ".3g"), f"{row.seconds:.3g}"]
            rows.append([results.name] * named + cells)
    return format_table(rows, names=len(first))


def _tolerance_table(several: Sequence[Results]) -> str:
    head = ["solver", "rtol", "mean steps", "median", "95th percentile", "saved (%)", "converged (%)", "AP", "change"]
    rows = [head]
    for results in several:
        for row in results.tolerances:
            steps = (row.mean_steps, row.median_steps, row.percentile_95_steps)
            shares = (row.saved, row.converged, row.accuracy.AP)
            cells = [f"{row.rtol:g}", *(format_value(value, ".1f") for value in steps + shares)]
            change = None if row.difference is None else round(row.difference, 1) + 0.0  # no -0.0
            rows.append([results.name, *cells, format_value(change, "+.1f")])
    return format_table(rows, names=1)


def _notes(report: Report) -> list[str]:
    (height, width), (padded_height, padded_width) = report.cost.image_size, report.cost.padded_size
    solvers = ", ".join(f"{results.name}: {results.solver}" for results in report.results)
    failed = {results.name: results.nonfinite for results in report.results if results.nonfinite}
    notes = [
        f"{report.images} image(s) of {report.dataset}, weights {report.weights}.",
        f"Solvers: {solvers}. One path of each image a solver; every row is read off it.",
        f"Multiply-adds of convolutions and linear layers, as the paper counts them, on an image of {height} x {width} "
        f"pixels, the size of the first one, padded to {padded_height} x {padded_width}; without the solver's "
        "arithmetic.",
        "residual: median over the images of ||f(y) - y|| / ||f(y)||, y being the last step's input: what rtol is "
        "compared with after that step.",
        f"s / image: one image at a time, without loading it, on {report.device}: the time before and after the steps "
        "and so many times that of one step, medians.",
        f"rtol: an image stops after the first step whose residual is below it, at the latest after {report.limit} "
        f"(TEST_STEPS). saved: evaluations of f, of {report.limit} an image. converged: images below rtol. "
        f"change: of AP, from rtol 0, which is {report.limit} steps.",
        f"{date.today().isoformat()}. Command: `{report.command}`",
    ]
    if failed:
        counts = ", ".join(f"{count} with {name}" for name, count in failed.items())
        notes.insert(1, f"Images whose states became infinite or NaN, and that keep the last finite one: {counts}.")
    return notes


def _billions(count: int) -> str:
    """Two decimals as the paper has them, four for a small model."""
    return f"{count / 1e9:.{2 if count >= 1e10 else 4}f}"


def _metrics(accuracy: Accuracy) -> list[str]:
    return [format_value(getattr(accuracy, name), ".1f") for name in METRICS]
