"""Solvers by their config name."""

from dataclasses import fields

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..equilibrium import Anderson, Broyden, FixedPointIteration, Solver
from ..layers import look_up

SOLVER_REGISTRY = Registry("SOLVER")
SOLVER_REGISTRY.__doc__ = """
Solvers (see deqdet.equilibrium.Solver): dataclasses whose fields have the names, in lower case, of the keys of
MODEL.DEQDET.SOLVER that they read, but for those in KEYS.
"""
KEYS = {"history_size": "MEMORY"}  # field -> key, where the names differ
for _solver in (FixedPointIteration, Anderson, Broyden):
    SOLVER_REGISTRY.register(_solver)


def build_solver(cfg: CfgNode) -> Solver:
    """The solver that MODEL.DEQDET.SOLVER.NAME names, with its numbers from the keys beside it.

    Raises:
        ValueError: an unknown name, or a number out of range, also one that this solver does not read.
    """
    options = cfg.MODEL.DEQDET.SOLVER
    solver = look_up(SOLVER_REGISTRY, "MODEL.DEQDET.SOLVER.NAME", options.NAME)
    try:
        _require_in_range(options.DAMPING, options.MEMORY, options.REGULARIZATION)
        return solver(**{field.name: options[KEYS.get(field.name, field.name.upper())] for field in fields(solver)})
    except ValueError as error:
        raise ValueError(f"MODEL.DEQDET.SOLVER (NAME {options.NAME}): {error}") from error


def _require_in_range(damping: float, memory: int, regularization: float) -> None:
    """Each by a solver that reads it, the chosen one or not.

    Raises:
        ValueError: one is out of range.
    """
    FixedPointIteration(damping=damping)
    Anderson(regularization=regularization)
    Broyden(history_size=memory)  # which asks least of it
