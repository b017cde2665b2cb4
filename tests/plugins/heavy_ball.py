"""A custom solver: plain iteration with momentum (Polyak's heavy ball)."""

from dataclasses import dataclass

from torch import Tensor

from deqdet.decoders import SOLVER_REGISTRY


@SOLVER_REGISTRY.register()
@dataclass(frozen=True)
class HeavyBall:
    """y_{t+1} = f(y_t) + momentum * (y_t - y_{t-1})."""

    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}")

    def init(self, iterate: Tensor) -> tuple[Tensor]:
        """The state that the first step gets: the iterate before this one, of which there is none yet."""
        return (iterate,)

    def step(self, iterate: Tensor, output: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """The next iterate (B, D) from this one and f of it, and the state for the next step."""
        (previous,) = state
        return output + self.momentum * (iterate - previous), (iterate,)
