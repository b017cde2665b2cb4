"""From the command line to a trained model, its data and the solvers."""

import os
import re
from collections.abc import Sequence

from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts

from ..analysis import Cost, count_multiply_adds
from ..decoders import EquilibriumDecoder, build_solver
from ..detector import DEQDet
from ..engine import argument_parser, build_model, load_config, load_weights, setup
from ..equilibrium import Solver
from ..errors import UserError

KINDS = {"plain": "FixedPointIteration", "anderson": "Anderson", "broyden": "Broyden"}


def prepare_config(config_file: str, output: str | os.PathLike, overrides: Sequence[str]) -> CfgNode:
    """The config of a trained model, frozen; the log and a copy of the config go to `output`.

    Args:
        overrides: KEY VALUE pairs. Without MODEL.WEIGHTS among them, OUTPUT_DIR/model_final.pth is taken.

    Raises:
        UserError: as engine.setup; or there are no weights.
    """
    args = argument_parser().parse_args(["--config-file", config_file, "--eval-only", *overrides])
    cfg = load_config(args)
    weights = cfg.MODEL.WEIGHTS
    if "MODEL.WEIGHTS" not in overrides[::2]:
        weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
        if not os.path.isfile(weights):
            raise UserError(f"{weights} does not exist: train the model, or give a checkpoint as MODEL.WEIGHTS")
    if not weights:
        raise UserError("MODEL.WEIGHTS is empty: give the checkpoint of a trained model")
    args.opts = [*overrides, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(output)]
    return setup(args)


def prepare_model(cfg: CfgNode) -> DEQDet:
    """The model with its weights, in eval mode.

    Raises:
        UserError: it cannot be built, has no equilibrium, or its weights cannot be read.
    """
    model = build_model(cfg)
    if not isinstance(model, DEQDet):
        raise UserError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}: it must be DEQDet")
    if not isinstance(model.decoder, EquilibriumDecoder):
        raise UserError(
            f"MODEL.DEQDET.DECODER is {cfg.MODEL.DEQDET.DECODER}, whose number of steps is fixed: "
            "choose a model with the EquilibriumDecoder"
        )
    load_weights(model, cfg, resume=False)
    return model.eval()


def prepare_loader(cfg: CfgNode, limit: int | None) -> DataLoader:
    """One image at a time of the first set of DATASETS.TEST.

    Args:
        limit: the most images, the first ones; all if None.

    Raises:
        UserError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of images must be at least 1, got {limit}")
    records = get_detection_dataset_dicts(cfg.DATASETS.TEST[0], filter_empty=False)[:limit]
    mapper = DatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)


def count_cost(model: DEQDet, batch: list[dict]) -> Cost:
    """Multiply-adds on an empty image of the size of the batch's first one.

    Raises:
        UserError: as analysis.count_multiply_adds.
    """
    height, width = batch[0]["image"].shape[-2:]
    try:
        return count_multiply_adds(model, height=height, width=width)
    except ValueError as error:
        raise UserError(str(error)) from error


def build_solvers(cfg: CfgNode, names: Sequence[str]) -> dict[str, Solver]:
    """Solvers by short names; the numbers that these do not give are those of MODEL.DEQDET.SOLVER.

    Each solver comes once, under the first of its names.

    Args:
        names: "plain", "anderson" or "broyden"; a number behind the last two is their memory m.

    Raises:
        UserError: an unknown name, or a number out of range.
    """
    solvers: dict[str, Solver] = {}
    for name in names:
        parts = re.fullmatch(r"plain|(anderson|broyden)(\d*)", name)
        if parts is None:
            raise UserError(f"unknown solver {name}: choose plain, anderson or broyden, or with a memory, as anderson4")
        kind, memory = parts.groups()
        options = cfg.clone()
        options.defrost()
        options.MODEL.DEQDET.SOLVER.NAME = KINDS[kind or "plain"]
        if memory:
            options.MODEL.DEQDET.SOLVER.MEMORY = int(memory)
        try:
            solver = build_solver(options)
        except ValueError as error:
            raise UserError(f"solver {name}: {error}") from error
        if solver not in solvers.values():
            solvers[name] = solver
    return solvers
