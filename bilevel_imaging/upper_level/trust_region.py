"""Trust region with values and gradients of bounded errors: the ratio is relaxed by what the values may be off."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import Objective, SampledObjective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    NOISE_SHARE,
    Compared,
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    compare,
    not_worth,
    report,
    require_all_images,
    value_with,
    within_certificate,
)
from bilevel_imaging.upper_level.conditions import AbsoluteError
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.sensitivities import gauss_newton, in_one_process, second_derivative, sensitivities
from bilevel_imaging.upper_level.trust_region_models import RankOneHessian, trust_region_step

SMALLEST_RADIUS = 1e-12


MODELS = ("auto", "newton", "gauss_newton", "sr1")
# up to this many parameters, "auto" solves for dx*/dtheta; relative residuals of these linear systems
FEW_PARAMETERS, SENSITIVITY = 16, 0.1


class NoisyTrustRegion(UpperLevelMethod):
    """Trust-region method with noise of Cao, Berahas & Scheinberg (2022), with Newton, Gauss-Newton or SR1 models.

    In iteration k the hypergradient has a certified error of at most C_k, proportional to the radius Delta_k; s
    minimizes the model <h, s> + 1/2 <s, B s> over ||s|| <= Delta_k; with r the sum of the certified errors of both
    values, the step is accepted if

        F~(theta) - F~(theta + s) + r >= eta_1 * (decrease of the model),

    after which the radius becomes Delta / gamma if ||h|| >= eta_2 times Delta, else gamma Delta, as after a rejected
    step. An accepted step raises the true loss by 2 r - eta_1 * decrease at most, and values are computed so
    accurately, where rounding allows it, that this is not positive.

    B is the mean of W^T f'' W with W = dx*/dtheta, from one linear system per parameter and image ("gauss_newton"), or
    F'' where that is positive definite ("newton"), or made of changes of the hypergradient ("sr1"). The first two cost
    little beside a hypergradient while parameters are few, and save iterations; F'' matters near the solution, where
    Gauss-Newton models converge slowly if reconstructions stay far from the truth.

    eta_2 and C_k have the unit of a curvature; they are in units of ||h_0|| / Delta_0. C_k is a tenth of the last ||h||
    at most: the radius alone would say too little near a solution.

    Args:
        relative: C_k / Delta_k, in units of ||h_0|| / Delta_0, in (0, 1).
        radius: Delta_0.
        largest_radius: limit of Delta.
        accept: eta_1, in (0, 1).
        steep: eta_2, in units of ||h_0|| / Delta_0.
        gamma: in (0, 1).
        model: see above; "newton" and "gauss_newton" need an objective that hands out its lower-level problems, and all
            images in one process; "auto" for "newton" where that is so and there are up to 16 parameters, else "sr1".
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
        model: str = "auto",
        memory: int = 20,
        tolerance: float = 1e-6,
        stationarity_tol: float | None = None,
    ):
        for name, value in (("relative", relative), ("accept", accept), ("gamma", gamma)):
            check_range(name, value, 0.0, 1.0)
        check_positive(radius=radius, largest_radius=largest_radius, steep=steep, stationarity_tol=stationarity_tol)
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        if model not in MODELS:
            raise ValueError(f"Expected model as one of {', '.join(MODELS)}. Got {model!r}.")
        if memory < 1:
            raise ValueError(f"Expected memory >= 1. Got {memory!r}.")
        self.relative, self.accept, self.steep, self.gamma = relative, accept, steep, gamma
        self.largest_radius, self.tolerance, self.stationarity_tol = largest_radius, tolerance, stationarity_tol
        self.radius = min(radius, largest_radius)
        self.model = model
        self.hessian = RankOneHessian(memory)
        self.derivatives: list[Tensor] = []  # dx*/dtheta of all batches at the last theta
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
        product, spent = self._model(objective)
        cost = cost + spent
        s, predicted = trust_region_step(product, g, self.radius)
        if float(s.norm()) < 0.999 * self.radius:
            stop = not_worth(predicted, self.tolerance, h.loss)
        elif self.radius < SMALLEST_RADIUS:
            stop = f"the radius fell to {self.radius:.1g}: no step lowers the loss"
        if stop:
            return report(h, old, cost, stop=stop)
        self.previous = {"theta": theta, "grad": g, "bound": h.bound}
        both = compare(objective, old, theta, s, NOISE_SHARE * self.accept * predicted, self.error_tol)
        self.error_tol, cost, moved = both.error_tol, cost + both.cost, float(s.norm())
        extra = {"radius": self.radius, "predicted": predicted}
        if not self._accepted(both, predicted):
            self.radius *= self.gamma
            assign(objective.theta, theta)
            return report(h, both.old, cost, refinements=both.refinements, backtracks=1, extra=extra)
        steep = h.norm >= self.steep * self.unit * self.radius
        self.radius = min(self.radius / self.gamma if steep else self.gamma * self.radius, self.largest_radius)
        counts = {"refinements": both.refinements}
        return report(h, both.new, cost, step_size=moved / h.norm, moved=moved, extra=extra, **counts)

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

    def _model(self, objective: Objective) -> tuple[Callable[[Tensor], Tensor], Cost]:
        """The product v -> B v at theta, and the work."""
        kind = self.model
        if kind == "auto":
            possible = in_one_process(objective) and isinstance(objective, SampledObjective)
            kind = "newton" if possible and len(flatten(objective.theta)) <= FEW_PARAMETERS else "sr1"
        if kind == "sr1":
            return self.hessian.build(), Cost()
        parts, cost = sensitivities(cast(SampledObjective, objective), SENSITIVITY, self.derivatives)
        self.derivatives = [part.derivative for part in parts]
        matrix = gauss_newton(parts)
        if kind == "newton":
            exact, spent = second_derivative(parts, matrix)
            cost = cost + spent
            if bool((torch.linalg.eigvalsh(exact) > 0).all()):
                matrix = exact
        return partial(torch.mv, matrix), cost

    def _learn_curvature(self, theta: Tensor, g: Tensor, bound: float) -> None:
        if self.previous is None or torch.equal(theta, self.previous["theta"]):
            return
        noise = bound + self.previous["bound"]
        self.hessian.update(theta - self.previous["theta"], g - self.previous["grad"], noise if noise < math.inf else 0)

    def _accepted(self, both: Compared, predicted: float) -> bool:
        """The relaxed ratio; where nothing is certified, the plain one."""
        return both.lower_by(self.accept * predicted)

    def state_dict(self) -> dict[str, Any]:
        """Radius, units, accuracy of the values, curvature pairs, dx*/dtheta and the last hypergradient."""
        return {
            "radius": self.radius,
            "unit": self.unit,
            "error_tol": self.error_tol,
            "hessian": self.hessian.state_dict(),
            "derivatives": list(self.derivatives),
            "previous": self.previous,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, set(self.state_dict()), "NoisyTrustRegion")
        self.radius, self.unit, self.error_tol = (float(state[name]) for name in ("radius", "unit", "error_tol"))
        self.hessian.load_state_dict(state["hessian"])
        self.derivatives = list(state["derivatives"])
        self.previous = None if state["previous"] is None else dict(state["previous"])
