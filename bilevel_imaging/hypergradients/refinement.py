"""The two solves behind a hypergradient, and how to make the pair more accurate where the bound says it is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients import aiming
from bilevel_imaging.hypergradients.aiming import LARGEST_FACTOR, LOWER_LIMIT, LOWER_SHARE, SMALLEST_FACTOR
from bilevel_imaging.hypergradients.evaluation import ENERGY_SLACK, Estimate, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.plain import classical
from bilevel_imaging.hypergradients.point import Point
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolution, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolution, LowerSolver, NewtonCG
from bilevel_imaging.tensors import inner, norm, per_sample

# parameters up to which the columns of J are expected to be at hand
MANY_PARAMETERS = 64
# relative accuracy that a single float32 solve can be asked for; more comes from repeated corrections
FLOAT32_RELATIVE = 1e-5


class Refiner:
    """Holds both solvers; evaluates in float64 where the problem can be, solves in the dtype of the data.

    Corrections added in float64 to solutions computed in float32 are iterative refinement: float32 data reach float64
    accuracy although every Krylov iteration runs in float32.
    """

    def __init__(
        self,
        problem: LowerLevelProblem,
        loss: LossOracle,
        lower: LowerSolver,
        linear: LinearSolver,
        *,
        thrifty: bool = False,
        plain: bool = False,
        enough: Callable[[float], float] | None = None,
        measures: bool = True,
    ):
        self.thrifty, self.plain, self.enough = thrifty, plain, enough
        self.measures = measures and not plain  # a value asks for less than one pass says
        self.problem, self.loss, self.lower, self.linear = problem, loss, lower, linear
        self.newton_solver = ConjugateGradient(preconditioner="auto")
        self.lower_solution: LowerSolution | None = None
        self.linear_solution: LinearSolution | None = None
        self.resumable: tuple[Estimate, LinearSolution] | None = None
        # of the randomized bounds at all points visited: each of them has steered the refinement
        self.failures: list[float] = []

    @cached_property
    def exact(self) -> LowerLevelProblem:
        """The problem in float64, or as it is where that can't be had."""
        exact = self.problem.double()
        return self.problem if exact is None else exact

    def solve(
        self,
        x0: Tensor | None,
        q0: Tensor | None,
        error_tol: Tensor | float,
        residual_tol: Tensor | float,
        *,
        relative: bool = False,
        aim: Callable[[float], float] | None = None,
    ) -> Estimate:
        """Both solves from scratch at fixed accuracies, then one evaluation; ``relative``: residual_tol ||grad f||.

        ``aim`` tells the bound to reach from ||h||: both solves go on until the local certificate should be below it,
        as far as a rough adjoint tells, which costs less than to evaluate all certificates first.
        """
        self.lower_solution = self.lower.solve(self.problem, x0, error_tol)
        if aim is None and self.plain and self.problem.constants().smoothness is not None:
            result, self.linear_solution = classical(
                self.problem,
                lambda: self.exact,
                self.loss,
                self.lower_solution,
                self.linear,
                residual_tol,
                q0=q0,
                few_parameters=not self.many_parameters,
                failures=self.failures,
            )
            return self._resumable(result, self.linear_solution)
        point = self.point(self.lower_solution.x)
        if aim is not None and not point.has_columns:
            point = aiming.nearer(self, point)
        rhs = point.rhs
        residual_tol = residual_tol * norm(rhs) if relative else residual_tol
        solve = self.linear.solve if aim is None else self.linear.begin
        self.linear_solution = solve(point.working, rhs, residual_tol, q0=q0)
        if aim is not None and self.quick:
            aiming.by_measurement(self, point, rhs, aim)
        elif aim is not None:
            point = aiming.by_forecast(self, point, rhs, aim)
        result = self._estimate(point, self.linear_solution)
        return self._resumable(result, self.linear_solution)

    @property
    def quick(self) -> bool:
        """Whether an evaluation is one pass of compiled code."""
        return self.problem.measures and self.measures and self.exact is not self.problem

    @property
    def many_parameters(self) -> bool:
        """Whether there are too many for columns of J."""
        return sum(p.numel() for p in self.problem.theta.values()) > MANY_PARAMETERS

    @property
    def adjoint(self) -> LinearSolution:
        """The last solution for the adjoint."""
        assert self.linear_solution is not None
        return self.linear_solution

    def polish(self) -> None:
        """From here on adjoints are corrected by conjugate gradients, too.

        What verifies an estimate must not depend on how far the user's solver gets.
        """
        if not isinstance(self.linear, ConjugateGradient):
            self.linear, self.resumable = self.newton_solver, None

    def point(self, x: Tensor) -> Point:
        """The point in the evaluation dtype, with a linearization there in the solver's dtype."""
        if self.exact is self.problem:
            return Point(self.exact, self.loss, x, failures=self.failures, plain=self.plain)
        working = self.problem.linearize(x.to(self.problem.dtype))
        there = x.dtype == self.problem.dtype
        return Point(
            self.exact,
            self.loss,
            x,
            working,
            there,
            failures=self.failures,
            plain=self.plain,
            given=self.problem if there else None,
            measures=self.measures,
        )

    @staticmethod
    def _gradient_energy(old: Point, step: LinearSolution, new: Point) -> Tensor | None:
        """Bound of ||G_new||_{H_new^-1}: G_new = -r + (what the Hessian's change along s adds), r the residual of the
        Newton system, whose energy norm conjugate gradients know; along s the Hessian changes by exp(kappa) at most."""
        if step.energy_norm is None or old.constants.strong_convexity is None:
            return None
        residual = step.residual.to(old.x.dtype)
        length = inner(new.x - old.x, -old.gradient - residual).double().clamp(min=0).sqrt() * (1 + 1e-6)
        curvature = old.curvature_on(length)
        if curvature is None:
            return None
        kappa = curvature * length
        change = new.dual_norm(new.gradient + residual)
        return (kappa / 2).exp() * step.energy_norm.double() * (1 + ENERGY_SLACK) + change

    def newton_step(self, point: Point, factor: Tensor | float) -> Point:
        """The point x + s with H s = -G solved to ``factor`` of ||G||; samples whose gradient does not shrink are
        solved by the globally convergent Newton-CG instead."""
        rhs = -point.gradient
        tol = self._above_floor(_known(factor * point.measured_grad_norm), point.measured_grad_norm)
        # the gradient at the new point is measured: the residual of the system need not be checked
        step = self.newton_solver._solve(
            point.working, rhs.to(self.problem.dtype), tol.to(self.problem.dtype), check=False
        )
        x = point.x + step.q.to(point.x.dtype)
        new = self.point(x)
        worse = new.measured_grad_norm > 0.9 * point.measured_grad_norm
        worse &= point.measured_grad_norm > 4 * point.rounding
        if not bool(worse.any()):
            new.gradient_energy = self._gradient_energy(point, step, new)
            return new
        target = torch.where(worse, 0.3 * point.distance, torch.full_like(point.distance, torch.inf))
        if not bool(torch.isfinite(target[worse]).all()):
            return point
        # restart the failed samples from the old point; the others are accepted as they are
        start = torch.where(per_sample(worse, x), point.x, x)
        solution = NewtonCG().solve(self.exact, start, target.to(x.dtype))
        return self.point(solution.x)

    def solve_lower(self, point: Point, error_tol: Tensor) -> Point:
        """Continue the user's lower-level solver to ``error_tol`` ``(B,)``; Newton corrections below its floor."""
        mu = point.constants.strong_convexity
        floor = 4 * self.problem.gradient_rounding(point.x.to(self.problem.dtype)).double() / mu
        if self.exact is not self.problem and bool((error_tol < floor).any()):
            return self.newton_step(point, (error_tol / point.distance).clamp(SMALLEST_FACTOR, LARGEST_FACTOR))
        x0 = point.in_dtype(self.problem)
        solution = self.lower.solve(self.problem, x0, error_tol.to(self.problem.dtype))
        if self.lower_solution is not None:
            solution = replace(solution, iterations=solution.iterations + self.lower_solution.iterations)
        self.lower_solution = solution
        return self.point(solution.x)

    def correct_adjoint(self, point: Point, current: Estimate, residual_tol: Tensor) -> Estimate:
        """The estimate at ``point`` with q + c, H c = grad f - H q solved to ``residual_tol`` ``(B,)`` by the user's
        linear solver."""
        residual_tol = _known(residual_tol)
        same = point is current.point
        if same and self.resumable is not None and self.resumable[0] is current:
            solution, rhs = self.resumable[1], point.rhs
            if self.exact is self.problem or bool((residual_tol >= FLOAT32_RELATIVE * point.loss_grad_norm).all()):
                solution = self.linear.resume(point.working, rhs, solution, residual_tol.to(rhs.dtype))
                self.linear_solution = solution
                return self._resumable(self._estimate(point, solution), solution)
        same = same and current.residual is not None
        residual = current.residual if same else point.loss_grad - point.linearization.hvp(current.q)
        residual_tol = self._above_floor(residual_tol, current.point.norm(residual) if same else norm(residual))
        latest = self.linear.solve(point.working, residual.to(self.problem.dtype), residual_tol.to(self.problem.dtype))
        before = self.linear_solution
        iterations = latest.iterations if before is None else latest.iterations + before.iterations
        self.linear_solution = replace(latest, iterations=iterations)
        return self._estimate(point, latest, current.q + latest.q.to(current.q.dtype))

    def _estimate(self, point: Point, known: LinearSolution, q: Tensor | None = None) -> Estimate:
        """With the q of the solve, or with another one to which its residual belongs."""
        given = known.q if q is None else None
        q = known.q.to(self.exact.dtype) if q is None else q
        return estimate(point, q, known=known, thrifty=self.thrifty, enough=self.enough, given=given)

    def _resumable(self, result: Estimate, solution: LinearSolution) -> Estimate:
        """Remember the solve behind an estimate, so that it can go on instead of starting again."""
        self.resumable = (result, solution)
        return result

    def attainable(self, tol: Tensor, point: Point) -> Tensor:
        """A tolerance for the adjoint of the point."""
        return self._above_floor(tol, point.loss_grad_norm)

    def _above_floor(self, tol: Tensor, size: Tensor) -> Tensor:
        """A tolerance that a solve in the dtype of the data can be asked for, ``size`` being ||b||."""
        if self.problem.dtype == torch.float64:
            return tol
        return torch.maximum(tol, FLOAT32_RELATIVE * size.to(tol.dtype))

    def improve(self, current: Estimate, goal: float, *, newton: bool, names: tuple[str, ...]) -> Estimate:
        """One round towards mean bound <= goal: the lower level if it dominates, then the adjoint.

        Args:
            current: where we are; must be certifiable.
            goal: bound of the mean over the batch to aim at.
            newton: correct by Newton steps (True) or by the user's lower-level solver (False).
            names: the certificates in force.
        """
        _, parts, _ = current.best(names)
        point = current.point
        # the remainder is mostly a product of both errors: it shrinks with the adjoint's
        lower_part = parts.lower + parts.remainder * (goal / parts.linear.clamp(min=1e-300)).clamp(max=1.0)
        lower_part = lower_part.nan_to_num(nan=torch.inf, posinf=torch.inf)  # inf * 0
        # below its limit the lower level is left alone, and the adjoint gets what is left of the goal
        enough = (lower_part <= LOWER_LIMIT * goal) | (lower_part.mean() <= LOWER_LIMIT * goal)
        factor = LOWER_SHARE * goal / lower_part.clamp(min=1e-300)
        factor = torch.where(lower_part.isfinite(), factor, SMALLEST_FACTOR)
        slope = parts.linear / current.residual_norm.clamp(min=1e-300)
        near = newton
        if "local" in names and current.local is not None:
            m = current.local
            wanted, size = aiming.local_targets(m, point, current.q, goal)
            slope = size * m.residual_norm / current.residual_norm.clamp(min=1e-300)
            factor, near = wanted / point.dual_grad_norm.clamp(min=1e-300), newton or aiming.is_near(point)
        if newton or not bool(enough.all()):
            if near:
                point = self.newton_step(point, factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR))
            else:
                target = torch.where(enough, point.distance * (1 + 1e-6), factor * point.distance)
                point = self.solve_lower(point, target)
        left = goal - torch.where(enough, lower_part.mean().clamp(max=LOWER_LIMIT * goal), LOWER_SHARE * goal)
        residual_tol = torch.where(
            slope.isfinite(), left / slope.clamp(min=1e-300), LARGEST_FACTOR * current.residual_norm
        )
        return self.correct_adjoint(point, current, residual_tol)


def _known(tol: Tensor) -> Tensor:
    """No accuracy is asked for where overflow hides what it should be."""
    return tol.nan_to_num(nan=torch.inf, posinf=torch.inf)
