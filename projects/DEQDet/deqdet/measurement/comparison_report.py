"""Write the results of a comparison: the table as Markdown and JSON, and a plot of AP against iterations."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic import write_text
from .comparison import Result, name_seeds
from .duplicates import DUPLICATE_COLUMNS, DUPLICATES_NOTE
from .plots import save_figure
from .tables import format_table, format_value

# Heading, key of `summarize`, unit, format.
COLUMNS = (
    ("steps", "steps", 1, ".0f"),
    ("AP50", "AP50", 1, ".1f"),
    ("APs", "APs", 1, ".1f"),
    ("parameters (M)", "parameters", 1e6, ".2f"),
    ("multiply-adds (G)", "multiply_adds", 1e9, ".3g"),
    ("s / iteration", "seconds_per_iteration", 1, ".3g"),
    ("ms / image", "ms_per_image", 1, ".3g"),
    ("memory, training (MiB)", "training_memory_mb", 1, ".0f"),
    ("memory, inference (MiB)", "inference_memory_mb", 1, ".0f"),
)


def write_report(results: Sequence[Result], folder: Path, command: str, *, planned: int | None = None) -> None:
    """Write comparison.md, comparison.json and comparison.png into `folder`, each atomically.

    Args:
        results: at least one. The results of one config form one row; rows are in the order of their first results.
        command: the command that produced the results, so that readers can repeat it.
        planned: number of trainings of the whole comparison; until all are done, the report says that it is incomplete.

    Raises:
        UserError: a file cannot be written.
    """
    configs, planned = summarize(results), planned or len(results)
    write_text(format_report(configs, results, command, planned=planned), folder / "comparison.md")
    counts = {"trainings": planned, "done": len(results)}
    summary = {"command": command, **counts, "machines": _machines(results), "configs": configs}
    write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", folder / "comparison.json")
    plot_curves(configs, folder / "comparison.png")


def summarize(results: Sequence[Result]) -> list[dict]:
    """Make a dict for each config: the means of all figures over its seeds, and under "seeds" the figures of each seed.

    "changes" holds the settings that both this config and the first one have, but with different values. A mean is None
    if one of its figures is. "AP_std" is the sample standard deviation of AP over the seeds; None if there is only one.
    The mean curve has the points that all seeds have in common.
    """
    configs, first = [], results[0].settings
    for name in dict.fromkeys(result.name for result in results):
        mine = [result for result in results if result.name == name]
        seeds = [{"seed": result.seed, **asdict(result.metrics), **asdict(result.measurement)} for result in mine]
        same = ("seed", "curve", "image_size", "duplicates")
        configs.append({
            "name": name,
            "decoder": mine[0].settings["MODEL.DEQDET.DECODER"],
            "layer": mine[0].settings["MODEL.DEQDET.REFINEMENT_LAYER"],
            "changes": {
                key: value
                for key, value in mine[0].settings.items()
                if key != "SEED" and value != first.get(key, value)
            },
            "image_size": seeds[0]["image_size"],
            **{key: _mean([seed[key] for seed in seeds]) for key in seeds[0] if key not in same},
            "AP_std": _spread([seed["AP"] for seed in seeds]),
            "duplicates": {
                key: _mean([(seed["duplicates"] or {}).get(key) for seed in seeds]) for _, key, _ in DUPLICATE_COLUMNS
            },
            "curve": _mean_curve([seed["curve"] for seed in seeds]),
            "seeds": seeds,
        })  # fmt: skip
    return configs


def format_report(configs: Sequence[dict], results: Sequence[Result], command: str, *, planned: int) -> str:
    """Format the Markdown report: a table with one row per config, the meaning of its columns, and the command."""
    done = len(results)
    missing = f"**Incomplete: {done} of {planned} trainings are done.**\n\n" if done < planned else ""
    budget, seeds = results[0].settings, list(dict.fromkeys(result.seed for result in results))
    sizes = dict.fromkeys("{} x {}".format(*config["image_size"]) for config in configs)
    doubles = [heading for heading, *_ in DUPLICATE_COLUMNS]
    rows = [["config", "decoder", "layer", "AP", "AP of each seed", *doubles, *(column[0] for column in COLUMNS)]]
    for config in configs:
        each = ", ".join(format_value(seed["AP"], ".1f") for seed in config["seeds"])
        names = [config["name"], config["decoder"], config["layer"]]
        cells = [format_value(config["duplicates"][key], form) for _, key, form in DUPLICATE_COLUMNS]
        cells += [format_value(config[key], form, unit) for _, key, unit, form in COLUMNS]
        ap = format_value(config["AP"], ".1f") + ("" if config["AP_std"] is None else f" ± {config['AP_std']:.1f}")
        rows.append([*names, ap, each, *cells])
    text = format_table(rows, names=3)
    spread = "; after ±, its sample standard deviation over the seeds (with n - 1)" if len(seeds) > 1 else ""
    processes = f"{budget['num_gpus']} process{'es' * (budget['num_gpus'] != 1)}"
    changes = "".join(f"  - {config['name']}: {_format_changes(config['changes'])}\n" for config in configs[1:])
    if changes:
        changes = f"- What differs from {configs[0]['name']}:\n{changes}"
    return f"""{missing}{text}

{changes}- {budget["SOLVER.MAX_ITER"]} iterations of {budget["SOLVER.IMS_PER_BATCH"]} images of \
{", ".join(budget["DATASETS.TRAIN"])}; {name_seeds(seeds)}; every figure is the mean of the seeds.
- AP on {budget["DATASETS.TEST"][0]} after the last iteration{spread}.
- Steps: how often the refinement layer runs on an image at test time, after the initialization layer; 5 for six \
stacked layers. With a tolerance (MODEL.DEQDET.SOLVER.RTOL), it is the largest number.
- {DUPLICATES_NOTE}
- Multiply-adds of convolutions and linear layers on an image of {", ".join(sizes)} pixels.
- s / iteration: median, with {processes}. ms / image: median, one image at a time, \
without loading it.
- Memory in training: on a GPU, the peak of tensors on the first one; on a CPU, the peak resident memory of the first \
process, which includes more than 0.5 GB of libraries.
- Memory at inference: the peak of tensors for one image, including the weights.
- Machine: {"; ".join(_machines(results))}. {date.today().isoformat()}.
- Command: `{command}`

![AP against iterations](comparison.png)
"""


def plot_curves(configs: Sequence[dict], path: Path) -> None:
    """Draw AP against iterations: thin lines for the seeds, a thick one for their mean."""
    figure = Figure(figsize=(8, 5), layout="constrained")  # not by pyplot, which would choose a backend
    axes = figure.subplots()
    colours, lines = matplotlib.colormaps["tab10"].colors, ("-", "--", ":")
    for index, config in enumerate(configs):
        colour, line = colours[index % len(colours)], lines[index // len(colours) % len(lines)]
        if len(config["seeds"]) > 1:
            for seed in config["seeds"]:
                _plot(axes, seed["curve"], color=colour, linestyle=line, linewidth=0.8, alpha=0.5)
        style = {"color": colour, "linestyle": line, "linewidth": 2.2, "marker": "o", "markersize": 4}
        _plot(axes, config["curve"], **style, label=config["name"])
    axes.set(xlabel="iterations", ylabel="AP", xlim=(0, None))
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))  # if every AP is 0, the axis would extend below 0
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(configs) > len(colours):
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=4)
    else:
        axes.legend(frameon=False)
    save_figure(figure, path)


def _plot(axes: Axes, curve: list[list], **style: object) -> None:
    axes.plot([point[0] for point in curve], [float("nan") if ap is None else ap for _, ap in curve], **style)


def _format_changes(changes: dict[str, object]) -> str:
    return ", ".join(f"`{key}` {value}" for key, value in changes.items()) or "nothing"


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values) / len(values)


def _spread(values: Sequence[float | None]) -> float | None:
    return None if None in values or len(values) < 2 else stdev(values)


def _mean_curve(curves: Sequence[list[list]]) -> list[list]:
    tables = [dict(curve) for curve in curves]
    common = [iteration for iteration in tables[0] if all(iteration in table for table in tables)]
    return [[iteration, _mean([table[iteration] for table in tables])] for iteration in common]


def _machines(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.machine for result in results))
