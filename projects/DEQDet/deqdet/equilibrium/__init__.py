"""Fixed points and their gradients: torch and nothing else, no box, no detector."""

from .estimators import Implicit, Phantom, Unrolled
from .solve import Map, Solution, Solver, Status, relative_residual, solve
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
    "relative_residual",
    "solve",
]
