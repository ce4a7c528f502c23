"""The unified framework: any lower-level solver, any linear solver, one certified hypergradient."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.checks import instance, whole
from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import Estimate, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.refinement import Refiner
from bilevel_imaging.hypergradients.requests import check_accuracy, check_solvers
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.tensors import all_finite, as_per_sample, length, norm

MAX_CORRECTIONS = 10
# with a relative goal, the first solves are as accurate as this times its root, relative to ||x|| and ||grad f||
FIRST_ERROR, FIRST_RESIDUAL, FIRST_SPREAD = 1e-4, 0.7, 1 / 3
# the same, at most, where the parameters are too many for columns of J
FIRST_ERROR_MANY, FIRST_RESIDUAL_MANY = 3e-6, 1e-3
# factors of both where one pass of compiled code measures everything: a few iterations cost less than a second look
QUICK_ERROR, QUICK_RESIDUAL = 0.1, 0.05
# the polished estimate is refined until it is certified to POLISHED_RELATIVE and its bound is at most
# POLISHED_SHARE of the distance to the unpolished one, whose own bound is then within (1 + s) / (1 - s) of its error
POLISHED_RELATIVE, POLISHED_SHARE = 1e-2, 0.2
# its own error is then measured by a still better estimate, whose bound is at most VERIFIED_SHARE of their distance and
# VERIFYING_STEP of the bound before
VERIFIED_SHARE, VERIFYING_STEP = 0.4, 1e-2


@torch.no_grad()
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
        linear: linear solver; ``None`` for conjugate gradients with the preconditioner of the energy.
        error_tol: lower-level accuracy, float or ``(B,)``; ``None`` with ``residual_tol`` given balances the two.
        residual_tol: linear accuracy, float or ``(B,)``; ``None`` with ``error_tol`` given balances the two.
        relative: instead of tolerances: refine both until bound <= relative * ||h||.
        bound_tol: the same with an absolute goal: refine both until bound <= bound_tol.
        x0: warm start of x, ``(B, *image)``.
        q0: warm start of q.
        certificate: "classical" (the cheapest, and far too large at rough accuracies), "directional", "metric",
            "polished" (Newton corrections until the estimate is certified to 1 % and both its error and that of the
            estimate before them are known almost exactly), or "auto" (the smallest that the work already done gives).
        max_rounds: limit of refinement rounds with ``relative``.

    Raises:
        ValueError: unknown certificate, contradictory or invalid accuracies, shapes that do not fit, no parameters.
    """
    check_accuracy(problem, certificate, (error_tol, residual_tol), relative, bound_tol)
    check_solvers(lower, linear)
    max_rounds = whole("max_rounds", max_rounds, 0)
    for name, given in (("x0", x0), ("q0", q0)):
        if given is not None:
            instance(name, given, Tensor, "a tensor of the shape of the images, or None")
        if given is not None and not all_finite(given):
            raise ValueError(f"Expected {name} with finite entries. Got NaN or infinity; leave it out to start cold.")
    start, before = time.perf_counter(), problem.cost.copy()
    oracle = LossOracle(loss, x_true, problem.shape)
    linear = ConjugateGradient(preconditioner="auto") if linear is None else linear
    thrifty = certificate in ("auto", "polished")
    plain = certificate == "classical"
    goal = None if relative is None and bound_tol is None else _Goal(relative, bound_tol)
    enough = goal.bound if goal is not None and certificate == "auto" else None
    refiner = Refiner(problem, oracle, lower or NewtonCG(), linear, thrifty=thrifty, plain=plain, enough=enough)
    names = ("classical", "directional", "metric", "local") if certificate in ("auto", "polished") else (certificate,)
    polished_from, verifier = None, None
    reason = ""
    if goal is None:
        current = _solve_at(refiner, x0, q0, error_tol, residual_tol)
    else:
        current, reason = _refine(refiner, x0, q0, goal, names, max_rounds)
    if certificate == "polished":
        polished_from = current
        current, verifier = _polish(refiner, current, names)
    cost = problem.cost - before + Cost(seconds=time.perf_counter() - start)
    return _result(refiner, current, polished_from, verifier, names, reason, cost)


@dataclass(frozen=True)
class _Goal:
    """A bound to reach, relative to the norm of the estimate or absolute."""

    relative: float | None
    bound_tol: float | None

    def bound(self, norm: float) -> float:
        return self.relative * norm if self.bound_tol is None else self.bound_tol

    def aim(self, norm: float) -> float:
        """What solvers are asked for: a little less."""
        return 0.98 * self.bound(norm)

    def shortfall(self, bound: float, norm: float) -> str:
        if self.relative is None:
            return f"bound {bound:.3g} instead of {self.bound_tol:.3g}"
        achieved = bound / norm if norm > 0 else float("inf")
        return f"relative bound {achieved:.3g} instead of {self.relative:.3g}"


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
    if current.component_bounds is not None and "directional" in names:
        total = min(total, length(current.component_bounds.mean(0)))
    return total if total == total else float("inf")


def _distance(a: Estimate, b: Estimate) -> float:
    return length(a.flat - b.flat)


def _by_way_of(better: Estimate, e: Estimate, better_bound: float) -> float:
    """Bound of the error of e from that of a better one, however the sum of squares is rounded."""
    return (_distance(better, e) + better_bound) * (1 + (len(e.flat) + 8) * torch.finfo(torch.float64).eps)


def _polish(refiner: Refiner, first: Estimate, names: tuple[str, ...]) -> tuple[Estimate, Estimate]:
    """Newton corrections of x, each followed by one of q; the estimate to report, and a better one that measures it.

    The first corrections go on until the estimate is certified to ``POLISHED_RELATIVE``; the others until the
    distance to the last estimate tells its error from both sides. Where that can't be had the two are the same.
    """
    if not first.bounds and first.point.reason:
        point = refiner.newton_step(first.point, 0.1)
        residual_tol = 0.1 * first.residual_norm.clamp(max=float(point.loss_grad_norm.max()))
        only = refiner.correct_adjoint(point, first, residual_tol)
        return only, only
    names = _available(first, names)
    current, bound = first, _total(first, names)
    first_bound = bound
    refiner.polish()
    answer, goal = None, min(POLISHED_RELATIVE * first.norm, POLISHED_SHARE * bound)
    for _ in range(MAX_CORRECTIONS):
        better = refiner.improve(current, goal, newton=True, names=names)
        better_bound = _total(better, names)
        improved = better_bound < 0.7 * bound
        if better_bound < bound or current is first:
            current, bound = better, better_bound
        if answer is None:
            enough = min(POLISHED_RELATIVE * current.norm, POLISHED_SHARE * _distance(current, first))
            if bound <= enough:
                answer, goal = current, VERIFYING_STEP * bound
            else:
                goal = enough
        elif bound <= VERIFIED_SHARE * _distance(current, answer):
            return answer, current
        else:
            goal = min(VERIFYING_STEP * bound, 0.8 * VERIFIED_SHARE * _distance(current, answer))
        if not improved:
            break
    if bound > first_bound:  # solvers that are cut off may have nothing to add
        return first, first
    return current, current


def _refine(refiner: Refiner, x0, q0, goal: _Goal, names, max_rounds: int) -> tuple[Estimate, str]:
    """Refine where the bound is lost until the goal is met; the reason in words if it is not."""
    problem = refiner.problem
    size = norm(problem.initial() if x0 is None else x0)
    size = torch.where(size > 0, size, 1e-3)
    fraction = 0.1 if goal.relative is None else min(goal.relative, 1.0)
    # even a rough goal needs x where the certificates are nearly linear in its error
    first_error, first_residual = FIRST_ERROR * min(fraction, 0.1) ** 0.5, FIRST_RESIDUAL * fraction**0.5
    if refiner.many_parameters:
        # bounds without the columns of J are looser, and a second evaluation costs more than a few iterations
        first_error = min(first_error, FIRST_ERROR_MANY)
        first_residual = min(first_residual, FIRST_RESIDUAL_MANY * fraction)
    elif (metric := problem.metric()) is not None:
        # most of G is not where M is smallest: x is much nearer than ||G|| / mu says
        size = size * (metric.highest / metric.lowest).pow(FIRST_SPREAD).to(size.dtype)
    if refiner.quick:
        first_error, first_residual = QUICK_ERROR * first_error, QUICK_RESIDUAL * first_residual
    current = refiner.solve(x0, q0, first_error * size, first_residual, relative=True, aim=goal.aim)
    if not current.bounds and current.point.reason:
        return current, ""  # no constants to measure the accuracy with
    if not _available(current, names):
        return current, ""
    best, best_bound = current, _total(current, names)
    stalled = rounds = 0
    while best_bound > goal.bound(best.norm) and rounds < max_rounds and stalled < 2:
        current = refiner.improve(best, goal.aim(best.norm), newton=stalled > 0, names=names)
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


def _result(refiner, current: Estimate, polished_from, verifier, names, reason, cost) -> Hypergradient:
    names = _available(current, names)
    problem, batch = refiner.problem, current.q.shape[0]
    bound = _total(current, names)
    certified = bound < float("inf")
    not_certified = "" if certified else current.point.reason or _why_infinite(current, names)
    if names:
        sample_bounds, parts, name = current.best(names)
    else:
        sample_bounds, name = torch.full((batch,), torch.inf, dtype=torch.float64, device=current.q.device), "none"
        parts = None
    before_polish = verified_by = None
    if polished_from is not None:
        best_bound = _total(verifier, names)
        before_polish = (polished_from.grad, _by_way_of(verifier, polished_from, best_bound))
        if verifier is not current:
            verified_by = (verifier.grad, best_bound)
            bound = min(bound, _by_way_of(verifier, current, best_bound))
    lower, upper = (float(end.mean()) for end in (current if verifier is None else verifier).loss_interval)
    point = current.point
    x, q = point.in_dtype(problem), current.q.to(problem.dtype)
    # float32 data round the x that is returned
    moved = 0.0 if point.working_is_there else norm(x.to(point.x.dtype) - point.x).double()
    return Hypergradient(
        grad=current.grad,
        bound=bound,
        component_bounds=_components(current, verifier, problem) if certified else None,
        relative_bound=bound / current.norm if current.norm > 0 else float("inf"),
        certified=certified,
        reason=f"not certified: {not_certified}" if not_certified else reason,
        certificate="polished" if polished_from is not None and certified else name,
        bounds={n: float(b.total.mean()) for n, b in current.bounds.items()},
        before_polish=before_polish,
        verified_by=verified_by,
        terms=_terms(sample_bounds, parts, current.rounding_share, bound),
        loss=min(max(float((current if verifier is None else verifier).loss.mean()), lower), upper),
        loss_interval=(lower, upper),
        sample_bounds=sample_bounds,
        x=x,
        q=q,
        lower=replace(
            refiner.lower_solution,
            x=x,
            grad_norm=point.measured_grad_norm,
            distance_bound=point.distance + moved,
            grad_rounding=point.rounding,
        ),
        linear=replace(refiner.linear_solution, q=q, residual_norm=current.residual_norm),
        cost=cost,
        failure_probability=sum(refiner.failures),
    )


def _why_infinite(current: Estimate, names: tuple[str, ...]) -> str:
    if not names:
        return "this energy has no such certificate; choose certificate='auto'"
    if kink := current.point.near_kink:
        return kink
    if names == ("local",):
        return "too far from the minimizer for the local certificate; reduce error_tol or choose certificate='auto'"
    return "the bound is not finite"


def _terms(sample_bounds: Tensor, parts, rounding_share: Tensor, bound: float) -> dict[str, float]:
    names = ("lower", "linear", "remainder", "rounding")
    if not bound < float("inf"):
        return dict.fromkeys(names, float("inf"))
    exact = 1 - rounding_share
    each = (parts.lower * exact, parts.linear * exact, parts.remainder * exact, sample_bounds * rounding_share)
    raw = [float(value.mean()) for value in each]
    total = sum(raw)
    return {name: value * bound / total if total > 0 else 0.0 for name, value in zip(names, raw, strict=True)}


def _components(current: Estimate, verifier: Estimate | None, problem: LowerLevelProblem) -> dict[str, Tensor] | None:
    if current.component_bounds is None:
        return None
    each = current.component_bounds.mean(0)
    if verifier is not None and verifier is not current and verifier.component_bounds is not None:
        moved = (current.flat - verifier.flat).abs() + verifier.component_bounds.mean(0)
        each = torch.minimum(each, moved * (1 + 8 * torch.finfo(torch.float64).eps))
    pieces = each.split([p.numel() for p in problem.theta.values()])
    return {name: b.reshape(p.shape) for (name, p), b in zip(problem.theta.items(), pieces, strict=True)}


@torch.no_grad()
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
    refiner = Refiner(problem, oracle, NewtonCG(), ConjugateGradient(), measures=False)
    point = refiner.point(x)
    if error_tol is not None and refiner.exact is not problem and not point.value_reason:
        target = as_per_sample(error_tol, point.distance, "error_tol")
        for _ in range(MAX_CORRECTIONS):
            if bool((point.distance <= target).all()):
                break
            factor = (0.5 * target / point.distance).clamp(1e-3, 0.1)
            point = refiner.newton_step(point, factor)
    adjoint = torch.zeros_like(point.x) if q is None else q.to(point.x.dtype)
    result = estimate(point, adjoint, gradient=False)
    lower, upper = result.loss_interval
    return torch.minimum(torch.maximum(result.loss, lower), upper), lower, upper
