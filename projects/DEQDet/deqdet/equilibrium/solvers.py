"""Solvers: frozen records of their numbers, with `init` and `step` on a flat (B, D) tensor (see solve.Solver)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FixedPointIteration:
    """y <- f(y): the paper's naive solver, Sec. 3.2."""

    def init(self, value: Tensor) -> None:
        """Nothing is remembered."""

    def step(self, value: Tensor, image: Tensor, memory: None) -> tuple[Tensor, None]:
        """The image is the next iterate."""
        return image, None
