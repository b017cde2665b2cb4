"""Measure whether the residual of a trained equilibrium detector predicts how reliable its detections are, compared
with the confidence scores.

    deqdet-residual-signal --config-file F --output DIR [--steps N] [--limit N] [KEY VALUE ...]

The command runs OUTPUT_DIR/model_final.pth, or MODEL.WEIGHTS if given on the command line, or the model file of
--model, on the first set of DATASETS.TEST. Each image is processed clean and with blur, noise, low contrast and
occlusion, each in four strengths, applied to the resized image. The residual ||f(y) - y|| / ||f(y)|| at the last step
and the scores are compared by how well each ranks images by their AP, and correct detections before false ones. The
results are DIR/residual_signal.md, .json and .png.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..data import build_test_loader, read_truths
from ..engine import add_config_arguments, exit_on_user_error, parse_arguments
from ..errors import UserError
from ..measurement.accuracy import Evaluation
from ..measurement.corruptions import CONDITIONS
from ..measurement.residual_signal import (
    make_groups,
    observe,
    summarize_condition,
    summarize_group,
    tabulate_detections,
    tabulate_images,
)
from ..measurement.residual_signal_report import Report, format_report, write_report
from ..measurement.timing import describe_machine
from .trained import choose_test_set, load_trained


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    words = sys.argv[1:] if words is None else words
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        measure(args, command=shlex.join(["deqdet-residual-signal", *words]))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder for the tables and the log")
    parser.add_argument("--steps", type=int, metavar="N", help="number of steps (default: the config's TEST_STEPS)")
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N images (default: all)")
    return parser


def measure(args: argparse.Namespace, command: str) -> None:
    """Run the detector under all conditions, compare the signals, and write the report.

    Args:
        command: how the tool was called, for the report.
    """
    for flag, value in (("--limit", args.limit), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise UserError(f"{flag} must be at least 1, got {value}")
    model, cfg = load_trained(args, args.output)
    if not model.decoder.has_equilibrium:
        raise UserError(f"MODEL.DEQDET.DECODER {cfg.MODEL.DEQDET.DECODER} has no residual: use an EquilibriumDecoder")
    if cfg.MODEL.DEQDET.SOLVER.RETURN_BEST:
        raise UserError(
            "MODEL.DEQDET.SOLVER.RETURN_BEST is True: set it to False, since the residuals are those of the last step"
        )
    steps, dataset = args.steps or model.decoder.execution().steps, choose_test_set(cfg)
    loader = build_test_loader(cfg, dataset, args.limit)
    evaluation = Evaluation(dataset, max_detections=cfg.TEST.DETECTIONS_PER_IMAGE)
    truths = read_truths(dataset)
    total = len(loader) * len(CONDITIONS)
    seen = list(tqdm(observe(model, loader, steps=steps), total=total, desc="detecting", unit="image", disable=None))
    accuracies = []
    for condition in CONDITIONS:
        alike = [x for x in seen if x.condition == condition]
        accuracies += evaluation(alike, [(steps,) * len(alike)])
    images = tabulate_images(seen, evaluation, truths, steps)
    detections = tabulate_detections(seen, truths, steps)
    pairs = zip(CONDITIONS, accuracies, strict=True)
    report = Report(
        command=command,
        weights=cfg.MODEL.WEIGHTS,
        dataset=dataset,
        images=len(loader),
        device=describe_machine(model.device),
        steps=steps,
        conditions=[summarize_condition(condition, images, detections, accuracy) for condition, accuracy in pairs],
        groups=[summarize_group(name, group, images, detections) for name, group in make_groups().items()],
    )
    write_report(report, images, detections, args.output)
    print(f"\n{format_report(report)}\nWritten: residual_signal.md, .json and .png in {args.output}")


if __name__ == "__main__":
    main()
