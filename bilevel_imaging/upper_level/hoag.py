"""HOAG: gradient descent with tolerances that decrease on a schedule, and a step length that adapts."""

from __future__ import annotations

import math
from typing import Any

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    report,
    require_all_images,
    value_with,
)
from bilevel_imaging.upper_level.conditions import SummableTolerances
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

# tolerances are not asked for below this part of the first
SMALLEST_SHARE = 1e-12
MAX_BACKTRACKS = 30
# factors of the smoothness when it proves too large, or too small
SHRINK, GROW = 0.95, 2.0
# where nothing is certified, a loss so many times the old one is a failure
LARGEST_INCREASE = 1.2


class HOAG(UpperLevelMethod):
    """Hyperparameter optimization with approximate gradients (Pedregosa 2016), steps h / L.

    In iteration k lower level and adjoint are solved to tolerances e_k with a finite sum, which suffices for
    convergence with L at least the smoothness of F. L is adapted as in the author's code: with Delta the length of the
    step, a step after which

        F~(new) <= F~(old) + C e_{k+1} + (C + 1) e_k Delta - L Delta^2 / 2

    is accepted and L becomes 0.95 L; one that raises the loss is taken back and tried again with 2 L and half the
    tolerances; others are accepted. Three things differ: the code takes every step twice and compares losses of points
    that are one step apart from those it decides about, here each step is taken once; it subtracts L Delta^2, which
    even exact steps of the right length miss (the descent lemma promises half of that); and it takes a step back only
    if the loss is 1.2 times the old one, which is done here where nothing is certified, while otherwise the certified
    intervals decide.

    Args:
        lr: first step 1 / L; ``None`` for one of length sqrt(n).
        error_tol: first tolerance e_0, in the units of x.
        schedule: "exponential", "quadratic" or "cubic", see :class:`SummableTolerances`.
        ratio: of "exponential".
        slack: C.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        error_tol: float = 0.1,
        schedule: str = "exponential",
        ratio: float = 0.9,
        slack: float = 0.25,
        stationarity_tol: float | None = None,
    ):
        check_positive(lr=lr, error_tol=error_tol, stationarity_tol=stationarity_tol)
        check_range("slack", slack, 0.0, math.inf, closed=True)
        self.tolerances = SummableTolerances(error_tol, schedule, ratio=ratio)
        self.slack, self.stationarity_tol = slack, stationarity_tol
        self.smoothness = 0.0 if lr is None else 1 / lr  # L; 0 before the first step
        self.steps = 0
        self.scale = 1.0  # of the tolerances, halved with every step taken back

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one accepted step; theta is left unchanged where every step raises the loss.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "HOAG compares losses of all images")
        h, tolerance, cost = self._hypergradient(objective)
        theta, p = flatten(objective.theta), flatten(h.grad)
        stop = certified_stationary(h, self.stationarity_tol) or ("the hypergradient is zero" if h.norm == 0 else "")
        if stop:
            return report(h, value_with(h), cost, stop=stop)
        self.smoothness = self.smoothness or (h.norm / len(p) ** 0.5 if h.norm > 1e-3 else 1.0)
        self.steps += 1
        for backtracks in range(MAX_BACKTRACKS):
            used = self.smoothness
            assign(objective.theta, theta - p / used)
            allowed = self._tolerance(self.steps)
            value = objective.value(allowed)
            cost = cost + value.cost
            moved = h.norm / used
            if not self._raised(value, h):
                promised = self.slack * allowed + (self.slack + 1) * tolerance * moved - 0.5 * used * moved**2
                if value.value <= h.loss + promised:
                    self.smoothness *= SHRINK
                extra = {"tolerance": tolerance, "smoothness": used}
                return report(h, value, cost, step_size=1 / used, moved=moved, backtracks=backtracks, extra=extra)
            self.smoothness *= GROW
            self.scale *= 0.5
        assign(objective.theta, theta)
        return report(h, value_with(h), cost, backtracks=MAX_BACKTRACKS)

    def _hypergradient(self, objective: Objective) -> tuple[Hypergradient, float, Cost]:
        """(hypergradient, its tolerance, work); tolerances that even q = 0 meets are halved until it does not."""
        cost = Cost()
        while True:
            tolerance = self._tolerance(self.steps)
            h = objective.hypergradient(error_tol=tolerance, residual_tol=tolerance)
            cost = cost + h.cost
            if h.norm > 0 or tolerance <= SMALLEST_SHARE * self.tolerances.first:
                return h, tolerance, cost
            self.scale *= 0.5

    def _tolerance(self, k: int) -> float:
        return max(self.scale * self.tolerances.accuracy(k)["error_tol"], SMALLEST_SHARE * self.tolerances.first)

    @staticmethod
    def _raised(value: CertifiedValue, h: Hypergradient) -> bool:
        """Whether the loss went up for certain; where nothing is certified, whether the estimate went up far."""
        if h.loss_interval[1] == math.inf or value.upper == math.inf:
            return not value.value < h.loss + (LARGEST_INCREASE - 1) * abs(h.loss)
        return not value.lower <= h.loss_interval[1]

    def state_dict(self) -> dict[str, Any]:
        """Smoothness, number of steps and scale of the tolerances."""
        return {"smoothness": self.smoothness, "steps": self.steps, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"smoothness", "steps", "scale"}, "HOAG")
        self.smoothness, self.scale = float(state["smoothness"]), float(state["scale"])
        self.steps = int(state["steps"])
