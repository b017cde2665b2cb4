"""Several configs trained on the same data for the same budget, and the table that comes of it."""

from .measurement import Measurement, measure_apart
from .metrics import Metrics, read_metrics
from .report import write_report
from .runs import Result, Run, complete, prepare_runs

__all__ = [
    "Measurement",
    "Metrics",
    "Result",
    "Run",
    "complete",
    "measure_apart",
    "prepare_runs",
    "read_metrics",
    "write_report",
]
