"""From the command line to a frozen, checked config."""

import argparse
import difflib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..config import add_deqdet_config
from ..data import check_datasets, prepare_datasets
from ..errors import UserError, one_line

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace) -> CfgNode:
    """Everything that comes before the model is built: config, data sets, log files, seed.

    A MODEL.DEVICE of "cuda" becomes "cpu" where there is no CUDA.

    Args:
        args: what `argument_parser` parses.

    Raises:
        UserError: as `load_config` and `check_run`; or OUTPUT_DIR cannot be made.
    """
    cfg = load_config(args)
    _make_folder(cfg.OUTPUT_DIR)
    # default_setup does the same for detectron2's and fvcore's loggers.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="deqdet")
    adapt_device(cfg)
    check_run(cfg, args)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def adapt_device(cfg: CfgNode) -> None:
    """Make a MODEL.DEVICE of "cuda" "cpu", in place, where there is no CUDA."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("CUDA is not available: MODEL.DEVICE is cpu instead of %s", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def load_config(args: argparse.Namespace) -> CfgNode:
    """detectron2's config with our keys, the config file and the KEY VALUE pairs of the command line.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, or a value has the wrong type.
    """
    if not args.config_file:
        raise UserError("--config-file is missing: choose one of configs/")
    if not PathManager.isfile(args.config_file):
        raise UserError(f"config file {args.config_file} does not exist: correct --config-file")
    cfg = get_cfg()
    add_deqdet_config(cfg)
    with _explained(cfg, args.config_file):
        cfg.merge_from_file(args.config_file)
    _check_pairs(args.opts)
    with _explained(cfg, "the command line"):
        cfg.merge_from_list(args.opts)
    return cfg


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Register the data sets (and draw the generated ones); see that they and MODEL.WEIGHTS fit and exist.

    Raises:
        UserError: a data set or file is missing, or the number of classes is not the model's.
    """
    try:
        prepare_datasets(cfg, eval_only=args.eval_only)
        check_datasets(cfg, eval_only=args.eval_only)
    except (KeyError, ValueError, OSError) as error:
        # str() of a KeyError is the repr of its message.
        raise UserError(one_line(error.args[0] if isinstance(error, KeyError) else error)) from error
    world_size = args.num_gpus * args.num_machines
    rescaled = cfg.SOLVER.REFERENCE_WORLD_SIZE > 0  # detectron2 then adapts the batch to the processes
    if not args.eval_only and not rescaled and cfg.SOLVER.IMS_PER_BATCH % max(world_size, 1):
        batch = f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}"
        raise UserError(f"{batch}: it must be a multiple of {world_size}, the number of processes")
    if not (args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        _check_weights(cfg.MODEL.WEIGHTS, eval_only=args.eval_only)


def flatten(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys of a config with their values, the sections among them."""
    for key, value in node.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")


def _make_folder(path: str) -> None:
    try:
        PathManager.mkdirs(path)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {path} cannot be made ({error.strerror}): choose another folder") from error
    if not PathManager.isdir(path):
        raise UserError(f"OUTPUT_DIR {path} is a file: choose a folder")


def _check_weights(path: str, *, eval_only: bool) -> None:
    path = path.split("?")[0]  # detectron2's ?matching_heuristics=True
    if eval_only and not path:
        raise UserError("nothing to evaluate: give a checkpoint as MODEL.WEIGHTS, or --resume to take the last one")
    if path and "://" not in path and not PathManager.isfile(path):
        raise UserError(
            f'MODEL.WEIGHTS {path} does not exist: give a checkpoint file, or "" to start from random weights'
        )


def _check_pairs(opts: list[str]) -> None:
    """The parser takes everything from the first KEY on as an override, flags too."""
    for option in opts:
        if option.startswith("--"):
            raise UserError(f"{option} must come before the KEY VALUE pairs")
    if len(opts) % 2:
        raise UserError(f"overrides are pairs of KEY VALUE, a space between, but got {' '.join(opts)}")


@contextmanager
def _explained(cfg: CfgNode, where: str) -> Iterator[None]:
    """Turn yacs' and YAML's exceptions into a UserError that names the key and the known ones like it."""
    known = [key for key, _ in flatten(cfg)]
    try:
        yield
    except (AssertionError, KeyError, TypeError, ValueError, OSError, yaml.YAMLError) as error:
        message = one_line(error.args[0] if isinstance(error, KeyError) else error)
        unknown = re.search(r"Non-existent (?:config )?key: (\S+)", message)
        if unknown is None:
            raise UserError(f"{where}: {message}") from error
        raise UserError(f"{where}: unknown config key {unknown[1]}; {_suggest(unknown[1], known)}") from error


def _suggest(key: str, known: list[str]) -> str:
    """Known keys for an unknown one: a like name in its section, the same name elsewhere, else a like key."""
    by_upper = {name.upper(): name for name in known}
    section, _, last = key.upper().rpartition(".")
    beside = [f"{section}.{name}" for name in _close(last, [n.rpartition(".")[2] for n in by_upper])]
    elsewhere = [name for name in by_upper if name.rpartition(".")[2] == last]
    found = [name for name in dict.fromkeys(beside + elsewhere) if name in by_upper]
    found = found or _close(key.upper(), list(by_upper))
    if not found:
        return "the known ones are in deqdet/config.py and detectron2/config/defaults.py"
    return "did you mean " + " or ".join(by_upper[name] for name in found[:4]) + "?"


def _close(name: str, names: list[str]) -> list[str]:
    return difflib.get_close_matches(name, dict.fromkeys(names), n=3, cutoff=0.75)
