"""What all command-line tools share: flags, KEY VALUE pairs at the end, and one-line messages for user errors."""

import argparse
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from ..data.folders import FORMATS
from ..errors import UserError, one_line
from ..model_zoo import is_key
from .cluster import check_alone
from .derivation import SIZES
from .signals import Interrupted


def parse_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None, *, joins: bool = False
) -> argparse.Namespace:
    """Parse a command line that ends in KEY VALUE pairs, and collect the pairs in the list `opts`.

    The pairs begin at the first config key, even if a flag that takes several values precedes it.

    Args:
        words: the command line; by default that of the process.
        joins: the command takes part in a run of several processes (see `launcher.run`).

    Raises:
        UserError: torchrun or srun has started several processes of a command that runs in a single one.
    """
    if words is None:
        gc.freeze()  # the libraries' objects live as long as the process: the collector need not visit them
    words = list(sys.argv[1:] if words is None else words)
    first = next((i for i, word in enumerate(words) if word == "--opts" or is_key(word)), len(words))
    args = parser.parse_args(words[:first])
    if not joins:
        check_alone(os.environ)
    args.opts = [*(getattr(args, "opts", None) or []), *words[first:]]
    if args.opts[:1] == ["--opts"]:  # older commands put this flag before the pairs
        del args.opts[0]
    return args


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the model; `load_config` reads them."""
    add_model_arguments(parser)
    parser.epilog = "KEY VALUE pairs at the end override config keys, e.g. MODEL.WEIGHTS FILE SOLVER.MAX_ITER 100"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config-file, --model, --plugin and --allow-remote-config."""
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="config file, or name of one in the model zoo"
    )
    parser.add_argument(
        "--model", default="", metavar="FILE", help="model file with its config: a .safetensors file or hf://OWNER/NAME"
    )
    add_plugin_argument(parser)
    parser.add_argument(
        "--allow-remote-config", action="store_true", help="allow the config or its _BASE_ files to be read from URLs"
    )


def add_plugin_argument(parser: argparse.ArgumentParser) -> None:
    """Add --plugin, for the user's own layers, decoders, solvers and backbones."""
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE",
        help="import this module or .py file first, e.g. one that registers a layer; can be given several times",
    )  # fmt: skip


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --data and its flags, which `own_data` reads, and --init, which `initialization` reads."""
    add_folder_arguments(
        parser, "train on the labelled images in FOLDER (COCO, YOLO or Pascal VOC), with settings derived from them"
    )
    parser.add_argument(
        "--init",
        default="",
        metavar="FILE",
        help="start from the weights in this checkpoint that fit the model: a file, a URL or a model zoo name",
    )


def add_folder_arguments(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add --data, with `purpose` as its help text, and the flags that control how FOLDER is read."""
    parser.add_argument("--data", default="", metavar="FOLDER", type=os.path.expanduser, help=purpose)
    parser.add_argument(
        "--data-format", default="", choices=list(FORMATS), help="format of the labels in FOLDER (default: detected)"
    )
    parser.add_argument(
        "--size", choices=list(SIZES),
        help="detector to train with --data: quick, for CPUs; mobilenet, the same with a MobileNetV2 pretrained on "
        "ImageNet; small, a ResNet-18 between quick and r50; r50, a ResNet-50 for GPUs (default: quick)",
    )  # fmt: skip
    parser.add_argument(
        "--val-fraction", type=_fraction, metavar="X",
        help="fraction of the images to evaluate on if FOLDER has no val set (default: 0.2)",
    )  # fmt: skip


@contextmanager
def exit_on_user_error(interrupted: str = "interrupted") -> Iterator[None]:
    """Turn a UserError in the block into one line on stderr and exit code 1, and Ctrl-C into exit code 130.

    After an Interrupted, the exit code is 128 + the number of its signal.

    As a side effect, stdout prints file names that are not UTF-8 with escapes from then on, as stderr does.

    Args:
        interrupted: the line to print after Ctrl-C or an Interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook replaces it by an object of another class
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt as error:
        print(interrupted, file=sys.stderr)
        sys.exit(128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT))


def _fraction(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")
