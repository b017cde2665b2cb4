"""Pictures of a trained equilibrium detector: contact sheet, loss curve, residual against the step.

    deqdet-report --config-file F [--images 8] [--steps 25] [KEY VALUE ...]

reads OUTPUT_DIR/model_final.pth, or the MODEL.WEIGHTS of the command line, or the file of --model, and the run's
metrics.json, and writes detections.png, loss.png, residual.png and residual.json into OUTPUT_DIR.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import build_test_loader
from ..engine import add_config_arguments, exit_on_user_error, parse_arguments
from ..errors import UserError
from ..measurement.plots import contact_sheet, draw_pair, plot_losses, plot_residuals
from ..measurement.residuals import measure_residuals
from .trained import load_trained

SHEET_SCORE = 0.3  # detections with a lower score are not drawn


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    with exit_on_user_error():
        report(parse_arguments(make_parser(), words))


def make_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--images", type=int, default=8, metavar="N", help="images on the contact sheet; default 8")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="steps of the residual plot; default 25")
    return parser


@torch.no_grad()
def report(args: argparse.Namespace) -> None:
    """Draw all pictures into OUTPUT_DIR, and print the median residuals."""
    if min(args.images, args.steps) < 1:
        raise UserError(f"--images and --steps must be at least 1, got {args.images} and {args.steps}")
    model, cfg = load_trained(args)
    output, dataset = Path(cfg.OUTPUT_DIR), cfg.DATASETS.TEST[0]
    loader = build_test_loader(cfg, dataset)

    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    pairs = []
    for record, batch in zip(records, islice(loader, args.images), strict=False):
        pairs.append(draw_pair(record, model(batch)[0]["instances"], metadata, width=320, threshold=SHEET_SCORE))
    contact_sheet(pairs, columns=2, path=output / "detections.png")
    pictures = ["detections.png"]
    if (output / "metrics.json").is_file():
        plot_losses(output / "metrics.json", output / "loss.png")
        pictures.append("loss.png")

    residuals = measure_residuals(model, loader, args.steps)
    plot_residuals(residuals, output / "residual.png")
    medians = residuals.median(dim=1).values.tolist()
    (output / "residual.json").write_text(json.dumps({"median_relative_residual": medians}, indent=1))
    print(f"Median relative residual over {residuals.shape[1]} images of {dataset}:")
    for step in sorted({1, 2, 5, 10, 15, 20, args.steps}):
        if step <= args.steps:
            print(f"  step {step:3d}  {medians[step]:.3e}")
    print(f"Pictures: {output}/{', '.join([*pictures, 'residual.png'])}")


if __name__ == "__main__":
    main()
