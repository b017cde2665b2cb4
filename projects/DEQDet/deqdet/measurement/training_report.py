"""Write a one-page report on a training run: AP of each class, curves of loss and AP, the worst images."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..atomic import write_text
from ..checkpoints.publish import AVERAGE
from ..data import find_results, read_results, read_truth
from ..engine.run_folder import has_other_test_sets
from ..errors import plural
from .metrics_file import read_lines
from .mistakes import NO_CHOICE, Judgement, Tally, best_threshold, judge_all, sort_by_error, tally
from .mistakes_sheet import describe, write_mistakes
from .plots import plot_curves
from .tables import format_table, format_value

REPORT, CURVES, MODEL_FILE = "report.md", "curves.png", "model_final.safetensors"
WORST = 12  # images on the sheet
_AP = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AP@100")


@dataclass(frozen=True)
class SetSummary:
    """The results on one test set."""

    dataset: str
    results: Mapping[str, float]  # box metrics "AP", "AP50", ..., "AP-cat", 0 to 100; empty if there are none
    iteration: int | None  # iterations before the evaluation; None if unknown
    averaged: bool = False  # the results are those of the averaged weights
    images: int = 0
    tallies: tuple[Tally, ...] = ()  # one for each class; empty without detections or labels
    threshold: float | None = None  # score threshold at which the mistakes were counted
    best_f1: bool = False  # whether this threshold is that of the best F1
    detections: int = 0  # with any score
    sheet: Path | None = None
    worst: tuple[tuple[str, str], ...] = ()  # file and mistakes of the images on the sheet


def write_training_report(
    output: str | os.PathLike,
    datasets: Sequence[str],
    *,
    results: Mapping[str, Mapping[str, float]] | None = None,
    num_images: int = WORST,
    threshold: float | None = None,
) -> Path:
    """Write report.md, curves.png and a sheet of the images with the most mistakes into a training's OUTPUT_DIR.

    The report is made from the files that the training wrote there: metrics.json, the detections of the last evaluation
    in inference/, and model_final.safetensors. If the training averaged its weights, results and detections are those
    of the averaged weights, which are then also the ones in the model file. Parts whose files are missing are left out.
    No model is run. In distributed runs, call this on the main process only.

    Args:
        output: OUTPUT_DIR.
        datasets: the names of the test sets, registered and checked.
        results: the evaluator's metrics of each set, {"set": {"AP": ..., "AP-cat": ...}}; by default those of the last
            evaluation in metrics.json.
        num_images: maximum number of images on each sheet.
        threshold: minimum score of the detections that are judged; by default the threshold with the best F1 on the
            set, see `mistakes.best_threshold`.

    Returns:
        The path of report.md.

    Raises:
        UserError: an image or a file cannot be read, or a file cannot be written.
    """
    folder = Path(output)
    lines = read_lines(folder / "metrics.json") if (folder / "metrics.json").is_file() else []
    others = has_other_test_sets(folder, datasets)  # evaluated after the training
    averaged = _has_average(lines) and not others
    summaries = []
    for name in datasets:
        figures, iteration = {}, None
        if not others:
            figures, iteration = find_last_results(lines, name, several=len(datasets) > 1, averaged=averaged)
        if results is not None and name in results:
            figures = dict(results[name])
        sheet = folder / ("worst.jpg" if len(datasets) == 1 else f"worst-{name.replace('/', '_')}.jpg")
        summary = SetSummary(name, figures, iteration, averaged)
        detections = find_results(folder / AVERAGE if averaged else folder, name)
        summaries.append(_summarize(summary, detections, sheet, num_images, threshold))
    curves = None
    if lines:
        curves = folder / CURVES
        plot_curves(lines, curves)
    model_file = folder / MODEL_FILE
    text = format_report(folder, summaries, lines, curves, model_file if model_file.is_file() else None)
    write_text(text, folder / REPORT)
    return folder / REPORT


def find_last_results(
    lines: Sequence[Mapping], dataset: str, *, several: bool, averaged: bool = False
) -> tuple[dict[str, float], int | None]:
    """Find the box metrics of the last evaluation in metrics.json.

    Args:
        lines: as read_lines returns them.
        several: there is more than one test set, so the names of metrics start with the name of the set.
        averaged: take the metrics of the averaged weights instead of those of the weights themselves.

    Returns:
        The metrics by name, without prefix, and the number of iterations before this evaluation. If there was no
        evaluation, an empty dict and None.
    """
    prefix = f"{AVERAGE}/" * averaged + f"{dataset}/" * several + "bbox/"
    trained = max((line["iteration"] for line in lines if "total_loss" in line), default=-1)
    for line in reversed(lines):
        figures = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
        if figures:
            # detectron2 numbers iterations from 0, but stores the last evaluation under the total number of iterations.
            after_all = line["iteration"] == trained + 1
            return figures, line["iteration"] + (not after_all)
    return {}, None


def _has_average(lines: Sequence[Mapping]) -> bool:
    """Return whether the last evaluation in metrics.json includes the averaged weights."""
    evaluated = (line for line in reversed(lines) if any("bbox/" in key for key in line))
    return any(key.startswith(f"{AVERAGE}/") for key in next(evaluated, ()))


@dataclass(frozen=True)
class Judged:
    """Detections in a data set, compared with its ground truth."""

    records: list[dict]
    judgements: list[Judgement]  # one for each record
    class_names: list[str]
    threshold: float
    best_f1: bool  # whether the threshold is that of the best F1
    detections: int  # with any score


def judge_results(file: Path, dataset: str, threshold: float | None) -> Judged | None:
    """Read a file of detections and find the mistakes in it; None for a set without boxes.

    Args:
        dataset: registered and checked.
        threshold: minimum score of the detections that are judged; None: that of the best F1, see
            `mistakes.best_threshold`, or NO_CHOICE if no detection is right.

    Raises:
        UserError: see `read_results`.
    """
    found = read_results(file, dataset)
    records = DatasetCatalog.get(dataset)
    if not any(record.get("annotations") for record in records):
        return None
    truths = [read_truth(record) for record in records]
    best = best_threshold(truths, found) if threshold is None else None
    if threshold is None:
        threshold = NO_CHOICE if best is None else best
    judgements = judge_all(truths, found, threshold)
    names = list(MetadataCatalog.get(dataset).thing_classes)
    return Judged(records, judgements, names, threshold, best is not None, sum(map(len, found)))


def write_worst(judged: Judged, sheet: Path, count: int) -> list[tuple[str, str]]:
    """Draw up to `count` images with the most mistakes; if there are no mistakes, delete the file `sheet`.

    Returns:
        The files of the images and their mistakes in words, the worst first.

    Raises:
        UserError: an image cannot be read, or the sheet cannot be written.
    """
    judgements = judged.judgements
    worst = [index for index in sort_by_error(judgements) if judgements[index].error][:count]
    if not worst:
        sheet.unlink(missing_ok=True)
        return []
    pairs = [judged.records[i] for i in worst], [judgements[i] for i in worst]
    write_mistakes(*pairs, judged.class_names, sheet, threshold=judged.threshold)
    return [(judged.records[i]["file_name"], describe(judgements[i])) for i in worst]


def _summarize(summary: SetSummary, file: Path | None, sheet: Path, count: int, threshold: float | None) -> SetSummary:
    """Add the mistakes in a file of detections, if there is one, to the summary of a test set."""
    judged = None if file is None else judge_results(file, summary.dataset, threshold)
    if judged is None:
        return summary
    worst = write_worst(judged, sheet, count)
    return replace(
        summary,
        images=len(judged.records),
        tallies=tuple(tally(judged.judgements, len(judged.class_names))),
        threshold=judged.threshold,
        best_f1=judged.best_f1,
        detections=judged.detections,
        sheet=sheet if worst else None,
        worst=tuple(worst),
    )


def format_report(
    folder: Path,
    summaries: Sequence[SetSummary],
    lines: Sequence[Mapping],
    curves: Path | None,
    model_file: Path | None,
) -> str:
    """Format the report as Markdown.

    Args:
        lines: as read_lines returns them.
    """
    title = f"# Results of the training in {folder.resolve().name}"
    parts = [title, *(_format_set(summary) for summary in summaries)]
    if curves is not None:
        losses = [line for line in lines if "total_loss" in line]
        words = f"Loss and AP while training, in metrics.json: [{curves.name}]({curves.name})."
        if losses:
            last = losses[-1]
            words += f" After {last['iteration'] + 1} iterations the loss is {last['total_loss']:.3f}."
        parts += ["## Curves", words, f"![curves]({curves.name})"]
    if model_file is not None:
        parts += ["## The trained model", f"`{model_file.resolve()}` holds weights, config and class names:"]
        code = ("from deqdet import Predictor", f'predictor = Predictor.from_file("{model_file.resolve()}")',
                'found = predictor("image.jpg")')  # fmt: skip
        parts += ["```python\n" + "\n".join(code) + "\n```"]
        for summary in summaries:
            if summary.best_f1:
                best = f"`threshold={summary.threshold:.2f}` gives the best F1 on {summary.dataset}"
                parts.append(f"{best}; the Predictor's default is 0.5.")
    parts += [f"Written on {datetime.now():%Y-%m-%d %H:%M}; `deqdet-report` writes it again."]
    return "\n\n".join(parts) + "\n"


def _format_set(summary: SetSummary) -> str:
    parts = [f"## {summary.dataset}"]
    figures = {key: value for key, value in summary.results.items() if math.isfinite(value)}
    names = MetadataCatalog.get(summary.dataset).thing_classes
    if figures:
        when = "" if summary.iteration is None else f", after {summary.iteration} iterations"
        shown = [key for key in _AP if key in figures]
        whose = " of the averaged weights" if summary.averaged else ""
        parts.append(f"COCO's box AP{whose} in the last evaluation{when}:")
        parts.append(format_table([shown, [f"{figures[key]:.1f}" for key in shown]], names=0))
    else:
        parts.append("There is no AP: the set has no labels, or metrics.json has no evaluation of it.")
    of_class = {name: figures.get(f"AP-{name}") for name in names}
    if len(names) == 1 and of_class[names[0]] is None:  # detectron2 omits it for a single class
        of_class[names[0]] = figures.get("AP")
    if summary.tallies:
        head = ("class", "AP", "boxes", "found", "missed", "as another class", "false detections")
        rows = [
            (name.replace("|", "\\|"), format_value(of_class[name], ".1f"), *map(str, (t.boxes, t.right, t.missed)),
             str(t.confused), str(t.false))
            for name, t in zip(names, summary.tallies, strict=True)
        ]  # fmt: skip
        images, lowest = plural(summary.images, "image"), f"{summary.threshold:.2f}"
        if not summary.detections:
            parts.append(f"There are no detections, so every box in {images} is missed:")
        else:
            counted = f"counting detections with a score of at least {lowest}"
            parts.append(f"Mistakes in {images}, at an IoU of 0.5 and {counted}:")
        parts.append(format_table([head, *rows], names=1))
    elif figures:
        rows = [(name.replace("|", "\\|"), format_value(ap, ".1f")) for name, ap in of_class.items()]
        parts.append(format_table([("class", "AP"), *rows], names=1))
    if summary.sheet is not None:
        parts.append(f"The images with the most mistakes: [{summary.sheet.name}]({summary.sheet.name})")
        parts.append(f"![mistakes]({summary.sheet.name})")
        parts.append("\n".join(f"- `{file}`: {mistakes}" for file, mistakes in summary.worst))
    elif summary.tallies:
        parts.append("No image has a mistake.")
    return "\n\n".join(parts)
