#!/usr/bin/env python
"""Detect in images, a video or a camera's pictures, and watch how an equilibrium detector converges.

    python tools/demo.py --config-file F --input PATH [PATH ...] [--output OUT] --opts MODEL.WEIGHTS CHECKPOINT ...
    python tools/demo.py --config-file F --video-input FILE | --webcam [INDEX] [--output OUT] --opts ...

A PATH is a file, a folder (the images directly in it) or a glob. Each picture goes to the folder OUT under its own name
(of several with one name, later ones get _2, _3, ...), or for a single image to the file OUT; small images are drawn
enlarged. Without --output, results are shown in a window: any key goes on, Esc ends. Boxes have one colour a class.

--refinement-gif, --refinement-strip and --convergence-plot write NAME_refinement.gif, NAME_strip.png and
NAME_convergence.png beside the picture: how the boxes of the detections moved from the initial ones step by step, and
the residuals of content and position. They need MODEL.DEQDET.DECODER EquilibriumDecoder, as do --steps, --rtol and
--solver.

A file that cannot be done has one line on stderr; the others are done, and the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

from detectron2.config import CfgNode

from deqdet.demo import (
    GIF,
    PLOT,
    STRIP,
    ImageDemo,
    build_detector,
    check_equilibrium,
    find_images,
    open_camera,
    open_video,
    plan_pictures,
    plan_video,
    prepare_config,
    run_video,
)
from deqdet.engine import UserError, load_config

EXTRAS = {"refinement_gif": GIF, "refinement_strip": STRIP, "convergence_plot": PLOT}


def main(args: argparse.Namespace) -> None:
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    extras = {as_option(name): ending for name, ending in EXTRAS.items() if getattr(args, name)}
    check_arguments(args, list(extras))
    cfg = load_config(args)
    prepare_config(cfg, steps=args.steps, rtol=args.rtol, solver=args.solver)
    check_equilibrium(cfg, list(extras))
    if args.input:
        detect_in_images(args, cfg, list(extras.values()))
        return
    video = open_camera(args.webcam) if args.video_input is None else open_video(args.video_input)
    output = None if args.output is None else plan_video(args.video_input, args.output)
    run_video(build_detector(cfg, args.confidence_threshold), video, output)


def detect_in_images(args: argparse.Namespace, cfg: CfgNode, extras: list[str]) -> None:
    """Do all that can be done, then exit with 1 if something could not."""
    sources, faults = find_images(args.input)
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    count = len(faults)
    if sources:
        pictures = None if args.output is None else plan_pictures(sources, args.output, extras)
        demo = ImageDemo(build_detector(cfg, args.confidence_threshold))
        if pictures is None:
            demo.show(sources)
        else:
            demo.write(sources, pictures, extras)
        count += demo.faults
    if count:
        sys.exit(1)


def check_arguments(args: argparse.Namespace, extras: list[str]) -> None:
    """
    Raises:
        UserError: two arguments do not fit together, or one is out of range.
    """
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}")
    if extras and not args.input:
        raise UserError(f"{', '.join(extras)}: only with --input")
    if extras and args.output is None:
        raise UserError(f"{', '.join(extras)}: say with --output where to")


def as_option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", metavar="F", required=True, help="one of configs/, or a run's config.yaml")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="image files, folders, globs")
    source.add_argument("--video-input", type=Path, metavar="FILE", help="a video file")
    source.add_argument("--webcam", type=int, nargs="?", const=0, metavar="INDEX", help="a camera; default 0")
    parser.add_argument("--output", type=Path, metavar="OUT", help="folder or file; if not given, a window is opened")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.5, metavar="S", help="lowest score that is shown; default 0.5"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="the most steps: MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS")
    parser.add_argument("--rtol", type=float, metavar="R", help="stop at this residual: MODEL.DEQDET.SOLVER.RTOL")
    parser.add_argument("--solver", metavar="NAME", help="MODEL.DEQDET.SOLVER.NAME")
    for name, what in (
        ("refinement_gif", "the boxes step by step"),
        ("refinement_strip", "some steps side by side"),
        ("convergence_plot", "residuals against the step"),
    ):
        parser.add_argument(as_option(name), action="store_true", help=f"write NAME{EXTRAS[name]}: {what}")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
