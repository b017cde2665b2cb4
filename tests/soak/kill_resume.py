"""Kill a training at many moments, resume it, and compare its end with that of the uninterrupted training.

    python tests/soak/kill_resume.py [--folder FOLDER] [--only TEXT]

A small DEQDet is trained on generated shapes, alone and in two processes. Weights, optimizer, schedule, BatchNorm
statistics, metrics, and the best model must be bit for bit the same; figures of the clock (seconds, memory) excepted.
Prints a table; the exit code is the number of moments that differ. Takes about ten minutes on two cores.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "projects" / "DEQDet")]

from deqdet.checkpoints.files import read_torch  # noqa: E402
from deqdet.engine.resume import CLOCK_FIGURES  # noqa: E402

SMALL = """
DATASETS.TRAIN ('shapes_seed3_24',) DATASETS.TEST ('shapes_seed4_8',)
MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8
MODEL.DEQDET.EQUILIBRIUM.TEST_STEPS 4 SOLVER.IMS_PER_BATCH 4 SEED 5
SOLVER.MAX_ITER 26 SOLVER.CHECKPOINT_PERIOD 6 TEST.EVAL_PERIOD 12 OUTPUT_DIR out
"""
# Processes, workers that load data, and the moments of the kills (see helpers/killer.py), one for each start.
MOMENTS = [
    (1, 0, ["SIGKILL@3"]),
    (1, 0, ["SIGKILL@8"]),
    (1, 0, ["SIGKILL@21"]),
    (1, 2, ["SIGKILL@15"]),
    (1, 0, ["EVALUATION"]),
    (1, 0, ["SIGTERM@10"]),
    (1, 2, ["SIGINT@25"]),
    (1, 0, ["SIGKILL@7", "SIGTERM@14", "SIGKILL@19"]),
    (1, 0, ["HALF:model_0000005.pth"]),
    (1, 0, ["BEFORE:model_0000011.pth"]),
    (1, 0, ["AFTER:model_0000011.pth"]),
    (1, 0, ["HALF:last_checkpoint"]),
    (1, 0, ["HALF:model_best.pth"]),
    (1, 0, ["AFTER:model_best.pth"]),
    (1, 0, ["HALF:model_best.json"]),
    (1, 0, ["LINE@19"]),
    (1, 0, ["HALF:model_final.pth"]),
    (1, 0, ["HALF:model_final.safetensors"]),
    (1, 0, ["HALF:config.yaml"]),
    (2, 0, ["SIGKILL@14:1"]),
    (2, 0, ["SIGKILL@20:0"]),
    (2, 0, ["LAUNCHER-SIGTERM@9"]),
    (2, 2, ["SIGINT@16:1"]),
    (2, 0, ["HALF:model_0000017.pth"]),
    (2, 0, ["LAUNCHER-SIGKILL@13"]),
]


def train(folder: Path, processes: int, workers: int, kill: str, *flags: str) -> int:
    """Start or resume a training; its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    config = str(ROOT / "configs" / "quick" / "deqdet_shapes.yaml")
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", config, *flags]
    command += ["--num-gpus", str(processes), "--rank-timeout", "30"]
    command += ["--plugin", str(ROOT / "tests" / "helpers" / "killer.py")]
    command += [*SMALL.split(), "DATALOADER.NUM_WORKERS", str(workers)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "KILL": kill, "CUDA_VISIBLE_DEVICES": "",
        "DETECTRON2_DATASETS": str(folder.parent / "datasets"), "PYTHONPATH": os.pathsep.join(sys.path[:2]),
    }  # fmt: skip
    with open(folder / "printed", "a") as output:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=300)
    return done.returncode


def wait_for_lock(folder: Path) -> None:
    """Wait until the processes of a training whose launcher was killed have ended."""
    import fcntl

    lock = folder / "out" / ".lock"
    for _ in range(600):
        with open(lock) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.1)
    raise TimeoutError(f"{lock} is still held")


def read_metrics(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK_FIGURES} for line in lines]


def read_end(out: Path) -> dict[str, object]:
    """All that a training leaves, by what the table calls it."""
    final = read_torch(out / "model_final.pth")
    trainer = final["trainer"]
    is_statistic = ("running_mean", "running_var", "num_batches_tracked")
    return {
        "weights": {k: v for k, v in final["model"].items() if not k.endswith(is_statistic)},
        "BatchNorm": {k: v for k, v in final["model"].items() if k.endswith(is_statistic)},
        "optimizer": trainer["_trainer"]["optimizer"],
        "schedule": trainer["hooks"],
        "metrics": (read_metrics(out), trainer["progress"]["storage"]),
        "best": (read_torch(out / "model_best.pth"), json.loads((out / "model_best.json").read_text())),
        "model file": load_file(out / "model_final.safetensors"),
        "rest": (sorted(path.name for path in out.glob(".unfinished*")), (out / "last_checkpoint").read_text()),
    }


def same(a: object, b: object) -> bool:
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN is NaN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the trainings go; by default a new folder")
    parser.add_argument("--only", default="", help="only moments whose text has this in it")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    wanted = [moment for moment in MOMENTS if args.only in " ".join(moment[2])]
    whole = {}
    for processes in sorted({moment[0] for moment in wanted}):
        code = train(folder / f"whole{processes}", processes, 0, "")
        assert code == 0, f"the uninterrupted training failed: see {folder}/whole{processes}/printed"
        whole[processes] = read_end(folder / f"whole{processes}" / "out")
    print(f"{'processes':>9} {'workers':>7}  {'killed at':<34} {'exit codes':<22} {'the same at the end':<20}")
    failures = 0
    for number, (processes, workers, kills) in enumerate(wanted):
        here = folder / f"moment{number}"
        codes = []
        for kill in [*kills, ""]:
            codes.append(train(here, processes, workers, kill, *(["--resume"] if codes else [])))
            if codes[-1] == -signal.SIGKILL and processes > 1:
                wait_for_lock(here)
        differs = []
        if codes[-1] == 0:
            end = read_end(here / "out")
            differs = [what for what in end if not same(whole[processes][what], end[what])]
        good = codes[-1] == 0 and not differs and 0 not in codes[:-1]
        failures += not good
        verdict = "all" if good else f"NOT {', '.join(differs) or 'finished'}"
        text = ", ".join(map(str, codes))
        print(f"{processes:>9} {workers:>7}  {', '.join(kills):<34} {text:<22} {verdict:<20}", flush=True)
    print(f"{len(wanted) - failures} of {len(wanted)} moments end as the uninterrupted training does")
    sys.exit(failures)


if __name__ == "__main__":
    main()
