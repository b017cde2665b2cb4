"""Fixed points y* = f(y*): how to solve for them and how to differentiate them.

The package depends on torch alone and knows nothing of boxes or detectors: f is any map of flat vectors (B, D).
"""

from .estimators import Implicit, Phantom, Unrolled
from .records import Solution, Status
from .residuals import first_below, relative_residual
from .solve import Map, Solver, is_solver, solve
from .solvers import Anderson, Broyden, FixedPointIteration
from .spectrum import spectral_radius
from .unroll import conclude, unroll

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
    "conclude",
    "first_below",
    "is_solver",
    "relative_residual",
    "solve",
    "spectral_radius",
    "unroll",
]
