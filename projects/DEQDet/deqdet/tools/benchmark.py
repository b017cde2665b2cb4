"""Time one step, the decoder, a whole detection or a training iteration of a detector, or measure the training memory.

    deqdet-benchmark --config-file F --task step [--device cuda] [--precision bfloat16] [--batch 4] [KEY VALUE ...]

Weights are random and images are noise, because the times depend on neither. The command prints the median time with
its quartiles, the peak memory and, for a step, the *floor*: the time of its matrix products alone, measured in turn
with the step. --task memory measures no time: it counts the bytes that training keeps for its backward pass, for
several numbers of supervised states. The last lines of the output are a row or a table for docs/benchmarks.md. OUT.json
contains the same numbers: median_ms, for a step also floor_ms and simple_ms, and so on.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from detectron2.config import CfgNode

from ..atomic import prepare_output, write_text
from ..engine import add_config_arguments, build_model, exit_on_user_error, load_config, parse_arguments
from ..engine.configuration import adapt_device
from ..errors import UserError
from ..measurement.benchmark import PRECISIONS, TASKS, Setting, benchmark
from ..measurement.tables import format_table, format_value
from ..measurement.timing import describe_machine

MODES = ("eager", "compiled", "graph", "compiled-graph")


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    with exit_on_user_error():
        measure(parse_arguments(make_parser(), words))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--task", choices=TASKS, default="step", help="what to measure (default: step)")
    parser.add_argument("--device", help="cpu or cuda (default: MODEL.DEVICE, or cpu without a GPU)")
    parser.add_argument(
        "--precision", choices=list(PRECISIONS), default="float32",
        help="autocast precision; tf32 is float32 with TF32 matrix products (default: float32)",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="images per batch (default: 1)")
    steps = "steps of the decoder (default: the config's); with --task step, of the solve that is timed (default: 5)"
    parser.add_argument("--steps", type=int, metavar="T", help=steps)
    parser.add_argument(
        "--mode", choices=MODES, default="eager",
        help="eager execution, torch.compile, replay of a recorded CUDA graph, or both of these (default: eager)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: PyTorch's)")
    parser.add_argument("--height", type=int, default=800, help="image height in pixels (default: 800)")
    parser.add_argument("--width", type=int, default=1333, help="image width in pixels (default: 1333)")
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="timed calls, after three warm-up calls (default: 20)"
    )
    parser.add_argument(
        "--count-only", action="store_true",
        help="with --task memory: count the saved tensors without computing anything; the peak is not measured",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="OUT.json", help="also write the numbers to this JSON file")
    return parser


def measure(args: argparse.Namespace) -> None:
    """Run the measurement, print the results, and write them to --output if it is given."""
    for name in ("batch", "height", "width", "threads", *(["steps"] if args.task == "step" else [])):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.output:
        prepare_output(args.output)
    if args.repeats < 2:
        raise UserError(f"--repeats must be at least 2, got {args.repeats}: quartiles need several times")
    if args.count_only and args.task != "memory":
        raise UserError(f"--count-only is for --task memory, not for {args.task}")
    if "graph" in args.mode and args.task in ("training", "memory"):
        raise UserError(f"--mode {args.mode}: a CUDA graph is for detection, not for --task {args.task}")
    cfg = load_config(args)
    _check_replaced_keys(cfg)
    if args.device:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {args.device}: CUDA is not available on this machine")
        cfg.MODEL.DEVICE = args.device
    adapt_device(cfg)
    if args.threads:
        torch.set_num_threads(args.threads)
    for flag, value in (("--mode", args.mode), ("--precision", args.precision)):
        if value in ("graph", "compiled-graph", "tf32") and not cfg.MODEL.DEVICE.startswith("cuda"):
            raise UserError(f"{flag} {value} needs a GPU, and the model is on {cfg.MODEL.DEVICE}: see --device")
    model = build_model(cfg)
    if args.steps is not None and args.task != "step" and not model.decoder.has_equilibrium:
        raise UserError(f"--steps: a {type(model.decoder).__name__} takes MODEL.DEQDET.NUM_LAYERS steps")
    setting = Setting(
        task=args.task,
        height=args.height,
        width=args.width,
        batch=args.batch,
        precision=args.precision,
        steps=args.steps,
        compiled="compiled" in args.mode,
        graph="graph" in args.mode,
        compute=not args.count_only,
        repeats=args.repeats,
    )
    found = {
        "config": args.config_file or args.model,
        "task": args.task,
        "queries": cfg.MODEL.DEQDET.NUM_QUERIES,
        "precision": args.precision,
        "mode": args.mode,
        "batch": args.batch,
        "steps": args.steps,
        "image": [args.height, args.width],
        "machine": describe_machine(model.device),
        "date": date.today().isoformat(),
        **benchmark(model, setting),
    }
    for name, value in found.items():
        print(f"{name:13} {value:.2f}" if isinstance(value, float) else f"{name:13} {value}")
    print(format_memory(found["memory"]) if args.task == "memory" else format_row(found))
    if args.output:
        write_text(json.dumps(found, indent=1) + "\n", args.output)


def _check_replaced_keys(cfg: CfgNode) -> None:
    """Check that keys that flags replace have their defaults, so that the flags describe what was measured.

    Raises:
        UserError: a key does not have its default value.
    """
    for key, value, default, flag in (
        ("FLOAT32_PRECISION", cfg.FLOAT32_PRECISION, "", "--precision float32 or tf32"),
        ("TEST.PRECISION", cfg.TEST.PRECISION, "float32", "--precision"),
        ("MODEL.DEQDET.COMPILE", cfg.MODEL.DEQDET.COMPILE, False, "--mode compiled"),
        ("MODEL.DEQDET.CUDA_GRAPHS", cfg.MODEL.DEQDET.CUDA_GRAPHS, 0, "--mode graph"),
    ):
        if value != default:
            raise UserError(f"{key} is {value!r}: set it to {default!r} and use {flag} instead")


def format_row(found: dict) -> str:
    """Format a row of the tables in docs/benchmarks.md."""
    ratio = f"{found['median_ms'] / found['floor_ms']:.2f}" if "floor_ms" in found else ""
    simple = f"{found['simple_ms'] / found['floor_ms']:.2f}" if "simple_ms" in found and ratio else ""
    task = found["task"] if found["steps"] is None else f"{found['task']}, {found['steps']} steps"
    cells = [found["config"], task, found["queries"], found["precision"], found["mode"], found["batch"]]
    spread = f"{found['median_ms']:.1f} ({found['low_ms']:.1f} to {found['high_ms']:.1f})"
    cells += [spread, ratio, simple, format_value(found["peak_mb"], ".0f")]
    return "| " + " | ".join(map(str, cells)) + " |"


def format_memory(rows: Sequence[dict]) -> str:
    """Format the table of --task memory in MiB, with one row per size of Omega."""
    points = sorted({row["points"] for row in rows})
    cells = {(row["points"], row["recomputed"]): row for row in rows}
    names = {"saved_mb": "saved", "peak_mb": "peak"}
    names = {key: name for key, name in names.items() if key in rows[0]}
    table = [["points in Omega", *names.values(), *(f"{name}, recomputed" for name in names.values())]]
    for count in points:
        found = cells[count, False], cells[count, True]
        table.append([str(count), *(f"{row[key]:.1f}" for row in found for key in names)])
    return format_table(table, names=0)


if __name__ == "__main__":
    main()
