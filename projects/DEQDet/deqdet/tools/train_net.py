"""Train or evaluate a detector.

    deqdet-train --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
    deqdet-train --config-file FILE --eval-only MODEL.WEIGHTS CHECKPOINT [KEY VALUE ...]

On a machine without CUDA, --num-gpus N starts N processes on the CPU.
"""

import argparse
from collections.abc import Sequence

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..engine import Trainer, argument_parser, load_weights, parse_arguments, run, setup


def main(words: Sequence[str] | None = None) -> None:
    """Run the tool with the given command line, by default that of the process."""
    run(train, parse_arguments(argument_parser(), words))


def train(args: argparse.Namespace) -> dict | None:
    """Train and evaluate, or with --eval-only evaluate and return the results, e.g. {"bbox": {"AP": ...}}."""
    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    load_weights(model, cfg, resume=args.resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)  # only if TEST.EXPECTED_RESULTS has any
    return results


if __name__ == "__main__":
    main()
