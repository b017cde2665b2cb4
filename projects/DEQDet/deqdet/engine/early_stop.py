"""Early stopping: ends a training that no longer improves."""

import logging
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm

from ..checkpoints.publish import AVERAGE
from ..errors import UserError

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "validation_loss")  # SOLVER.EARLY_STOP.METRIC


class _End(BaseException):
    """Leaves detectron2's training loop, which has no other exit."""


class EndableTrainer(TrainerBase):
    """detectron2's training loop, which an EarlyStop hook can end as if max_iter had been reached.

    It must come right before TrainerBase in the method resolution order: class Trainer(DefaultTrainer, EndableTrainer).
    """

    def train(self, start_iter: int, max_iter: int) -> None:
        try:
            super().train(start_iter, max_iter)
        except _End:
            pass

    def before_step(self) -> None:
        # Checked here, between two iterations, where all hooks of the last one have run, even if it was resumed.
        if any(isinstance(hook, EarlyStop) and hook.patience_is_over for hook in self._hooks):
            self.max_iter = self.iter
            raise _End
        super().before_step()


class EarlyStop(HookBase):
    """Ends the training after `patience` evaluations in a row without an improvement.

    The training then ends as if SOLVER.MAX_ITER were the iteration after that evaluation: with a last evaluation,
    model_final.pth, which has the last weights, and the model file. model_best.pth has the best weights.

    Register the hook on every rank of an EndableTrainer, after the evaluations and before StopOnSignal. Its state is
    in every checkpoint, so a resumed training ends at the same iteration, and one that has ended early does not go on
    unless it is resumed with more patience. If the checkpoint's best value is of another metric, counting starts over.
    """

    def __init__(self, *, patience: int, metric: str, must_fall: bool, min_delta: float, eval_period: int):
        """
        Args:
            patience: at least 1.
            metric: its name in the event storage of the main process.
            must_fall: a lower value is better, as for a loss.
            min_delta: smaller changes of the metric do not count as improvements.
            eval_period: iterations between evaluations.
        """
        self._patience = patience
        self._metric = metric
        self._sign = -1 if must_fall else 1
        self._min_delta = min_delta
        self._period = eval_period
        self._best: float | None = None
        self._waited = 0  # evaluations since the best

    @property
    def patience_is_over(self) -> bool:
        """Whether the training is to end before the next iteration."""
        return self._waited >= self._patience

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self._metric, "best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("metric", self._metric)  # older checkpoints do not have the name
        if before != self._metric:
            logger.info("SOLVER.EARLY_STOP watched %s before and starts over with %s", before, self._metric)
            return
        self._best, self._waited = state_dict["best"], state_dict["waited"]

    def before_train(self) -> None:
        if self.patience_is_over:
            logger.info("This training has ended early (%s): there is nothing to resume", self._describe())

    def after_step(self) -> None:
        """Check the metric if this iteration had an evaluation.

        Raises:
            UserError: the evaluation did not compute the metric.
        """
        done = self.trainer.iter + 1
        if done % self._period != 0 or done == self.trainer.max_iter:
            return
        found = self.trainer.storage.latest().get(self._metric) if comm.is_main_process() else None
        value = comm.all_gather(found[0] if found and found[1] == self.trainer.iter else None)[0]
        if value is None:
            raise UserError(
                f"the evaluation computed no {self._metric}, which SOLVER.EARLY_STOP watches: put a data set with "
                "boxes first in DATASETS.TEST, or set SOLVER.EARLY_STOP.PATIENCE to 0"
            )
        self._take(value)
        if self.patience_is_over:
            logger.info("The training ends early, after iteration %d: %s", self.trainer.iter, self._describe())
            self.trainer.iteration_complete = True
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)

    def _take(self, value: float) -> None:
        first = self._best is None and not math.isnan(value)
        if first or (self._best is not None and self._sign * (value - self._best) > self._min_delta):
            self._best, self._waited = value, 0
        else:  # also if it is NaN, which is the AP without any detection
            self._waited += 1

    def _describe(self) -> str:
        best = "was never a number" if self._best is None else f"was best at {self._best:.3f}"
        return f"{self._metric} {best}, {self._waited} evaluations ago (SOLVER.EARLY_STOP.PATIENCE {self._patience})"


def metric_name(cfg: CfgNode, name: str) -> str:
    """Return the full name under which a metric of the published weights is logged, such as "ema/bbox/AP".

    The best checkpoint and early stopping go by this metric: that of the first test set, and of the averaged weights if
    there are any.

    Args:
        name: the metric, such as "bbox/AP" or "validation/total_loss".
    """
    if len(cfg.DATASETS.TEST) > 1:  # detectron2 puts a set's name before its metrics
        name = f"{cfg.DATASETS.TEST[0]}/{name}"
    return f"{AVERAGE}/{name}" if cfg.SOLVER.EMA.ENABLED else name


def build_early_stop(cfg: CfgNode) -> list[EarlyStop]:
    """Build the hook that SOLVER.EARLY_STOP asks for, or return an empty list."""
    options = cfg.SOLVER.EARLY_STOP
    if options.PATIENCE == 0:
        return []
    is_loss = options.METRIC == "validation_loss"
    metric = metric_name(cfg, "validation/total_loss" if is_loss else f"bbox/{options.METRIC}")
    numbers = {"patience": options.PATIENCE, "min_delta": options.MIN_DELTA, "eval_period": cfg.TEST.EVAL_PERIOD}
    return [EarlyStop(metric=metric, must_fall=is_loss, **numbers)]
