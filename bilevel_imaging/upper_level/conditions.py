"""How accurate a hypergradient must be: the conditions of the convergence theories, asked for, met and verified.

Each condition says what to ask of a hypergradient in iteration k (``accuracy``, keywords of
:func:`bilevel_imaging.hypergradient`; an :class:`Objective` takes those it knows), and whether the certificate of a
hypergradient proves it (``holds``). k counts from 0. What a certificate proves holds with the certificate: surely, or
except with ``Hypergradient.failure_probability``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.upper_level.slope import Slope

# goals of a refinement, so that storing the estimate in the dtype of theta does not spoil a bound just met
REFINED_SHARE = 1 - 1e-6
# tolerances of single solves, so that the rounding added to what they measure fits in
SOLVED_SHARE = 0.9


class AccuracyCondition(abc.ABC):
    """What a convergence theory demands of the hypergradient in iteration k."""

    @abc.abstractmethod
    def accuracy(self, k: int) -> dict[str, float]:
        """Keyword arguments that ask for it."""

    @abc.abstractmethod
    def holds(self, h: Hypergradient, k: int) -> bool | None:
        """Whether the certificate of h proves the condition; ``None`` if h certifies nothing."""

    @abc.abstractmethod
    def describe(self, h: Hypergradient, k: int) -> str:
        """What was reached and what is demanded, in words."""

    def enforce(
        self,
        problem: LowerLevelProblem,
        loss: Callable[[Tensor, Tensor], Tensor],
        x_true: Tensor,
        k: int,
        **settings: Any,
    ) -> Hypergradient:
        """A hypergradient for which the condition holds, or whose ``reason`` says why that could not be proved.

        Args:
            problem: a batch of lower-level problems.
            loss: upper-level loss.
            x_true: ground truth.
            k: iteration.
            **settings: further arguments of :func:`bilevel_imaging.hypergradient` (solvers, warm starts, ...).

        Raises:
            ValueError: what :func:`bilevel_imaging.hypergradient` raises.
        """
        h = hypergradient(problem, loss, x_true, **self.accuracy(k), **settings)
        if self.holds(h, k):
            return replace(h, reason="") if h.certified else h
        because = f": {h.reason}" if h.reason else ""
        return replace(h, reason=f"{self.describe(h, k)}{because}")


class RelativeError(AccuracyCondition):
    """||h - grad F|| <= C ||h||, the norm test (Berahas, Cao & Scheinberg 2021); with C < 1, -h is a descent direction.

    Args:
        factor: C in (0, 1).

    Raises:
        ValueError: C out of range.
    """

    def __init__(self, factor: float):
        if not 0 < factor < 1:
            raise ValueError(f"Expected factor in (0, 1), without which -h need not descend. Got {factor!r}.")
        self.factor = factor

    def accuracy(self, k: int) -> dict[str, float]:
        return {"relative": self.factor * REFINED_SHARE}

    def holds(self, h: Hypergradient, k: int) -> bool | None:
        return h.bound <= self.factor * h.norm if h.certified else None

    def describe(self, h: Hypergradient, k: int) -> str:
        return f"relative error bounded by {h.relative_bound:.3g} instead of {self.factor:.3g}"


class AbsoluteError(AccuracyCondition):
    """||h_k - grad F|| <= C_k (Cao, Berahas & Scheinberg 2022), with C_k chosen by the caller as the method goes on.

    Args:
        values: C_k: one number for all k, a sequence (a list may grow meanwhile), or a function of k.
    """

    def __init__(self, values: float | Sequence[float] | Callable[[int], float]):
        self.values = values

    def value(self, k: int) -> float:
        """C_k.

        Raises:
            ValueError: if there is no C_k, or it is not a positive number.
        """
        if callable(self.values):
            value = self.values(k)
        elif isinstance(self.values, Sequence):
            if not 0 <= k < len(self.values):
                raise ValueError(f"Expected a value for iteration {k}. Got {len(self.values)} values; append it first.")
            value = self.values[k]
        else:
            value = self.values
        if not 0 < value < math.inf:
            raise ValueError(f"Expected a positive number for iteration {k}. Got {value!r}.")
        return float(value)

    def accuracy(self, k: int) -> dict[str, float]:
        return {"bound_tol": self.value(k) * REFINED_SHARE}

    def holds(self, h: Hypergradient, k: int) -> bool | None:
        return h.bound <= self.value(k) if h.certified else None

    def describe(self, h: Hypergradient, k: int) -> str:
        return f"error bounded by {h.bound:.3g} instead of {self.value(k):.3g}"


class SummableTolerances(AccuracyCondition):
    """||x_k - x*|| <= e_k and ||grad f - H q_k|| <= e_k with sum e_k finite (HOAG; Pedregosa 2016), image by image.

    Schedules: "exponential", e_k = first ratio^k; "quadratic", first / (k + 1)^2; "cubic", first / (k + 1)^3.

    Args:
        first: e_0 > 0, in the units of x.
        schedule: one of the above.
        ratio: of "exponential", in (0, 1).

    Raises:
        ValueError: an argument is out of range.
    """

    SCHEDULES = ("exponential", "quadratic", "cubic")

    def __init__(self, first: float, schedule: str = "exponential", *, ratio: float = 0.9):
        if schedule not in self.SCHEDULES:
            raise ValueError(f"Unknown schedule {schedule!r}. Choose from {list(self.SCHEDULES)}.")
        if not 0 < first < math.inf or not 0 < ratio < 1:
            raise ValueError(f"Expected first > 0 and ratio in (0, 1). Got {first!r}, {ratio!r}.")
        self.first, self.schedule, self.ratio = first, schedule, ratio

    def tolerance(self, k: int) -> float:
        """e_k."""
        if self.schedule == "exponential":
            return self.first * self.ratio**k
        return self.first / (k + 1) ** (2 if self.schedule == "quadratic" else 3)

    @property
    def total(self) -> float:
        """The sum of all e_k."""
        if self.schedule == "exponential":
            return self.first / (1 - self.ratio)
        # zeta(2) and zeta(3)
        return self.first * (math.pi**2 / 6 if self.schedule == "quadratic" else 1.2020569031595942)

    def accuracy(self, k: int) -> dict[str, float]:
        tolerance = SOLVED_SHARE * self.tolerance(k)
        return {"error_tol": tolerance, "residual_tol": tolerance}

    def holds(self, h: Hypergradient, k: int) -> bool | None:
        return max(h.distance, h.residual) <= self.tolerance(k) if math.isfinite(h.distance) else None

    def describe(self, h: Hypergradient, k: int) -> str:
        return f"distance {h.distance:.3g} and residual {h.residual:.3g} instead of {self.tolerance(k):.3g}"


def descent_direction_certified(h: Hypergradient, eta: float) -> bool | None:
    """Whether bound <= (1 - eta) ||h||, which proves <h, grad F> >= eta ||h||^2; ``None`` if h is not certified.

    Descent test of MAID (Salehi et al. 2023, Algorithm 3.2).

    Args:
        h: a hypergradient.
        eta: in (0, 1).

    Raises:
        ValueError: eta out of range.
    """
    if not 0 < eta < 1:
        raise ValueError(f"Expected eta in (0, 1). Got {eta!r}.")
    return 0 < h.norm and h.bound <= (1 - eta) * h.norm if h.certified else None


def gradient_norm_interval(h: Hypergradient | Slope) -> tuple[float, float]:
    """Certified interval of ||grad F||: [||h|| - bound, ||h|| + bound], not below 0; (0, inf) if h is not certified.

    An upper end below a tolerance is a certificate of stationarity.
    """
    return (max(h.norm - h.bound, 0.0), h.norm + h.bound) if h.certified else (0.0, math.inf)
