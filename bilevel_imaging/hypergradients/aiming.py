"""Where both solves go before anything is evaluated: to a bound, as far as a rough adjoint or one pass tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.certificates import LocalMeasurements
from bilevel_imaging.hypergradients.evaluation import adjoint_gradient, forecast, measured_dual_residual
from bilevel_imaging.hypergradients.point import Point
from bilevel_imaging.tensors import entries, length

if TYPE_CHECKING:
    from bilevel_imaging.hypergradients.refinement import Refiner

# a correction is solved to this fraction of its right-hand side at least, and to no less than the smallest factor
LARGEST_FACTOR, SMALLEST_FACTOR = 0.2, 1e-2
# of the bound aimed at, this part goes to the lower level, which is good enough below the limit; the rest is the
# adjoint's
LOWER_SHARE, LOWER_LIMIT = 0.4, 0.7
# of what the lower level leaves of the goal, the part that the adjoint is aimed at
ADJOINT_SHARE, LEAST_SHARE = 0.97, 0.2
# curvature times distance from which the local certificate is nearly linear in the distance, and from which Newton's
# method is expected to get there at once
NEAR, REACH = 0.2, 10.0
# Newton steps before the first evaluation, at most
MAX_FIRST_STEPS = 2
# how often both solves are aimed before it, at most: again where the aim fell below this part of the one before
MAX_AIMS, MISSED = 4, 0.7
# parts of the aim that the residual may be in what was measured, and that it is reduced to
LINEAR_LIMIT, LINEAR_SHARE = 0.9, 0.8


def nearer(refiner: Refiner, point: Point) -> Point:
    """Newton steps to where the local certificate is valid, if that is not far: without columns of J the others
    are so large that they would ask for far more."""
    for _ in range(MAX_FIRST_STEPS):
        if point.constants.strong_convexity is None or point.relative_curvature is None or is_near(point):
            break
        if not _in_reach(point):
            break
        point = refiner.newton_step(point, SMALLEST_FACTOR)
    return point


def by_forecast(refiner: Refiner, point: Point, rhs: Tensor, aim: Callable[[float], float]) -> Point:
    """Newton steps where the lower level would keep the bound above the aim, then the adjoint for what is left.

    Both rest on the local certificate of the adjoint solved so far; without it, nothing is done. Near a stationary
    point a rough adjoint makes an estimate that is much too large, and so is the aim until a better one is known.
    """
    m = forecast(point, rhs, refiner.adjoint)
    if m is None or not (bool(m.valid.all()) or _in_reach(point)):
        return point
    before = math.inf
    for _ in range(MAX_AIMS):
        goal = aim(length(entries(adjoint_gradient(point, refiner.adjoint.q))))
        if goal == 0 or goal > MISSED * before:
            break
        before, start, solution = goal, point, refiner.adjoint
        point, m = _toward(refiner, goal, point, m)
        if point is start and refiner.adjoint is solution:
            break
    return point


def by_measurement(refiner: Refiner, point: Point, rhs: Tensor, aim: Callable[[float], float]) -> None:
    """The adjoint until its residual alone would not keep the local bound above the aim, by what one pass measures:
    the evaluation after that needs no other."""
    for _ in range(MAX_AIMS):
        solution = refiner.adjoint
        measured = point.measured(solution.q, solution.residual)
        if measured is None:
            return
        goal = aim(length(entries(adjoint_gradient(point, solution.q, measured))))
        part = point.mixed_dual_norms.norm(dim=1) * measured_dual_residual(point, measured, solution)
        share = float(part.mean()) / goal if goal > 0 else 0.0
        if not LINEAR_LIMIT < share < math.inf:
            return
        residual_tol = refiner.attainable(LINEAR_SHARE / share * measured.residual_norm, point).to(rhs.dtype)
        if not bool((residual_tol < solution.residual_norm).any()):
            return
        refiner.linear_solution = refiner.linear.resume(point.working, rhs, solution, residual_tol)


def _toward(refiner: Refiner, goal: float, point: Point, m: LocalMeasurements) -> tuple[Point, LocalMeasurements]:
    """Both solves to a bound of ``goal``, of which at most the adjoint changes if that will do; ``m`` is known of
    the point and the adjoint, and what is returned of those after."""
    at, start, solution = point, point, refiner.adjoint
    lower = _lower_part(m, point)
    for _ in range(MAX_FIRST_STEPS):
        if float(lower.mean()) <= LOWER_LIMIT * goal:
            break
        wanted, _ = local_targets(m, point, solution.q, goal)
        factor = wanted / point.dual_grad_norm.clamp(min=1e-300)
        point = refiner.newton_step(point, factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR))
        if not bool(m.valid.all()):
            at, found = point, forecast(point, point.rhs, solution)
            m = m if found is None else found
        lower = _lower_part(m, point)
    residual_tol = solution.residual_norm
    if bool(m.valid.all()):
        left = ADJOINT_SHARE * max(goal - float(lower.mean()), LEAST_SHARE * goal)
        part = certificates.local(m)[0].total - (lower if point is at else _lower_part(m, at))
        tighter = (left / part.clamp(min=1e-300)).nan_to_num(nan=1.0).clamp(max=1.0)
        residual_tol = residual_tol * tighter.to(residual_tol.dtype)
    rhs = point.rhs
    if point is not start:
        latest = refiner.linear.solve(point.working, rhs, refiner.attainable(residual_tol, point), q0=solution.q)
        refiner.linear_solution = replace(latest, iterations=latest.iterations + solution.iterations)
    elif bool((residual_tol < solution.residual_norm).any()):
        residual_tol = refiner.attainable(residual_tol, point)
        refiner.linear_solution = refiner.linear.resume(point.working, rhs, solution, residual_tol)
    left_over = refiner.adjoint.residual_norm.double() / solution.residual_norm.double().clamp(min=1e-300)
    return point, replace(m if point is at else _moved(m, point), residual_norm=m.residual_norm * left_over)


def is_near(point: Point) -> bool:
    """Whether every sample is where Newton's method converges quadratically, by the local certificate."""
    return bool(point.energy_distance.isfinite().all())


def _in_reach(point: Point) -> bool:
    """Whether Newton steps should soon make the local certificate valid, where it is not."""
    curvature = point.curvature_on(torch.zeros_like(point.dual_grad_norm))
    return bool((curvature * point.dual_grad_norm < REACH).all())


def local_targets(m: LocalMeasurements, point: Point, q: Tensor, goal: float) -> tuple[Tensor, Tensor]:
    """||G||_{H^-1} at which the local bound meets its share of the goal, and that bound per ||r||_{H^-1}."""
    hessian, energy, curvature = m.hessian, m.adjoint_energy, m.curvature
    if not bool(m.valid.all()):  # the constants on a smaller ball, where the point will be
        radius = torch.zeros_like(m.strong_convexity)
        change, curvature = point.local_change(q, radius), point.curvature_on(radius)
        hessian, energy = change.hessian, change.energy
    size = m.mixed_norms.norm(dim=1)
    per_distance = size * (m.loss_smoothness / m.strong_convexity + hessian)
    per_distance = per_distance + m.slopes.norm(dim=-1) * energy
    wanted = torch.minimum(LOWER_SHARE * goal / per_distance.clamp(min=1e-300), NEAR / curvature.clamp(min=1e-300))
    return wanted, size


def _moved(m: LocalMeasurements, point: Point) -> LocalMeasurements:
    """The same adjoint's at a point near by, as far as that is known without it."""
    return replace(
        m, distance=point.energy_distance, curvature=point.relative_curvature, mixed_norms=point.mixed_dual_norms
    )


def _lower_part(m: LocalMeasurements, point: Point) -> Tensor:
    """What the local bound would be at the point if the adjoint were solved exactly, ``(B,)``."""
    moved = replace(_moved(m, point), residual_norm=torch.zeros_like(m.residual_norm))
    return certificates.local(moved)[0].total
