#!/usr/bin/env python
"""AP, residual, latency and multiply-adds of a trained equilibrium detector against steps, solver and rtol.

    python tools/evaluate_steps.py --config-file F --output DIR [--steps 4 5 6 8 10 15 20 25 50 200]
        [--solvers plain anderson2 anderson4 broyden] [--rtols 0.2 0.1 0.05 0.02 0.01] [--limit N] [KEY VALUE ...]

evaluates OUTPUT_DIR/model_final.pth, or the MODEL.WEIGHTS of the command line, on the first set of DATASETS.TEST, and
writes DIR/steps.md, steps.json and steps.png, anew after every solver: the paper's Tables 7 to 9 with residual and
latency, and what is saved where each image stops at a relative residual (at the latest after TEST_STEPS). The data are
gone through once a solver. A solver's numbers that its name does not give are those of MODEL.DEQDET.SOLVER.
"""

import argparse
import shlex
import sys
from pathlib import Path

from tqdm import tqdm

from deqdet.convergence import (
    Evaluation,
    Plan,
    Report,
    Results,
    build_solvers,
    count_cost,
    describe_device,
    format_report,
    measure_latencies,
    prepare_config,
    prepare_loader,
    prepare_model,
    summarize,
    walk_paths,
    write_report,
)
from deqdet.engine import UserError

STEPS = "4 5 6 8 10 15 20 25 50 200"  # those of Tables 7 and 8
SOLVERS = "plain anderson2 anderson4 broyden"
RTOLS = "0.2 0.1 0.05 0.02 0.01"


def main(args: argparse.Namespace) -> None:
    split_lists(args)
    cfg = prepare_config(args.config_file, args.output, args.opts)
    solvers = build_solvers(cfg, args.solvers)
    model = prepare_model(cfg)
    plan = make_plan(args, model.decoder.test_steps)
    loader, evaluation = prepare_loader(cfg, args.limit), Evaluation(cfg.DATASETS.TEST[0])
    cost, latencies = count_cost(model, next(iter(loader))), measure_latencies(model, loader, solvers)
    done: list[Results] = []
    for name, solver in solvers.items():
        walked = walk_paths(model, loader, solver=solver, plan=plan)
        paths = list(tqdm(walked, desc=name, total=len(loader), unit="image", disable=None))
        done.append(
            summarize(name, str(solver), paths, plan=plan, evaluate=evaluation, cost=cost, latency=latencies[name])
        )
        report = Report(
            command=shlex.join(["python", "tools/evaluate_steps.py", *sys.argv[1:]]),
            weights=cfg.MODEL.WEIGHTS,
            dataset=cfg.DATASETS.TEST[0],
            images=len(paths),
            device=describe_device(model.device),
            limit=plan.limit,
            cost=cost,
            results=done,
        )
        write_report(report, args.output)
    print(f"\n{format_report(report)}\nWritten: {args.output}/steps.md, steps.json, steps.png")


def is_key(word: str) -> bool:
    """A KEY such as MODEL.WEIGHTS; neither a solver nor a number such as 1E-2."""
    return word[:1].isalpha() and word.isupper()


def split_lists(args: argparse.Namespace) -> None:
    """Hand the KEY VALUE pairs that follow a list, which argparse takes for part of it, back to args.opts."""
    for name in ("steps", "solvers", "rtols"):
        values = getattr(args, name)
        count = next((i for i, value in enumerate(values) if is_key(value)), len(values))
        if count == 0:
            raise UserError(f"--{name} has no value")
        setattr(args, name, values[:count])
        args.opts = values[count:] + args.opts


def make_plan(args: argparse.Namespace, limit: int) -> Plan:
    """Rising steps, falling tolerances."""
    try:
        steps, rtols = set(map(int, args.steps)), set(map(float, args.rtols))
        return Plan(steps=tuple(sorted(steps)), rtols=tuple(sorted(rtols, reverse=True)), limit=limit)
    except ValueError as error:
        raise UserError(f"--steps or --rtols: {error}") from error


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="F", required=True, help="the trained model's")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the tables and of the log")
    parser.add_argument("--steps", nargs="+", default=STEPS.split(), metavar="N", help=f"default {STEPS}")
    parser.add_argument("--solvers", nargs="+", default=SOLVERS.split(), metavar="S", help=f"default {SOLVERS}")
    parser.add_argument("--rtols", nargs="+", default=RTOLS.split(), metavar="R", help=f"default {RTOLS}")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N images only")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
