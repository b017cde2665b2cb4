"""Combine a checkpoint and its config into one model file, which can be used without a config.

    deqdet-publish CHECKPOINT --config-file FILE --output FILE.safetensors [--half] [KEY VALUE ...]

CHECKPOINT is a .pth file written by training, or a .safetensors file. The output contains the weights, the config, the
class names and the pixel format, and no code. FILE is the config that the checkpoint was trained with, for example
config.yaml in the output folder of the training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import publish_checkpoint
from ..data import find_class_names
from ..engine import add_config_arguments, exit_on_user_error, load_config, parse_arguments


def main(words: Sequence[str] | None = None) -> None:
    """Run the command. If it fails, it leaves no file.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        cfg = load_config(args)
        names = args.class_names or find_class_names(cfg)
        done = publish_checkpoint(
            args.checkpoint, args.output, cfg=cfg, class_names=names, weights=args.weights, half=args.half
        )
        print(done)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=".pth or .safetensors file, or hf://OWNER/NAME")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="model file to write, .safetensors")
    parser.add_argument(
        "--weights",
        choices=("auto", "raw", "ema"),
        default="auto",
        help="the raw weights or their moving average (default: auto, the average if the checkpoint has one)",
    )
    parser.add_argument("--half", action="store_true", help="store the weights as float16, which halves the file size")
    parser.add_argument(
        "--class-names", nargs="+", metavar="NAME",
        help="class names, in the order of the model's classes (default: those of the first training set, or else of "
        "the first test set)",
    )  # fmt: skip
    add_config_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
