#!/usr/bin/env python
"""Pictures of a trained equilibrium detector: contact sheet, loss curve, residual against the step.

    python tools/report.py --config-file F [--images 8] [--steps 25] [KEY VALUE ...]

reads OUTPUT_DIR/model_final.pth, or the MODEL.WEIGHTS of the command line, and the run's metrics.json, and writes
detections.png, loss.png, residual.png and residual.json into OUTPUT_DIR.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader

from deqdet.engine import argument_parser, build_model, load_config, load_weights, run, setup
from deqdet.residuals import measure_residuals
from deqdet.visualization import contact_sheet, draw_pair, plot_losses, plot_residuals

SHEET_SCORE = 0.3  # detections below are not drawn


def main(args: argparse.Namespace) -> None:
    if "MODEL.WEIGHTS" not in args.opts:
        args.opts += ["MODEL.WEIGHTS", str(Path(load_config(args).OUTPUT_DIR) / "model_final.pth")]
    cfg = setup(args)
    output = Path(cfg.OUTPUT_DIR)
    model = build_model(cfg).eval()
    load_weights(model, cfg, resume=False)
    dataset = cfg.DATASETS.TEST[0]

    draw_detections(model, cfg, dataset, args.images, output / "detections.png")
    if (output / "metrics.json").is_file():
        plot_losses(output / "metrics.json", output / "loss.png")
    residuals = measure_residuals(model, build_detection_test_loader(cfg, dataset), args.steps)
    plot_residuals(residuals, output / "residual.png")
    medians = residuals.median(dim=1).values.tolist()
    (output / "residual.json").write_text(json.dumps({"median_relative_residual": medians}, indent=1))
    print(f"Median relative residual over {residuals.shape[1]} images of {dataset}:")
    for step in sorted({1, 2, 5, 10, 15, 20, args.steps}):
        if step <= args.steps:
            print(f"  step {step:3d}  {medians[step]:.3e}")
    print(f"Pictures: {output}/detections.png, loss.png, residual.png")


def draw_detections(model: torch.nn.Module, cfg: CfgNode, dataset: str, count: int, path: Path) -> None:
    """The first `count` images of a data set with their ground truth and the model's detections."""
    records, metadata = DatasetCatalog.get(dataset), MetadataCatalog.get(dataset)
    batches = islice(build_detection_test_loader(cfg, dataset), count)
    pairs = []
    with torch.no_grad():
        for record, batch in zip(records, batches, strict=False):
            found = model(batch)[0]["instances"]
            pairs.append(draw_pair(record, found, metadata, width=320, threshold=SHEET_SCORE))
    contact_sheet(pairs, columns=2, path=path)


def parse_args() -> argparse.Namespace:
    parser = argument_parser()
    parser.add_argument("--images", type=int, default=8, help="number of images on the contact sheet")
    parser.add_argument("--steps", type=int, default=25, help="steps of the residual plot")
    parser.set_defaults(eval_only=True)
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
