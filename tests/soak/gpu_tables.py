"""Measure the tables of docs/benchmarks.md, On a GPU, row by row, and print them; by hand, on a machine with a GPU.

    python tests/soak/gpu_tables.py --output FOLDER [--tables steps images training] [--minutes 9] [FLAG ...]

Each row is one call of deqdet-benchmark, whose numbers go to a JSON file in the output folder. Rows that are there
already are not measured again, so that several calls with --minutes complete the tables. The rows that decide whether
a step is within 1.5 times its floor come first. FLAGs go to deqdet-benchmark, for example --device cuda:1.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"
LAYERS = {
    "AdaMixer's, 300": "deqdet_r50_300q_2x_p64",
    "AdaMixer's, 100": "deqdet_r50_100q_1x_p64",
    "Sparse R-CNN's, 300": "deq_sparse_rcnn_r50_300q_2x",
}
TRAINED = ("deqdet_r50_300q_2x", "deqdet_r50_100q_1x_p64", "deqdet_r50_300q_2x_p64")
PRECISIONS = ("bfloat16", "tf32", "float32")
MODES = ("compiled-graph", "graph", "eager")
LONGEST = 240  # seconds for a row
RECOMPUTED = ("MODEL.DEQDET.EQUILIBRIUM.CHECKPOINT_SEGMENTS", "True")


@dataclass(frozen=True)
class Row:
    """One call of deqdet-benchmark."""

    config: str
    task: str
    precision: str
    mode: str = "eager"
    recomputed: bool = False

    def command(self, output: Path, words: Sequence[str]) -> list[str]:
        """Its command line.

        Args:
            words: further flags, and keys of the config.
        """
        flags = ["--config-file", self.config, "--task", self.task, "--precision", self.precision, "--mode", self.mode]
        flags += {"training": ["--batch", "16", "--repeats", "4"], "step": ["--steps", "25"]}.get(self.task, [])
        keys = RECOMPUTED if self.recomputed else ()
        return [sys.executable, str(TOOL), *flags, "--output", str(output), *words, *keys]

    def file(self, folder: Path) -> Path:
        """The file of its numbers, or of the error with which the call ended."""
        parts = [self.config, self.task, self.precision, self.mode, *(["recomputed"] if self.recomputed else [])]
        return folder / f"{'-'.join(parts)}.json"


def rows(table: str) -> Iterator[Row]:
    """The rows of a table, the most important ones first."""
    if table == "steps":
        yield from (Row(config, "step", p, mode) for mode in MODES for p in PRECISIONS for config in LAYERS.values())
    elif table == "images":
        for task in ("decoder", "inference"):
            for mode in MODES:
                yield from (Row(config, task, p, mode) for config in LAYERS.values() for p in PRECISIONS)
    else:
        for config in TRAINED:
            yield from (Row(config, "training", p, recomputed=again) for p in PRECISIONS for again in (False, True))


def measure(row: Row, file: Path, words: Sequence[str]) -> None:
    """Call deqdet-benchmark, and write its numbers, or {"error": the reason why there are none}."""
    try:
        done = subprocess.run(row.command(file, words), capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        file.write_text(json.dumps({"error": f"more than {LONGEST} s"}))
        return
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line for line in lines if re.match(r"(error:|\w*(\.\w+)*Error)", line)]
        file.write_text(json.dumps({"error": (errors or lines)[-1][:300]}))


def cell(file: Path) -> str:
    """Format the numbers of a row: milliseconds (step / floor), or milliseconds and GiB."""
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())
    if "error" in found:
        return found["error"][:40]
    if found["task"] == "step":
        return f"{found['median_ms']:.2f} ({found['median_ms'] / found['floor_ms']:.2f})"
    if found["task"] == "training":
        return f"{found['median_ms']:.0f} ms, {found['peak_mb'] / 1024:.1f} GiB"
    return f"{found['median_ms']:.1f}"


def print_table(title: str, names: dict[str, str], columns: dict[str, dict], folder: Path, **fields: str) -> None:
    """Print one line for each config and precision.

    Args:
        names: the first cell of the lines of each config.
        columns: the fields of a Row that are those of a column, by its heading.
        fields: those of the whole table.
    """
    print(f"\n{title}\n\n| | precision | {' | '.join(columns)} |\n|---|---|{'---:|' * len(columns)}")
    for name, config in names.items():
        for precision in reversed(PRECISIONS):
            cells = [cell(Row(config, precision=precision, **fields, **x).file(folder)) for x in columns.values()]
            print(f"| {name} | {precision} | {' | '.join(cells)} |")


def main() -> None:
    """Measure the rows that are missing, and print the tables as far as they go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the rows' JSON files")
    parser.add_argument("--tables", nargs="+", choices=("steps", "images", "training"), default=["steps"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no row after this time")
    args, words = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for row in (row for table in args.tables for row in rows(table)):
        file = row.file(args.output)
        if file.is_file():
            continue
        if time.monotonic() - start > 60 * args.minutes:
            print("out of time: the same command continues")
            break
        measure(row, file, ["--device", "cuda", *words])
        print(f"{time.monotonic() - start:6.0f} s  {file.stem}: {cell(file)}", flush=True)
    by_mode = {mode: {"mode": mode} for mode in reversed(MODES)}
    if "steps" in args.tables:
        print_table("A step, ms (step / floor)", LAYERS, by_mode, args.output, task="step")
    if "images" in args.tables:
        print_table("The decoder, ms", LAYERS, by_mode, args.output, task="decoder")
        print_table("An image end-to-end, ms", LAYERS, by_mode, args.output, task="inference")
    if "training" in args.tables:
        again = {"states kept": {"recomputed": False}, "recomputed": {"recomputed": True}}
        print_table("Training", {name: name for name in TRAINED}, again, args.output, task="training")


if __name__ == "__main__":
    main()
