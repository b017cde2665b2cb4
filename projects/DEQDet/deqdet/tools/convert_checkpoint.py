"""Make a checkpoint of another implementation one of ours, for MODEL.WEIGHTS.

    deqdet-convert-checkpoint IN OUT [--from deqdet|adamixer|sparse_rcnn|torchvision|swin]

IN is a file that torch.save wrote, or a .safetensors file; code in it is never run. OUT becomes a .safetensors file if
its name ends so, and else a file that detectron2's checkpointer loads. The command also prints, in one line of KEY
VALUE pairs, every config key that the checkpoint decides: put them behind --config-file FILE, for any FILE of ours.
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
        print(f"wrote {len(done.weights)} tensors to {args.target}; what they imply for the config:")
        print(format_config(done.config))


def format_config(config: dict[str, object]) -> str:
    """The config as KEY VALUE pairs for a shell's command line."""
    texts = {key: str(value).replace(", ", ",") for key, value in config.items()}
    return " ".join(f'{key} "{text}"' if "[" in text else f"{key} {text}" for key, text in texts.items())


def parse_args(words: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, and import the plugins first: they may bring kinds of their own."""
    plugins = argparse.ArgumentParser(add_help=False)
    plugins.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="import a module of your own")
    import_plugins(plugins.parse_known_args(words)[0].plugin)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[plugins]
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--from", dest="kind", choices=sorted(KINDS), help="the kind of IN; guessed if not given")
    parser.add_argument("--num-classes", type=int, metavar="K", help="the classes that IN must have, or be refused")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
