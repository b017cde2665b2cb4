#!/usr/bin/env python
"""Parameters and multiply-adds of a detector on an 800 x 1333 image. No data set, no weights, no GPU.

    python tools/analyze_model.py --config-file F [--tasks parameter flop] [--steps N] [--output OUT.json]
        [KEY VALUE ...]

Multiply-adds are counted in two ways. "linear", the paper's: over convolutions and linear layers, without the
projections within nn.MultiheadAttention, which its counter misses. "all": over all operators that fvcore counts.
The image is padded to 800 x 1344, as at test time. A step is one refinement layer after the initialization layer
(or after the first of a stack), with its read-out: T layers are T - 1 steps.

OUT.json, plain numbers: parameters.total and parameters.modules.NAME; flops.steps and, for WAY linear or all,
flops.WAY.backbone, .neck, .initialization, .per_step, .read_out (the part of per_step that is one) and .total.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from detectron2.modeling import build_model

from deqdet.analysis import count_multiply_adds, count_parameters, format_cost, format_parameters
from deqdet.engine import UserError, load_config

TASKS = ("parameter", "flop")


def main(args: argparse.Namespace) -> None:
    split_tasks(args)
    cfg = load_config(args)
    cfg.MODEL.DEVICE = "cpu"
    found, tables = {}, []
    try:
        model = build_model(cfg)
        if "parameter" in args.tasks:
            parameters = count_parameters(model)
            found["parameters"] = asdict(parameters)
            tables.append(format_parameters(parameters))
        if "flop" in args.tasks:
            cost = count_multiply_adds(model, steps=args.steps)
            found["flops"] = cost.to_dict()
            tables.append(format_cost(cost))
    except ValueError as error:
        raise UserError(f"{args.config_file}: {error}") from error
    print("\n\n".join(tables))
    if args.output:
        try:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {args.output}: {error.strerror}") from error


def split_tasks(args: argparse.Namespace) -> None:
    """Hand the KEY VALUE pairs that follow --tasks, which argparse takes for tasks, back to args.opts."""
    count = next((i for i, name in enumerate(args.tasks) if name not in TASKS), len(args.tasks))
    pairs = args.tasks[count:]
    if pairs and (count == 0 or not pairs[0].isupper()):
        raise UserError(f"--tasks: {pairs[0]} is unknown, choose from {', '.join(TASKS)}")
    args.tasks, args.opts = args.tasks[:count], pairs + args.opts
    if args.steps is not None and "flop" not in args.tasks:
        raise UserError("--steps is for the task flop: add it to --tasks, or leave --steps out")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="F", required=True, help="one of configs/")
    parser.add_argument(
        "--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="parameter, flop or both, the default"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="of an equilibrium decoder; default TEST_STEPS")
    parser.add_argument("--output", type=Path, metavar="OUT.json", help="the same numbers as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
