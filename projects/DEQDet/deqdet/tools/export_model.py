"""Export a trained detector as ONNX or torch.export files, which run without this package, and check them.

    deqdet-export-model --model FILE.safetensors --output detector.onnx [--to onnx] [--form two] [--steps N]
    deqdet-export-model --config-file FILE --output detector.onnx MODEL.WEIGHTS CHECKPOINT

--form two, for detectors that apply one layer again and again, writes detector.encoder.onnx and detector.step.onnx,
which deqdet.export.OnnxDetector runs with any number of steps, a tolerance, and plain or Anderson's iteration.
--form one writes a whole detector with plain iteration; in an .onnx file its number of steps is an input. See
docs/deployment.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..engine import add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..errors import UserError
from ..predictor import Predictor


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        try:
            from ..export import check_export, export_detector
        except ImportError as error:
            raise UserError(f"{error}: the export needs pip install 'deqdet[export]'") from error
        cfg = load_config(args)
        predictor = Predictor.from_config(cfg, device="cpu")
        if args.form == "one" and predictor.has_equilibrium and (rtol := predictor.model.decoder.rtol) > 0:
            print(f"One graph takes all its steps: MODEL.DEQDET.SOLVER.RTOL {rtol} has no effect in it.")
        exported = export_detector(predictor, args.output, target=args.to, form=args.form, steps=args.steps)
        for path in exported.files:
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
        print(f"Compared with PyTorch after {exported.notes['steps']} steps:")
        for difference in check_export(exported):
            print(f"  {difference}")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx, or .pt2")
    parser.add_argument("--to", choices=("onnx", "torch-export"), default="onnx", help="the format")
    parser.add_argument("--form", choices=("one", "two"), default="two", help="one graph, or an encoder and a step")
    parser.add_argument("--steps", type=int, metavar="N", help="applications of f; default: the config's")
    add_config_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
