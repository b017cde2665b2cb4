"""What a detector costs: its parameters, and its multiply-adds on one image, with fvcore's counters."""

from .cost import Cost, Execution, count_multiply_adds, plan_execution
from .counters import MultiplyAdds, trace
from .parameters import Parameters, count_parameters
from .tables import format_cost, format_parameters

__all__ = [
    "Cost",
    "Execution",
    "MultiplyAdds",
    "Parameters",
    "count_multiply_adds",
    "count_parameters",
    "format_cost",
    "format_parameters",
    "plan_execution",
    "trace",
]
