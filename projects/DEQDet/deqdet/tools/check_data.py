"""Check data sets before training, and report what they contain.

    deqdet-check-data --data FOLDER [--data-format coco|yolo|voc] [--contact-sheet FILE.png] [KEY VALUE ...]
    deqdet-check-data TRAIN.json IMAGES [TEST.json IMAGES ...] [--contact-sheet FILE.png] [KEY VALUE ...]
    deqdet-check-data --config-file FILE [--draw-augmented FILE.png] [KEY VALUE ...]
    deqdet-check-data TEST.json IMAGES --draw-results RESULTS.json FILE.png [--threshold S]

The first form checks a folder of labelled images as `deqdet-train --data FOLDER` would, with the same split and, for
--draw-augmented, the same settings; nothing is trained, and nothing is written into FOLDER or an OUTPUT_DIR. The second
form checks annotation files in COCO format, each followed by the folder of its images; the classes of all files are
matched by name with those of the first. The third form checks the sets in DATASETS.TRAIN and DATASETS.TEST of a config,
as training with it would. The report lists the number of images, the boxes of each class, the sizes and aspect ratios
of the boxes, the number of boxes per image compared with the model's queries, and the image sizes.

Each problem either stops the run with a one-line error or is repaired with a one-line warning. With
DATASETS.SKIP_BROKEN True, images with problems that would stop the run are left out instead. Your files are never
changed. The exit code is 1 if a set cannot be used.

--draw-augmented shows the first images of a training with this config after augmentation, with the remaining boxes.
--draw-results shows a file of detections in COCO format, such as inference/coco_instances_results.json, beside the
ground truth, starting with the images that have the most mistakes.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..atomic import prepare_output
from ..data import CheckedSet, format_report, prepare_datasets
from ..data.contact_sheet import draw_contact_sheet, draw_inputs, find_first_inputs
from ..drawing import find_format, save_picture
from ..engine import UserError, add_config_arguments, exit_on_user_error, load_config, parse_arguments
from ..engine.arguments import add_folder_arguments
from ..engine.configuration import explained_datasets
from ..engine.labelled_folder import base_config, check_flags, derive_config, labelled_folder
from ..measurement.training_report import judge_results, write_worst
from ..plugins import import_plugins


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    with exit_on_user_error():
        args = parse_arguments(make_parser(), words)
        if args.images < 1:
            raise UserError(f"--images must be at least 1, got {args.images}")
        if args.threshold is not None and not 0 <= args.threshold <= 1:
            raise UserError(f"--threshold must lie between 0 and 1, got {args.threshold}")
        for file in (args.contact_sheet, args.draw_augmented, *(args.draw_results or ())[1:]):
            if file:
                find_format(Path(file))
                prepare_output(Path(file))
        with checked_sets(args) as (cfg, checked):
            names = list(dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]))
            for name in names:
                print_report(name, checked.get(name), cfg.MODEL.DEQDET.NUM_QUERIES)
            if args.contact_sheet:
                write_contact_sheets(names, args.contact_sheet, args.images)
            if args.draw_augmented:
                write_augmented(cfg, args.draw_augmented, args.images)
            if args.draw_results:
                write_results(cfg, *map(Path, args.draw_results), args.images, args.threshold)


@contextmanager
def checked_sets(args: argparse.Namespace) -> Iterator[tuple[CfgNode, dict[str, CheckedSet]]]:
    """Yield the config whose sets are checked and the results by set name; the sets are registered within the block.

    Raises:
        UserError: the flags do not fit together, or a set cannot be used.
    """
    check_flags(args)
    if args.data:
        if args.files:
            raise UserError(f"--data FOLDER brings its own annotation files: omit {' '.join(args.files)}")
        import_plugins(args.plugin)
        cfg = base_config(args)
        with labelled_folder(args, cfg) as folder:
            derive_config(args, cfg, folder)
            yield cfg, folder.checked
        return
    cfg = load_check_config(args)
    with explained_datasets():
        checked = prepare_datasets(cfg)
    yield cfg, checked


def load_check_config(args: argparse.Namespace) -> CfgNode:
    """Load the config whose sets are checked: the given config, or a default one, with the sets of the command line.

    Raises:
        UserError: there is neither a config nor a set, an annotation file has no folder, or a key is invalid.
    """
    if not args.files:
        return load_config(args)
    if len(args.files) % 2:
        raise UserError(f"each annotation file must be followed by its image folder, got {' '.join(args.files)}")
    sets = list(zip(args.files[::2], args.files[1::2], strict=True))
    if not args.config_file and not args.model:
        args.config_file = "deqdet_r50_100q_1x"
    cfg = load_config(args)
    names = [_name(index, json_file) for index, (json_file, _) in enumerate(sets)]
    cfg.DATASETS.REGISTER = [[name, *files] for name, files in zip(names, sets, strict=True)]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names[0],), tuple(names[1:])
    return cfg


def print_report(name: str, checked: CheckedSet | None, num_queries: int) -> None:
    """Print the report on a set; `checked` is None for a set that is not in COCO format."""
    print(f"== {name}")
    if checked is None:
        print("not in COCO format: only its class names were compared")
        return
    print(format_report(checked.report, checked.findings, num_queries))
    if checked.from_cache:
        print("(cached from an earlier check: neither the file nor an image has changed)")


def write_contact_sheets(names: Sequence[str], file: Path, count: int) -> None:
    """Write a contact sheet of `count` images of each set; with several sets, file names include the name of the set.

    Raises:
        UserError: an image cannot be read, or the file cannot be written.
    """
    for name in names:
        path = file if len(names) == 1 else file.with_name(f"{file.stem}-{name.replace('/', '_')}{file.suffix}")
        sheet = draw_contact_sheet(DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes, count)
        save_picture(sheet, path)
        print(f"{path}: images of {name} with their boxes")


def write_augmented(cfg: CfgNode, file: Path, count: int) -> None:
    """Draw the first `count` images of a training with this config, after augmentation.

    Raises:
        UserError: there is no training set, an image cannot be read, or the file cannot be written.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("--draw-augmented: DATASETS.TRAIN is empty, so there is nothing to train on")
    with explained_datasets():
        inputs = find_first_inputs(cfg, count)
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    save_picture(draw_inputs(inputs, names, order=cfg.INPUT.FORMAT), file)
    print(f"{file}: the first {len(inputs)} images of a training, as INPUT.AUGMENTATION {cfg.INPUT.AUGMENTATION} and "
          f"INPUT.RANDOM_FLIP {cfg.INPUT.RANDOM_FLIP} change them")  # fmt: skip


def write_results(cfg: CfgNode, results: Path, file: Path, count: int, threshold: float | None) -> None:
    """Draw the images with the most mistakes in a file of detections, the worst first.

    Args:
        results: detections in the first set of DATASETS.TEST, or else of DATASETS.TRAIN.
        threshold: minimum score of a detection; None: the score with the best F1.

    Raises:
        UserError: the detections are not of this set, the set has no boxes, or a file cannot be read or written.
    """
    name = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][0]
    judged = judge_results(results, name, threshold)
    if judged is None:
        raise UserError(f"--draw-results: {name} has no boxes to compare the detections with")
    wrong = sum(1 for judgement in judged.judgements if judgement.error)
    chosen = ", that of the best F1" if judged.best_f1 else ""
    where = f"at a score of {judged.threshold:.2f}{chosen}" if judged.detections else "since there are no detections"
    print(f"{results}: {wrong} of {len(judged.judgements)} images have mistakes {where}")
    for path, mistakes in write_worst(judged, file, count):
        print(f"  {path}: {mistakes}")
    if wrong:
        print(f"{file}: ground truth beside detections, the worst image first")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="annotation files, each followed by its image folder")
    parser.add_argument(
        "--contact-sheet", type=Path, metavar="FILE.png", help="draw images of each set with their boxes into this file"
    )
    parser.add_argument(
        "--draw-augmented", type=Path, metavar="FILE.png", help="draw augmented training images into this file"
    )
    parser.add_argument(
        "--draw-results", nargs=2, metavar=("RESULTS.json", "FILE.png"),
        help="draw the detections in RESULTS.json beside the ground truth into FILE.png",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=16, metavar="N", help="number of images in each FILE.png (default: 16)"
    )
    parser.add_argument(
        "--threshold", type=float, metavar="S",
        help="minimum score of a detection in --draw-results (default: the score with the best F1)",
    )  # fmt: skip
    add_folder_arguments(parser, "check the labelled images in FOLDER (COCO, YOLO or Pascal VOC)")
    add_config_arguments(parser)
    # `labelled_folder` reads these arguments of a run. --draw-augmented shows the images of a training in one process.
    parser.set_defaults(num_gpus=1, num_machines=1, machine_rank=0, eval_only=False)
    return parser


def _name(index: int, json_file: str) -> str:
    path = Path(json_file)
    return f"{index + 1}-{path.parent.name}-{path.stem}"


if __name__ == "__main__":
    main()
