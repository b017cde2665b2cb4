"""Convert a checkpoint of another implementation to a checkpoint that MODEL.WEIGHTS can load.

    deqdet-convert-checkpoint IN OUT [--from deqdet|adamixer|sparse_rcnn|torchvision|swin]

IN is a file written by torch.save or a .safetensors file; code in it is never run. OUT is written in safetensors format
if its name ends in .safetensors, and otherwise in the format of Detectron2's checkpointer. The command also prints
every config key that the checkpoint determines, as one line of KEY VALUE pairs: append them to --config-file FILE, for
any FILE of this project.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ..checkpoints import KINDS, convert_file
from ..engine import check_alone, exit_on_user_error
from ..plugins import import_plugins


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_args(words)
        check_alone(os.environ)
        done = convert_file(args.source, args.target, kind=args.kind, num_classes=args.num_classes)
        print(f"kind: {done.kind}{' (guessed from the keys)' if done.guessed else ''}")
        for note in done.notes:
            print(f"note: {note}")
        print(f"wrote {len(done.weights)} tensors to {args.target}; the config keys that they determine:")
        print(format_config(done.config))


def format_config(config: dict[str, object]) -> str:
    """Format the config as KEY VALUE pairs for a shell's command line."""
    texts = {key: str(value).replace(", ", ",") for key, value in config.items()}
    return " ".join(f'{key} "{text}"' if "[" in text else f"{key} {text}" for key, text in texts.items())


def parse_args(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and import the plugins first, because they may register kinds."""
    plugins = argparse.ArgumentParser(add_help=False)
    plugins.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE",
        help="import this module or .py file first, e.g. one that registers a kind; can be given several times",
    )  # fmt: skip
    import_plugins(plugins.parse_known_args(words)[0].plugin)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[plugins]
    )
    parser.add_argument("source", type=Path, metavar="IN", help="checkpoint to convert")
    parser.add_argument("target", type=Path, metavar="OUT", help="converted checkpoint to write, .safetensors or .pth")
    parser.add_argument(
        "--from", dest="kind", choices=sorted(KINDS), help="kind of IN (default: guessed from its parameter names)"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="K",
        help="number of classes that IN must have (default: any number but 81, COCO's 80 and a background class)",
    )  # fmt: skip
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
