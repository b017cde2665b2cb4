"""Detect objects in a folder of images, a list of images or a video, and write the detections as data.

    deqdet-predict --model FILE --input PATH [PATH ...] --output FOLDER [--format coco|yolo|csv]
    deqdet-predict --model FILE --input FOLDER --images-from image_info.json --output FOLDER
    deqdet-predict --config-file F --video-input FILE --output FOLDER MODEL.WEIGHTS CHECKPOINT

A PATH is a file, a folder (the images directly in it) or a glob pattern; --input-list FILE has one PATH per line.

- coco: predictions.json in COCO result format. The image ids are those of --images-from; without it they are 1, 2, ...,
  and images.json maps them to the images.
- yolo: labels/NAME.txt for each image, with one line per detection: class index, centre x, centre y, width and height
  as fractions of the image, score; and classes.txt.
- csv: predictions.csv, with boxes as corners in pixels.

If a run is interrupted or killed, the same command resumes it, and the files are the same as without the interruption.
An image that cannot be read stops the run with a one-line error; with --skip-broken it is reported in one line on
stderr, the other images are processed, and the exit code is 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints.files import checksum
from ..demo import open_video
from ..engine import add_config_arguments, exit_on_user_error, parse_arguments
from ..errors import UserError, plural
from ..predictions import (
    BATCHES,
    FORMATS,
    WRITTEN,
    Journal,
    OutputFiles,
    Source,
    digest,
    list_sources,
    predict_images,
    predict_video,
    read_image_info,
    read_list,
)
from ..predictions.formats import IMAGES_NAME
from ..predictions.journal import NAME
from ..predictor import Predictor
from .trained import add_solver_arguments, load_predictor


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line `words`, by default that of the process."""
    with exit_on_user_error("interrupted: run the same command again to continue"):
        args = parse_arguments(make_parser(), words)
        _check_arguments(args)
        if args.video_input is None:
            _predict_images(args)
        else:
            _predict_video(args)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="image files, folders or glob patterns")
    source.add_argument("--input-list", type=Path, metavar="FILE", help="text file with one PATH per line")
    source.add_argument("--video-input", type=Path, metavar="FILE", help="video file")
    parser.add_argument(
        "--images-from", type=Path, metavar="FILE.json",
        help="process the images listed in this COCO-format file, under its ids; --input is their folder",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the results")
    parser.add_argument("--format", choices=FORMATS, default="coco", help="format of the results (default: coco)")
    parser.add_argument(
        "--confidence-threshold", type=float, default=0.05, metavar="S",
        help="minimum score of a detection that is written; 0 to compute AP as in an evaluation (default: 0.05)",
    )  # fmt: skip
    add_solver_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="maximum number of images per batch (default: 8)"
    )
    parser.add_argument("--skip-broken", action="store_true", help="continue if an image cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(f"--confidence-threshold must lie between 0 and 1, got {args.confidence_threshold}")
    if args.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.images_from and (not args.input or len(args.input) != 1 or not Path(args.input[0]).is_dir()):
        raise UserError("--images-from: --input must be the one folder that contains its images")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output {args.output} is a file: give a folder")
    names = [name for name in WRITTEN[args.format] if not (args.images_from and name == IMAGES_NAME)]
    present = [path for name in names if (path := args.output / name).exists()]
    if present and not args.overwrite and not (args.output / NAME).exists():
        raise UserError(f"{present[0]} already exists: choose another --output, or give --overwrite")


def _predict_images(args: argparse.Namespace) -> None:
    """Process all images, then exit with 1 if any were skipped."""
    faults: list[str] = []
    if not args.images_from:
        sources, faults = list_sources(args.input or read_list(args.input_list))
        if faults and not (args.skip_broken and sources):
            raise UserError(f"{faults[0]}{'; --skip-broken continues without it' if sources else ''}")
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
    predictor, options = load_predictor(args)
    ids: Sequence[int | str] = range(1, len(predictor.class_names) + 1)
    if args.images_from:
        sources, ids = read_image_info(args.images_from, Path(args.input[0]), predictor.class_names)
    journal = _open_journal(args, predictor)
    try:
        journal.keep([source.state() for source in sources], overwrite=args.overwrite)
        _say_where(journal, plural(len(sources), "image"))
        options = {**options, "threshold": args.confidence_threshold}
        predict_images(predictor, sources, journal, options, batch_size=args.batch_size, skip_broken=args.skip_broken)
        _write(args, journal, _describe_images(args, sources, journal, predictor, ids))
    finally:
        journal.close()
    if skipped := journal.faults:
        print(f"error: {len(skipped)} of {len(sources)} images skipped; the first: {skipped[0]}", file=sys.stderr)
    if skipped or faults:
        sys.exit(1)


def _predict_video(args: argparse.Namespace) -> None:
    video = open_video(args.video_input)
    try:
        predictor, options = load_predictor(args)
        journal = _open_journal(args, predictor, video=Source(args.video_input, 1, "").state())
        try:
            _say_where(journal, "the frames" if video.length is None else plural(video.length, "frame"))
            options = {**options, "threshold": args.confidence_threshold}
            predict_video(predictor, video, journal, options, batch_size=args.batch_size)
            if journal.done:
                _write(args, journal, _describe_frames(args, journal, predictor))
        finally:
            journal.close()
        video.check_complete(len(journal.done))
    finally:
        video.capture.release()


def _open_journal(args: argparse.Namespace, predictor: Predictor, video: list | None = None) -> Journal:
    """Open the journal of the output folder; its settings have the names by which users know them."""
    cfg = predictor.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""  # the file may have moved; only its contents matter
    settings = {
        "model": digest(checksum(predictor.model.state_dict()), cfg.MODEL.dump(), predictor.class_names),
        "INPUT": digest(cfg.INPUT.dump()),
        "TEST": digest(cfg.TEST.dump()),
        "--confidence-threshold": args.confidence_threshold,
        "--steps": args.steps,
        "--rtol": args.rtol,
        "--solver": args.solver,
        "--batch-size": args.batch_size,
        "--video-input": video,
        "--images-from": bool(args.images_from),
    }
    return Journal(args.output, settings, group=BATCHES * args.batch_size, overwrite=args.overwrite)


def _say_where(journal: Journal, of: str) -> None:
    if journal.done:
        skipped = f" ({len(journal.faults)} skipped)" if journal.faults else ""
        print(f"{journal.path}: an earlier run completed {len(journal.done)} of {of}{skipped}; continuing from there")


def _write(args: argparse.Namespace, journal: Journal, output: OutputFiles) -> None:
    files = FORMATS[args.format](output)
    journal.remove()
    count = sum(len(done.detections) for done in output.done)
    inputs = plural(len(output.done) - len(journal.faults), "frame" if args.video_input else "image")
    skipped = f", {len(journal.faults)} skipped" if journal.faults else ""
    print(f"{', '.join(map(str, files))}: {plural(count, 'detection')} in {inputs}{skipped}")
    if nonfinite := sum(not done.finite for done in output.done):
        print(
            f"The states became infinite or NaN in {nonfinite} of {inputs}: their detections may be useless "
            "(docs/equilibrium.md, When it does not converge)"
        )


def _describe_images(
    args: argparse.Namespace,
    sources: Sequence[Source],
    journal: Journal,
    predictor: Predictor,
    category_ids: Sequence[int | str],
) -> OutputFiles:
    return OutputFiles(
        folder=args.output,
        done=journal.done,
        paths=[source.path for source in sources],
        names=[source.name for source in sources],
        frames=[None for _ in sources],
        image_ids=[source.image_id for source in sources],
        class_names=predictor.class_names,
        category_ids=category_ids,
        images_from=args.images_from,
        overwrite=args.overwrite,
    )


def _describe_frames(args: argparse.Namespace, journal: Journal, predictor: Predictor) -> OutputFiles:
    numbers = range(1, len(journal.done) + 1)
    return OutputFiles(
        folder=args.output,
        done=journal.done,
        paths=[Path(f"{args.video_input.stem}_{number:06d}.png") for number in numbers],
        names=[str(args.video_input) for _ in numbers],
        frames=list(numbers),
        image_ids=list(numbers),
        class_names=predictor.class_names,
        category_ids=range(1, len(predictor.class_names) + 1),
        images_from=None,
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    main()
