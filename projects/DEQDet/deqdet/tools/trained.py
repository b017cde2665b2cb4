"""Load the trained model that a tool's command line describes."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..decoders import EquilibriumDecoder
from ..detector import DEQDet
from ..engine import check_training_sets, load_config, setup
from ..errors import UserError
from ..predictor import Predictor


def load_trained(
    args: argparse.Namespace, output: Path | None = None, *, with_training_sets: bool = False
) -> tuple[DEQDet, CfgNode]:
    """Set up the run that a command line describes, and load its model with the weights.

    Without --model or a MODEL.WEIGHTS among the overrides, the weights are those of OUTPUT_DIR/model_final.pth, and of
    a training with SOLVER.EMA.ENABLED the averaged ones in OUTPUT_DIR/model_final.safetensors.

    Args:
        args: with the flags of `add_config_arguments`, parsed by `parse_arguments`.
        output: the folder of the log and of a copy of the config; by default OUTPUT_DIR.
        with_training_sets: check and register the sets of DATASETS.TRAIN too, not only those of DATASETS.TEST.

    Returns:
        The model in evaluation mode, and its frozen config.

    Raises:
        UserError: the config, a data set or the weights are missing or wrong.
    """
    opts, cfg = list(args.opts), load_config(args)
    weights = cfg.MODEL.WEIGHTS
    if not args.model and "MODEL.WEIGHTS" not in opts[::2]:
        name = "model_final.safetensors" if cfg.SOLVER.EMA.ENABLED else "model_final.pth"
        weights = os.path.join(cfg.OUTPUT_DIR, name)
        if not os.path.isfile(weights):
            raise UserError(f"{weights} does not exist: train the model, or give a checkpoint as MODEL.WEIGHTS")
        opts += ["MODEL.WEIGHTS", weights]
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: give the checkpoint of a trained model")
    if output is not None:
        opts += ["OUTPUT_DIR", str(output)]
    launch = {"eval_only": True, "resume": False, "num_gpus": 1, "num_machines": 1}
    args = argparse.Namespace(**{**vars(args), **launch, "opts": opts})
    cfg = setup(args)
    if with_training_sets:
        check_training_sets(cfg, args)
    return Predictor.from_config(cfg).model, cfg


def choose_test_set(cfg: CfgNode) -> str:
    """Return the first set of DATASETS.TEST, for tools that use only one; print a line if there are others."""
    first, *others = cfg.DATASETS.TEST
    if others:
        count, unused = 1 + len(others), ", ".join(others)
        print(f"DATASETS.TEST has {count} sets: only {first} is used, not {unused}; name the one to use there")
    return first


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --steps, --rtol and --solver; `load_predictor` reads them."""
    parser.add_argument(
        "--steps", type=int, metavar="N", help="maximum number of steps (default: the config's TEST_STEPS)"
    )
    parser.add_argument(
        "--rtol", type=float, metavar="R",
        help="stop when the relative residual is below R; 0: take all steps (default: the config's SOLVER.RTOL)",
    )  # fmt: skip
    parser.add_argument(
        "--solver", metavar="S",
        help='solver, such as "anderson4", "Broyden" or "Anderson(history_size=4)" (default: the config\'s)',
    )  # fmt: skip


def load_predictor(args: argparse.Namespace, extras: Sequence[str] = ()) -> tuple[Predictor, dict]:
    """Build the detector, and convert the command line's steps, rtol and solver to options of its calls.

    Args:
        args: with the flags of `add_config_arguments` and `add_solver_arguments`, and confidence_threshold.
        extras: further flags of the command line that need an equilibrium.

    Raises:
        UserError: the detector cannot be built or loaded, or has no equilibrium although a flag needs one.
    """
    predictor = Predictor.from_config(load_config(args), threshold=args.confidence_threshold)
    options = {"steps": args.steps, "rtol": args.rtol, "solver": args.solver}
    flags = [f"--{name}" for name, value in options.items() if value is not None] + list(extras)
    if flags and not predictor.has_equilibrium:
        raise UserError(
            f"{', '.join(flags)}: only for a decoder with an equilibrium, such as {EquilibriumDecoder.__name__}, "
            f"but MODEL.DEQDET.DECODER is {type(predictor.model.decoder).__name__}"
        )
    return predictor, predictor.options(**options)
