"""Export a trained detector to ONNX or torch.export files, which run without this package, and check them.

    deqdet-export-model --model FILE.safetensors --output detector.onnx [--to onnx] [--form two] [--steps N]
        [--rtol R] [--solver S]
    deqdet-export-model --config-file FILE --output detector.onnx MODEL.WEIGHTS CHECKPOINT

--form two, for detectors that apply one layer repeatedly, writes detector.encoder.onnx and detector.step.onnx, which
deqdet.export.OnnxDetector runs with any number of steps, with a tolerance, and with plain iteration or Anderson
acceleration. --form one writes the whole detector with plain iteration; in an .onnx file its number of steps is an
input. See docs/deployment.md.

The files get their names, and replace older ones, only after the check.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..atomic import prepare_output, replacing_once_checked
from ..engine import add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..errors import UserError
from ..extras import how_to_install
from ..predictor import Predictor
from .trained import add_solver_arguments


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
            raise UserError(f"{error}, which the export needs: {how_to_install('export')}") from error
        prepare_output(args.output)
        cfg = load_config(args)
        predictor = Predictor.from_config(cfg, device="cpu")
        options = predictor.options(args.steps, args.rtol, args.solver)
        if args.form == "one" and predictor.has_equilibrium:
            _, rtol, _ = predictor.model.decoder.options(**options)
            if rtol > 0:
                print(f"One graph always takes all its steps: the tolerance {rtol} has no effect.")
        with replacing_once_checked(args.output) as (unfinished, describe):

            def say(line: str) -> None:
                print(describe(line), flush=True)  # flushed, so that it comes before its stage, even in a pipe

            exported = export_detector(predictor, unfinished, target=args.to, form=args.form, **options, say=say)
            try:
                check_export(exported, say)
            except UserError as error:
                raise UserError(f"{error}; it was deleted, and an older file of this name is unchanged") from error
        for path in (args.output.with_name(file.name) for file in exported.files):
            print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--to", choices=("onnx", "torch-export"), default="onnx", help="format of the export (default: onnx)"
    )
    parser.add_argument(
        "--form", choices=("one", "two"), default="two",
        help="one graph, or two graphs: an encoder and one step (default: two)",
    )  # fmt: skip
    add_solver_arguments(parser)
    add_config_arguments(parser)
    return parser


if __name__ == "__main__":
    main()
