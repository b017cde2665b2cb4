"""Prepares a folder of labelled images for training: reads, splits and checks it, and derives settings from it.

`deqdet-train --data` and `deqdet-check-data --data` share these steps. They leave no files behind: the sets are
checked and registered as COCO files in a temporary folder.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..atomic import write_text
from ..config_keys import find_section, read_key
from ..data import CheckedSet, find_entries, prepare_datasets
from ..data.folders import FolderData, complete_splits, read_folder
from ..errors import UserError
from ..model_zoo import get_config
from .cluster import find_place
from .configuration import explained_datasets
from .data_folder import FOLDER
from .derivation import SIZES, Setting, choose_processes, derive_settings, measure_facts
from .launcher import count_cores
from .options import check_options

VAL_FRACTION = 0.2  # the default of --val-fraction
_OURS = ("DATASETS.REGISTER", "DATASETS.TRAIN")  # keys that --data sets
_SEED = 1


@dataclass(frozen=True)
class LabelledFolder:
    """The sets of a folder, as `labelled_folder` has registered them."""

    data: FolderData  # always with a train and a val set
    names: dict[str, str]  # the names of the registered sets, by split
    files: dict[str, Path]  # the COCO files in a temporary folder, by split
    checked: dict[str, CheckedSet]  # by name, without a test set that DATASETS.TEST does not name


def check_flags(args: argparse.Namespace) -> None:
    """Check that the flags of the command line are compatible with --data, or with its absence.

    Raises:
        UserError: a flag needs --data, or a flag or key is given that --data sets itself.
    """
    needing = {"--data-format": args.data_format, "--size": args.size, "--val-fraction": args.val_fraction}
    for flag, value in needing.items():
        if value and not args.data:
            raise UserError(f"{flag} needs --data FOLDER, which is missing")
    if not args.data:
        return
    for flag, value in (("--config-file", args.config_file), ("--model", args.model)):
        if value:
            advice = "--init FILE starts from its weights" if flag == "--model" else "KEY VALUE pairs change its values"
            raise UserError(f"--data chooses a config by --size: omit {flag} {value}; {advice}")
    for key in _OURS:
        if key in args.opts[::2]:
            raise UserError(f"--data sets {key}: give only one of them")


def base_config(args: argparse.Namespace) -> CfgNode:
    """Return the config of --size with the values of the command line, before anything is derived.

    Raises:
        UserError: a key or its value is wrong.
    """
    defaults = ["OUTPUT_DIR", os.path.join("output", _folder_name(args)), "SEED", str(_SEED)]
    return get_config(SIZES[args.size or "quick"].config, [*defaults, *args.opts])


@contextmanager
def labelled_folder(args: argparse.Namespace, cfg: CfgNode) -> Iterator[LabelledFolder]:
    """Read, split and check args.data, and print the reader's remarks; the sets are registered within the block.

    Args:
        args: must have the flags of `add_folder_arguments`, `opts` and `machine_rank`.
        cfg: the config of `base_config`; its keys DATASETS.REGISTER, TRAIN, TEST and BOX_FORMAT are set in place.

    Raises:
        UserError: the folder or its data cannot be used.
    """
    fraction = VAL_FRACTION if args.val_fraction is None else args.val_fraction
    data = complete_splits(read_folder(Path(args.data), args.data_format), seed=cfg.SEED, val_fraction=fraction)
    say(args, f"{args.data}: {data.format.upper()} format", *(f"  {remark}" for remark in data.remarks))
    # detectron2's own sets have no dash in their names.
    names = {found.split: f"{_folder_name(args)}-{found.split}" for found in data.sets}
    cfg.DATASETS.TRAIN = (names["train"],)
    if "DATASETS.TEST" not in args.opts[::2]:
        cfg.DATASETS.TEST = (names["val"],)
    if "DATASETS.BOX_FORMAT" not in args.opts[::2] and data.format != "coco":
        cfg.DATASETS.BOX_FORMAT = "xywh"  # the format that the readers of YOLO and VOC produce
    _forget([name for name in names.values() if _is_of_run(name, Path(cfg.OUTPUT_DIR, FOLDER))])
    with tempfile.TemporaryDirectory(prefix="deqdet-") as folder, _forgotten_afterwards(names.values()):
        files = {found.split: Path(folder, f"{found.split}.json") for found in data.sets}
        for found in data.sets:
            write_text(json.dumps(found.content), files[found.split])
        cfg.DATASETS.REGISTER = register_entries(data, names, files)
        yield LabelledFolder(data, names, files, _check(cfg, data))


def register_entries(data: FolderData, names: dict[str, str], files: dict[str, Path]) -> list[list[str]]:
    """Return the value of DATASETS.REGISTER for the sets of a folder, from their names and COCO files by split."""
    return [[names[each.split], str(files[each.split].absolute()), str(each.image_root)] for each in data.sets]


def derive_config(args: argparse.Namespace, cfg: CfgNode, folder: LabelledFolder) -> str:
    """Derive the settings of a training on the folder, put them into `cfg`, and return a table of them.

    A missing args.num_gpus is filled in.

    Raises:
        UserError: a given value is incompatible with the derived ones.
    """
    given = {key: read_key(cfg, key) for key in args.opts[::2]}
    train, checked = folder.names["train"], folder.checked
    facts = measure_facts(
        DatasetCatalog.get(train),
        len(checked[train].class_names),
        evaluable=all(checked[each].labelled for each in cfg.DATASETS.TEST if each in checked),
    )
    place = find_place(os.environ)
    rules, counted = SIZES[args.size or "quick"], args.num_gpus is not None
    on_cuda = torch.cuda.is_available() and str(given.get("MODEL.DEVICE", "cuda")).startswith("cuda")
    fill_in_processes(args, cfg, given.get("SOLVER.IMS_PER_BATCH", rules.batch), "cuda" if on_cuda else "cpu")
    settings = derive_settings(
        facts, rules, given,
        processes=args.num_gpus * args.num_machines if place is None else place.world_size,
        multi_step=cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR",
        on_cuda=on_cuda,
    )  # fmt: skip
    if "SEED" not in given:
        settings.append(Setting("SEED", _SEED, "makes the split and the training reproducible"))
    known = {setting.key for setting in settings}
    settings += [Setting(key, value, "") for key, value in given.items() if key not in known]
    for setting in settings:
        section, name = find_section(cfg, setting.key)
        section[name] = setting.value
    check_options(cfg)
    flags = [
        Setting("--size", args.size or "quick", "" if args.size else f"the default, based on {rules.config}"),
        Setting("--num-gpus", args.num_gpus, "" if counted else "GPUs, or processes on the CPU"),
    ]
    return format_settings([*flags, *settings])


def format_settings(settings: Sequence[Setting]) -> str:
    """Format a table of keys, values, and the origin of each value."""
    values = [_show(setting.value) for setting in settings]
    first = max(len(setting.key) for setting in settings)
    second = min(30, max(map(len, values)))
    lines = zip(settings, values, strict=True)
    return "\n".join(
        f"  {setting.key.ljust(first)}  {value.ljust(second)}  "
        + (f"derived: {setting.reason}" if setting.reason else "given")
        for setting, value in lines
    )


def fill_in_processes(args: argparse.Namespace, cfg: CfgNode, batch: int, device: str) -> None:
    """Set args.num_gpus if --num-gpus is not given, so that each process can accumulate an equal share of the batch."""
    if args.num_gpus is not None:
        return
    alone = find_place(os.environ) is None  # else torchrun or srun has started the processes
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    training = not args.eval_only and args.num_machines == 1
    part = batch // cfg.SOLVER.ACCUMULATION_STEPS
    args.num_gpus = choose_processes(part, count_cores()) if on_cpu and alone and training else 1


def say(args: argparse.Namespace, *lines: str) -> None:
    """Print lines, on rank 0 only."""
    place = find_place(os.environ)
    if (args.machine_rank if place is None else place.rank) == 0:
        print(*lines, sep="\n", flush=True)


def _folder_name(args: argparse.Namespace) -> str:
    name = Path(os.path.abspath(args.data))  # resolves "..", which would lead OUTPUT_DIR elsewhere
    return (name.parent if name.suffix in (".yaml", ".yml") else name).name or "data"


def _show(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(str, value))})"
    return str(value) if value != "" else "''"


def _is_of_run(name: str, folder: Path) -> bool:
    """Return whether an earlier run in this process has registered the name for a file in its OUTPUT_DIR/data."""
    source = MetadataCatalog.get(name).get("source") if name in DatasetCatalog else None
    return source is not None and Path(source[0]).parent == folder.absolute()


def _forget(names: Iterable[str]) -> None:
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@contextmanager
def _forgotten_afterwards(names: Iterable[str]) -> Iterator[None]:
    """Remove those of the named data sets that are registered within the block."""
    new = [name for name in names if name not in DatasetCatalog]
    try:
        yield
    finally:
        _forget(name for name in new if name in DatasetCatalog)


def _check(cfg: CfgNode, data: FolderData) -> dict[str, CheckedSet]:
    """Check and register the sets; an error names the user's label files, not the temporary COCO file."""
    cfg = cfg.clone()
    cfg.MODEL.DEQDET.NUM_QUERIES = 0  # no limit: it is derived from the data later
    log, silence = logging.getLogger("deqdet"), logging.NullHandler()
    log.addHandler(silence)  # the report has all findings
    sources: dict[str, Path] = {}
    try:
        with explained_datasets():
            places = [where for _, _, where in find_entries(cfg).values()]
            sources = {where: found.source for where, found in zip(places, data.sets, strict=True)}
            return prepare_datasets(cfg)
    except UserError as error:
        message = str(error)
        for where, source in sources.items():
            message = message.replace(where, str(source))
        raise UserError(message) from error
    finally:
        log.removeHandler(silence)
