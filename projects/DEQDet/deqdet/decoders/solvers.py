"""Solvers by name, with their options from a config."""

import ast
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from ..contract import describe, misfit
from ..equilibrium import Anderson, Broyden, FixedPointIteration, Solver, solve
from ..layers import look_up

SOLVER_REGISTRY = Registry("SOLVER")
SOLVER_REGISTRY.__doc__ = """
Solvers of the fixed point: frozen dataclasses with the methods of deqdet.equilibrium.Solver. The fields of a solver are
its options. MODEL.DEQDET.SOLVER.OPTIONS sets a field under its name in upper case; other fields keep their default.
docs/extending.md has a complete example.
"""
OURS = (FixedPointIteration, Anderson, Broyden)
for _solver in OURS:
    SOLVER_REGISTRY.register(_solver)

# Fields that can also be set by a key beside MODEL.DEQDET.SOLVER.NAME. OPTIONS takes precedence.
KEYS = {"damping": "DAMPING", "history_size": "MEMORY", "regularization": "REGULARIZATION"}
SHORT_NAMES = {"plain": "FixedPointIteration"}
# Options whose default is an int or a float. The default's type -> the accepted types, and their name in messages.
_NUMBERS = {int: ((int,), "a whole number"), float: ((int, float), "a number")}


def build_solver(cfg: CfgNode, spec: str | None = None) -> Solver:
    """Build a solver with its options from MODEL.DEQDET.SOLVER.

    Args:
        spec: the solver in the short form of the tools: a name in the registry (in any case) or "plain", with the
            history_size as an optional suffix ("anderson4"), or with options in parentheses
            ("Anderson(history_size=4, damping=0.5)"). None: MODEL.DEQDET.SOLVER.NAME.

    Raises:
        ValueError: the name is unknown, the solver has no such option, an option is out of range, or a user's solver
            does not fit the interface.
    """
    options = cfg.MODEL.DEQDET.SOLVER
    name, own = (_find(options.NAME) or options.NAME, {}) if spec is None else parse_spec(spec)
    solver = look_up(SOLVER_REGISTRY, "MODEL.DEQDET.SOLVER.NAME" if spec is None else "the solver", name)
    try:
        # What a solver stored in itself would stay when images leave the batch, and from one batch to the next.
        if not (is_dataclass(solver) and solver.__dataclass_params__.frozen):
            raise ValueError(f"{name} must be a frozen dataclass: put @dataclass(frozen=True) above it")
        known = [field.name for field in fields(solver) if field.init]
        values = {field: options[key] for field, key in KEYS.items() if field in known}
        if name == (_find(options.NAME) or options.NAME):
            by_lower = {field.lower(): field for field in known}
            values |= {by_lower.get(key.lower(), key.lower()): value for key, value in options.OPTIONS.items()}
        values |= own
        _check_numbers(solver, values)
        if unknown := [field for field in values if field not in known]:
            has = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ValueError(f"{name} has no option {unknown[0]}: {has}")
        built = solver(**values)
    except (TypeError, ValueError) as error:
        where = f"MODEL.DEQDET.SOLVER (NAME {name})" if spec is None else f"solver {spec}"
        raise ValueError(f"{where}: {error}") from error
    if solver not in OURS:
        _try(built)
    return built


def _try(solver: Solver) -> None:
    """Take three steps of a user's solver with two rows, so that solve() checks what its methods return.

    The map contracts each coordinate by another factor, so that the changes of successive iterates are not parallel.

    Raises:
        ValueError: it lacks a method, or a method takes other arguments or returns something else.
    """
    if missing := [method for method in ("init", "step") if not callable(getattr(solver, method, None))]:
        raise ValueError(f"{describe(solver)} has no method {missing[0]}: see deqdet.equilibrium.Solver")
    if (problem := misfit(solver, {"init": 1, "step": 3}, Solver)) is not None:
        raise ValueError(problem)
    factor, start = torch.linspace(0.1, 0.9, 64), torch.linspace(-1, 1, 128).view(2, 64)
    solve(lambda iterate: factor * iterate + 1, start, solver=solver, max_steps=3)


def _check_numbers(solver: type, values: Mapping[str, object]) -> None:
    """Check that options whose default is a number get one; anything else would fail somewhere inside the solver."""
    for field in fields(solver):
        value = values.get(field.name)
        if value is not None and type(field.default) in _NUMBERS:
            types, name = _NUMBERS[type(field.default)]
            if type(value) not in types:
                raise ValueError(f"{field.name} must be {name}, got {value!r}")


def parse_spec(spec: str) -> tuple[str, dict[str, object]]:
    """ "anderson4" -> ("Anderson", {"history_size": 4}); "Anderson(damping=0.5)" -> ("Anderson", {"damping": 0.5}).

    Raises:
        ValueError: the text does not have this form, or the registry has no such solver.
    """
    form = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", spec)
    if form is None:
        raise ValueError(f"solver {spec!r}: write NAME or NAME(option=value, ...)")
    name, options = _find(form[1]), {}
    if name is None and (numbered := re.fullmatch(r"(.*?\D)(\d+)", form[1])):
        name, options = _find(numbered[1]), {"history_size": int(numbered[2])}
    if name is None:
        known = [*SHORT_NAMES, *(name for name, _ in SOLVER_REGISTRY)]
        raise ValueError(f"unknown solver {spec}: choose {', '.join(known)}, or with a history size, as anderson4")
    try:
        call = ast.parse(f"options({form[2] or ''})", mode="eval").body
        options |= {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"solver {spec!r}: write the options as (option=value, ...), values as in Python") from error
    if call.args or None in options:
        raise ValueError(f"solver {spec!r}: give every option by its name, as in (damping=0.5)")
    return name, options


def suggest_keys(spec: object) -> str:
    """Translate a solver's short form into config keys, as the end of an error message; "" if it is not a short form.

    In a config, each option has its own key, so that a child config can change a single one.
    """
    try:
        name, options = parse_spec(str(spec))
    except ValueError:
        return ""
    pairs = [f"MODEL.DEQDET.SOLVER.NAME {name}"]
    pairs += [f"MODEL.DEQDET.SOLVER.{KEYS.get(x, f'OPTIONS.{x.upper()}')} {value!r}" for x, value in options.items()]
    return f"; for {spec}, write {' '.join(pairs)}"


def _find(word: str) -> str | None:
    """Return the registered name of a solver, given in any case or as a short name; None if there is none."""
    names = {name.lower(): name for name, _ in SOLVER_REGISTRY}
    if word in names.values():
        return word
    return SHORT_NAMES.get(word.lower()) or names.get(word.lower())
