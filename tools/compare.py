#!/usr/bin/env python
"""Train several detectors on the same data for the same budget, and write one table.

    python tools/compare.py CONFIG [CONFIG ...] --output DIR [--seeds 1 2] [--num-gpus N] [--opts KEY VALUE ...]

writes DIR/comparison.md, comparison.json and comparison.png (AP against iterations), after every run anew. Each run
lives in DIR/CONFIG-seedN, its output in the file "log" there. Called again, it does not train a finished run again,
and goes on with an interrupted one from its last checkpoint (SOLVER.CHECKPOINT_PERIOD). A run that was begun with
another config is an error: delete its folder to train it again. Changes of the code go unnoticed.

    python tools/compare.py configs/ablations/{default,rag_1}.yaml --scale FILE --output DIR [...]

trains rows of an ablation at the scale of the config FILE: what a CONFIG changes is put on FILE, and the default row
then equals FILE. A CONFIG changes the keys in which it differs, once loaded, from the default.yaml beside it. A size in
pixels (MODEL.DEQDET.PERTURBATION.POSITION_SIZE) keeps its ratio to the default row's: 50 of 25 pixels become twice
FILE's. Any other change must start from a value that FILE shares with the default row; if not, that is an error before
any training. The pairs after --opts are put on FILE first, and can provide such values.

Memory in training is, on a GPU, the most that tensors took of the first one; on a CPU, the most that the first process
had resident, with more than 0.5 GB of libraries. At inference it is the most that tensors took for one image, weights
included.
"""

import argparse
import shlex
import signal
import sys
from pathlib import Path

from deqdet.comparison import Measurement, Run, complete, measure_apart, prepare_runs, write_report
from deqdet.engine import UserError

TRAIN = (sys.executable, str(Path(__file__).with_name("train_net.py")))


def measure(run: Run) -> Measurement:
    return measure_apart(run.arguments, run.weights, run.log)


def main(args: argparse.Namespace) -> None:
    runs = prepare_runs(
        args.configs,
        args.output,
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        overrides=args.opts,
        eval_period=args.eval_period,
        scale=args.scale,
    )
    results = []
    for number, run in enumerate(runs, start=1):
        where = f"[{number}/{len(runs)}] {run.label}"
        print(f"{where}: in {run.folder}", flush=True)
        result = complete(run, TRAIN, measure)
        results.append(result)
        score = "no AP" if result.metrics.AP is None else f"AP {result.metrics.AP:.1f}"
        print(f"{where}: {score}, {result.minutes:.1f} min of training", flush=True)
        write_report(results, args.output, shlex.join(["python", "tools/compare.py", *sys.argv[1:]]))
    print(f"Table: {args.output}/comparison.md, comparison.json; curve: {args.output}/comparison.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="config files, each with a name of its own")
    parser.add_argument("--output", type=Path, required=True, help="folder of the table and of the runs")
    parser.add_argument("--scale", metavar="FILE", help="config on which the changes of the CONFIGs are put, see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="each config is trained with each; default 1")
    parser.add_argument("--num-gpus", type=int, default=1, help="as tools/train_net.py: processes on a CPU")
    parser.add_argument(
        "--eval-period", type=int, help="iterations between two points of the curve, 20 or more; default MAX_ITER / 6"
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs for all configs")
    return parser.parse_args()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):  # lest a training outlives this process
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        main(parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: say the same again to go on")
