"""Count the parameters and multiply-adds of a detector, or compare its low-precision gradients.

    deqdet-analyze-model --config-file F [--tasks parameter flop] [--size HEIGHT WIDTH] [--steps N] [--output OUT.json]
        [KEY VALUE ...]
    deqdet-analyze-model --config-file F --tasks gradient [--batches N] MODEL.WEIGHTS CHECKPOINT [KEY VALUE ...]

The default tasks need neither data nor weights nor a GPU; `--tasks gradient` needs a trained model and its training
set.

Multiply-adds are counted in two ways. "linear", as in the paper: those of convolutions and linear layers, without the
projections inside nn.MultiheadAttention, which the paper's counter misses. "all": those of every operator that fvcore
can count. The image has 800 x 1333 pixels, the paper's size, whatever the config's own images have; --size counts for
another one, such as 160 160 for quick/deqdet_shapes. It is padded as at test time (to 800 x 1344). A step is one
refinement layer after the initialization layer (or after the first layer of a stack), including its prediction heads: T
layers are T - 1 steps.

The task gradient compares the gradients of training in bfloat16 and in float16 with those in float32, on N batches of
DATASETS.TRAIN (see deqdet.measurement.gradients).

OUT.json contains plain numbers: parameters.total and parameters.modules.NAME; flops.image_size, .padded_size, .steps
and, for WAY linear or all, flops.WAY.backbone, .neck, .initialization, .per_step, .read_out (the prediction heads' part
of .per_step) and .total; and gradients.PRECISION.PART.norms, .ratios and .cosines, with one number per batch.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..atomic import prepare_output, write_text
from ..data import build_train_loader
from ..engine import add_config_arguments, build_model, exit_on_user_error, load_config, parse_arguments
from ..errors import UserError
from ..measurement.cost import count_multiply_adds, count_parameters, format_cost, format_parameters
from ..measurement.gradients import compare_gradients, format_gradients
from .trained import load_trained

SIZE = (800, 1333)  # height and width in the paper, pixels
TASKS = ("parameter", "flop", "gradient")


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    with exit_on_user_error():
        analyze(parse_arguments(make_parser(), words))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=TASKS[:2], metavar="TASK",
        help="one or more of parameter, flop and gradient (default: parameter flop)",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=int, default=4, metavar="N", help="training batches for the task gradient (default: 4)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of an equilibrium decoder (default: the config's TEST_STEPS)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="size of the image for the task flop, pixels, before it is padded (default: 800 1333)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="OUT.json", help="also write the numbers to this JSON file")
    return parser


def analyze(args: argparse.Namespace) -> None:
    """Print the tables that the command line asks for, and write them as JSON."""
    if args.steps is not None and "flop" not in args.tasks:
        raise UserError("--steps is only for the task flop: add flop to --tasks, or omit --steps")
    if args.size is not None and "flop" not in args.tasks:
        raise UserError("--size is only for the task flop: add flop to --tasks, or omit --size")
    height, width = args.size or SIZE
    if min(height, width) < 1:
        raise UserError(f"--size must be two positive numbers of pixels, height and width, got {height} {width}")
    if args.batches < 1:
        raise UserError(f"--batches must be at least 1, got {args.batches}")
    if args.output:
        prepare_output(args.output)
    cfg, found, tables = load_config(args), {}, []
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg) if {"parameter", "flop"} & set(args.tasks) else None
    if "parameter" in args.tasks:
        parameters = count_parameters(model)
        found["parameters"] = asdict(parameters)
        tables.append(format_parameters(parameters))
    if "flop" in args.tasks:
        cost = count_multiply_adds(model, steps=args.steps, height=height, width=width)
        found["flops"] = cost.to_dict()
        tables.append(format_cost(cost))
    if "gradient" in args.tasks:
        trained, cfg = load_trained(args, with_training_sets=True)
        batches = itertools.islice(iter(build_train_loader(cfg)), args.batches)
        gradients = compare_gradients(trained, list(batches))
        found["gradients"] = {
            name: {part: asdict(x) for part, x in parts.items()} for name, parts in gradients.items()
        }
        tables.append(format_gradients(gradients))
    print("\n\n".join(tables))
    if args.output:
        write_text(json.dumps(found, indent=1) + "\n", args.output)


if __name__ == "__main__":
    main()
