"""The trained model that a tool is about, from its command line."""

import argparse
import os
from pathlib import Path

from detectron2.config import CfgNode

from ..detector import DEQDet
from ..engine import load_config, setup
from ..errors import UserError
from ..predictor import Predictor


def load_trained(args: argparse.Namespace, output: Path | None = None) -> tuple[DEQDet, CfgNode]:
    """Set up the run that a command line describes, and load its model with the weights.

    Without --model or a MODEL.WEIGHTS among the overrides, the weights are OUTPUT_DIR/model_final.pth.

    Args:
        args: with the flags of `add_config_arguments`, parsed by `parse_arguments`.
        output: the folder of the log and of a copy of the config; by default OUTPUT_DIR.

    Returns:
        The model in evaluation mode, and its frozen config.

    Raises:
        UserError: the config, a data set or the weights are missing or wrong.
    """
    opts, cfg = list(args.opts), load_config(args)
    weights = cfg.MODEL.WEIGHTS
    if not args.model and "MODEL.WEIGHTS" not in opts[::2]:
        weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        if not os.path.isfile(weights):
            raise UserError(f"{weights} does not exist: train the model, or give a checkpoint as MODEL.WEIGHTS")
        opts += ["MODEL.WEIGHTS", weights]
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: give the checkpoint of a trained model")
    if output is not None:
        opts += ["OUTPUT_DIR", str(output)]
    launch = {"eval_only": True, "resume": False, "num_gpus": 1, "num_machines": 1}
    cfg = setup(argparse.Namespace(**{**vars(args), **launch, "opts": opts}))
    return Predictor.from_config(cfg).model, cfg
