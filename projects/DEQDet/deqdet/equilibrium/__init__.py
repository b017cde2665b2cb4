"""Fixed points and their gradients: torch and nothing else, no box, no detector."""

from .estimators import Implicit, Phantom, Unrolled
from .solve import Map, Solution, Solver, Status, first_below, relative_residual, solve
from .solvers import Anderson, Broyden, FixedPointIteration

__all__ = [
    "Anderson",
    "Broyden",
    "FixedPointIteration",
    "Implicit",
    "Map",
    "Phantom",
    "Solution",
    "Solver",
    "Status",
    "Unrolled",
    "first_below",
    "relative_residual",
    "solve",
]
