"""A trained equilibrium detector against the number of steps, the solver and rtol (the paper's Tables 7 to 9)."""

from .accuracy import Accuracy, Evaluation
from .latency import Latency, describe_device, measure_latencies
from .paths import ImagePath, Plan, walk_paths
from .plots import plot_results
from .preparation import build_solvers, count_cost, prepare_config, prepare_loader, prepare_model
from .report import Report, format_report, write_report
from .rows import Results, StepsRow, ToleranceRow, summarize

__all__ = [
    "Accuracy",
    "Evaluation",
    "ImagePath",
    "Latency",
    "Plan",
    "Report",
    "Results",
    "StepsRow",
    "ToleranceRow",
    "build_solvers",
    "count_cost",
    "describe_device",
    "format_report",
    "measure_latencies",
    "plot_results",
    "prepare_config",
    "prepare_loader",
    "prepare_model",
    "summarize",
    "walk_paths",
    "write_report",
]
