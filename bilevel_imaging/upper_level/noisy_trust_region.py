"""Trust region with values and gradients of bounded errors: the ratio is relaxed by what the values may be off."""

from __future__ import annotations

import math
from typing import Any

import torch

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    first_error_tol,
    half_width,
    not_worth,
    report,
    require_all_images,
    value_with,
    value_within,
    within_certificate,
)
from bilevel_imaging.upper_level.conditions import AbsoluteError
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.trust_region_models import RankOneHessian, trust_region_step

# values are computed to this part of the decrease asked for: the relaxed test then still implies no increase
NOISE_SHARE = 1 / 4
SMALLEST_RADIUS = 1e-12


class NoisyTrustRegion(UpperLevelMethod):
    """First-order trust-region method with noise of Cao, Berahas & Scheinberg (2022), models with an SR1 Hessian.

    In iteration k the hypergradient has a certified error of at most C_k, proportional to the radius Delta_k; s
    minimizes the model <h, s> + 1/2 <s, B s> over ||s|| <= Delta_k; with r the sum of the certified errors of both
    values, the step is accepted if

        F~(theta) - F~(theta + s) + r >= eta_1 * (decrease of the model),

    after which the radius becomes Delta / gamma if ||h|| >= eta_2 times Delta, else gamma Delta, as after a rejected
    step. An accepted step raises the true loss by 2 r - eta_1 * decrease at most, and values are computed so
    accurately, where rounding allows it, that this is not positive.

    eta_2 and C_k have the unit of a curvature; they are in units of ||h_0|| / Delta_0. C_k is a tenth of the last ||h||
    at most: the radius alone would say too little near a solution.

    Args:
        relative: C_k / Delta_k, in units of ||h_0|| / Delta_0, in (0, 1).
        radius: Delta_0.
        largest_radius: limit of Delta.
        accept: eta_1, in (0, 1).
        steep: eta_2, in units of ||h_0|| / Delta_0.
        gamma: in (0, 1).
        memory: SR1 pairs, >= 1.
        tolerance: stop when a step that no radius limits is predicted to lower the loss by less than this fraction.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        relative: float = 0.1,
        radius: float = 0.5,
        largest_radius: float = 2.0,
        accept: float = 0.1,
        steep: float = 1e-4,
        gamma: float = 0.5,
        memory: int = 20,
        tolerance: float = 1e-6,
        stationarity_tol: float | None = None,
    ):
        for name, value in (("relative", relative), ("accept", accept), ("gamma", gamma)):
            check_range(name, value, 0.0, 1.0)
        check_positive(radius=radius, largest_radius=largest_radius, steep=steep, stationarity_tol=stationarity_tol)
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        if memory < 1:
            raise ValueError(f"Expected memory >= 1. Got {memory!r}.")
        self.relative, self.accept, self.steep, self.gamma = relative, accept, steep, gamma
        self.largest_radius, self.tolerance, self.stationarity_tol = largest_radius, tolerance, stationarity_tol
        self.radius = min(radius, largest_radius)
        self.hessian = RankOneHessian(memory)
        self.unit = 0.0  # ||h_0|| / Delta_0; 0 before the first step
        self.error_tol = 0.0  # accuracy of the last value; 0 before the first
        self.previous: dict[str, Any] | None = None

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one trial; theta is left unchanged where it is not accepted.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "the trust region compares losses of all images")
        h, cost = self._hypergradient(objective)
        theta, g, old = flatten(objective.theta), flatten(h.grad), value_with(h)
        self._learn_curvature(theta, g, h.bound)
        stop = certified_stationary(h, self.stationarity_tol) or within_certificate(h)
        if stop:
            return report(h, old, cost, stop=stop)
        self.unit = self.unit or h.norm / self.radius
        s, predicted = trust_region_step(self.hessian.build(), g, self.radius)
        if float(s.norm()) < 0.999 * self.radius:
            stop = not_worth(predicted, self.tolerance, h.loss)
        elif self.radius < SMALLEST_RADIUS:
            stop = f"the radius fell to {self.radius:.1g}: no step lowers the loss"
        if stop:
            return report(h, old, cost, stop=stop)
        self.previous = {"theta": theta, "grad": g, "bound": h.bound}
        old, value, spent, refinements = self._compare(objective, h, theta, s, predicted)
        cost, moved = cost + spent, float(s.norm())
        extra = {"radius": self.radius, "predicted": predicted}
        if not self._accepted(old, value, predicted):
            self.radius *= self.gamma
            assign(objective.theta, theta)
            return report(h, old, cost, refinements=refinements, backtracks=1, extra=extra)
        steep = h.norm >= self.steep * self.unit * self.radius
        self.radius = min(self.radius / self.gamma if steep else self.gamma * self.radius, self.largest_radius)
        return report(h, value, cost, step_size=moved / h.norm, moved=moved, refinements=refinements, extra=extra)

    def _hypergradient(self, objective: Objective) -> tuple[Hypergradient, Cost]:
        """With an error of at most C_k; if that is not less than its norm, with the norm test instead."""
        if self.previous is None:
            h = objective.hypergradient(relative=self.relative)
            return h, h.cost
        last = float(self.previous["grad"].norm())
        condition = AbsoluteError(min(self.relative * self.unit * self.radius, 0.1 * last))
        h = objective.hypergradient(**condition.accuracy(0))
        if not within_certificate(h):
            return h, h.cost
        again = objective.hypergradient(relative=self.relative)
        return again, h.cost + again.cost

    def _learn_curvature(self, theta: torch.Tensor, g: torch.Tensor, bound: float) -> None:
        if self.previous is None or torch.equal(theta, self.previous["theta"]):
            return
        noise = bound + self.previous["bound"]
        self.hessian.update(theta - self.previous["theta"], g - self.previous["grad"], noise if noise < math.inf else 0)

    def _compare(
        self, objective: Objective, h: Hypergradient, theta: torch.Tensor, s: torch.Tensor, predicted: float
    ) -> tuple[CertifiedValue, CertifiedValue, Cost, int]:
        """(loss before, loss after, work, refinements), accurate enough for the ratio; leaves theta + s behind."""
        goal, cost, refinements = NOISE_SHARE * self.accept * predicted, Cost(), 0
        old, tolerance = value_with(h), self.error_tol or first_error_tol(h)
        if goal < half_width(old) < math.inf:
            again, tolerance, refinements = value_within(objective, goal, tolerance)
            old, cost = min(old, again, key=half_width), again.cost
        assign(objective.theta, theta + s)
        value, self.error_tol, tries = value_within(objective, goal, 2 * tolerance, hopeless=old.upper)
        return old, value, cost + value.cost, refinements + tries

    def _accepted(self, old: CertifiedValue, new: CertifiedValue, predicted: float) -> bool:
        """The relaxed ratio; where nothing is certified, the plain one."""
        noise = half_width(old) + half_width(new)
        relaxed = noise if math.isfinite(noise) else 0.0
        return old.value - new.value + relaxed >= self.accept * predicted

    def state_dict(self) -> dict[str, Any]:
        """Radius, units, accuracy of the values, curvature pairs and the last hypergradient."""
        return {
            "radius": self.radius,
            "unit": self.unit,
            "error_tol": self.error_tol,
            "hessian": self.hessian.state_dict(),
            "previous": self.previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"radius", "unit", "error_tol", "hessian", "previous"}, "NoisyTrustRegion")
        self.radius, self.unit, self.error_tol = (float(state[name]) for name in ("radius", "unit", "error_tol"))
        self.hessian.load_state_dict(state["hessian"])
        self.previous = None if state["previous"] is None else dict(state["previous"])
