"""Paths of four images, whose rows the tests of the steps tables and of their report work out by hand."""

import torch

from deqdet.measurement.accuracy import Accuracy
from deqdet.measurement.cost import Cost, MultiplyAdds
from deqdet.measurement.duplicates import Duplicates
from deqdet.measurement.steps import ImagePath, Plan, summarize
from deqdet.measurement.timing import Latency

NAN = float("nan")


def make_path(image_id: int, residuals: list[float], detections: dict | None = None, steps: int | None = None):
    return ImagePath(image_id=image_id, steps=steps or len(residuals), finite=steps is None,
                     residuals=torch.tensor(residuals), detections=detections or {}, distances={})  # fmt: skip


COST = Cost(image_size=(120, 160), padded_size=(128, 160), steps=25, backbone=MultiplyAdds(80 * 10**9, 1),
            neck=MultiplyAdds(16 * 10**9, 1), initialization=MultiplyAdds(2 * 10**9, 1),
            per_step=MultiplyAdds(3 * 10**9, 1), read_out=MultiplyAdds(10**6, 1))  # fmt: skip
PLAN = Plan(steps=(1, 3, 5), rtols=(0.5, 0.01), limit=4)
PATHS = [
    make_path(1, [1.0, 0.4, 0.3, 0.2, 0.1]),
    make_path(2, [1.0, 0.6, 0.2, 0.1, 0.2]),
    make_path(3, [2.0, 0.8, 0.9, 0.6, 0.1]),
    make_path(4, [3.0, 0.9, NAN, NAN, NAN], steps=3),
]


def accuracy_of_choice(paths, choices):
    """An AP of 10 times the mean step; there are no medium or large objects."""
    means = [10 * sum(choice) / len(paths) for choice in choices]
    return [Accuracy(AP=x, AP50=x + 1, AP75=x + 2, APs=x + 3, APm=None, APl=None) for x in means]


def duplicates_of_step(paths, step):
    """A share of 10 percent a step; from step 5 on no pair is left."""
    return Duplicates(found=8, doubled=10.0 * step, distance=0.25 if step < 5 else None, AP_nms=50.0 + step)


def make_results(name: str = "plain", paths=PATHS):
    return summarize(name, f"Some({name})", paths, plan=PLAN, evaluate=accuracy_of_choice,
                     count_duplicates=duplicates_of_step, cost=COST,
                     latency=Latency(fixed=0.5, per_step=0.02))  # fmt: skip
