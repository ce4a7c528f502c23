"""The adjoint and the classical certificate with nothing that this certificate does not need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import Estimate, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.point import Point
from bilevel_imaging.hypergradients.rounding import PLAINLY, accumulation, loss_grad_rounding, unnoticed
from bilevel_imaging.linear_solvers import LinearSolution, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolution
from bilevel_imaging.native import Measured
from bilevel_imaging.tensors import as_per_sample


def classical(
    problem: LowerLevelProblem,
    exact: Callable[[], LowerLevelProblem],
    loss: LossOracle,
    lower: LowerSolution,
    linear: LinearSolver,
    residual_tol: Tensor | float,
    *,
    q0: Tensor | None,
    few_parameters: bool,
    failures: list[float],
) -> tuple[Estimate, LinearSolution]:
    """Solve for the adjoint at ``lower.x`` and evaluate: in one pass in float64 where the problem has one, else in the
    dtype of the data if its rounding is not noticed there.

    Args:
        problem: in the dtype of the data, with a known smoothness.
        exact: gives the problem in float64, if it comes to that.
        loss: the loss of the upper level.
        lower: of a lower-level solve.
        linear: solves for the adjoint.
        residual_tol: to this residual.
        q0: warm start.
        few_parameters: whether columns of J may be formed.
        failures: receives probabilities of randomized bounds to fail.
    """
    point = Point(problem, loss, lower.x, failures=failures, plain=True)
    if lower.grad_rounding is not None:
        point.rounding = lower.grad_rounding.double()
    at, rhs = point.working, point.loss_grad
    tol = as_per_sample(residual_tol, rhs, "residual_tol")
    before: Tensor | int = 0  # iterations
    if _measures(point, tol):
        solution = linear.begin(at, rhs, tol, q0=q0)  # whose residual is measured
        measured = _measured(point, solution)
        if measured is not None and bool((solution.converged & (measured.residual_norm > tol)).any()):
            before = solution.iterations
            solution = linear.solve(at, rhs, tol, q0=solution.q)
            measured = _measured(point, solution)
        if measured is not None:
            found = estimate(point, solution.q, known=solution, measured=measured)
            return found, replace(solution, iterations=solution.iterations + before)
        before, q0 = before + solution.iterations, solution.q
    solution = linear.solve(at, rhs, tol, q0=q0)
    solution = replace(solution, iterations=solution.iterations + before)
    if point.x.dtype == torch.float64 or _rough_will_do(point, solution, few_parameters):
        found = estimate(point, solution.q, known=solution)
        if not point.accumulated or _sums_will_do(found):
            return found, solution
    fine = exact()
    point = Point(fine, loss, lower.x.to(fine.dtype), at, True, failures=failures, plain=True)
    return estimate(point, solution.q.to(fine.dtype), known=solution), solution


def _measures(point: Point, residual_tol: Tensor) -> bool:
    """Whether one pass in float64 can be expected not to notice the rounding of the gradient of the loss."""
    if not point.problem.measures or point.loss.x_true.dtype != point.x.dtype:
        return False
    return not bool((loss_grad_rounding(point) > PLAINLY * residual_tol).any())


def _measured(point: Point, solution: LinearSolution) -> Measured | None:
    """What one pass says of the two solutions, told to the point; ``None`` where numbers leave the range."""
    if solution.residual is None:
        return None
    measured, rounding = point.problem.measure(point.x, solution.q, point.loss_grad)
    if not point.in_range(measured):
        return None
    point.take(measured, rounding, solution.q)
    return measured


def _rough_will_do(point: Point, solution: LinearSolution, few_parameters: bool) -> bool:
    """Whether the certificate can be evaluated in the dtype of float32 data."""
    if not unnoticed(point, solution):
        return False
    if few_parameters and point.columns is not None:
        return True
    mixed_norm = point.linearization.mixed_norm_bound()
    if mixed_norm is None:
        return False
    point.mixed_norm, point.accumulated = mixed_norm, point.x.numel()
    return True


def _sums_will_do(found: Estimate) -> bool:
    """Whether the bound does not notice the rounding of the sums behind J^T q; where there is none, nothing tells."""
    if not found.bounds:
        return False
    return bool((accumulation(found.point, found.q) <= PLAINLY * found.bounds["classical"].total).all())
