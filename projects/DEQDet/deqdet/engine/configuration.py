"""Turns a command line into a frozen, checked config."""

import argparse
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from detectron2.config import CfgNode
from detectron2.engine import default_setup, defaults
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from ..atomic import write_text
from ..checkpoints import (
    check_pickle,
    check_query,
    is_model_file,
    load_model_config,
    read_model_header,
    resolve_file,
)
from ..checkpoints.latest import has_checkpoint
from ..data import check_datasets, prepare_datasets
from ..errors import UserError, describe_os_error, one_line
from ..model_zoo import find_config, get_config, put_overrides
from ..plugins import import_plugins
from .data_folder import follow_moved_sets
from .determinism import set_determinism
from .options import check_options
from .pretrained import check_backbone_weights
from .run_folder import CONFIG, check_folder, claim_folder, find_results, hold_config
from .terminal import shorten_listings

logger = logging.getLogger(__name__)


def setup(args: argparse.Namespace, *, brief: bool = False) -> CfgNode:
    """Do everything that precedes building the model: config, data sets, log files, seed.

    If CUDA is not available, a MODEL.DEVICE of "cuda" becomes "cpu". A training locks OUTPUT_DIR until its process
    ends. An evaluation does not change the config.yaml of a training in OUTPUT_DIR. If that training is resumed or
    overwritten, the file is replaced only when the new one begins (see `begin_training`).

    Args:
        args: the flags of `argument_parser`.
        brief: whether to print only the first line of long listings, such as the full config (see `shorten_listings`).

    Raises:
        UserError: as `load_config` and `check_run`; or OUTPUT_DIR cannot be created or written, is in use by another
            training, or holds one that is neither resumed nor overwritten.
    """
    cfg = load_config(args)
    check_folder(cfg, args)
    _make_folder(cfg.OUTPUT_DIR)
    if not args.eval_only and comm.is_main_process():
        claim_folder(Path(cfg.OUTPUT_DIR), overwrite=args.overwrite)
    comm.synchronize()
    with _writable(cfg.OUTPUT_DIR):
        # default_setup does the same for detectron2's and fvcore's loggers.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="deqdet")
        if brief:
            shorten_listings(cfg.OUTPUT_DIR)
        adapt_device(cfg)
        check_run(cfg, args)
        if cfg.MODEL.DEVICE.startswith("cuda:"):
            torch.cuda.set_device(cfg.MODEL.DEVICE)  # detectron2 and PeakMemory measure the memory of the current GPU
        cfg.freeze()
        # default_setup logs the text of the config file, so a model zoo name is resolved to its path.
        file = find_config(args.config_file) if args.config_file else ""
        with _whole_config_file(_config_writer(cfg, args)):
            default_setup(cfg, argparse.Namespace(**{**vars(args), "config_file": file}))
        set_determinism(cfg.DETERMINISTIC)
    return cfg


@contextmanager
def _writable(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be written ({describe_os_error(error)})") from error


def _config_writer(cfg: CfgNode, args: argparse.Namespace) -> Callable[[Path, str], None]:
    """Return a function that takes the path and text of config.yaml, and writes, keeps or discards the text."""
    folder = Path(cfg.OUTPUT_DIR)
    if not find_results(folder) or not (folder / CONFIG).is_file():
        return lambda path, text: write_text(text, path)
    return (lambda path, text: None) if args.eval_only else (lambda path, text: hold_config(path.parent, text))


class _WholeFiles:
    """detectron2's PathManager, except that the text written to a file is passed to `write` when it is complete."""

    def __init__(self, write: Callable[[Path, str], None]):
        self._when_whole = write

    def __getattr__(self, name: str) -> object:
        return getattr(PathManager, name)

    @contextmanager
    def _write(self, path: str) -> Iterator[io.StringIO]:
        text = io.StringIO()
        yield text
        self._when_whole(Path(path), text.getvalue())

    def open(self, path: str, mode: str = "r") -> object:
        return self._write(path) if mode == "w" else PathManager.open(path, mode)


@contextmanager
def _whole_config_file(write: Callable[[Path, str], None]) -> Iterator[None]:
    """Make default_setup pass config.yaml to `write`, by replacing PathManager in its module for the moment."""
    original, defaults.PathManager = defaults.PathManager, _WholeFiles(write)
    try:
        yield
    finally:
        defaults.PathManager = original


def adapt_device(cfg: CfgNode) -> None:
    """Change a MODEL.DEVICE of "cuda" to "cpu", in place, if CUDA is not available."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.info("CUDA is not available: MODEL.DEVICE is cpu instead of %s", cfg.MODEL.DEVICE)
        cfg.MODEL.DEVICE = "cpu"


def load_config(args: argparse.Namespace) -> CfgNode:
    """Return the config that a command line asks for: of a file, of a name in the model zoo, or of a model file.

    The user's own modules (--plugin) are imported first. With a model file, MODEL.WEIGHTS is that file.

    Raises:
        UserError: there is no config, or it is wrong; names the file or key, and for a value its range.
    """
    cfg = _read_config(args)
    check_options(cfg)
    return cfg


def _read_config(args: argparse.Namespace) -> CfgNode:
    import_plugins(args.plugin)
    file = args.model or _only_model_file(args)
    if file and args.config_file:
        raise UserError(f"--model {file} brings its own config: leave --config-file out, or give MODEL.WEIGHTS instead")
    if not file:
        if not args.config_file:
            raise UserError("--config-file is missing: give a file, or a name such as quick/deqdet_shapes")
        cfg = get_config(args.config_file, args.opts, allow_remote=args.allow_remote_config)
        if "DATASETS.REGISTER" not in args.opts[::2]:
            follow_moved_sets(cfg, Path(args.config_file))
        return cfg
    path = resolve_file(file)
    cfg = load_model_config(read_model_header(path))
    put_overrides(cfg, args.opts)
    if not cfg.MODEL.WEIGHTS:
        cfg.MODEL.WEIGHTS = str(path)
    return cfg


def _only_model_file(args: argparse.Namespace) -> str:
    """Return the model file that MODEL.WEIGHTS names if no config is given, else ""."""
    pairs = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
    weights = pairs.get("MODEL.WEIGHTS", "")
    return weights if not args.config_file and (weights.startswith("hf://") or is_model_file(weights)) else ""


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Register the data sets (and draw the generated ones); check that they and MODEL.WEIGHTS exist and fit the model.

    Raises:
        UserError: a data set or file is missing, the number of classes differs from the model's, or MODEL.DEVICE is one
            GPU for several processes.
    """
    _check_device(cfg.MODEL.DEVICE, args.num_gpus)
    with explained_datasets():
        prepare_datasets(cfg, eval_only=args.eval_only, class_names=_known_classes(cfg, args))
        check_datasets(cfg, eval_only=args.eval_only)
    # With SOLVER.REFERENCE_WORLD_SIZE, detectron2 scales the batch with the number of processes.
    if not args.eval_only and not cfg.SOLVER.REFERENCE_WORLD_SIZE:
        _check_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS, args.num_gpus * args.num_machines)
    if not (args.resume and has_checkpoint(Path(cfg.OUTPUT_DIR))):
        _check_weights(cfg.MODEL.WEIGHTS, eval_only=args.eval_only, trust_pickle=cfg.MODEL.TRUST_PICKLE)
        if not args.eval_only:
            check_backbone_weights(cfg)


def check_training_sets(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Also register the sets of DATASETS.TRAIN, for a command that evaluates a model but needs its training images.

    Args:
        cfg: as returned by `setup` with args.eval_only, which has registered the test sets.

    Raises:
        UserError: as `check_run` for the data sets of a training.
    """
    with explained_datasets():
        prepare_datasets(cfg, class_names=_known_classes(cfg, args))
        check_datasets(cfg)


def _known_classes(cfg: CfgNode, args: argparse.Namespace) -> tuple[str, ...]:
    """Return the class names of the model file that is evaluated; none if they are mere numbers."""
    weights = cfg.MODEL.WEIGHTS
    if not args.eval_only or args.resume or not is_model_file(weights):
        return ()
    return read_model_header(weights).known_names


@contextmanager
def explained_datasets() -> Iterator[None]:
    """Turn errors in the block, which registers and checks data sets, into a UserError."""
    try:
        yield
    except (KeyError, ValueError, OSError) as error:
        # The text of a KeyError is the repr of its message.
        raise UserError(one_line(error.args[0] if isinstance(error, KeyError) else error)) from error


def _make_folder(path: str) -> None:
    try:
        PathManager.mkdirs(path)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {path} cannot be created ({error.strerror}): choose another folder") from error
    if not PathManager.isdir(path):
        raise UserError(f"OUTPUT_DIR {path} is a file: choose a folder")


def _check_device(device: str, processes: int) -> None:
    """Check that the processes of a machine, if it has several GPUs, do not all take the same one."""
    if processes > 1 and device.startswith("cuda:") and torch.cuda.device_count() > 1:
        raise UserError(
            f"MODEL.DEVICE is {device}, the same GPU for {processes} processes: it must be cuda, so that each process "
            "takes its own"
        )


def _check_batch(images: int, parts: int, processes: int) -> None:
    """Check that a batch can be divided among the processes, and in each into `parts` equal parts."""
    if images % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {images}: it must be a multiple of {processes}, the number of processes"
        )
    if images % (processes * parts):
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {parts}: times {processes}, the number of processes, it must divide "
            f"SOLVER.IMS_PER_BATCH ({images})"
        )


def _check_weights(path: str, *, eval_only: bool, trust_pickle: bool) -> None:
    check_pickle(path, trusted=trust_pickle)
    check_query(path)
    path = path.split("?")[0]  # detectron2's ?matching_heuristics=True
    if eval_only and not path:
        raise UserError("nothing to evaluate: give a checkpoint as MODEL.WEIGHTS, or --resume to take the last one")
    if path and "://" not in path and not PathManager.isfile(path):
        raise UserError(
            f'MODEL.WEIGHTS {path} does not exist: give a checkpoint file, or "" to start from random weights'
        )
