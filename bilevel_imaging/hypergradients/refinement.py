"""The two solves behind a hypergradient, and how to make the pair more accurate where the bound says it is lost."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import Estimate, Point, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolution, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolution, LowerSolver, NewtonCG
from bilevel_imaging.tensors import norm, per_sample

# a correction is solved to this fraction of its right-hand side at least, and to no less than the smallest factor
LARGEST_FACTOR, SMALLEST_FACTOR = 0.2, 1e-2
# of the bound aimed at, this part goes to the lower level and this part to the adjoint
LOWER_SHARE, LINEAR_SHARE = 0.5, 0.3
# relative accuracy that a single float32 solve can be asked for; more comes from repeated corrections
FLOAT32_RELATIVE = 1e-5


class Refiner:
    """Holds both solvers; evaluates in float64 where the problem can be, solves in the dtype of the data.

    Corrections added in float64 to solutions computed in float32 are iterative refinement: float32 data reach float64
    accuracy although every Krylov iteration runs in float32.
    """

    def __init__(self, problem: LowerLevelProblem, loss: LossOracle, lower: LowerSolver, linear: LinearSolver):
        exact = problem.double()
        self.problem, self.loss, self.lower, self.linear = problem, loss, lower, linear
        self.exact = problem if exact is None else exact
        self.newton_solver = ConjugateGradient()
        self.lower_solution: LowerSolution | None = None
        self.linear_solution: LinearSolution | None = None

    def solve(self, x0: Tensor | None, q0: Tensor | None, error_tol: Tensor | float, residual_tol: Tensor) -> Estimate:
        """Both solves from scratch at fixed accuracies, then one evaluation."""
        self.lower_solution = self.lower.solve(self.problem, x0, error_tol)
        point = self.point(self.lower_solution.x)
        rhs = self.loss.grad(self.lower_solution.x)
        self.linear_solution = self.linear.solve(point.working, rhs, residual_tol, q0=q0)
        return estimate(point, self.linear_solution.q.to(self.exact.dtype))

    def point(self, x: Tensor) -> Point:
        """The point in the evaluation dtype, with a linearization there in the solver's dtype."""
        if self.exact is self.problem:
            return Point(self.exact, self.loss, x)
        working = self.problem.linearize(x.to(self.problem.dtype))
        return Point(self.exact, self.loss, x.to(self.exact.dtype), working)

    def newton_step(self, point: Point, factor: Tensor | float) -> Point:
        """The point x + s with H s = -G solved to ``factor`` of ||G||; samples whose gradient does not shrink are
        solved by the globally convergent Newton-CG instead."""
        rhs = -point.gradient
        tol = self._attainable(factor * norm(rhs), rhs)
        step = self.newton_solver.solve(point.working, rhs.to(self.problem.dtype), tol.to(self.problem.dtype))
        x = point.x + step.q.to(point.x.dtype)
        new = self.point(x)
        worse = new.measured_grad_norm > 0.9 * point.measured_grad_norm
        worse &= point.measured_grad_norm > 4 * point.rounding
        if not bool(worse.any()):
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
        x0 = point.x.to(self.problem.dtype)
        solution = self.lower.solve(self.problem, x0, error_tol.to(self.problem.dtype))
        if self.lower_solution is not None:
            solution = replace(solution, iterations=solution.iterations + self.lower_solution.iterations)
        self.lower_solution = solution
        return self.point(solution.x)

    def correct_adjoint(self, point: Point, q: Tensor, residual_tol: Tensor) -> Tensor:
        """q + c with H c = grad f - H q solved to ``residual_tol`` ``(B,)`` by the user's linear solver."""
        residual = point.loss_grad - point.linearization.hvp(q)
        residual_tol = self._attainable(residual_tol.to(residual.dtype), residual)
        solution = self.linear.solve(
            point.working, residual.to(self.problem.dtype), residual_tol.to(self.problem.dtype)
        )
        if self.linear_solution is not None:
            solution = replace(solution, iterations=solution.iterations + self.linear_solution.iterations)
        self.linear_solution = solution
        return q + solution.q.to(q.dtype)

    def _attainable(self, tol: Tensor, rhs: Tensor) -> Tensor:
        if self.problem.dtype == torch.float64:
            return tol
        return torch.maximum(tol, FLOAT32_RELATIVE * norm(rhs).to(tol.dtype))

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
        lower_part = parts.lower + parts.remainder
        needed = LOWER_SHARE * goal / lower_part.clamp(min=1e-300)
        if newton or bool((needed < 1).any()):
            factor = needed.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
            if newton:
                point = self.newton_step(point, factor)
            else:
                error_tol = torch.where(needed < 1, point.distance * factor, point.distance * (1 + 1e-6))
                point = self.solve_lower(point, error_tol)
        mu = point.constants.strong_convexity.double()
        wanted = LINEAR_SHARE * goal * mu / point.mixed_norm.double().clamp(min=1e-300)
        # solving the adjoint far below what the lower-level error does to it would be wasted
        useless = 0.2 * (float(point.loss.smoothness) + current.hessian) * point.distance
        q = self.correct_adjoint(point, current.q, torch.maximum(wanted, useless))
        return estimate(point, q)
