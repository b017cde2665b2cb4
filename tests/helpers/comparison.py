"""Results of a comparison, as no training made them."""

from deqdet.measurement.checkpoint_cost import Measurement
from deqdet.measurement.comparison import Metrics, Result
from deqdet.measurement.duplicates import Duplicates

MEASURED = Measurement(parameters=2_000_000, multiply_adds=3_000_000_000, image_size=[160, 192],
                       ms_per_image=40.0, inference_memory_mb=50.0, steps=25,
                       duplicates=Duplicates(found=100, doubled=12.0, distance=0.25, AP_nms=61.0))  # fmt: skip


def make_result(name: str, seed: int, ap: float | None, **figures: object) -> Result:
    settings = {
        "MODEL.DEQDET.DECODER": f"{name}Decoder",
        "MODEL.DEQDET.REFINEMENT_LAYER": "SomeLayer",
        "SOLVER.MAX_ITER": 30,
        "SOLVER.IMS_PER_BATCH": 16,
        "DATASETS.TRAIN": ["some_train"],
        "DATASETS.TEST": ["some_val"],
        "num_gpus": 2,
    }
    curve = [[10, 1.0], [20, 2.0], [30, ap]]
    metrics = {"AP": ap, "AP50": 60.0, "APs": 10.0, "curve": curve, "seconds_per_iteration": 0.5}
    metrics = Metrics(**{**metrics, "training_memory_mb": 900.0, **figures})
    return Result(name, seed, settings, metrics, MEASURED, "a machine", 1.5)
