"""Trainings of the toy detector in processes of their own, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.engine_toy import TRAIN_NET
from helpers.paths import ROOT

HELPERS = ROOT / "tests" / "helpers"


def command(config: str, *words) -> list[str]:
    plugins = ["--plugin", str(HELPERS / "engine_toy.py"), "--plugin", str(HELPERS / "killer.py")]
    return [sys.executable, str(TRAIN_NET), "--config-file", config, *plugins, *map(str, words)]


def environment(kill: str = "") -> dict[str, str]:
    paths = [str(ROOT / "tests"), str(ROOT / "projects" / "DEQDet")]
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "KILL": kill, "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip


def run_toy(config: str, *words, kill: str = "") -> subprocess.CompletedProcess:
    """Train, with KILL as helpers/killer.py takes it; what was printed is in `stdout` and `stderr`."""
    return subprocess.run(
        command(config, *words), env=environment(kill), capture_output=True, text=True, timeout=300
    )


def said(done: subprocess.CompletedProcess) -> list[str]:
    """The lines on stderr, without warnings of libraries."""
    lines = done.stderr.splitlines()
    return [line for line in lines if line.startswith(("error:", "SIG", "stopped", "interrupted", "Traceback"))]


def read_lines(out: Path) -> list[dict]:
    """metrics.json."""
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
