"""Measure AP and time per image of trained detectors in several execution modes, and write one table.

    deqdet-speed-accuracy DETECTOR.safetensors [DETECTOR.safetensors ...] --output DIR [--steps 5 8 25]
        [--precisions float32 bfloat16] [--modes eager compiled graph onnx] [--limit N] [--threads N] [KEY VALUE ...]

Every model file is run on the first set of DATASETS.TEST in each precision and mode and, for an equilibrium detector,
with each number of steps. The time is that from the image in memory to its detections. The results are
DIR/speed_accuracy.md, .json and .png. The mode graph replays CUDA graphs and needs a GPU. The mode onnx exports the
detectors to a temporary folder (one graph, plain iteration, float32) and runs them with onnxruntime, which needs
the packages of the extra "export". Run nothing else on the machine at the same time.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from detectron2.data import get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances

from ..decoders import DecodingGraphs
from ..engine import add_plugin_argument, exit_on_user_error, load_config, parse_arguments
from ..errors import UserError, plural
from ..extras import how_to_install
from ..measurement.accuracy import Evaluation
from ..measurement.speed_accuracy import TIMED, Report, Way, format_report, measure_ways, write_report
from ..measurement.timing import describe_machine
from ..predictor import Predictor
from .trained import choose_test_set, load_trained

STEPS = (5, 8, 25)
PRECISIONS = ("float32", "bfloat16")  # those of TEST.PRECISION
MODES = ("eager", "compiled", "graph", "onnx")
DEFAULT_MODES = ("eager", "compiled", "onnx")
# Keys that decide how a model runs -> the flags that replace them.
OWN_KEYS = {
    "TEST.PRECISION": "--precisions",
    "MODEL.DEQDET.COMPILE": "--modes compiled",
    "MODEL.DEQDET.CUDA_GRAPHS": "--modes graph",
}
RECORDINGS = 16  # CUDA graphs for each number of steps, one per padded image size


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    words = sys.argv[1:] if words is None else words
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        measure(args, command=shlex.join(["deqdet-speed-accuracy", *words]))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="DETECTOR", help="model files (.safetensors)")
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder for the table and the log")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, metavar="N", help="numbers of steps to measure (default: 5 8 25)"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="precisions to measure (default: both)"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, help="modes to measure (default: all but graph)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first N images (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="number of CPU threads (default: PyTorch's)")
    add_plugin_argument(parser)
    parser.epilog = "KEY VALUE pairs at the end override keys of every detector's config"
    return parser


def measure(args: argparse.Namespace, command: str) -> None:
    """Measure every detector in every execution mode, and write the report.

    Args:
        command: how the tool was called, for the report.
    """
    for flag, values in (("--limit", [args.limit]), ("--threads", [args.threads]), ("--steps", args.steps)):
        if any(value is not None and value < 1 for value in values):
            raise UserError(f"{flag} must be at least 1, got {' '.join(map(str, values))}")
    for key in args.opts[::2]:
        if key in OWN_KEYS:
            raise UserError(f"{key} cannot be overridden here: use {OWN_KEYS[key]}")
    names = _names(args.models)
    first = argparse.Namespace(**vars(args), config_file="", model=str(args.models[0]), allow_remote_config=False)
    if precision := load_config(first).FLOAT32_PRECISION:
        raise UserError(f"FLOAT32_PRECISION is {precision!r}: set it to '', so that the rows of float32 are exact")
    _, cfg = load_trained(first, args.output)
    if args.threads:
        torch.set_num_threads(args.threads)
    dataset = choose_test_set(cfg)
    records = get_detection_dataset_dicts(dataset, filter_empty=False)[: args.limit]
    timed = min(TIMED, len(records))
    if timed < 2:
        raise UserError(f"--limit or {dataset} leaves one image: quartiles of times need at least two")
    with tempfile.TemporaryDirectory() as folder:
        ways = []
        for name, path in names.items():
            for precision, mode in [(p, m) for m in args.modes for p in args.precisions]:
                if mode != "onnx":
                    ways += _torch_ways(name, path, precision, mode, args)
                elif precision == "float32":
                    ways += _onnx_ways(name, path, Path(folder), args)
        if not ways:
            raise UserError("--modes onnx runs in float32 only: add float32 to --precisions")
        # No detector returns more detections than its own limit, so with the largest limit all of them count.
        limit = max(way.max_detections for way in ways)
        rows = measure_ways(ways, records, Evaluation(dataset, max_detections=limit), images=timed)
    device = f"{describe_machine()}, {plural(torch.get_num_threads(), 'thread')}"
    report = Report(command, dataset, len(records), timed, device, rows)
    write_report(report, args.output)
    print(f"\n{format_report(report)}\nWritten: speed_accuracy.md, .json and .png in {args.output}")


def _names(models: Sequence[Path]) -> dict[str, Path]:
    """Choose a short name for each model file: its own, or that of its folder if file names are not unique."""
    stems = [path.stem for path in models]
    names = stems if len(set(stems)) == len(stems) else [path.resolve().parent.name for path in models]
    if len(set(names)) < len(names):
        raise UserError(f"two model files have the same name and the same folder's name, {names[0]}: rename one")
    return dict(zip(names, models, strict=True))


def _torch_ways(name: str, path: Path, precision: str, mode: str, args: argparse.Namespace) -> Iterator[Way]:
    overrides = [*args.opts, "TEST.PRECISION", precision, "MODEL.DEQDET.COMPILE", str(mode == "compiled")]
    predictor = Predictor.from_file(path, overrides=overrides, threshold=0.0)
    if mode == "graph":
        _check_device(predictor, path)

    def detect(image: np.ndarray, steps: int | None, graphs: DecodingGraphs | None) -> Instances:
        predictor.model.graphs = graphs
        before = graphs.replays if graphs else 0
        found = predictor(image, steps=steps).instances
        if graphs and graphs.replays == before:
            raise UserError(f"--modes graph: no recording, since {path} has a tolerance, or the images have more than "
                            f"{RECORDINGS} padded sizes")  # fmt: skip
        return found

    for label, steps in _step_choices(predictor, args.steps):
        graphs = DecodingGraphs(RECORDINGS) if mode == "graph" else None
        limit = predictor.model.max_detections
        yield Way(name, label, precision, mode, limit, partial(detect, steps=steps, graphs=graphs))


def _check_device(predictor: Predictor, path: Path) -> None:
    device = predictor.model.device.type
    if device != "cuda":
        raise UserError(f"--modes graph needs a GPU, and {path} runs on the device {device}")


def _onnx_ways(name: str, path: Path, folder: Path, args: argparse.Namespace) -> Iterator[Way]:
    try:
        from ..export import OnnxDetector, export_detector
    except ImportError as error:
        raise UserError(f"{error}, which --modes onnx needs: {how_to_install('export')}") from error
    overrides = [*args.opts, "MODEL.DEQDET.SOLVER.NAME", "FixedPointIteration"]  # one graph supports no other
    predictor = Predictor.from_file(path, overrides=overrides, device="cpu", threshold=0.0)
    exported = export_detector(predictor, folder / f"{name}.onnx", form="one")
    detector = OnnxDetector(exported.files[0], threads=args.threads or 0)

    def detect(image: np.ndarray, steps: int | None) -> Instances:
        found = detector(image, threshold=0.0, steps=steps)
        boxes, scores, classes = map(torch.from_numpy, (found.boxes, found.scores, found.classes))
        return Instances(image.shape[:2], pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)

    for label, steps in _step_choices(predictor, args.steps):
        yield Way(name, label, "float32", "onnx", predictor.model.max_detections, partial(detect, steps=steps))


def _step_choices(predictor: Predictor, steps: Sequence[int]) -> list[tuple[str, int | None]]:
    """Return the labels and values of the steps to measure; a detector without equilibrium has only one choice."""
    if predictor.has_equilibrium:
        return [(f"{n} steps", n) for n in dict.fromkeys(steps)]
    return [(f"{predictor.model.decoder.execution().steps + 1} layers", None)]


if __name__ == "__main__":
    main()
