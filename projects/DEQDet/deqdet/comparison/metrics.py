"""What a training's metrics.json says."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Metrics:
    """Of a finished training. A metric without a value is None: APs on a set with no small objects, say."""

    AP: float | None  # after the last iteration, as are the next two
    AP50: float | None
    APs: float | None
    curve: list[list]  # [iterations done, AP] of every evaluation, in order
    seconds_per_iteration: float | None  # median; None if too few iterations were timed
    training_memory_mb: float | None  # the most that deqdet.engine.hooks.PeakMemory saw


def read_metrics(path: Path, max_iter: int) -> Metrics | None:
    """None if the evaluation after iteration `max_iter` is not there yet.

    The file is appended to: what a resumed training evaluates again replaces what was there.
    """
    lines = list(_read_lines(path))
    # detectron2 counts iterations from 0, but gives the last evaluation the number of all of them.
    evaluations = {min(line["iteration"] + 1, max_iter): line for line in lines if "bbox/AP" in line}
    if max_iter not in evaluations:
        return None
    last = evaluations[max_iter]
    times = [line["time"] for line in lines if "time" in line]
    return Metrics(
        **{name: _number(last[f"bbox/{name}"]) for name in ("AP", "AP50", "APs")},
        curve=[[iteration, _number(evaluations[iteration]["bbox/AP"])] for iteration in sorted(evaluations)],
        seconds_per_iteration=median(times) if times else None,
        training_memory_mb=max((line["peak_memory_mb"] for line in lines if "peak_memory_mb" in line), default=None),
    )


def _read_lines(path: Path) -> Iterator[dict]:
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            yield json.loads(text)
        except ValueError:  # cut off by the end of a process
            continue


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
