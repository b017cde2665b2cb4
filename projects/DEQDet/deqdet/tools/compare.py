"""Train several detectors on the same data with the same budget, and write one comparison table.

    deqdet-compare CONFIG [CONFIG ...] --output DIR [--seeds 1 2] [--num-gpus N] [KEY VALUE ...]

The command updates DIR/comparison.md, comparison.json and comparison.png (AP against iterations) after every run. They
have the configs and seeds of this command only; its last line names finished runs in DIR that are not among them. A
CONFIG is a file or the name of a config in the model zoo. Each run is stored in DIR/CONFIG-seedN, its output in the
file "log" there. If the command is run again, it skips finished runs and resumes an interrupted one from its last
checkpoint. Ctrl-C and SIGTERM end the current training after its current iteration or evaluation, with a checkpoint; a
second signal ends it at once, and the last checkpoint is then that of SOLVER.CHECKPOINT_PERIOD. It is an error if a run
was started with a different config: delete its folder to train it again. Changes of the code are not detected.

    deqdet-compare configs/ablations/{default,rag_1}.yaml --scale CONFIG --output DIR [...]

This form trains rows of an ablation at the scale of another config: the changes that a row makes are applied to that
config, so that the default row equals it. A row changes the keys in which it differs, once loaded, from the
default.yaml beside it. A size in pixels (MODEL.DEQDET.PERTURBATION.POSITION_SIZE) keeps its ratio to the default row's:
50 instead of 25 pixels becomes twice the other config's value. Any other change must start from a value that the other
config shares with the default row; otherwise the command stops with an error before any training. The KEY VALUE pairs
are applied to the other config first, and can provide such values.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..engine import add_plugin_argument, exit_on_user_error, parse_arguments
from ..engine.signals import interruptible
from ..measurement.checkpoint_cost import Measurement, measure_apart
from ..measurement.comparison import Run, complete, find_unlisted, name_seeds, prepare_runs
from ..measurement.comparison_report import write_report

TRAIN = (sys.executable, "-m", "deqdet.tools.train_net")


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    words = sys.argv[1:] if words is None else words
    with interruptible(), exit_on_user_error(interrupted="interrupted: run the same command again to continue"):
        args = parse_arguments(make_parser(), words)
        compare(args, command=shlex.join(["deqdet-compare", *words]))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files, or names in the model zoo")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the table and the runs")
    parser.add_argument("--scale", metavar="CONFIG", help="config to which the changes of each row are applied")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1], metavar="N",
        help="random seeds, from 0 on; each config is trained once per seed (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--num-gpus", type=int, default=1, metavar="N", help="GPUs, or CPU processes, of each training (default: 1)"
    )
    parser.add_argument(
        "--eval-period", type=int, metavar="N",
        help="iterations between two points of the AP curve (default: SOLVER.MAX_ITER / 6)",
    )  # fmt: skip
    add_plugin_argument(parser)
    parser.epilog = "KEY VALUE pairs at the end override keys of all configs, e.g. SOLVER.MAX_ITER 100"
    return parser


def compare(args: argparse.Namespace, command: str) -> None:
    """Complete one run after the other, and write the report after each.

    Args:
        command: how the tool was called, for the report.
    """
    runs = prepare_runs(
        args.configs,
        args.output,
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        overrides=args.opts,
        eval_period=args.eval_period,
        scale=args.scale,
        plugins=args.plugin,
    )
    results = []
    for number, run in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {run.label}"
        print(f"{where}: in {run.folder}", flush=True)
        result = complete(run, TRAIN, measure)
        results.append(result)
        score = "no AP" if result.metrics.AP is None else f"AP {result.metrics.AP:.1f}"
        minutes = "trained earlier" if result.minutes is None else f"{result.minutes:.1f} min of training"
        print(f"{where}: {score}, {minutes}", flush=True)
        write_report(results, args.output, command, planned=len(runs))
    print(f"Table: {args.output}/comparison.md, comparison.json; curve: {args.output}/comparison.png")
    if unlisted := find_unlisted(runs, args.output):
        names = ", ".join(f"{name} ({name_seeds(seeds)})" for name, seeds in unlisted.items())
        print(f"Not in this table: the finished runs {names} in {args.output}; to include them, add their configs and "
              "--seeds to the command")  # fmt: skip


def measure(run: Run) -> Measurement:
    """Measure the model of a finished training, in a process of its own."""
    return measure_apart(run.arguments, run.weights, run.log)


if __name__ == "__main__":
    main()
