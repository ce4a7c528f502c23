"""MAID as published: both accuracies of hypergradient and values follow the line search up and down."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    MAX_STALLED,
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    report,
    require_all_images,
    value_with,
)
from bilevel_imaging.upper_level.conditions import descent_direction_certified
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.step_sizes import LARGEST_FIRST_MOVE

# line searches of one step, each at accuracies nu times those before: more can only follow rounding errors
MAX_SEARCHES = 60
# times that the accuracies are tightened for one hypergradient; where it is exactly zero nothing else ends that
MAX_TIGHTENED = 100


class PaperMAID(UpperLevelMethod):
    """Algorithms 3.1 and 3.2 of Salehi, Mukherjee, Roberts & Ehrhardt (2023).

    Algorithm 3.2 tightens (epsilon, delta) by nu until the certified error of the hypergradient z is at most
    (1 - eta) ||z||. Algorithm 3.1 then tries the steps alpha rho^i, i = 0, 1, ..., accepts the first with

        F_hi(theta - a z) <= F_lo(theta) - lambda a ||z||^2,

    where the value at the trial is computed to nu_bar epsilon, and multiplies step and accuracies by rho_bar and nu_bar
    for the next one. If none of ``max_backtracks`` steps is accepted, both accuracies are tightened by nu, the
    hypergradient is computed again and one step more is tried, and so on.

    Error bound and intervals are those of the objective: never wider than the bound (ER) and the interval
    f +- (||grad f|| epsilon + L_f epsilon^2 / 2) of the paper, because they use the accuracies measured and the best of
    several certificates; an objective made with ``certificate="classical"`` gives the bound of the paper. Accuracies
    that the solvers already exceeded are tightened from those reached, as the same solves would only be repeated.
    :class:`MAID` is the method to use; this one is to compare with.

    Args:
        lr: first step alpha_0; ``None`` for one that changes the parameters by at most 0.5.
        error_tol: first lower-level accuracy epsilon_0, in the units of x.
        residual_tol: first adjoint accuracy delta_0.
        rho: factor of backtracking, in (0, 1).
        rho_bar: factor of the step after an accepted one, >= 1.
        nu: factor that tightens the accuracies, in (0, 1).
        nu_bar: factor of the accuracies after an accepted step, >= 1.
        eta: of the descent test, in (0, 1).
        decrease: lambda of the line search, in (0, eta).
        max_backtracks: steps tried before the accuracies are tightened for the first time.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        error_tol: float = 1.0,
        residual_tol: float = 1.0,
        rho: float = 0.5,
        rho_bar: float = 10 / 9,
        nu: float = 0.5,
        nu_bar: float = 1.05,
        eta: float = 1e-4,
        decrease: float = 1e-8,
        max_backtracks: int = 10,
        stationarity_tol: float | None = None,
    ):
        for name, value in (("rho", rho), ("nu", nu), ("eta", eta)):
            check_range(name, value, 0.0, 1.0)
        for name, value in (("rho_bar", rho_bar), ("nu_bar", nu_bar)):
            check_range(name, value, 1.0, math.inf, closed=True)
        check_range("decrease", decrease, 0.0, eta)
        check_positive(lr=lr, error_tol=error_tol, residual_tol=residual_tol, stationarity_tol=stationarity_tol)
        if max_backtracks < 1:
            raise ValueError(f"Expected max_backtracks >= 1. Got {max_backtracks!r}.")
        self.rho, self.rho_bar, self.nu, self.nu_bar = rho, rho_bar, nu, nu_bar
        self.eta, self.decrease, self.max_backtracks = eta, decrease, max_backtracks
        self.stationarity_tol = stationarity_tol
        self.step_size = 0.0 if lr is None else lr  # alpha_k; 0 before the first step
        self.error_tol, self.residual_tol = error_tol, residual_tol  # epsilon_k and delta_k

    def step(self, objective: Objective) -> StepReport:
        """One accepted step of Algorithm 3.1; theta is left unchanged where none can be certified any more.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "MAID compares losses of all images")
        theta, cost, refinements, backtracks = flatten(objective.theta), Cost(), 0, 0
        width, stalled = math.inf, 0
        for search in range(MAX_SEARCHES):
            assign(objective.theta, theta)
            h, tightened, spent, stop = self._inexact_gradient(objective)
            cost, refinements = cost + spent, refinements + tightened
            stop = certified_stationary(h, self.stationarity_tol) or stop
            if stop:
                return report(h, value_with(h), cost, refinements=refinements, backtracks=backtracks, stop=stop)
            z = flatten(h.grad)
            self.step_size = self.step_size or LARGEST_FIRST_MOVE / float(z.abs().max())
            for i in range(self.max_backtracks + search):
                a = self.step_size * self.rho**i
                assign(objective.theta, theta - a * z)
                value = objective.value(self.nu_bar * self.error_tol)
                cost = cost + value.cost
                if self._accepted(value, h, a):
                    return self._accept(h, value, a, z, cost, refinements=refinements, backtracks=backtracks)
                backtracks += 1
            now = (value.upper - value.lower) + (h.loss_interval[1] - h.loss_interval[0])
            stalled = 0 if now < 0.9 * width else stalled + 1
            if stalled == MAX_STALLED:
                break  # rounding: better accuracies make no difference
            width = min(width, now)
            self._tighten(h)
            refinements += 1
        assign(objective.theta, theta)
        stop = "no decrease of the loss can be certified any more along the negative hypergradient"
        return report(h, value_with(h), cost, refinements=refinements, backtracks=backtracks, stop=stop)

    def _inexact_gradient(self, objective: Objective) -> tuple[Hypergradient, int, Cost, str]:
        """Algorithm 3.2: (hypergradient, times the accuracies were tightened, work, why it can't be had or "")."""
        cost, tightened, best = Cost(), 0, math.inf
        while True:
            h = objective.hypergradient(error_tol=self.error_tol, residual_tol=self.residual_tol)
            cost = cost + h.cost
            if not h.certified and not h.bounds and h.norm > 0:
                return h, tightened, cost, ""  # without constants there is nothing to test
            if descent_direction_certified(h, self.eta) or certified_stationary(h, self.stationarity_tol):
                return h, tightened, cost, ""
            missed = h.distance > self.error_tol or h.residual > self.residual_tol
            if (missed and not h.bound < 0.9 * best) or tightened == MAX_TIGHTENED:
                words = "stationary to within the certificate" if h.certified else f"not certified ({h.reason})"
                return h, tightened, cost, f"{words}: ||h|| = {h.norm:.3g}, error bounded by {h.bound:.3g}"
            best = min(best, h.bound)
            self._tighten(h)
            tightened += 1

    def _tighten(self, h: Hypergradient) -> None:
        self.error_tol = self.nu * min(self.error_tol, h.distance or math.inf)
        self.residual_tol = self.nu * min(self.residual_tol, h.residual or math.inf)

    def _accepted(self, value: CertifiedValue, h: Hypergradient, a: float) -> bool:
        """Lemma 3.5: psi(a) <= 0, which proves the decrease; without certificates the estimates are compared."""
        needed = self.decrease * a * h.norm**2
        if not h.certified or value.upper == math.inf:
            return value.value <= h.loss - needed
        return value.upper <= h.loss_interval[0] - needed

    def _accept(
        self, h: Hypergradient, value: CertifiedValue, a: float, z: Tensor, cost: Cost, **counts: int
    ) -> StepReport:
        reached = {"tolerance/error": self.error_tol, "tolerance/residual": self.residual_tol}
        self.step_size = self.rho_bar * a
        self.error_tol, self.residual_tol = self.nu_bar * self.error_tol, self.nu_bar * self.residual_tol
        return report(h, value, cost, step_size=a, moved=a * float(z.norm()), extra=reached, **counts)

    def state_dict(self) -> dict[str, Any]:
        """Step and accuracies of the next step."""
        return {"step_size": self.step_size, "error_tol": self.error_tol, "residual_tol": self.residual_tol}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"step_size", "error_tol", "residual_tol"}, "PaperMAID")
        self.step_size = float(state["step_size"])
        self.error_tol, self.residual_tol = float(state["error_tol"]), float(state["residual_tol"])
