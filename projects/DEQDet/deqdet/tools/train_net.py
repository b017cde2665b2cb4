"""Train or evaluate a detector.

    deqdet-train --data FOLDER [--size quick|mobilenet|small|r50] [--init FILE] [--resume | --overwrite] [KEY VALUE ...]
    deqdet-train --config-file FILE [--num-gpus N] [--resume | --overwrite] [KEY VALUE ...]
    deqdet-train --config-file FILE --eval-only MODEL.WEIGHTS CHECKPOINT [KEY VALUE ...]
    deqdet-train --model model_final.safetensors --eval-only [KEY VALUE ...]

FOLDER contains images with labels in COCO, YOLO or Pascal VOC format; the settings are derived from them and printed,
and the results are written to output/NAME, where NAME is the name of the folder, unless OUTPUT_DIR is given. FILE is a
config file, or the name of a config in the model zoo, such as quick/deqdet_shapes. Without CUDA, --num-gpus N starts N
processes on the CPU. In the repository, `python tools/train_net.py` is the same command.

--resume continues the training in OUTPUT_DIR exactly as if it had not been interrupted. SIGTERM and Ctrl-C stop a
training after the current iteration, with a checkpoint; a second signal stops it at once.
"""

import argparse
from collections.abc import Sequence

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..data import find_class_names
from ..engine import Trainer, argument_parser, exit_on_user_error, load_weights, parse_arguments, run, setup
from ..engine.data_folder import DataInPlace
from ..engine.initialization import initialize, prepare_initialization
from ..engine.own_data import use_own_data

EXAMPLES = """\
KEY VALUE pairs at the end override keys of the config. Examples:

  deqdet-train --data animals --size small
  deqdet-train --data animals --resume
  deqdet-train --config-file quick/deqdet_shapes --num-gpus 2 SOLVER.MAX_ITER 1000 OUTPUT_DIR output/short
  deqdet-train --data animals --eval-only MODEL.WEIGHTS output/animals/model_final.safetensors

On two machines, with the same HOST:PORT:

  (machine 0) deqdet-train --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 0 --dist-url tcp://HOST:PORT
  (machine 1) deqdet-train --config-file FILE --num-gpus 8 --num-machines 2 --machine-rank 1 --dist-url tcp://HOST:PORT
"""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: the command line; by default that of the process.
    """
    parser = argument_parser()
    parser.set_defaults(num_gpus=None)  # to distinguish a given number from the default
    parser.description, parser.epilog = __doc__, EXAMPLES
    with exit_on_user_error():
        args = parse_arguments(parser, words, joins=True)
        prepare_initialization(args)
        use_own_data(args)
    run(work, args)


def work(args: argparse.Namespace) -> dict | None:
    """Train and evaluate, or with --eval-only only evaluate, in one of the processes.

    Returns:
        The results, such as {"bbox": {"AP": ...}}.
    """
    cfg = setup(args, brief=bool(args.data))  # the settings that --data derives, above the listings, stay in sight
    if not args.eval_only:
        if args.data:  # Other trainings need no matplotlib. A failed import must not come after hours of training.
            from ..measurement.training_report import write_training_report
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        if args.init and not trainer.checkpointer.has_checkpoint():
            initialize(trainer.model, args.init, find_class_names(cfg), trust_pickle=cfg.MODEL.TRUST_PICKLE)
        if args.data:
            trainer.register_hooks([DataInPlace(args.config_file)])
        results = trainer.train()
        if args.data and comm.is_main_process():
            print(f"Report: {write_training_report(cfg.OUTPUT_DIR, cfg.DATASETS.TEST)}")
        return results
    model = Trainer.build_model(cfg)
    load_weights(model, cfg, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)  # only if TEST.EXPECTED_RESULTS has any
    return results


if __name__ == "__main__":
    main()
