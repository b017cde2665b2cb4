"""The rules by which `deqdet-train --data` derives config values from a data set. They read no files.

docs/training.md, "How the settings are derived", has the same rules in a table with their reasons.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

ANCHOR = 800, 25.0  # the paper's short side and noise on positions, both in pixels
OBJECT_SIDE = 16  # pixels that small objects should have: four cells of the finest level
MOST_ENLARGED = 5 / 3  # times the images' own short side: COCO's images are enlarged from 480 to 800
MOST_QUERIES = 900
EVALUATIONS = 5  # per training
SHORTEST_PERIOD = 200  # iterations
MOST_CPU_PROCESSES = 4


@dataclass(frozen=True)
class DataFacts:
    """The statistics of a data set on which the rules depend; medians and percentiles are over the train set."""

    images: int  # to train on
    classes: int
    width: float  # median, pixels
    height: float
    objects: float  # per image, 99th percentile
    object_side: float  # sqrt(width * height) of the boxes, 10th percentile, pixels
    evaluable: bool = True  # the set to evaluate on has labels

    @property
    def short_side(self) -> float:
        """The short side of the median image, in pixels."""
        return min(self.width, self.height)

    @property
    def aspect(self) -> float:
        """Long side divided by short side of the median image."""
        return max(self.width, self.height) / self.short_side


@dataclass(frozen=True)
class SizeRules:
    """The constants of one --size.

    The length of a training is counted in views. A view is one use of one image, so E epochs on M images are E M views.
    """

    config: str  # the base, a name in the model zoo
    pixels: int  # image size for which the time of an iteration was measured
    train_sides: tuple[float, ...]  # short sides in training, relative to the one at test time
    crop_resize: tuple[float, ...]  # INPUT.DETR_CROP.RESIZE, likewise relative
    crop_size: tuple[float, float]  # INPUT.DETR_CROP.SIZE, likewise relative
    least_queries: int
    batch: int  # images per optimizer step, over all processes, or per process if batch_per_process
    batch_per_process: bool
    lr: float  # for a batch of lr_batch images
    lr_batch: int
    epochs: int
    least_views: int
    most_views: int
    warmup: int  # iterations


# The training sizes and crops are those of quick/deqdet_photos, and for r50 those of the paper's 2x recipe.
_FOUR_FIFTHS_UP = (12 / 15, 13 / 15, 14 / 15, 1.0, 16 / 15)
_QUICK = SizeRules(
    config="quick/deqdet_photos", pixels=240 * 320, train_sides=_FOUR_FIFTHS_UP, crop_resize=(5 / 6, 1, 7 / 6),
    crop_size=(2 / 3, 1), least_queries=16, batch=8, batch_per_process=False, lr=1e-3, lr_batch=8, epochs=100,
    least_views=16_000, most_views=36_000, warmup=50,
)  # fmt: skip
SIZES = {
    "quick": _QUICK,
    "mobilenet": replace(_QUICK, config="quick/deqdet_photos_mobilenet"),
    "small": SizeRules(
        config="own/deqdet_small", pixels=360 * 480, train_sides=_FOUR_FIFTHS_UP,
        crop_resize=(5 / 6, 1, 7 / 6), crop_size=(2 / 3, 1), least_queries=32, batch=8, batch_per_process=False,
        lr=5e-4, lr_batch=8, epochs=100, least_views=24_000, most_views=160_000, warmup=100,
    ),
    "r50": SizeRules(
        config="deqdet_r50_300q_2x", pixels=800 * 1067, train_sides=tuple(0.6 + 0.04 * i for i in range(11)),
        crop_resize=(0.5, 0.625, 0.75), crop_size=(0.48, 0.75), least_queries=100, batch=4, batch_per_process=True,
        lr=2.5e-5, lr_batch=16, epochs=50, least_views=40_000, most_views=2_800_000, warmup=500,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A config key with its value and the value's origin."""

    key: str
    value: object
    reason: str  # the rule that gives the value; "" for a value from the command line


def derive_settings(
    facts: DataFacts,
    rules: SizeRules,
    given: Mapping[str, object],
    *,
    processes: int,
    multi_step: bool,
    on_cuda: bool,
) -> list[Setting]:
    """Derive every key, in the order of the rules. If the user has given a key, later rules use the given value.

    Args:
        given: the values on the command line, by key.
        processes: number of processes that share a batch.
        multi_step: the learning rate falls in steps, at SOLVER.STEPS.
        on_cuda: a GPU is available.
    """
    settings = _Settings(given)
    put = settings.put
    put("MODEL.DEQDET.NUM_CLASSES", facts.classes, "the classes of the data")
    side = _derive_sizes(facts, rules, put)
    queries = put("MODEL.DEQDET.NUM_QUERIES", *_queries(facts, rules))
    put("TEST.DETECTIONS_PER_IMAGE", queries, "one for each query")
    noise = float(f"{ANCHOR[1] * side / ANCHOR[0]:.3g}")
    put(
        "MODEL.DEQDET.PERTURBATION.POSITION_SIZE", noise,
        f"the paper's {ANCHOR[1]:g} pixels at {ANCHOR[0]}, for {side}",
    )  # fmt: skip
    _derive_schedule(facts, rules, put, given, processes=processes, multi_step=multi_step)
    put("MODEL.DEVICE", "cuda" if on_cuda else "cpu", "CUDA is available" if on_cuda else "CUDA is not available")
    put(
        "DATALOADER.NUM_WORKERS", 4 if on_cuda else 0,
        "for each GPU" if on_cuda else "the training itself keeps the cores busy",
    )  # fmt: skip
    return settings.found


def choose_processes(batch: int, cores: int) -> int:
    """Choose how many processes share the CPU: the most of 4, 2 and 1 that divides the batch, with a core for each."""
    return next(n for n in (MOST_CPU_PROCESSES, 2, 1) if n <= max(1, cores) and batch % n == 0)


def measure_facts(records: Sequence[Mapping], classes: int, *, evaluable: bool) -> DataFacts:
    """Compute the facts of a train set.

    Args:
        records: in detectron2's format, with boxes as (x, y, width, height); crowds are ignored.
        classes: number of classes.
        evaluable: the set to evaluate on has labels.
    """
    objects = [[box["bbox"] for box in record["annotations"] if not box["iscrowd"]] for record in records]
    boxes = np.array([box for boxes in objects for box in boxes]).reshape(-1, 4)
    return DataFacts(
        images=len(records),
        classes=classes,
        width=float(np.median([record["width"] for record in records])),
        height=float(np.median([record["height"] for record in records])),
        objects=float(np.percentile([len(boxes) for boxes in objects], 99)),
        object_side=float(np.percentile(np.sqrt(boxes[:, 2] * boxes[:, 3]), 10)),
        evaluable=evaluable,
    )


class _Settings:
    def __init__(self, given: Mapping[str, object]):
        self.given, self.found = given, []

    def put(self, key: str, value: object, reason: str) -> object:
        """Add a key and return its value: the user's if there is one, else the derived one."""
        setting = Setting(key, self.given[key], "") if key in self.given else Setting(key, value, reason)
        self.found.append(setting)
        return setting.value


def _derive_sizes(facts: DataFacts, rules: SizeRules, put) -> int:
    """Derive the keys of the image sizes, and return the short side at test time."""
    side = put("INPUT.MIN_SIZE_TEST", *_side(facts, rules))
    side = side or round(facts.short_side)  # 0: images keep their size
    longest = _round(side * facts.aspect * 1.1, 16)
    put("INPUT.MAX_SIZE_TEST", longest, f"the median image's aspect ratio {facts.aspect:.2f} plus 10%")
    sides = tuple(dict.fromkeys(_round(side * x, 8) for x in rules.train_sides))
    put("INPUT.MIN_SIZE_TRAIN", sides, f"{rules.train_sides[0]:.2g} to {rules.train_sides[-1]:.3g} of the test size")
    put("INPUT.MAX_SIZE_TRAIN", longest, "as at test time")
    put("INPUT.DETR_CROP.RESIZE", [_round(side * x, 4) for x in rules.crop_resize], "in proportion to the side")
    put("INPUT.DETR_CROP.SIZE", [_round(side * x, 4) for x in rules.crop_size], "in proportion to the side")
    put("INPUT.RANDOM_FLIP", "horizontal", "mirrored images are as likely; 'both' if none is upright, 'none' for text")
    return side


def _side(facts: DataFacts, rules: SizeRules) -> tuple[int, str]:
    budget = math.sqrt(rules.pixels / facts.aspect)
    wanted = OBJECT_SIDE * facts.short_side / max(facts.object_side, 1e-3)
    side, reason = budget, f"{rules.pixels:,} pixels at the median image's aspect ratio {facts.aspect:.2f}"
    if wanted > budget:
        side = min(wanted, 1.5 * budget)
        reason = (
            f"small objects (10%: {facts.object_side:.0f} px) should have {OBJECT_SIDE} px; at most 1.5 x the usual"
        )
    if side > MOST_ENLARGED * facts.short_side:
        side = MOST_ENLARGED * facts.short_side
        reason = f"5/3 of the images' own {facts.short_side:.0f}"
    return max(32, _round(side, 16)), reason


def _queries(facts: DataFacts, rules: SizeRules) -> tuple[int, str]:
    wanted = 4 * math.ceil(1.5 * facts.objects / 4)
    if wanted <= rules.least_queries:
        return rules.least_queries, f"the minimum; 99% of the images have at most {facts.objects:.0f} objects"
    if wanted > MOST_QUERIES:
        return MOST_QUERIES, f"the maximum; 99% of the images have at most {facts.objects:.0f} objects"
    return wanted, f"1.5 x {facts.objects:.0f}, the 99th percentile of objects per image"


def _derive_schedule(
    facts: DataFacts, rules: SizeRules, put, given: Mapping[str, object], *, processes: int, multi_step: bool
) -> None:
    wanted = rules.batch * processes if rules.batch_per_process else rules.batch
    batch = put(
        "SOLVER.IMS_PER_BATCH", processes * math.ceil(wanted / processes),
        f"{rules.batch} for each process" if rules.batch_per_process else "as the base config was tuned with",
    )  # fmt: skip
    lr_batch, of = batch, "batch"
    if given.get("SOLVER.LR_RULE", "none") != "none":  # the rule then scales the rate from that batch to IMS_PER_BATCH
        lr_batch, of = given.get("SOLVER.REFERENCE_BATCH", batch), "SOLVER.REFERENCE_BATCH"
    lr = float(f"{rules.lr * math.sqrt(lr_batch / rules.lr_batch):.4g}")
    put("SOLVER.BASE_LR", lr, f"{rules.lr:g} x sqrt({of} / {rules.lr_batch})")
    length = put("SOLVER.MAX_ITER", *_iterations(facts, rules, batch))
    put("SOLVER.WARMUP_ITERS", min(rules.warmup, length // 10), f"{rules.warmup}, at most 10% of the training")
    if multi_step:
        steps = tuple(sorted({x for x in (length * 2 // 3, length * 11 // 12) if 0 < x < length}))
        put("SOLVER.STEPS", steps, "after 2/3 and 11/12, as in the paper's 2x")
    period = max(SHORTEST_PERIOD, math.ceil(length / EVALUATIONS))
    reason = f"{EVALUATIONS} in a training, at least {SHORTEST_PERIOD} iterations apart"
    put("SOLVER.CHECKPOINT_PERIOD", period, reason)
    put(
        "TEST.EVAL_PERIOD", period if facts.evaluable else 0,
        reason if facts.evaluable else "there are no labels to evaluate with",
    )  # fmt: skip


def _iterations(facts: DataFacts, rules: SizeRules, batch: int) -> tuple[int, str]:
    views = rules.epochs * facts.images
    reason = f"{rules.epochs} epochs of {facts.images} images"
    if views < rules.least_views:
        views, reason = rules.least_views, f"the minimum of {rules.least_views:,} images seen"
    if views > rules.most_views:
        views, reason = rules.most_views, f"the maximum of {rules.most_views:,} images seen"
    return 50 * math.ceil(views / batch / 50), reason


def _round(value: float, step: int) -> int:
    """Round to the nearest positive multiple of `step`, halves upwards."""
    return max(step, step * math.floor(value / step + 0.5))
