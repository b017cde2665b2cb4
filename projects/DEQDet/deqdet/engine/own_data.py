"""`--data FOLDER`: from a folder of labelled images to an ordinary config file and COCO files.

The folder is read, split, checked and measured, and the settings are derived (see `labelled_folder`). The results go
into OUTPUT_DIR/data when the training begins (see `data_folder`). From then on, the run is an ordinary one with the
config file OUTPUT_DIR/data/config.yaml. --resume and --eval-only use the same file, so nothing is split or derived
a second time.
"""

import argparse
import json
import os
from pathlib import Path

from detectron2.config import CfgNode

from ..data import format_report
from ..errors import UserError
from ..model_zoo import get_config
from ..plugins import import_plugins
from .data_folder import CONFIG, FLAGS, FOLDER, write_sets, write_settings
from .labelled_folder import (
    VAL_FRACTION,
    base_config,
    check_flags,
    derive_config,
    fill_in_processes,
    labelled_folder,
    register_entries,
    say,
)
from .options import check_processes, check_ranges
from .run_folder import check_folder, refuse_folder_in_use


def use_own_data(args: argparse.Namespace) -> None:
    """Prepare the run that --data asks for, and set args.config_file to its config file.

    Without --data, only a missing num_gpus is set, to 1. With --data, it becomes 2 or 4 on a CPU with at least that
    many cores. Under an external launcher such as torchrun, every process computes the same result, and rank 0 prints
    it.

    Args:
        args: the flags of `argument_parser`; num_gpus may be None. config_file and num_gpus are set in place.

    Raises:
        UserError: a flag is incompatible, the folder or its data cannot be used, or OUTPUT_DIR holds another training.
    """
    check_flags(args)
    if not args.data:
        args.num_gpus = 1 if args.num_gpus is None else args.num_gpus
        return
    if args.num_gpus is not None:  # early, since batch and schedule are derived from it
        check_processes(args)
    import_plugins(args.plugin)
    base = base_config(args)
    file = Path(base.OUTPUT_DIR, FOLDER, CONFIG)
    if (args.resume or args.eval_only) and file.is_file():
        _compare_flags(args, file.parent)
        say(args, f"the settings and the split are those of {file}")
        cfg = get_config(str(file), args.opts)
        fill_in_processes(args, cfg, cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE)
    else:
        check_ranges(base)  # the relations between values are checked once all are derived
        check_folder(base, args)
        refuse_folder_in_use(Path(base.OUTPUT_DIR))
        file = _make_run(base, args)
    args.config_file = str(file)


def _compare_flags(args: argparse.Namespace, folder: Path) -> None:
    """Check that a resumed training is given the flags that it began with, as recorded in OUTPUT_DIR/data.

    Raises:
        UserError: a flag differs from its recorded value. It would otherwise be silently ignored.
    """
    try:
        begun = json.loads((folder / FLAGS).read_text())
    except (OSError, ValueError):  # a training of an older version, which did not write it
        return
    given = {"--size": args.size, "--val-fraction": args.val_fraction, "--data-format": args.data_format}
    given = {"--data": os.path.realpath(args.data)} | {flag: value for flag, value in given.items() if value}
    for flag, value in given.items():
        if value != begun.get(flag, value):
            raise UserError(
                f"{flag} {value}: the training in {folder.parent} was begun with {flag} {begun[flag]}; give that "
                "value, start a new training with --overwrite, or choose another OUTPUT_DIR"
            )


def _make_run(cfg: CfgNode, args: argparse.Namespace) -> Path:
    """Read, split and check the folder, derive and write the settings, and return the config file."""
    folder = Path(cfg.OUTPUT_DIR, FOLDER)
    with labelled_folder(args, cfg) as found:
        test = found.names.get("test")
        if test and test not in cfg.DATASETS.TEST:
            evaluate = f"--eval-only DATASETS.TEST \"('{test}',)\" MODEL.WEIGHTS {cfg.OUTPUT_DIR}/model_best.pth"
            say(args, f"  evaluate on the test set after training: deqdet-train --data {args.data} {evaluate}")
        for each in cfg.DATASETS.TRAIN + tuple(cfg.DATASETS.TEST):
            if each in found.checked:
                say(args, f"== {each}", format_report(found.checked[each].report, found.checked[each].findings))
        table = derive_config(args, cfg, found)
        say(args, "== settings; a flag, or KEY VALUE at the end of the command line, overrides each", table)
        cfg.DATASETS.REGISTER = register_entries(found.data, found.names, write_sets(found.files, folder))
    begun = {
        "--data": os.path.realpath(args.data), "--data-format": found.data.format, "--size": args.size or "quick",
        "--val-fraction": VAL_FRACTION if args.val_fraction is None else args.val_fraction,
    }  # fmt: skip
    cfg = cfg.clone()
    cfg.MODEL.TRUST_PICKLE = False  # only the command line may set it
    config = "".join(f"# {line}\n" for line in table.splitlines()) + cfg.dump()
    # An evaluation has no start of training to wait for, and gets here only if the folder has no settings yet.
    return write_settings(config, json.dumps(begun, indent=2), folder, at_once=args.eval_only)
