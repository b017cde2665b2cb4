"""`--data FOLDER`: from a folder of labelled pictures to an ordinary config file and COCO files.

The folder is read, split, checked, and measured, and the settings are derived; all that goes into OUTPUT_DIR/data. From
there on, the run is that of the config file OUTPUT_DIR/data/config.yaml, which --resume and --eval-only find again, so
that nothing is split or derived a second time.
"""

import argparse
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..checkpoints.files import write_text
from ..data import CheckedSet, format_report, prepare_datasets
from ..data.folders import FolderData, FoundSet, complete_splits, read_folder
from ..errors import UserError, describe_os_error
from ..model_zoo import get_config
from ..plugins import import_plugins
from .cluster import find_place
from .configuration import explained_datasets
from .derivation import SIZES, Setting, choose_processes, derive_settings, measure_facts
from .launcher import count_cores
from .options import check_options, check_processes, check_ranges, read
from .run_folder import check_folder, refuse_folder_in_use

FOLDER, CONFIG, FLAGS = "data", "config.yaml", "flags.json"  # the folder within OUTPUT_DIR, and its files
_OURS = ("DATASETS.REGISTER", "DATASETS.TRAIN")  # keys that --data sets
_SEED = 1


def use_own_data(args: argparse.Namespace) -> None:
    """Prepare the run that --data asks for, and let `args` name its config file.

    Without --data, nothing happens but that a missing number of processes becomes 1. A missing number becomes 2 or 4 on
    a CPU with as many cores. Every process of a run that was started from outside, such as torchrun's, comes to the
    same result, and the first of them prints it.

    Args:
        args: what `argument_parser` parses; num_gpus may be None. config_file and num_gpus are changed.

    Raises:
        UserError: a flag does not fit, the folder or its data cannot be used, or OUTPUT_DIR holds another training.
    """
    if not args.data:
        for flag, value in (
            ("--data-format", args.data_format),
            ("--size", args.size),
            ("--val-fraction", args.val_fraction),
        ):
            if value:
                raise UserError(f"{flag} needs --data FOLDER, which is missing")
        args.num_gpus = 1 if args.num_gpus is None else args.num_gpus
        return
    _check_flags(args)
    if args.num_gpus is not None:  # batch and schedule are derived from it
        check_processes(args)
    import_plugins(args.plugin)
    base = get_config(SIZES[args.size or "quick"].config, _with_defaults(args))
    file = Path(base.OUTPUT_DIR, FOLDER, CONFIG)
    if (args.resume or args.eval_only) and file.is_file():
        _compare_flags(args, file.parent)
        _say(args, f"the settings and the split are those of {file}")
        cfg = get_config(str(file), args.opts)
        _choose_processes(args, cfg, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE)
    else:
        check_ranges(base)  # what the values must be together is checked when the rest is derived
        check_folder(base, args)
        refuse_folder_in_use(Path(base.OUTPUT_DIR))
        _make_run(base, args, file)
    args.config_file = str(file)


def _compare_flags(args: argparse.Namespace, folder: Path) -> None:
    """Check that a resumed training has the flags with which it began; OUTPUT_DIR/data records them.

    Raises:
        UserError: a flag differs from its recorded value. It would otherwise be ignored without a word.
    """
    try:
        begun = json.loads((folder / FLAGS).read_text())
    except (OSError, ValueError):  # an older version has not written it
        return
    given = {"--size": args.size, "--val-fraction": args.val_fraction, "--data-format": args.data_format}
    given = {"--data": os.path.realpath(args.data)} | {flag: value for flag, value in given.items() if value}
    for flag, value in given.items():
        if value != begun.get(flag, value):
            raise UserError(
                f"{flag} {value}: the training in {folder.parent} was begun with {flag} {begun[flag]}, which stays; "
                "give that, begin anew with --overwrite, or choose another OUTPUT_DIR"
            )


def _check_flags(args: argparse.Namespace) -> None:
    for flag, value in (("--config-file", args.config_file), ("--model", args.model)):
        if value:
            advice = "--init FILE starts from its weights" if flag == "--model" else "KEY VALUE pairs change its values"
            raise UserError(f"--data chooses a config by --size: omit {flag} {value}; {advice}")
    for key in _OURS:
        if key in args.opts[::2]:
            raise UserError(f"--data sets {key}: give only one of them")


def _with_defaults(args: argparse.Namespace) -> list[str]:
    name = Path(os.path.abspath(args.data))  # without "..", by which OUTPUT_DIR would lead elsewhere
    name = (name.parent if name.suffix in (".yaml", ".yml") else name).name or "data"
    return ["OUTPUT_DIR", os.path.join("output", name), "SEED", str(_SEED), *args.opts]


def _make_run(cfg: CfgNode, args: argparse.Namespace, file: Path) -> None:
    """Read, split, check, derive, and write OUTPUT_DIR/data."""
    fraction = 0.2 if args.val_fraction is None else args.val_fraction
    data = complete_splits(read_folder(Path(args.data), args.data_format), seed=cfg.SEED, val_fraction=fraction)
    _say(args, f"{args.data}: {data.format.upper()} format", *(f"  {remark}" for remark in data.remarks))
    name = Path(_with_defaults(args)[1]).name
    names = _write_sets(data, name, file.parent)
    given = {key: read(cfg, key) for key in args.opts[::2]}
    cfg.DATASETS.REGISTER = [[names[found.split], *_paths(found, file.parent)] for found in data.sets]
    cfg.DATASETS.TRAIN = (names["train"],)
    if "DATASETS.TEST" not in given:
        cfg.DATASETS.TEST = (names["val"],)
    if "DATASETS.BOX_FORMAT" not in given and data.format != "coco":
        cfg.DATASETS.BOX_FORMAT = "xywh"  # as the readers write it
    if "test" in names and names["test"] not in cfg.DATASETS.TEST:
        evaluate = (
            f"--eval-only DATASETS.TEST \"('{names['test']}',)\" MODEL.WEIGHTS {file.parent.parent}/model_best.pth"
        )
        _say(args, f"  evaluate on the test set after training: deqdet-train --data {args.data} {evaluate}")
    checked = _check(cfg, data, names)
    for each in cfg.DATASETS.TRAIN + tuple(cfg.DATASETS.TEST):
        if each in checked:
            _say(args, f"== {each}", format_report(checked[each].report, checked[each].findings))
    facts = measure_facts(
        DatasetCatalog.get(names["train"]),
        len(checked[names["train"]].class_names),
        evaluable=all(checked[each].labelled for each in cfg.DATASETS.TEST if each in checked),
    )
    place = find_place(os.environ)
    rules, counted = SIZES[args.size or "quick"], args.num_gpus is not None
    on_cuda = torch.cuda.is_available() and str(given.get("MODEL.DEVICE", "cuda")).startswith("cuda")
    _choose_processes(args, cfg, given.get("SOLVER.IMS_PER_BATCH", rules.batch), "cuda" if on_cuda else "cpu")
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
        *sections, last = setting.key.split(".")
        node = cfg
        for section in sections:
            node = node[section]
        node[last] = setting.value
    check_options(cfg)
    flags = [
        Setting("--size", args.size or "quick", "" if args.size else f"the default, based on {rules.config}"),
        Setting("--num-gpus", args.num_gpus, "" if counted else "GPUs, or processes on the CPU"),
    ]
    table = format_settings([*flags, *settings])
    _say(args, "== settings; a flag, or KEY VALUE at the end of the command line, overrides each", table)
    begun = {
        "--data": os.path.realpath(args.data), "--data-format": data.format, "--size": args.size or "quick",
        "--val-fraction": fraction,
    }  # fmt: skip
    write_text(json.dumps(begun, indent=2), file.with_name(FLAGS))
    cfg = cfg.clone()
    cfg.MODEL.TRUST_PICKLE = False  # which counts on the command line only
    write_text("".join(f"# {line}\n" for line in table.splitlines()) + cfg.dump(), file)


def format_settings(settings: Sequence[Setting]) -> str:
    """A table of keys, values, and where each is from."""
    values = [_show(setting.value) for setting in settings]
    first = max(len(setting.key) for setting in settings)
    second = min(30, max(map(len, values)))
    lines = zip(settings, values, strict=True)
    return "\n".join(
        f"  {setting.key.ljust(first)}  {value.ljust(second)}  "
        + (f"derived: {setting.reason}" if setting.reason else "given")
        for setting, value in lines
    )


def _show(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(str, value))})"
    return str(value) if value != "" else "''"


def _write_sets(data: FolderData, name: str, folder: Path) -> dict[str, str]:
    """Write each split's COCO file; returns the names of the sets by split."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder.parent} cannot be made ({describe_os_error(error)})") from error
    for found in data.sets:
        write_text(json.dumps(found.content), Path(_paths(found, folder)[0]))
    # detectron2's own sets have no dash in their names.
    return {found.split: f"{name}-{found.split}" for found in data.sets}


def _paths(found: FoundSet, folder: Path) -> tuple[str, str]:
    return str((folder / f"{found.split}.json").absolute()), str(found.image_root)


def _check(cfg: CfgNode, data: FolderData, names: dict[str, str]) -> dict[str, CheckedSet]:
    """Check the sets, with a hint at the labels' own files where one cannot be used."""
    cfg = cfg.clone()
    cfg.MODEL.DEQDET.NUM_QUERIES = 0  # derived from what is found
    log, silence = logging.getLogger("deqdet"), logging.NullHandler()
    log.addHandler(silence)  # the report has all findings
    try:
        with explained_datasets():
            return prepare_datasets(cfg)
    except UserError as error:
        sources = ", ".join(dict.fromkeys(str(found.source) for found in data.sets))
        raise UserError(f"{error} [the labels were read from {sources}]") from error
    finally:
        log.removeHandler(silence)


def _choose_processes(args: argparse.Namespace, cfg: CfgNode, batch: int, device: str) -> None:
    """Fill in the number of processes where --num-gpus is not given. Each must be able to accumulate its own share."""
    if args.num_gpus is not None:
        return
    alone = find_place(os.environ) is None  # else torchrun or srun has started the processes
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    training = not args.eval_only and args.num_machines == 1
    part = batch // cfg.SOLVER.ACCUMULATION_STEPS
    args.num_gpus = choose_processes(part, count_cores()) if on_cpu and alone and training else 1


def _say(args: argparse.Namespace, *lines: str) -> None:
    place = find_place(os.environ)
    if (args.machine_rank if place is None else place.rank) == 0:
        print(*lines, sep="\n", flush=True)
