"""Measures a lower-level point and an adjoint, and turns what was measured into certified bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.certificates import Bound, Measurements
from bilevel_imaging.derivatives import Directional, Linearization, Metric
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.tensors import binary_scale, inner, norm, per_sample


class Point:
    """A lower-level point x with everything that does not depend on the adjoint, in the dtype of ``problem``.

    ``working`` is a linearization at x for solvers, in the dtype of the data; by default the same as that of the point.
    """

    def __init__(self, problem: LowerLevelProblem, loss: LossOracle, x: Tensor, working: Linearization | None = None):
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

    @property
    def value_reason(self) -> str:
        """Why the loss can't be enclosed at this point; empty if it can."""
        constants = self.constants
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
        constants = self.constants
        if self.value_reason:
            return self.value_reason
        if constants.mixed_lipschitz is None:
            return constants.reason or "the Lipschitz constant of the mixed derivative is not known"
        if self.columns is None and constants.mixed_norm is None:
            return "the norm of the mixed derivative is not known"
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
    def mixed_norm(self) -> Tensor | None:
        """||J||: exact from the Gram matrix of its columns where they are few, else the a priori bound, ``(B,)``."""
        if self.columns is None:
            return self.constants.mixed_norm
        if self.columns.shape[1] == 1:
            return self.column_norms[:, 0]
        flat = self.columns.flatten(2).double()
        gram = flat @ flat.transpose(1, 2)
        return torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0).sqrt() * (1 + 1e-10)

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
        plain = certificates.distance(self.grad_norm, self.constants.strong_convexity.double())
        if self.metric is None:
            return plain
        return torch.minimum(plain, self.metric_grad_norm / self.metric.lowest.sqrt())


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
        best, which = totals.nan_to_num(nan=torch.inf).min(0)
        parts = [
            torch.stack([getattr(self.bounds[name], part) for name in names]).gather(0, which.unsqueeze(0))[0]
            for part in ("lower", "linear", "remainder")
        ]
        return best, Bound(*parts), names[int(torch.mode(which).values)]


def estimate(point: Point, q: Tensor, *, gradient: bool = True) -> Estimate:
    """Evaluate -J^T q at the point: one HVP for the residual, then bounds from what was measured.

    With ``gradient=False`` only the loss interval is evaluated (``grad`` and ``bounds`` stay empty).
    """
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
        loss=point.loss_value - inner(q, point.gradient).double(),
        loss_interval=(torch.full_like(measured, -torch.inf), torch.full_like(measured, torch.inf)),
    )
    if point.value_reason or (gradient and point.reason):
        return partial
    hessian, along = _along(point, q, q_norm)
    partial = replace(partial, hessian=hessian, loss_interval=_loss_interval(partial, hessian))
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
        return point.constants.hessian_lipschitz.double() * q_norm, None
    return along.hessian.double(), along


def _certify(e: Estimate, q_norm: Tensor, measured: Tensor, along: Directional | None) -> Estimate:
    point, constants, hessian = e.point, e.point.constants, e.hessian
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
    # derivatives are off by the same relative amount as the parameters and filters they were computed from
    representation = point.problem.relative_uncertainty * m.mixed_norm * q_norm
    bounds = {name: replace(b, remainder=b.remainder + representation) for name, b in bounds.items()}
    components = None
    if along is not None and along.mixed_components is not None and point.column_norms is not None:
        each = [
            certificates.directional(replace(m, mixed_norm=point.column_norms[:, j]), hessian, along_j).total
            for j, along_j in enumerate(along.mixed_components.double().unbind(1))
        ]
        components = torch.stack(each, 1) + representation.unsqueeze(1)
    return replace(
        e,
        bounds=bounds,
        component_bounds=components,
        rounding_share=_rounding_share(m, bounds["directional"], point, measured, hessian, mixed),
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
    lower, upper = lower - off, upper + off
    loss_grad_norm = norm(point.loss_grad).double()
    plain_lower, plain_upper = certificates.corrected_value_interval(
        point.loss_value, distance, loss_grad_norm, smoothness, torch.zeros_like(hessian), convex
    )
    # rounding of sums over many pixels, on the generous side: nothing acts on a relative 1e-10 of the loss
    relative = max(16 * torch.finfo(e.q.dtype).eps, 1e-10)
    unit = relative * (point.loss_value.abs() + norm(e.q).double() * point.grad_norm)
    return torch.maximum(lower, plain_lower) - unit, torch.minimum(upper, plain_upper) + unit
