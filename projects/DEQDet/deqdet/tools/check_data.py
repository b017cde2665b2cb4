"""Check data sets before training, and report what they hold.

    deqdet-check-data TRAIN.json IMAGES [TEST.json IMAGES ...] [--contact-sheet FILE.png] [KEY VALUE ...]
    deqdet-check-data --config-file FILE [KEY VALUE ...]

The first form checks annotation files in COCO's format, each with the folder of its images; the classes of all are
matched by name to those of the first. The second form checks the sets that a config's DATASETS.TRAIN and TEST name, as
a training with it would. The report tells the number of images, the boxes of each class, sizes and aspect ratios of the
boxes, boxes an image against the model's queries, sizes of the images, and what is left out or put right. Nothing is
changed in your files. Exit code 1: a set cannot be used, and a line says why.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import CheckedSet, draw_contact_sheet, format_report, prepare_datasets
from ..engine import UserError, add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..engine.configuration import explained_datasets


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        cfg = load_check_config(args)
        with explained_datasets():
            checked = prepare_datasets(cfg)
        names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
        for name in names:
            print_report(name, checked.get(name), cfg.MODEL.DEQDET.NUM_QUERIES)
        if args.contact_sheet:
            write_contact_sheets(names, args.contact_sheet)


def load_check_config(args: argparse.Namespace) -> CfgNode:
    """The config whose sets are checked: the given one, or the model zoo's default with the sets of the command line.

    Raises:
        UserError: there is neither, or both, or a key is wrong.
    """
    if not args.files:
        return load_config(args)
    if len(args.files) % 2:
        raise UserError(f"each annotation file needs the folder of its images behind it, got {' '.join(args.files)}")
    sets = list(zip(args.files[::2], args.files[1::2], strict=True))
    if not args.config_file and not args.model:
        args.config_file = "deqdet_r50_100q_1x"
    cfg = load_config(args)
    names = [_name(index, json_file) for index, (json_file, _) in enumerate(sets)]
    cfg.DATASETS.REGISTER = [[name, *files] for name, files in zip(names, sets, strict=True)]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names[0],), tuple(names[1:])
    return cfg


def print_report(name: str, checked: CheckedSet | None, num_queries: int) -> None:
    """Print what a set holds; None stands for a set that is not in COCO's format."""
    print(f"== {name}")
    if checked is None:
        print("not in COCO's format: only its class names were compared")
        return
    print(format_report(checked.report, checked.findings, num_queries))
    if checked.from_cache:
        print("(remembered from an earlier check: neither the file nor an image has changed)")


def write_contact_sheets(names: Sequence[str], file: Path) -> None:
    """Write a contact sheet of each set; with several, a set's name is put before the suffix.

    Raises:
        UserError: an image cannot be read, or the file cannot be written.
    """
    for name in names:
        path = file if len(names) == 1 else file.with_name(f"{file.stem}-{name.replace('/', '_')}{file.suffix}")
        sheet = draw_contact_sheet(DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes)
        try:
            sheet.save(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write {path}: {error}") from error
        print(f"{path}: images of {name} with their boxes")


def make_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="annotation files, each followed by its image folder")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="write 16 images of each set with their boxes drawn"
    )
    add_config_arguments(parser)
    return parser


def _name(index: int, json_file: str) -> str:
    path = Path(json_file)
    return f"{index + 1}-{path.parent.name}-{path.stem}"


if __name__ == "__main__":
    main()
