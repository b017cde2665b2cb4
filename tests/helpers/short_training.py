"""Trainings of the toy detector in this process, whose evaluations give what a test says."""

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detectron2.utils.events import get_event_storage

from deqdet.engine import Trainer, setup

from helpers.engine_toy import parse


def train(config: str, *words, ap=None, fail_at: int | None = None) -> Trainer:
    """Train; `ap` gives the AP of an iteration in place of each evaluation; an interruption comes before `fail_at`."""

    class ShortTrainer(Trainer):
        @classmethod
        def test(cls, cfg, model):
            return super().test(cfg, model) if ap is None else {"bbox": {"AP": ap(get_event_storage().iter)}}

        def run_step(self):
            if self.iter == fail_at:
                raise KeyboardInterrupt
            super().run_step()

    args = parse(config, *words)
    trainer = ShortTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    try:
        trainer.train()
    except KeyboardInterrupt:
        assert fail_at is not None
    return trainer


def in_metrics(folder: Path, name: str) -> list[tuple[int, float]]:
    """Iteration and value of each line of metrics.json that has a metric."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(line["iteration"], line[name]) for line in lines if name in line]


def in_tensorboard(folder: Path, name: str) -> list[tuple[int, float]]:
    """The same as TensorBoard shows it."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(x.step, x.value) for x in events.Scalars(name)]
