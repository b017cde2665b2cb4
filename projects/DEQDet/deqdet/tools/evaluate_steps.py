"""Evaluate a trained equilibrium detector for several solvers, numbers of steps and tolerances.

    deqdet-evaluate-steps --config-file F --output DIR [--steps 4 5 6 8 10 15 20 25 50 200]
        [--solvers plain anderson2 anderson4 broyden] [--rtols 0.2 0.1 0.05 0.02 0.01] [--limit N] [KEY VALUE ...]

The command measures AP, residual, latency and multiply-adds on the first set of DATASETS.TEST. It evaluates
OUTPUT_DIR/model_final.pth, or MODEL.WEIGHTS if given on the command line, or the model file of --model. After each
solver it updates DIR/steps.md, steps.json and steps.png: Tables 7 to 9 of the paper with residual and latency, and what
is saved if each image stops at a relative residual (at the latest after TEST_STEPS steps). Each solver processes every
image only once.

A solver is "plain", "anderson" or "broyden", optionally with a history size as in "anderson4" or with options as in
"Anderson(history_size=4, damping=0.5)", or a registered solver of your own. Options that are not given are taken from
MODEL.DEQDET.SOLVER.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..data import build_test_loader
from ..engine import add_config_arguments, exit_on_user_error, parse_arguments
from ..errors import UserError
from ..measurement.accuracy import Evaluation
from ..measurement.cost import count_multiply_adds
from ..measurement.duplicates import DuplicateCounter
from ..measurement.steps import Plan, Results, build_solvers, summarize, walk_paths
from ..measurement.steps_report import Report, format_report, write_report
from ..measurement.timing import describe_machine, measure_latencies
from .trained import choose_test_set, load_trained

STEPS = (4, 5, 6, 8, 10, 15, 20, 25, 50, 200)  # those of Tables 7 and 8
SOLVERS = ("plain", "anderson2", "anderson4", "broyden")
RTOLS = (0.2, 0.1, 0.05, 0.02, 0.01)


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    words = sys.argv[1:] if words is None else words
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        evaluate(args, command=shlex.join(["deqdet-evaluate-steps", *words]))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder for the tables and the log")
    for flag, values, metavar, what in (
        ("--steps", STEPS, "N", "numbers of steps to evaluate"),
        ("--solvers", SOLVERS, "S", "solvers to evaluate"),
        ("--rtols", RTOLS, "R", "relative residuals at which to stop"),
    ):
        shown = f"{what} (default: {' '.join(map(str, values))})"
        parser.add_argument(flag, nargs="+", type=type(values[0]), default=values, metavar=metavar, help=shown)
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N images (default: all)")
    return parser


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Evaluate with one solver after the other, and write the report after each.

    Args:
        command: how the tool was called, for the report.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    model, cfg = load_trained(args, args.output)
    dataset, solvers = choose_test_set(cfg), build_solvers(cfg, args.solvers)
    plan = make_plan(args, model.decoder.execution().steps)
    loader = build_test_loader(cfg, dataset, args.limit)
    evaluation = Evaluation(dataset, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE)
    counter = DuplicateCounter(dataset, evaluation)
    latencies = measure_latencies(model, loader, solvers)
    height, width = next(iter(loader))[0]["image"].shape[-2:]
    cost = count_multiply_adds(model, height=height, width=width)
    done: list[Results] = []
    for name, solver in solvers.items():
        walked = walk_paths(model, loader, solver=solver, plan=plan)
        paths = list(tqdm(walked, desc=name, total=len(loader), unit="image", disable=None))
        done.append(
            summarize(
                name,
                str(solver),
                paths,
                plan=plan,
                evaluate=evaluation,
                count_duplicates=counter,
                cost=cost,
                latency=latencies[name],
            )
        )
        report = Report(
            command=command,
            weights=cfg.MODEL.WEIGHTS,
            dataset=dataset,
            images=len(paths),
            device=describe_machine(model.device),
            limit=plan.limit,
            cost=cost,
            results=done,
        )
        write_report(report, args.output)
    print(f"\n{format_report(report)}\nWritten: {args.output}/steps.md, steps.json, steps.png")


def make_plan(args: argparse.Namespace, limit: int) -> Plan:
    """Make the plan of a command line, with increasing steps and decreasing tolerances."""
    steps, rtols = tuple(sorted(set(args.steps))), tuple(sorted(set(args.rtols), reverse=True))
    try:
        return Plan(steps=steps, rtols=rtols, limit=limit)
    except ValueError as error:
        raise UserError(f"--steps or --rtols: {error}") from error


if __name__ == "__main__":
    main()
