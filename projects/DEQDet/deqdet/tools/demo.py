"""Detect objects in images, a video or a camera stream, and show how an equilibrium detector converges.

    deqdet-demo --model FILE --input PATH [PATH ...] [--output OUT]
    deqdet-demo --config-file F --input PATH [PATH ...] [--output OUT] MODEL.WEIGHTS CHECKPOINT
    deqdet-demo ... --video-input FILE | --webcam [INDEX] [--output OUT]

A PATH is a file, a folder (the images directly in it) or a glob pattern. Each result is written to the folder OUT under
the name of its image (if several images have the same name, later ones get _2, _3, ...), or, for a single image, to the
file OUT; small images are enlarged. Without --output, the results are shown in a window: press any key for the next
one, Esc to quit. Each class has its own colour.

--refinement-gif, --refinement-strip and --convergence-plot write NAME_refinement.gif, NAME_strip.png and
NAME_convergence.png beside the result: how the boxes of the detections moved from the initial ones step by step, and
the residuals of content and position. They need a decoder with an equilibrium, as do --steps, --rtol and --solver.

Each file that cannot be processed is reported in one line on stderr; the others are processed, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..demo import (
    GIF,
    PLOT,
    STRIP,
    ImageDemo,
    find_images,
    open_camera,
    open_video,
    plan_pictures,
    plan_video,
    run_video,
)
from ..engine import add_config_arguments, exit_on_user_error, parse_arguments
from ..errors import UserError
from .trained import add_solver_arguments, load_predictor

EXTRAS = {  # flag: the file's ending, what it shows
    "--refinement-gif": (GIF, "an animation of the boxes, step by step"),
    "--refinement-strip": (STRIP, "the boxes at some steps, side by side"),
    "--convergence-plot": (PLOT, "a plot of the residuals against the step"),
}


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line `words`, by default that of the process."""
    with exit_on_user_error():
        args = parse_arguments(_parser(), words)
        args.extras = [flag for flag in EXTRAS if flag in args.extras]  # each once, in this order
        if not 0 <= args.confidence_threshold <= 1:
            raise UserError(f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}")
        if args.extras and not args.input:
            raise UserError(f"{', '.join(args.extras)}: only with --input")
        if args.extras and args.output is None:
            raise UserError(f"{', '.join(args.extras)}: --output is needed")
        if args.input:
            _detect_in_images(args)
        else:
            _detect_in_video(args)


def _detect_in_images(args: argparse.Namespace) -> None:
    """Process all images that can be read, then exit with 1 if any could not."""
    sources, faults = find_images(args.input)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    count = len(faults)
    if sources:
        predictor, options = load_predictor(args, args.extras)
        demo = ImageDemo(predictor, options)
        if args.output is None:
            demo.show(sources)
        else:
            endings = [EXTRAS[flag][0] for flag in args.extras]
            demo.write(sources, plan_pictures(sources, args.output, endings), endings)
        count += demo.faults
    if count:
        sys.exit(1)


def _detect_in_video(args: argparse.Namespace) -> None:
    video = open_camera(args.webcam) if args.video_input is None else open_video(args.video_input)
    predictor, options = load_predictor(args, args.extras)
    output = None if args.output is None else plan_video(args.video_input, args.output)
    run_video(predictor, video, output, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="image files, folders or glob patterns")
    source.add_argument("--video-input", type=Path, metavar="FILE", help="video file")
    source.add_argument("--webcam", type=int, nargs="?", const=0, metavar="INDEX", help="camera index (default: 0)")
    parser.add_argument("--output", type=Path, metavar="OUT", help="folder or file to write (default: open a window)")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="S",
        help="minimum score of a detection that is drawn (default: 0.5)",
    )  # fmt: skip
    add_solver_arguments(parser)
    for flag, (ending, what) in EXTRAS.items():
        parser.add_argument(
            flag, action="append_const", const=flag, dest="extras", default=[], help=f"also write NAME{ending}: {what}"
        )
    return parser


if __name__ == "__main__":
    main()
