"""Measures a lower-level point and an adjoint, and turns what was measured into certified bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.certificates import Bound, LocalMeasurements, Measurements
from bilevel_imaging.derivatives import Constants, Directional, Linearization, Metric
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.mixed_operators import randomized_mixed_norms
from bilevel_imaging.linear_solvers import LinearSolution
from bilevel_imaging.tensors import binary_scale, inner, norm, per_sample

# relative rounding of the coefficients from which an energy norm was computed
ENERGY_SLACK = 1e-2


class Point:
    """A lower-level point x with everything that does not depend on the adjoint, in the dtype of ``problem``.

    ``working`` is a linearization at x for solvers, in the dtype of the data; by default the same as that of the point.
    ``gradient_energy`` is a bound of ||G||_{H^-1}, ``(B,)``, from whoever computed x, rounding of G not included.
    A randomized bound made here appends the probability that it fails to ``failures``.
    """

    def __init__(
        self,
        problem: LowerLevelProblem,
        loss: LossOracle,
        x: Tensor,
        working: Linearization | None = None,
        gradient_energy: Tensor | None = None,
        failures: list[float] | None = None,
    ):
        self.problem, self.loss, self.x = problem, loss, x
        self.linearization = problem.linearize(x)
        self.working = self.linearization if working is None else working
        self.constants = self.linearization.constants
        self.gradient = self.linearization.grad
        self.loss_value = loss.value(x).double()
        self.loss_grad = loss.grad(x)
        self.rounding = problem.gradient_rounding(x).double() + problem.input_uncertainty(x).double()
        self.measured_grad_norm = norm(self.gradient).double()
        self.grad_norm = self.measured_grad_norm + self.rounding
        self.gradient_energy = gradient_energy
        self.failures = [] if failures is None else failures

    @cached_property
    def ball_constants(self) -> Constants:
        """Constants on the ball that holds the minimizer, where the energy has better ones there than everywhere."""
        constants = self.constants
        if constants.strong_convexity is None:
            return constants
        ball = self.linearization.constants_on_ball(self.distance)
        return constants if ball is None else ball

    @property
    def value_reason(self) -> str:
        """Why the loss can't be enclosed at this point; empty if it can."""
        constants = self.ball_constants
        if constants.strong_convexity is None:
            return constants.reason or "no strong convexity constant is known"
        if constants.hessian_lipschitz is None:
            return constants.reason or "the Lipschitz constant of the Hessian is not known"
        if self.loss.smoothness is None:
            return "the upper-level loss does not declare its smoothness"
        return ""

    @property
    def reason(self) -> str:
        """Why nothing can be certified at this point; empty if it can."""
        constants = self.ball_constants
        if self.value_reason:
            return self.value_reason
        if constants.mixed_lipschitz is None:
            return constants.reason or "the Lipschitz constant of the mixed derivative is not known"
        if not bool(self.mixed_norm.isfinite().all()):
            return (
                "the norm of the mixed derivative is not known (autograd through grad fails or contradicts mixed_vjp)"
            )
        return ""

    @cached_property
    def columns(self) -> Tensor | None:
        """Columns of J, ``(B, n, *image)``."""
        return self.linearization.mixed_columns()

    @cached_property
    def column_norms(self) -> Tensor | None:
        """``(B, n)`` float64."""
        return None if self.columns is None else self.columns.flatten(2).double().norm(dim=2)

    @cached_property
    def mixed_norm(self) -> Tensor:
        """||J||, ``(B,)``: exact from its columns where they are few, else the a priori bound, else from products."""
        if self.columns is not None:
            return certificates.operator_norms.from_columns(self.columns)
        if self.constants.mixed_norm is not None:
            return self.constants.mixed_norm
        bounds, failure_probability = randomized_mixed_norms(self.problem, self.linearization, self.x)
        self.failures.append(failure_probability)
        return bounds

    @cached_property
    def metric(self) -> Metric | None:
        """The problem's metric, where the columns of J can be measured in it."""
        return None if self.columns is None else self.problem.metric()

    @cached_property
    def metric_grad_norm(self) -> Tensor:
        """||G||_{M^-1} with rounding, ``(B,)`` float64."""
        size = inner(self.gradient, self.metric.inverse(self.gradient)).double().clamp(min=0).sqrt()
        return size + self.rounding / self.metric.lowest.sqrt()

    @cached_property
    def metric_mixed_norm(self) -> Tensor:
        """||M^{-1/2} J|| from the Gram matrix of the columns, ``(B,)`` float64."""
        scaled = torch.stack([self.metric.inverse(column) for column in self.columns.unbind(1)], 1)
        gram = self.columns.flatten(2).double() @ scaled.flatten(2).double().transpose(1, 2)
        return torch.linalg.eigvalsh(0.5 * (gram + gram.transpose(1, 2)))[:, -1].clamp(min=0).sqrt() * (1 + 1e-10)

    @cached_property
    def distance(self) -> Tensor:
        """Certified bound of ||x - x*||, the smallest available, ``(B,)`` float64; inf if unknown."""
        if self.constants.strong_convexity is None:
            return torch.full_like(self.grad_norm, torch.inf)
        bound = certificates.distance(self.grad_norm, self.constants.strong_convexity.double())
        if self.metric is not None:
            bound = torch.minimum(bound, self.metric_grad_norm / self.metric.lowest.sqrt())
        return torch.minimum(bound, self.energy_distance / self.constants.strong_convexity.double().sqrt())

    def dual_norm(self, v: Tensor) -> Tensor:
        """Bound of ||v||_{H^-1} that needs no solve: the norm of the metric, or ||v|| / sqrt(mu), ``(B,)`` float64."""
        plain = norm(v).double() / self.constants.strong_convexity.double().sqrt()
        metric = self.problem.metric()
        if metric is None:
            return plain
        return torch.minimum(plain, inner(v, metric.inverse(v)).double().clamp(min=0).sqrt() * (1 + 1e-12))

    @cached_property
    def dual_grad_norm(self) -> Tensor:
        """||G||_{H^-1} with rounding, ``(B,)`` float64."""
        size = self.dual_norm(self.gradient)
        if self.gradient_energy is not None:
            size = torch.minimum(size, self.gradient_energy)
        return size + self.rounding / self.constants.strong_convexity.double().sqrt()

    @cached_property
    def relative_curvature(self) -> Tensor | None:
        """K on the ball where ``energy_distance`` looks for x*, ``(B,)`` float64; ``None`` if not known."""
        radius = (certificates.TRIAL_FACTOR * self.dual_grad_norm).clamp(min=1e-150)
        return self.linearization.relative_curvature(radius, self.constants.strong_convexity.double())

    @cached_property
    def energy_distance(self) -> Tensor:
        """Certified bound of ||x - x*||_H, ``(B,)`` float64; inf where the local test fails."""
        if self.constants.strong_convexity is None or self.relative_curvature is None:
            return torch.full_like(self.grad_norm, torch.inf)
        return certificates.energy_distance(self.dual_grad_norm, self.relative_curvature)

    @cached_property
    def mixed_dual_norms(self) -> Tensor:
        """||J_j||_{H^-1}, the smaller of what a solve-free bound gives and of the energy's own, ``(B, n)`` float64."""
        norms = torch.stack([self.dual_norm(column) for column in self.columns.unbind(1)], 1)
        own = self.linearization.mixed_energy_norms()
        return norms if own is None else torch.minimum(norms, own)


@dataclass(frozen=True)
class Estimate:
    """A hypergradient estimate -mean_i J_i^T q_i at a point, with its bounds per sample.

    Attributes:
        point: where.
        q: adjoint, ``(B, *image)``.
        residual: grad f - H q, ``(B, *image)``.
        residual_norm: its norm with rounding, ``(B,)`` float64.
        grad: estimate by name.
        bounds: every certificate by name; empty if not certified.
        component_bounds: ``(B, n)`` or ``None``.
        rounding_share: part of the bound that is due to rounding, ``(B,)``, as a fraction.
        hessian: Lambda_H(q) on the ball around the point, ``(B,)``; 0 if not certified.
        local: what was measured in the norm of the Hessian, where the energy knows how that changes.
        loss_interval: per sample, two ``(B,)``.
        loss: corrected value per sample, ``(B,)``.
    """

    point: Point
    q: Tensor
    residual: Tensor
    residual_norm: Tensor
    grad: dict[str, Tensor]
    bounds: dict[str, Bound]
    component_bounds: Tensor | None
    rounding_share: Tensor
    hessian: Tensor
    local: LocalMeasurements | None
    loss: Tensor
    loss_interval: tuple[Tensor, Tensor]

    @property
    def flat(self) -> Tensor:
        """All entries of the estimate in one float64 vector, in the order of theta."""
        return torch.cat([g.detach().double().reshape(-1) for g in self.grad.values()])

    @property
    def norm(self) -> float:
        """||grad||_2."""
        return float(self.flat.norm())

    def best(self, names: tuple[str, ...]) -> tuple[Tensor, Bound, str]:
        """Smallest of the named bounds for every sample, its parts, and the name that wins most often."""
        totals = torch.stack([self.bounds[name].total for name in names])
        best, which = totals.nan_to_num(nan=torch.inf, posinf=torch.inf).min(0)
        parts = [
            torch.stack([getattr(self.bounds[name], part) for name in names]).gather(0, which.unsqueeze(0))[0]
            for part in ("lower", "linear", "remainder")
        ]
        return best, Bound(*parts), names[int(torch.mode(which).values)]


def estimate(point: Point, q: Tensor, *, gradient: bool = True, known: LinearSolution | None = None) -> Estimate:
    """Evaluate -J^T q at the point: one HVP for the residual (unless the solver measured it), then bounds from that.

    With ``gradient=False`` only the loss interval is evaluated (``grad`` and ``bounds`` stay empty). ``known`` is the
    linear solve that ended with this residual; a bound of its energy norm is used if there is one.
    """
    if known is not None and known.residual is not None and point.working is point.linearization:
        residual = known.residual  # as measured by the solver, in the dtype of the evaluation
        product = point.loss_grad - residual
    else:
        product = point.linearization.hvp(q)
        residual = point.loss_grad - product
    unit = 8 * torch.finfo(q.dtype).eps
    q_norm = norm(q).double()
    smoothness = point.constants.smoothness
    size = 10 * norm(product).double() if smoothness is None else smoothness.double() * q_norm
    relative = point.problem.relative_uncertainty
    rounding = (unit + relative) * size + unit * norm(point.loss_grad).double()
    measured = norm(residual).double()
    partial = Estimate(
        point=point,
        q=q,
        residual=residual,
        residual_norm=measured + rounding,
        grad=_gradient(point, q) if gradient else {},
        bounds={},
        component_bounds=None,
        rounding_share=torch.zeros_like(measured),
        hessian=torch.zeros_like(measured),
        local=None,
        loss=point.loss_value - inner(q, point.gradient).double(),
        loss_interval=(torch.full_like(measured, -torch.inf), torch.full_like(measured, torch.inf)),
    )
    if point.value_reason or (gradient and point.reason):
        return partial
    hessian, along = _along(point, q, q_norm)
    local = _local(point, q, product, residual, rounding, known)
    partial = replace(partial, hessian=hessian, local=local)
    partial = replace(partial, loss_interval=_loss_interval(partial, hessian))
    return _certify(partial, q_norm, measured, along) if gradient else partial


def _gradient(point: Point, q: Tensor) -> dict[str, Tensor]:
    theta = point.problem.theta
    batch = q.shape[0]
    if point.columns is None:
        product = point.linearization.mixed_vjp(q)
        return {name: (-product[name] / batch).to(theta[name].dtype) for name in theta}
    flat = -torch.einsum("bnd,bd->n", point.columns.flatten(2).double(), q.flatten(1).double()) / batch
    pieces = flat.split([p.numel() for p in theta.values()])
    return {name: g.reshape(p.shape).to(p.dtype) for (name, p), g in zip(theta.items(), pieces, strict=True)}


def _directional(point: Point, q: Tensor) -> Directional | None:
    """Constants along q, evaluated in the dtype of the data: upper bounds need no more than that, if rounded up."""
    working = point.working
    if working is point.linearization:
        return working.directional(q, point.distance.to(q.dtype))
    dtype = working.grad.dtype
    unit = torch.finfo(dtype).eps
    # the working point is x rounded: no pixel moved by more than this, so the ball around it holds that around x
    moved = unit * norm(point.x).double()
    # homogeneous in q: normalized, so that squares of a tiny q do not underflow to a bound of 0
    scale = binary_scale(q)
    along = working.directional(
        (q / per_sample(scale, q)).to(dtype), ((point.distance + moved) * (1 + 4 * unit)).to(dtype)
    )
    if along is None:
        return None
    # relative errors are a few units of the last place, times the power (at most 5) in which a length enters
    up = (1 + 1e-4) * scale
    components = along.mixed_components
    return Directional(
        along.hessian.double() * up,
        along.mixed.double() * up,
        None if components is None else components.double() * up.unsqueeze(1),
    )


def _along(point: Point, q: Tensor, q_norm: Tensor) -> tuple[Tensor, Directional | None]:
    """Lambda_H(q) on the ball, from the linearization or from the global constant."""
    along = _directional(point, q)
    if along is None:
        return point.ball_constants.hessian_lipschitz.double() * q_norm, None
    return along.hessian.double(), along


def _certify(e: Estimate, q_norm: Tensor, measured: Tensor, along: Directional | None) -> Estimate:
    point, constants, hessian = e.point, e.point.ball_constants, e.hessian
    mu = constants.strong_convexity.double()
    loss_smoothness = torch.full_like(mu, float(point.loss.smoothness))
    mixed = constants.mixed_lipschitz.double() * q_norm if along is None else along.mixed.double()
    m = Measurements(
        distance=point.distance,
        residual_norm=e.residual_norm,
        strong_convexity=mu,
        mixed_norm=point.mixed_norm.double(),
        mixed_lipschitz=constants.mixed_lipschitz.double(),
        loss_smoothness=loss_smoothness,
    )
    loss_grad_norm = norm(point.loss_grad).double()
    bounds = {
        "classical": certificates.classical(m, loss_grad_norm, constants.hessian_lipschitz.double()),
        "directional": certificates.directional(m, hessian, mixed),
    }
    if point.metric is not None:
        bounds["metric"] = _metric_bound(e, m, e.residual_norm - measured, mixed)
    local_components = None
    if e.local is not None:
        bounds["local"], local_components = certificates.local(e.local)
    # derivatives are off by the same relative amount as the parameters and filters they were computed from
    representation = point.problem.relative_uncertainty * m.mixed_norm * q_norm
    bounds = {name: replace(b, remainder=b.remainder + representation).without_nan() for name, b in bounds.items()}
    components = None
    if along is not None and along.mixed_components is not None and point.column_norms is not None:
        each = [
            certificates.directional(replace(m, mixed_norm=point.column_norms[:, j]), hessian, along_j).total
            for j, along_j in enumerate(along.mixed_components.double().unbind(1))
        ]
        components = torch.stack(each, 1) + representation.unsqueeze(1)
    if local_components is not None:
        local_components = local_components + representation.unsqueeze(1)
        components = local_components if components is None else torch.minimum(components, local_components)
    if components is not None:
        components = components.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return replace(
        e,
        bounds=bounds,
        component_bounds=components,
        rounding_share=_rounding_share(m, bounds["directional"], point, measured, hessian, mixed),
    )


def _local(
    point: Point, q: Tensor, product: Tensor, residual: Tensor, rounding: Tensor, known: LinearSolution | None
) -> LocalMeasurements | None:
    """Everything in the norm of the Hessian; ``None`` where the energy does not say how its Hessian changes."""
    mu = point.constants.strong_convexity.double()
    change = point.linearization.local_change(q, point.energy_distance.clamp(max=1e150), mu)
    if change is None or point.columns is None:
        return None
    dual = point.dual_norm(residual)
    if known is not None and known.energy_norm is not None:
        off = point.dual_norm(residual - known.residual.to(residual.dtype))
        dual = torch.minimum(dual, known.energy_norm.double() * (1 + ENERGY_SLACK) + off)
    return LocalMeasurements(
        distance=point.energy_distance,
        curvature=point.relative_curvature,
        residual_norm=dual + rounding / mu.sqrt(),
        mixed_norms=point.mixed_dual_norms,
        slopes=change.slopes,
        hessian=change.hessian,
        adjoint_energy=change.energy,
        adjoint_norm=inner(q, product).double().clamp(min=0).sqrt() * (1 + 1e-10) + rounding / mu.sqrt(),
        loss_smoothness=torch.full_like(mu, float(point.loss.smoothness)),
        strong_convexity=mu,
    )


def _metric_bound(e: Estimate, m: Measurements, rounding: Tensor, mixed: Tensor) -> Bound:
    point, inverse, lowest = e.point, e.point.metric.inverse, e.point.metric.lowest
    residual_norm = inner(e.residual, inverse(e.residual)).double().clamp(min=0).sqrt() + rounding / lowest.sqrt()
    return certificates.metric(
        m, point.metric_grad_norm, residual_norm, point.metric_mixed_norm, lowest, e.hessian, mixed
    )


def _rounding_share(
    m: Measurements, full: Bound, point: Point, measured: Tensor, hessian: Tensor, mixed: Tensor
) -> Tensor:
    """Fraction of the bound that would vanish in exact arithmetic."""
    exact = replace(m, distance=point.measured_grad_norm / m.strong_convexity, residual_norm=measured)
    exact = replace(exact, distance=torch.minimum(exact.distance, m.distance))
    total = full.total
    share = 1 - certificates.directional(exact, hessian, mixed).total / torch.where(total > 0, total, 1)
    return share.clamp(0, 1)


def _loss_interval(e: Estimate, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection of the interval with this q and the one with q = 0, widened by the rounding of the value itself."""
    point = e.point
    convex, distance = point.loss.convex, point.distance
    smoothness = torch.full_like(distance, float(point.loss.smoothness))
    lower, upper = certificates.corrected_value_interval(e.loss, distance, e.residual_norm, smoothness, hessian, convex)
    # the corrected value holds for the exact gradient; the measured one is off by up to point.rounding
    off = norm(e.q).double() * point.rounding
    lower = (lower - off).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # 0 * inf where a kink is met
    upper = (upper + off).nan_to_num(nan=torch.inf, posinf=torch.inf)
    loss_grad_norm = norm(point.loss_grad).double()
    plain_lower, plain_upper = certificates.corrected_value_interval(
        point.loss_value, distance, loss_grad_norm, smoothness, torch.zeros_like(hessian), convex
    )
    if e.local is not None:
        local_lower, local_upper = certificates.local_value_interval(e.local, e.loss, convex)
        lower, upper = torch.maximum(lower, local_lower - off), torch.minimum(upper, local_upper + off)
    # rounding of sums over many pixels, on the generous side: nothing acts on a relative 1e-10 of the loss
    relative = max(16 * torch.finfo(e.q.dtype).eps, 1e-10)
    unit = relative * (point.loss_value.abs() + norm(e.q).double() * point.grad_norm)
    return torch.maximum(lower, plain_lower) - unit, torch.minimum(upper, plain_upper) + unit
