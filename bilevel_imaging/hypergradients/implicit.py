"""The unified framework: any lower-level solver, any linear solver, one certified hypergradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import Estimate, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.refinement import Refiner
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.tensors import as_per_sample, norm

CERTIFICATES = ("auto", "classical", "directional", "metric", "polished")
MAX_CORRECTIONS = 8
# with a relative goal, the first solves are this much more accurate, relative to ||x|| and ||grad f||
FIRST_ERROR, FIRST_RESIDUAL = 2e-5, 0.05
# the polished estimate is refined until it is certified to POLISHED_RELATIVE and its bound is at most
# POLISHED_SHARE of the distance to the unpolished one, whose own bound is then within (1 + s) / (1 - s) of its error
POLISHED_RELATIVE, POLISHED_SHARE = 1e-2, 0.2


def hypergradient(
    problem: LowerLevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    x_true: Tensor,
    *,
    lower: LowerSolver | None = None,
    linear: LinearSolver | None = None,
    error_tol: float | Tensor | None = None,
    residual_tol: float | Tensor | None = None,
    relative: float | None = None,
    bound_tol: float | None = None,
    x0: Tensor | None = None,
    q0: Tensor | None = None,
    certificate: str = "auto",
    max_rounds: int = 12,
) -> Hypergradient:
    """dF/dtheta of F = mean_i f_i(x_i*(theta)) by the implicit function theorem, with a certified error bound.

    x is solved to distance ``error_tol``, the adjoint H q = grad f to residual ``residual_tol``, the estimate is
    h = -J^T q; then residuals are measured (in float64 where the problem allows it) and turned into bounds
    (Ehrhardt & Roberts 2023, and their directional, metric and polished sharpenings).

    Args:
        problem: a batch of B lower-level problems.
        loss: ``loss(x, x_true) -> (B,)``; certified if it declares ``smoothness``.
        x_true: ground truth, ``(B, *image)``.
        lower: lower-level solver; ``None`` for Newton-CG.
        linear: linear solver; ``None`` for conjugate gradients.
        error_tol: lower-level accuracy, float or ``(B,)``; ``None`` with ``residual_tol`` given balances the two.
        residual_tol: linear accuracy, float or ``(B,)``; ``None`` with ``error_tol`` given balances the two.
        relative: instead of tolerances: refine both until bound <= relative * ||h||.
        bound_tol: the same with an absolute goal: refine both until bound <= bound_tol.
        x0: warm start of x, ``(B, *image)``.
        q0: warm start of q.
        certificate: "classical", "directional", "metric", "polished" (Newton corrections until the estimate is
            certified to 1 % and the bound of the estimate before them is nearly exact), or "auto" (the smallest
            that the work already done gives).
        max_rounds: limit of refinement rounds with ``relative``.

    Raises:
        ValueError: unknown certificate, contradictory or invalid accuracies, shapes that do not fit, no parameters.
    """
    _check_request(problem, certificate, error_tol, residual_tol, relative, bound_tol)
    start, before = time.perf_counter(), problem.cost.copy()
    oracle = LossOracle(loss, x_true, problem.shape)
    refiner = Refiner(problem, oracle, lower or NewtonCG(), linear or ConjugateGradient())
    names = ("classical", "directional", "metric") if certificate in ("auto", "polished") else (certificate,)
    polished_from = None
    reason = ""
    if relative is None and bound_tol is None:
        current = _solve_at(refiner, x0, q0, error_tol, residual_tol)
        if certificate == "polished":
            polished_from = current
            current = _polish(refiner, current, names)
    else:
        goal = _Goal(relative, bound_tol)
        current, reason = _refine(refiner, x0, q0, goal, names, max_rounds)
    cost = problem.cost - before + Cost(seconds=time.perf_counter() - start)
    return _result(refiner, current, polished_from, names, certificate, reason, cost)


@dataclass(frozen=True)
class _Goal:
    """A bound to reach, relative to the norm of the estimate or absolute."""

    relative: float | None
    bound_tol: float | None

    def bound(self, norm: float) -> float:
        return self.relative * norm if self.bound_tol is None else self.bound_tol

    def shortfall(self, bound: float, norm: float) -> str:
        if self.relative is None:
            return f"bound {bound:.3g} instead of {self.bound_tol:.3g}"
        achieved = bound / norm if norm > 0 else float("inf")
        return f"relative bound {achieved:.3g} instead of {self.relative:.3g}"


def _check_request(problem, certificate, error_tol, residual_tol, relative, bound_tol) -> None:
    if certificate not in CERTIFICATES:
        raise ValueError(f"Unknown certificate {certificate!r}. Choose from {list(CERTIFICATES)}.")
    if not problem.theta:
        raise ValueError("Expected at least one learnable parameter in the energy. Got none with requires_grad=True.")
    modes = (error_tol is not None or residual_tol is not None, relative is not None, bound_tol is not None)
    if sum(modes) != 1:
        raise ValueError(
            "Expected exactly one of: error_tol and residual_tol, relative, bound_tol. Got "
            f"error_tol={error_tol}, residual_tol={residual_tol}, relative={relative}, bound_tol={bound_tol}."
        )
    for name, value in (("relative", relative), ("bound_tol", bound_tol)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"Expected {name} as a positive number, e.g. 0.1. Got {value!r}.")
    if certificate == "metric" and problem.metric() is None:
        raise ValueError(
            "The metric certificate needs a data term with a cheap inverse and A^T A + ridge I positive definite. "
            "Choose certificate='auto', 'classical', 'directional' or 'polished'."
        )


def _solve_at(refiner: Refiner, x0, q0, error_tol, residual_tol) -> Estimate:
    """Both solves at fixed accuracies; a missing one is balanced so that residual_tol = L_f * error_tol."""
    like = refiner.loss.x_true.to(refiner.problem.dtype)
    smoothness = 1.0 if refiner.loss.smoothness is None else max(float(refiner.loss.smoothness), 1e-12)
    if error_tol is None:
        error_tol = as_per_sample(residual_tol, like, "residual_tol") / smoothness
    if residual_tol is None:
        residual_tol = as_per_sample(error_tol, like, "error_tol") * smoothness
    error_tol = as_per_sample(error_tol, like, "error_tol")
    residual_tol = as_per_sample(residual_tol, like, "residual_tol")
    return refiner.solve(x0, q0, error_tol, residual_tol)


def _available(current: Estimate, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in current.bounds)


def _total(current: Estimate, names: tuple[str, ...]) -> float:
    """Bound of the mean over the batch: the mean of the sample bounds, or by components if that is smaller."""
    names = _available(current, names)
    if not names:
        return float("inf")
    total = float(current.best(names)[0].mean())
    if "directional" in names and current.component_bounds is not None:
        total = min(total, float(current.component_bounds.mean(0).norm()))
    return total if total == total else float("inf")


def _polish(refiner: Refiner, first: Estimate, names: tuple[str, ...]) -> Estimate:
    """Newton corrections of x, each followed by a correction of q, until the certificate is tight on both sides."""
    if first.point.reason:
        point = refiner.newton_step(first.point, 0.1)
        residual_tol = 0.1 * norm(first.residual).double().clamp(max=float(norm(point.loss_grad).max()))
        return estimate(point, refiner.correct_adjoint(point, first.q, residual_tol))
    names = _available(first, names)
    best, best_bound = first, _total(first, names)
    current, goal = first, POLISHED_RELATIVE * first.norm
    for _ in range(MAX_CORRECTIONS):
        current = refiner.improve(current, goal, newton=True, names=names)
        bound = _total(current, names)
        moved = float((current.flat - first.flat).norm())
        goal = min(POLISHED_RELATIVE * current.norm, POLISHED_SHARE * moved)
        improved = bound < 0.7 * best_bound
        if bound < best_bound or best is first:
            best, best_bound = current, bound
        if bound <= goal or not improved:
            break
    return best


def _refine(refiner: Refiner, x0, q0, goal: _Goal, names, max_rounds: int) -> tuple[Estimate, str]:
    """Refine where the bound is lost until the goal is met; the reason in words if it is not."""
    problem = refiner.problem
    start = problem.initial() if x0 is None else x0
    size = norm(start).clamp(min=1e-3)
    loss_size = norm(refiner.loss.grad(start)).clamp(min=1e-12)
    fraction = 0.1 if goal.relative is None else min(goal.relative, 1.0)
    current = refiner.solve(x0, q0, FIRST_ERROR * fraction * size, FIRST_RESIDUAL * fraction * loss_size)
    if current.point.reason:
        return current, ""  # no constants to measure the accuracy with
    names = _available(current, names)
    best, best_bound = current, _total(current, names)
    stalled = rounds = 0
    while best_bound > goal.bound(best.norm) and rounds < max_rounds and stalled < 2:
        current = refiner.improve(best, 0.9 * goal.bound(best.norm), newton=stalled > 0, names=names)
        bound = _total(current, names)
        stalled = stalled + 1 if bound > 0.7 * best_bound else 0
        if bound < best_bound:
            best, best_bound = current, bound
        rounds += 1
    if best_bound <= goal.bound(best.norm):
        return best, ""
    return best, goal.shortfall(best_bound, best.norm) + ": " + _obstacle(refiner, best, stalled)


def _obstacle(refiner: Refiner, best: Estimate, stalled: int) -> str:
    if best.norm == 0:
        return "the hypergradient is zero to within its bound"
    if stalled and float(best.rounding_share.max()) > 0.1:
        return f"the rounding floor of {str(refiner.exact.dtype).removeprefix('torch.')} is reached"
    if stalled:
        return "the solvers made no further progress (iteration limit or rounding floor)"
    return "max_rounds refinements were used up"


def _result(refiner, current: Estimate, polished_from, names, certificate, reason, cost) -> Hypergradient:
    names = _available(current, names)
    problem, batch = refiner.problem, current.q.shape[0]
    bound = _total(current, names)
    certified = bound < float("inf")
    not_certified = current.point.reason or ("" if certified else "the bound is not finite")
    if names:
        sample_bounds, parts, name = current.best(names)
        terms = _terms(sample_bounds, parts, current.rounding_share, bound)
    else:
        sample_bounds, name = torch.full((batch,), torch.inf, dtype=torch.float64, device=current.q.device), "none"
        terms = dict.fromkeys(("lower", "linear", "remainder", "rounding"), float("inf"))
    before_polish = None
    if polished_from is not None:
        before_polish = (polished_from.grad, float((current.flat - polished_from.flat).norm()) + bound)
    lower, upper = (float(end.mean()) for end in current.loss_interval)
    x = current.point.x.to(problem.dtype)
    return Hypergradient(
        grad=current.grad,
        bound=bound,
        component_bounds=_components(current, problem) if certified else None,
        relative_bound=bound / current.norm if current.norm > 0 else float("inf"),
        certified=certified,
        reason=f"not certified: {not_certified}" if not_certified else reason,
        certificate="polished" if polished_from is not None and certified else name,
        bounds={n: float(b.total.mean()) for n, b in current.bounds.items()},
        before_polish=before_polish,
        terms=terms,
        loss=min(max(float(current.loss.mean()), lower), upper),
        loss_interval=(lower, upper),
        sample_bounds=sample_bounds,
        x=x,
        q=current.q.to(problem.dtype),
        lower=replace(
            refiner.lower_solution,
            x=x,
            grad_norm=current.point.measured_grad_norm,
            # of the x returned, which float32 data round
            distance_bound=current.point.distance + norm(x.to(current.point.x.dtype) - current.point.x).double(),
        ),
        linear=replace(refiner.linear_solution, q=current.q.to(problem.dtype), residual_norm=current.residual_norm),
        cost=cost,
    )


def _terms(sample_bounds: Tensor, parts, rounding_share: Tensor, bound: float) -> dict[str, float]:
    exact = 1 - rounding_share
    raw = {
        "lower": float((parts.lower * exact).mean()),
        "linear": float((parts.linear * exact).mean()),
        "remainder": float((parts.remainder * exact).mean()),
        "rounding": float((sample_bounds * rounding_share).mean()),
    }
    total = sum(raw.values())
    return {name: value * bound / total if total > 0 else 0.0 for name, value in raw.items()}


def _components(current: Estimate, problem: LowerLevelProblem) -> dict[str, Tensor] | None:
    if current.component_bounds is None:
        return None
    pieces = current.component_bounds.mean(0).split([p.numel() for p in problem.theta.values()])
    return {name: b.reshape(p.shape) for (name, p), b in zip(problem.theta.items(), pieces, strict=True)}


def loss_interval(
    problem: LowerLevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    x_true: Tensor,
    x: Tensor,
    q: Tensor | None = None,
    *,
    error_tol: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(estimate, lower bound, upper bound) of every f_i(x_i*), each ``(B,)`` float64, from a point x near x*.

    With an adjoint q of this or of a nearby theta the interval is that of the corrected value (one Hessian product);
    without, that of ||grad f|| distance. (-inf, inf) where nothing is certified.

    Args:
        problem: the batch.
        loss: ``loss(x, x_true) -> (B,)``.
        x_true: ground truth.
        x: point, ``(B, *image)``.
        q: adjoint, or ``None``.
        error_tol: if given and not met by a float32 point, Newton corrections with float64 residuals go on until it is.

    Raises:
        ValueError: shapes that do not fit.
    """
    oracle = LossOracle(loss, x_true, problem.shape)
    refiner = Refiner(problem, oracle, NewtonCG(), ConjugateGradient())
    point = refiner.point(x)
    if error_tol is not None and refiner.exact is not problem and not point.value_reason:
        target = as_per_sample(error_tol, point.x, "error_tol")
        for _ in range(MAX_CORRECTIONS):
            if bool((point.distance <= target).all()):
                break
            factor = (0.5 * target / point.distance).clamp(1e-3, 0.1)
            point = refiner.newton_step(point, factor)
    adjoint = torch.zeros_like(point.x) if q is None else q.to(point.x.dtype)
    result = estimate(point, adjoint, gradient=False)
    lower, upper = result.loss_interval
    return torch.minimum(torch.maximum(result.loss, lower), upper), lower, upper
