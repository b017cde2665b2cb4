#!/usr/bin/env python
"""Make another implementation's checkpoint one of ours, for MODEL.WEIGHTS.

    python tools/convert_checkpoint.py IN OUT [--from deqdet|adamixer|sparse_rcnn|torchvision|swin]

IN is what torch.save wrote, or a .safetensors file; no code in it is ever run. OUT becomes a .safetensors file if it is
named so, else one that detectron2's checkpointer loads. Printed are also, as KEY VALUE pairs in one line, all config
keys that the checkpoint decides: put them behind --config-file FILE, for whichever FILE of ours.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from deqdet.checkpoints import KINDS, CheckpointError, convert_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert; on any error print one line and exit with 1, leaving no file."""
    args = parse_args(arguments)
    try:
        done = convert_file(args.source, args.target, kind=args.kind, num_classes=args.num_classes)
    except CheckpointError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"kind: {done.kind}{' (guessed from the keys)' if done.guessed else ''}")
    for note in done.notes:
        print(f"note: {note}")
    print(f"wrote {len(done.weights)} tensors to {args.target}; what they imply for the config:")
    print(format_config(done.config))


def format_config(config: dict[str, object]) -> str:
    """KEY VALUE pairs for a shell's command line."""
    texts = {key: str(value).replace(", ", ",") for key, value in config.items()}
    return " ".join(f'{key} "{text}"' if "[" in text else f"{key} {text}" for key, text in texts.items())


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    kinds = sorted(KINDS)
    parser.add_argument("--from", dest="kind", choices=kinds, help="what IN is; guessed from its keys if not given")
    parser.add_argument("--num-classes", type=int, metavar="K", help="IN's classes; refuse it if it has others")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
