"""Write a one-page report about a training run, with plots and example images.

    deqdet-report --run FOLDER [--images 8] [--steps 25] [KEY VALUE ...]
    deqdet-report --config-file F [--images 8] [--steps 25] [KEY VALUE ...]

The command writes into OUTPUT_DIR:

- report.md: the AP of each class, missed objects and false detections, and how to load the model;
- curves.png: loss and AP against the iteration;
- worst.jpg: the test images with the most mistakes, ground truth beside detections (one file per test set);
- loss.png: the loss of each supervised prediction;
- detections.png: the first images of the first test set, ground truth beside the detections of the model;
- residual.png, residual.json: the residual against the step, for an equilibrium detector, on the same set.

The first three are made from the files that the training and its last evaluation left in OUTPUT_DIR (metrics.json and
inference/), without running the model; with --page-only, only these are written. loss.png is made from metrics.json
too. The others run OUTPUT_DIR/model_final.pth, or MODEL.WEIGHTS if given on the command line, or the model file of
--model. --run FOLDER uses FOLDER as OUTPUT_DIR, with the config.yaml in it.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..atomic import write_text
from ..data import build_test_loader, prepare_datasets
from ..detector import DEQDet
from ..engine import add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..engine.configuration import explained_datasets
from ..errors import UserError
from ..measurement.plots import contact_sheet, draw_pair, plot_losses, plot_residuals
from ..measurement.residuals import measure_residuals
from ..measurement.training_report import write_training_report
from .trained import choose_test_set, load_trained

SHEET_SCORE = 0.3  # detections with a lower score are not drawn


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    with exit_on_user_error():
        report(parse_arguments(make_parser(), words))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--run", default="", metavar="FOLDER", help="OUTPUT_DIR of a training, with its config.yaml")
    parser.add_argument(
        "--page-only", action="store_true",
        help="write only report.md, curves.png and worst.jpg, without running the model",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=8, metavar="N",
        help="maximum number of images in worst.jpg and in detections.png (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, default=25, metavar="N", help="number of steps in the residual plot (default: 25)"
    )
    return parser


def report(args: argparse.Namespace) -> None:
    """Write the page and all pictures into OUTPUT_DIR, and print the median residuals."""
    if min(args.images, args.steps) < 1:
        raise UserError(f"--images and --steps must be at least 1, got {args.images} and {args.steps}")
    if args.run:
        _take_run(args)
    if args.page_only:
        cfg = load_config(args)
        with explained_datasets():
            prepare_datasets(cfg, eval_only=True)
        _write_page(Path(cfg.OUTPUT_DIR), cfg.DATASETS.TEST, args.images)
        return
    model, cfg = load_trained(args)
    output, dataset = Path(cfg.OUTPUT_DIR), choose_test_set(cfg)
    draw_first(model, build_test_loader(cfg, dataset), dataset, args.images, output / "detections.png")
    pictures = ["detections.png"]
    if (output / "metrics.json").is_file():
        plot_losses(output / "metrics.json", output / "loss.png")
        pictures.append("loss.png")
    if model.decoder.has_equilibrium:
        residuals = measure_residuals(model, build_test_loader(cfg, dataset), args.steps)
        plot_residuals(residuals, output / "residual.png")
        pictures.append("residual.png")
        medians = residuals.median(dim=1).values.tolist()
        write_text(json.dumps({"median_relative_residual": medians}, indent=1), output / "residual.json")
        print(f"Median relative residual over {residuals.shape[1]} images of {dataset}:")
        for step in sorted({1, 2, 5, 10, 15, 20, args.steps}):
            if step <= args.steps:
                print(f"  step {step:3d}  {medians[step]:.3e}")
    print(f"Images: {output}/{', '.join(pictures)}")
    _write_page(output, cfg.DATASETS.TEST, args.images)


def _take_run(args: argparse.Namespace) -> None:
    """Use the config.yaml in the folder of --run as --config-file, and the folder as OUTPUT_DIR.

    Raises:
        UserError: a config is given as well, or the folder is not that of a training.
    """
    if args.config_file or args.model:
        raise UserError("--run uses the config.yaml in its folder: omit --config-file and --model")
    config = Path(args.run, "config.yaml")
    if not config.is_file():
        raise UserError(f"--run {args.run}: {config} does not exist: give the OUTPUT_DIR of a training")
    args.config_file, args.opts = str(config), ["OUTPUT_DIR", args.run, *args.opts]


def _write_page(output: Path, datasets: Sequence[str], images: int) -> None:
    if not output.is_dir():
        raise UserError(f"OUTPUT_DIR {output} does not exist: give the OUTPUT_DIR of a training")
    page = write_training_report(output, datasets, num_images=images)
    print(f"Report: {page}")


@torch.no_grad()
def draw_first(model: DEQDet, loader: Iterable[list[dict]], dataset: str, count: int, path: Path) -> None:
    """Run the model on the first `count` images of a test set, and draw them beside the ground truth."""
    records, names = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset).thing_classes
    pairs = []
    for record, batch in zip(records, islice(loader, count), strict=False):
        pairs.append(draw_pair(record, model(batch)[0]["instances"], names, width=320, threshold=SHEET_SCORE))
    contact_sheet(pairs, columns=2, path=path)


if __name__ == "__main__":
    main()
