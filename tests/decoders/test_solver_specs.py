"""Solvers by the short names that the tools take, and solvers of a user's own."""

from dataclasses import dataclass

import pytest

from deqdet.config import merge_overrides
from deqdet.decoders import SOLVER_REGISTRY, build_solver
from deqdet.equilibrium import Anderson, Broyden, FixedPointIteration


@pytest.mark.parametrize("spec, expected", [
    ("plain", FixedPointIteration()),
    ("FixedPointIteration", FixedPointIteration()),
    ("anderson", Anderson(history_size=4)),
    ("anderson2", Anderson(history_size=2)),
    ("Broyden(history_size=3)", Broyden(history_size=3)),
    ("anderson6(damping=0.5, regularization=1e-3)", Anderson(history_size=6, damping=0.5, regularization=1e-3)),
    (" plain ( damping = 0.25 ) ", FixedPointIteration(damping=0.25)),
])  # fmt: skip
def test_specs(small_cfg, spec, expected):
    assert build_solver(small_cfg(), spec) == expected


def test_what_a_spec_does_not_say_is_the_configs(small_cfg):
    cfg = small_cfg("MODEL.DEQDET.SOLVER.MEMORY", 7, "MODEL.DEQDET.SOLVER.DAMPING", 0.5)
    assert build_solver(cfg, "anderson") == Anderson(history_size=7, damping=0.5)
    assert build_solver(cfg, "anderson2") == Anderson(history_size=2, damping=0.5)


@pytest.mark.parametrize("spec, message", [
    ("newton", "unknown solver newton: choose plain, FixedPointIteration, Anderson, Broyden"),
    ("4", "unknown solver 4"),
    ("anderson(4)", "give every option by its name"),
    ("anderson(depth=4)", "Anderson has no option depth: its options are history_size, damping, regularization"),
    ("plain4", "FixedPointIteration has no option history_size: its options are damping"),
    ("anderson1", "history_size"),
    ("anderson(damping=x)", "write the options as"),
    ("anderson(", "write NAME"),
    ("anderson(damping=2.0)", "solver .*damping must lie in"),
    ("anderson(damping='much')", "damping"),
    ("", "write NAME"),
])  # fmt: skip
def test_wrong_specs(small_cfg, spec, message):
    with pytest.raises(ValueError, match=message):
        build_solver(small_cfg(), spec)


@dataclass(frozen=True)
class Lazy:
    """Goes a fraction of the way, and stays where it is with the fraction 0."""

    fraction: float
    label: str = "none"

    def init(self, iterate):
        return ()

    def step(self, iterate, output, state):
        return iterate + self.fraction * (output - iterate), state


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(SOLVER_REGISTRY._obj_map, "Lazy", Lazy)


def test_a_solver_of_ones_own(small_cfg, registered):
    """One class and one registration: its options are its fields."""
    cfg = small_cfg("MODEL.DEQDET.SOLVER.NAME", "Lazy")
    merge_overrides(cfg, ["MODEL.DEQDET.SOLVER.OPTIONS.FRACTION", "0.5", "MODEL.DEQDET.SOLVER.OPTIONS.label", "'b'"])
    assert build_solver(cfg) == Lazy(0.5, "b")
    assert build_solver(cfg, "lazy(fraction=0.1)") == Lazy(0.1, "b")
    assert build_solver(cfg, "plain") == FixedPointIteration()  # OPTIONS are the named solver's alone


def test_options_come_before_the_keys(small_cfg):
    cfg = small_cfg("MODEL.DEQDET.SOLVER.NAME", "Anderson", "MODEL.DEQDET.SOLVER.MEMORY", 7)
    cfg.MODEL.DEQDET.SOLVER.OPTIONS.HISTORY_SIZE = 3
    assert build_solver(cfg) == Anderson(history_size=3)
    assert build_solver(type(cfg)(cfg).clone()) == Anderson(history_size=3)


@pytest.mark.parametrize("options, message", [
    ({}, "fraction"),
    ({"FRACTION": 0.5, "WINDOW": 3}, "Lazy has no option window: its options are fraction, label"),
])  # fmt: skip
def test_wrong_options(small_cfg, registered, options, message):
    cfg = small_cfg("MODEL.DEQDET.SOLVER.NAME", "Lazy")
    cfg.MODEL.DEQDET.SOLVER.OPTIONS.update(options)
    with pytest.raises(ValueError, match=rf"MODEL.DEQDET.SOLVER \(NAME Lazy\): .*{message}"):
        build_solver(cfg)
