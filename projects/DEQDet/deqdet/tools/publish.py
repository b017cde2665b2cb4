"""Make one model file, with which no config is needed, of a checkpoint and its config.

    python tools/publish.py CHECKPOINT --config-file FILE --output FILE.safetensors [--half] [KEY VALUE ...]

CHECKPOINT is a .pth file of a training, or a .safetensors file. The output holds the weights, the config, the class
names and the pixel format, and no code. KEY VALUE pairs at the end change the config. After --class-names, another flag
or -- must come before them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import publish_checkpoint
from ..demo.predictor import build_class_names
from ..engine import load_config
from ..errors import UserError, one_line


def main(argv: Sequence[str] | None = None) -> None:
    """Publish; on any error print one line, exit with 1 and leave no file."""
    args = parse_args(argv)
    try:
        cfg = load_config(args)
        done = publish_checkpoint(
            args.checkpoint,
            args.output,
            cfg=cfg,
            class_names=args.class_names or build_class_names(cfg),
            weights=args.weights,
            half=args.half,
        )
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    print(done)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .pth or .safetensors file, or an hf:// name")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config that it was trained with")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the model file, .safetensors")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        default="auto",
        help="the weights themselves or their moving average; by default the average where the checkpoint has one",
    )
    parser.add_argument("--half", action="store_true", help="store float16, which halves the file")
    parser.add_argument(
        "--class-names", nargs="+", metavar="NAME", help="in the order of the classes; default: the first test set's"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes of the config")
    return parser.parse_intermixed_args(argv)
