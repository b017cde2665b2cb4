"""Evaluators other than COCO's AP."""

import logging

import numpy as np

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

logger = logging.getLogger(__name__)


class StepsEvaluator(DatasetEvaluator):
    """Counts the applications of f per image until convergence (MODEL.DEQDET.SOLVER.RTOL) or the limit.

    `evaluate` logs a line and returns {"steps": {"mean": ..., "p50": ..., "p95": ...}} over the images of all ranks.
    In training, detectron2 puts these into the event storage as "steps/mean" and so on.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []

    def reset(self) -> None:
        self._steps = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect the step counts of a batch.

        Args:
            outputs: DEQDet's outputs, each with "steps".
        """
        self._steps += [int(output["steps"]) for output in outputs]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Gather the counts on rank 0 and return their statistics; None on all other ranks."""
        steps = [count for part in comm.gather(self._steps) for count in part]
        if not comm.is_main_process():
            return None
        if not steps:
            return {}
        median, high = np.percentile(steps, [50, 95])
        result = {"mean": float(np.mean(steps)), "p50": float(median), "p95": float(high)}
        logger.info(
            "Steps that %d images took: mean %.2f, median %.1f, 95th percentile %.1f, maximum %d",
            len(steps), result["mean"], median, high, max(steps),
        )  # fmt: skip
        return {"steps": result}


class StatesEvaluator(DatasetEvaluator):
    """Counts the images whose states became infinite or NaN, which keep their last finite ones.

    If there are any, `evaluate` logs a warning and returns {"nonfinite": {"images": n, "of": m}}: n of the m images of
    all ranks.
    """

    def __init__(self) -> None:
        self._finite: list[bool] = []

    def reset(self) -> None:
        self._finite = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Collect a batch.

        Args:
            outputs: DEQDet's outputs, each with "finite". Other models' outputs without it count as finite.
        """
        self._finite += [bool(output.get("finite", True)) for output in outputs]

    def evaluate(self) -> dict[str, dict[str, int]] | None:
        """Gather the counts on rank 0; None on all other ranks."""
        finite = [value for part in comm.gather(self._finite) for value in part]
        if not comm.is_main_process():
            return None
        failed = finite.count(False)
        if not failed:
            return {}
        logger.warning(
            "The states became infinite or NaN in %d of %d images: their detections count in the AP above, but may be "
            "useless (docs/equilibrium.md, When it does not converge)", failed, len(finite),
        )  # fmt: skip
        return {"nonfinite": {"images": failed, "of": len(finite)}}
