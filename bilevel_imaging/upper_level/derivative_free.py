"""Derivative-free Gauss-Newton: models from reconstructions at n + 1 parameters, losses as accurate as a step needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients import loss_interval
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.upper_level.base import (
    CertifiedValue,
    Objective,
    SampledObjective,
    StepReport,
    UpperLevelMethod,
)
from bilevel_imaging.upper_level.certified_steps import (
    check_positive,
    check_range,
    check_state,
    half_width,
    report_without_hypergradient,
    require_all_images,
    require_problems,
)
from bilevel_imaging.upper_level.losses import SquaredError
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.sampled_method import exact_term
from bilevel_imaging.upper_level.sensitivities import MOST_PARAMETERS
from bilevel_imaging.upper_level.trust_region_models import trust_region_step

# least part of the predicted decrease; part from which the radius grows; its factors (the paper's)
ACCEPT, VERY_GOOD, SHRINK, GROW = 0.1, 0.7, 0.5, 2.0
# certified errors of both losses that are compared, as parts of the predicted decrease: below ACCEPT / 2 each
COMPARED = 0.04
TIGHTEN, MAX_TIGHTENINGS = 0.1, 10
# a step shorter than this part of the radius is not tried: the model is to be better first
SHORT = 0.1
# points so many radii away, or so close to the plane of the others, say little about the loss around theta
FAR, FLAT = 2.0, 0.1


@dataclass(frozen=True)
class _Point:
    """Reconstructions at one theta.

    Attributes:
        theta: ``(n,)``.
        residuals: x_i - x_i^true of all images over the square root of their number, one vector.
        value: the loss.
        error_tol: accuracy of the reconstructions.
    """

    theta: Tensor
    residuals: Tensor
    value: CertifiedValue
    error_tol: float


class DFOLS(UpperLevelMethod):
    """Inexact derivative-free least squares with dynamic accuracy (Ehrhardt & Roberts 2021), for few parameters.

    F = mean_i 1/2 ||x_i(theta) - x_i^true||^2 + r with an exact r. The residuals are interpolated linearly between
    n + 1 points, which gives a Gauss-Newton model of F. Its minimizer s over ||s|| <= Delta is accepted if F falls by
    a tenth of what the model says; Delta grows and shrinks with how well it says it. Reconstructions are computed to a
    distance of ``accuracy`` Delta^2, and those two whose losses are compared so accurately that an accepted step does
    not raise the true loss. No hypergradient is computed.

    The paper has one residual ||x_i - x_i^true|| per image. With one per pixel the model holds all of W^T W for
    W = dx/dtheta, and is smooth where an image is reconstructed exactly. Published runs end at Delta = 1e-6.

    Args:
        radius: Delta_0.
        largest_radius: limit of Delta.
        final_radius: stop when Delta is smaller.
        accuracy: see above; in the units of x.
        tolerance: steps predicted to lower the loss by less than this fraction are not tried; the radius shrinks.
        lower: lower-level solver; ``None`` for Newton-CG.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        radius: float = 0.5,
        largest_radius: float = 2.0,
        final_radius: float = 1e-3,
        accuracy: float = 1.0,
        tolerance: float = 1e-6,
        lower: LowerSolver | None = None,
    ):
        check_positive(radius=radius, largest_radius=largest_radius, final_radius=final_radius, accuracy=accuracy)
        self.radius, self.largest_radius = min(radius, largest_radius), largest_radius
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        self.final_radius, self.accuracy, self.tolerance = final_radius, accuracy, tolerance
        self.lower = NewtonCG() if lower is None else lower
        self.points: list[_Point] = []  # the first is at the current theta
        self.repair = False  # whether the model is to be improved before the next trial

    def check_size(self, parameters: int) -> None:
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"Expected at most {MOST_PARAMETERS} parameters for dfo_ls, which needs one more value than there are "
                f"parameters before its first step. Got {parameters}; choose a method that uses hypergradients."
            )

    def step(self, objective: Objective) -> StepReport:
        """One trust-region iteration; theta is left unchanged where its trial is not accepted.

        Args:
            objective: a :class:`SampledObjective`.

        Raises:
            ValueError: the objective takes minibatches, or its loss is not the squared error.
        """
        require_all_images(objective, "dfo_ls compares losses of all images")
        objective = require_problems(objective, "draw", "exact_term")
        self.check_size(len(flatten(objective.theta)))
        cost = self._prepare(objective)
        slopes = self._slopes()
        gradient = slopes @ self.points[0].residuals + exact_term(objective)[1]
        hessian = slopes @ slopes.T
        s, predicted = torch.zeros_like(gradient), 0.0
        if bool(gradient.any()):
            s, predicted = trust_region_step(lambda v: hessian @ v, gradient, self.radius)
        length = float(s.norm())
        enough = predicted > self.tolerance * abs(self.points[0].value.value)
        if length < SHORT * self.radius or not enough:
            self.repair, self.radius = True, max(SHORT * self.radius, min(length, SHRINK * self.radius))
            return self._report(cost, gradient, predicted)
        trial, spent, tightened = self._compare(objective, s, predicted)
        cost, old = cost + spent, self.points[0].value
        ratio = (old.value - trial.value.value) / predicted
        accepted = self._accepted(old, trial.value, ratio)
        self._insert(trial, accepted)
        if accepted and ratio >= VERY_GOOD:
            self.radius = min(max(self.radius, GROW * length), self.largest_radius)
        elif not accepted:
            self.radius *= 1.0 if self._bad_points() else SHRINK
            self.repair = True
        assign(objective.theta, self.points[0].theta)
        return self._report(cost, gradient, predicted, length if accepted else 0.0, tightened, 0 if accepted else 1)

    def _report(self, cost: Cost, gradient: Tensor, predicted: float, moved=0.0, tightened=0, rejected=0) -> StepReport:
        stop = f"the radius of the trust region fell below {self.final_radius:g}"
        return report_without_hypergradient(
            self.points[0].value,
            cost,
            grad_norm=float(gradient.norm()),
            error_tol=self.points[0].error_tol,
            moved=moved,
            refinements=tightened,
            backtracks=rejected,
            stop=stop if self.radius < self.final_radius else "",
            extra={"radius": self.radius, "predicted": predicted},
        )

    # points

    def _evaluate(self, objective: SampledObjective, theta: Tensor, error_tol: float) -> _Point:
        """Reconstruct all images at theta."""
        assign(objective.theta, theta)
        exact = exact_term(objective)[0]
        sums, residuals, count, cost = torch.zeros(3, dtype=torch.float64), [], 0, Cost()
        for samples in objective.draw(everything=True):
            if not isinstance(samples.loss.loss, SquaredError):
                name = type(samples.loss.loss).__name__
                raise ValueError(f"Expected the squared error, whose residuals are interpolated. Got {name}.")
            before = samples.problem.cost.copy()
            x = self.lower.solve(samples.problem, samples.x, error_tol).x
            ends = loss_interval(samples.problem, samples.loss.loss, samples.loss.x_true, x, error_tol=error_tol)
            objective.keep(samples, x, torch.zeros_like(x) if samples.q is None else samples.q)
            sums += torch.stack([end.sum().cpu() for end in ends])
            residuals.append((x - samples.loss.x_true).double().flatten().cpu())
            count += len(samples.indices)
            cost = cost + (samples.problem.cost - before)
        value, lower, upper = (sums / count + exact).tolist()
        certified = CertifiedValue(value=value, lower=lower, upper=upper, cost=cost)
        return _Point(theta.clone(), torch.cat(residuals) / count**0.5, certified, error_tol)

    def _prepare(self, objective: SampledObjective) -> Cost:
        """n + 1 points around theta; those that say too little are replaced where that is asked for."""
        theta, cost = flatten(objective.theta), Cost()
        tolerance = self.accuracy * self.radius**2
        if not self.points or not torch.equal(self.points[0].theta, theta):
            axes = torch.eye(len(theta), dtype=torch.float64)
            around = [theta, *(theta + self.radius * axis for axis in axes)]
            self.points = [self._evaluate(objective, at, tolerance) for at in around]
            cost = sum((p.value.cost for p in self.points), Cost())
        elif self.repair:
            for place in range(len(self.points)):
                if self.points[place].error_tol > tolerance and place not in self._bad_points():
                    self.points[place] = self._evaluate(objective, self.points[place].theta, tolerance)
                    cost = cost + self.points[place].value.cost
            while self._bad_points():
                place = self._bad_points()[0]
                self.points[place] = self._evaluate(objective, theta + self._missing(place), tolerance)
                cost = cost + self.points[place].value.cost
        self.repair = False
        assign(objective.theta, theta)
        return cost

    def _offsets(self) -> Tensor:
        """From theta to the other points, ``(n, n)``."""
        return torch.stack([p.theta - self.points[0].theta for p in self.points[1:]])

    def _dual(self) -> Tensor:
        """Rows that are orthogonal to all offsets but one, with which their product is 1."""
        return torch.linalg.pinv(self._offsets()).T

    def _bad_points(self) -> list[int]:
        """Places of points that are far from theta, or nearly in the plane of theta and the others."""
        far = self._offsets().norm(dim=1) > FAR * self.radius
        flat = self._dual().norm(dim=1) * FLAT * self.radius > 1
        dependent = torch.linalg.matrix_rank(self._offsets() / self.radius, atol=1e-8) < len(far)
        bad = [1 + place for place in range(len(far)) if bool(far[place] | flat[place])]
        return bad or (list(range(1, len(self.points))) if bool(dependent) else [])

    def _missing(self, place: int) -> Tensor:
        """The offset of length Delta that is orthogonal to the offsets of all other points."""
        others = torch.cat([self._offsets()[: place - 1], self._offsets()[place:]])
        direction = torch.linalg.svd(others, full_matrices=True).Vh[-1] if len(others) else torch.ones(1).double()
        return self.radius * direction

    def _slopes(self) -> Tensor:
        """The interpolated derivative of the residuals, ``(n, pixels)``."""
        changes = torch.stack([p.residuals - self.points[0].residuals for p in self.points[1:]])
        return torch.linalg.pinv(self._offsets()) @ changes

    def _insert(self, point: _Point, accepted: bool) -> None:
        """Replace the point that the new one makes least useful; an accepted one becomes the first."""
        s = point.theta - self.points[0].theta
        scores = (self._dual() @ s).abs() * (self._offsets().norm(dim=1) / self.radius).clamp(min=1) ** 2
        place = 1 + int(scores.argmax())
        if accepted:
            self.points = [point, *(p for i, p in enumerate(self.points) if i != place)]
        elif float(scores.max()) > 1:
            self.points[place] = point

    # comparing losses

    @staticmethod
    def _accepted(old: CertifiedValue, new: CertifiedValue, ratio: float) -> bool:
        """Whether the model was right enough and, where something is certified, the true loss does not rise."""
        return ratio >= ACCEPT and (new.upper <= old.lower or new.upper == math.inf)

    def _compare(self, objective: SampledObjective, s: Tensor, predicted: float) -> tuple[_Point, Cost, int]:
        """(trial, work, refinements): the losses at theta and theta + s, accurate enough where rounding allows it."""
        goal = COMPARED * predicted
        first, cost, count = self._accurate(objective, self.points[0], goal)
        self.points[0] = first
        tolerance = min(self.accuracy * self.radius**2, 10 * first.error_tol)
        trial = self._evaluate(objective, first.theta + s, tolerance)
        cost = cost + trial.value.cost
        if trial.value.lower <= first.value.upper:  # a loss that is larger for certain need not be known better
            trial, spent, more = self._accurate(objective, trial, goal)
            cost, count = cost + spent, count + more
        return trial, cost, count

    def _accurate(self, objective: SampledObjective, point: _Point, goal: float) -> tuple[_Point, Cost, int]:
        cost, count, stalled = Cost(), 0, 0
        while goal < half_width(point.value) < math.inf and count < MAX_TIGHTENINGS and stalled < 2:
            factor = min(max(0.5 * goal / half_width(point.value), TIGHTEN**3), TIGHTEN)
            again = self._evaluate(objective, point.theta, factor * point.error_tol)
            stalled = stalled + 1 if half_width(again.value) > 0.5 * half_width(point.value) else 0
            point, cost, count = again, cost + again.value.cost, count + 1
        return point, cost, count

    def state_dict(self) -> dict[str, Any]:
        """Radius and points."""
        points = [
            [p.theta, p.residuals, [p.value.value, p.value.lower, p.value.upper], p.error_tol] for p in self.points
        ]
        return {"radius": self.radius, "repair": self.repair, "points": points}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"radius", "repair", "points"}, "DFOLS")
        self.radius, self.repair = float(state["radius"]), bool(state["repair"])
        self.points = []
        for theta, residuals, (value, lower, upper), error_tol in state["points"]:
            certified = CertifiedValue(value=value, lower=lower, upper=upper, cost=Cost())
            self.points.append(_Point(theta.clone(), residuals.clone(), certified, float(error_tol)))
