"""Accuracies and steps that fall with the iteration, as inexact stochastic methods need them."""

from __future__ import annotations

import math

from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.upper_level.conditions import SOLVED_SHARE, AccuracyCondition


class Decay:
    """Factors 1 = c_0 >= c_1 >= ... of a step or a tolerance: pure functions of k, so resumed runs need no state.

    "power": c_k = (1 + k / offset)^-power; "log": c_k = 1 / (1 + log(1 + k / offset)); "constant": c_k = 1.

    Args:
        kind: one of the above.
        power: of "power", >= 0.
        offset: iterations after which the decay sets in, > 0.

    Raises:
        ValueError: unknown kind, or a number out of range.
    """

    KINDS = ("power", "log", "constant")

    def __init__(self, kind: str = "power", power: float = 0.5, *, offset: float = 1.0):
        if kind not in self.KINDS:
            raise ValueError(f"Expected a schedule out of {', '.join(self.KINDS)}. Got {kind!r}.")
        if not 0 <= power < math.inf:
            raise ValueError(f"Expected a finite power >= 0 of a schedule. Got {power!r}.")
        if not 0 < offset < math.inf:
            raise ValueError(f"Expected a finite offset > 0 of a schedule. Got {offset!r}.")
        self.kind, self.power, self.offset = kind, power, offset

    def factor(self, k: int) -> float:
        """c_k for k = 0, 1, ..."""
        if self.kind == "constant":
            return 1.0
        late = k / self.offset
        return (1 + late) ** -self.power if self.kind == "power" else 1 / (1 + math.log1p(late))


class DecayingTolerances(AccuracyCondition):
    """||x_k - x*|| <= e_0 c_k and ||grad f - H q_k|| <= d_0 c_k, image by image (Salehi et al. 2024).

    Unlike :class:`SummableTolerances` their sum may be infinite: with steps that fall too it is enough that the errors
    fall faster than the noise of the minibatches averages out.

    Args:
        error_tol: e_0 > 0, in the units of x.
        residual_tol: d_0 > 0, in the units of the gradient of the upper-level loss.
        decay: the factors c_k.

    Raises:
        ValueError: a tolerance is not a positive number.
    """

    def __init__(self, error_tol: float, residual_tol: float, decay: Decay):
        for name, value in (("error_tol", error_tol), ("residual_tol", residual_tol)):
            if not 0 < value < math.inf:
                raise ValueError(f"Expected {name} as a finite number > 0. Got {value!r}.")
        self.error_tol, self.residual_tol, self.decay = error_tol, residual_tol, decay

    def tolerances(self, k: int) -> tuple[float, float]:
        """(e_0 c_k, d_0 c_k)."""
        factor = self.decay.factor(k)
        return self.error_tol * factor, self.residual_tol * factor

    def accuracy(self, k: int) -> dict[str, float]:
        error_tol, residual_tol = self.tolerances(k)
        return {"error_tol": SOLVED_SHARE * error_tol, "residual_tol": SOLVED_SHARE * residual_tol}

    def holds(self, h: Hypergradient, k: int) -> bool | None:
        error_tol, residual_tol = self.tolerances(k)
        return h.distance <= error_tol and h.residual <= residual_tol if math.isfinite(h.distance) else None

    def describe(self, h: Hypergradient, k: int) -> str:
        error_tol, residual_tol = self.tolerances(k)
        return (
            f"distance {h.distance:.3g} and residual {h.residual:.3g} instead of {error_tol:.3g} and {residual_tol:.3g}"
        )
