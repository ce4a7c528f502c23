"""Measures an adjoint at a lower-level point, and turns what was measured into certified bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.certificates import Bound, LocalMeasurements, Measurements
from bilevel_imaging.derivatives import Directional
from bilevel_imaging.hypergradients.point import Point, lowest_multiple
from bilevel_imaging.hypergradients.rounding import SOLVER_UNITS, accumulation, measured_rounding, residual_rounding
from bilevel_imaging.linear_solvers import LinearSolution
from bilevel_imaging.native import Measured
from bilevel_imaging.tensors import entries, inner, length, norm, products

# relative rounding of the coefficients from which an energy norm was computed
ENERGY_SLACK = 1e-2
# curvature times distance below which intervals in the norm of the Hessian are not worse than Euclidean ones
SMALL = 0.1
# the same for a certificate alone, where the intervals only should not be much worse
MODERATE = 1.0
# part of a residual that a solver measured in its own dtype below which rounding does not count
UNNOTICED = 1e-2
# rounding of J beside that of the gradient
COLUMN_UNITS = 4
# part of a bound below which a simpler one will do
NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class Estimate:
    """A hypergradient estimate -mean_i J_i^T q_i at a point, with its bounds per sample.

    Attributes:
        point: where.
        q: adjoint, ``(B, *image)``.
        residual: grad f - H q, ``(B, *image)``; ``None`` where one pass has measured it.
        residual_norm: its norm with rounding, ``(B,)`` float64.
        residual_rounding: bound of the rounding alone, likewise.
        grad: estimate by name.
        bounds: every certificate by name; empty if not certified.
        component_bounds: ``(B, n)`` or ``None``.
        rounding_share: part of the bound that is due to rounding, ``(B,)``, as a fraction.
        hessian: Lambda_H(q) on the ball around the point, ``(B,)``; 0 if not certified, inf if not evaluated.
        local: what was measured in the norm of the Hessian, where the energy knows how that changes.
        loss_interval: per sample, two ``(B,)``.
        loss: corrected value per sample, ``(B,)``.
    """

    point: Point
    q: Tensor
    residual: Tensor | None
    residual_norm: Tensor
    residual_rounding: Tensor
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
        return entries(self.grad)

    @property
    def norm(self) -> float:
        """||grad||_2."""
        return length(self.flat)

    def best(self, names: tuple[str, ...]) -> tuple[Tensor, Bound, str]:
        """Smallest of the named bounds for every sample, its parts, and the name that wins most often."""
        names = tuple(name for name in names if name in self.bounds)
        if len(names) == 1:
            only = self.bounds[names[0]]
            return only.total.nan_to_num(nan=torch.inf, posinf=torch.inf), only, names[0]
        totals = torch.stack([self.bounds[name].total for name in names])
        best, which = totals.nan_to_num(nan=torch.inf, posinf=torch.inf).min(0)
        parts = [
            torch.stack([getattr(self.bounds[name], part) for name in names]).gather(0, which.unsqueeze(0))[0]
            for part in ("lower", "linear", "remainder")
        ]
        return best, Bound(*parts), names[int(torch.mode(which).values)]


def estimate(
    point: Point,
    q: Tensor,
    *,
    gradient: bool = True,
    known: LinearSolution | None = None,
    thrifty: bool = False,
    enough: Callable[[float], float] | None = None,
    measured: Measured | None = None,
    given: Tensor | None = None,
) -> Estimate:
    """Evaluate -J^T q at the point: one HVP for the residual (unless the solver measured it), then bounds from that.

    With ``gradient=False`` only the loss interval is evaluated (``grad`` and ``bounds`` stay empty). ``known`` is the
    linear solve that ended with this residual; a bound of its energy norm is used if there is one. ``thrifty``: with
    parameters too many for columns of J, Euclidean bounds cost several products and are worse than the local one: they
    are left out where that holds; and where the local one is below what ``enough`` makes of the norm of the estimate,
    or none of them can be.
    ``measured``: what else would be evaluated at a plain point, which has taken its part of that. ``given``: q in the
    dtype of the data, if it is the same numbers.
    """
    measured = measured or point.measured(q if given is None else given, None if known is None else known.residual)
    q_norm = point.norm(q) if measured is None else measured.q_norm
    if measured is None:
        residual, product, rounding = _residual(point, q, q_norm, known)
        size, value = point.norm(residual), inner(q, point.gradient).double()
    else:
        residual, product, size, value = None, None, measured.residual_norm, measured.q_dot_grad
        rounding = measured_rounding(point, measured)
    partial = Estimate(
        point=point,
        q=q,
        residual=residual,
        residual_norm=size + rounding,
        residual_rounding=rounding,
        grad=adjoint_gradient(point, q, measured) if gradient else {},
        bounds={},
        component_bounds=None,
        rounding_share=torch.zeros_like(size),
        hessian=torch.zeros_like(size),
        local=None,
        loss=point.loss_value - value,
        loss_interval=(torch.full_like(size, -torch.inf), torch.full_like(size, torch.inf)),
    )
    if point.value_reason:
        return partial
    local = None if point.plain else _local(point, q, product, residual, rounding, known, gradient, measured)
    kappa = None if local is None else local.curvature * local.distance
    if gradient and local is not None:
        many = not point.has_columns
        if (thrifty and bool(local.valid.all())) if many else (enough is not None and bool((kappa < MODERATE).all())):
            alone = replace(partial, hessian=torch.full_like(size, torch.inf), local=local)
            alone = _certify_local(alone, q_norm)
            bound, goal = alone.bounds["local"], None if many else enough(alone.norm)
            # the part of a Euclidean bound from the residual is at most that much smaller: ||J|| for all columns
            if many or float(bound.total.mean()) <= goal or float(bound.linear.mean()) > len(alone.flat) ** 0.5 * goal:
                return replace(alone, loss_interval=_loss_interval(alone, alone.hessian))
    if gradient and point.reason:
        return partial
    if not gradient and kappa is not None and bool((kappa < SMALL).all()):
        hessian, along = torch.full_like(size, torch.inf), None  # the local interval is the smaller one
    else:
        hessian, along = _along(point, q, q_norm)
    partial = replace(partial, hessian=hessian, local=local)
    partial = replace(partial, loss_interval=_loss_interval(partial, hessian))
    return _certify(partial, q_norm, along) if gradient else partial


def _residual(
    point: Point, q: Tensor, q_norm: Tensor, known: LinearSolution | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """grad f - H q, H q where it is used, and a bound of the rounding of both, ``(B,)``: by a product, unless the
    solver has measured it in the dtype of the evaluation, or in its own one and far above the rounding there."""
    smoothness, units = point.constants.smoothness, 8 if q.dtype == torch.float64 else SOLVER_UNITS
    unit = units * torch.finfo(q.dtype).eps
    size = None if smoothness is None else smoothness.double() * q_norm
    residual = known.residual if known is not None and known.verified else None
    if residual is not None and point.working is not point.linearization:
        rough = SOLVER_UNITS * torch.finfo(residual.dtype).eps
        fine = size is not None and point.working_is_there and point.loss.x_true.dtype == residual.dtype
        if fine:
            rounding = residual_rounding(residual.dtype, smoothness, q_norm, point.loss_grad_norm)
            fine = bool((rounding <= UNNOTICED * known.residual_norm).all())
        residual, unit = (residual.to(q.dtype), rough) if fine else (None, unit)
    if residual is None:
        product = point.linearization.hvp(q)
        residual = point.loss_grad - product
    else:
        product = None if point.plain and size is not None else point.loss_grad - residual
    size = 10 * norm(product).double() if size is None else size
    return residual, product, unit * (size + point.loss_grad_norm)


def adjoint_gradient(point: Point, q: Tensor, measured: Measured | None = None) -> dict[str, Tensor]:
    """-mean_i J_i^T q_i by name, in the dtype of the parameters."""
    theta = point.problem.theta
    if measured is not None:
        return _by_name(measured.products, theta)
    if point.columns is None:
        product = point.linearization.mixed_vjp(q)
        return {name: (-product[name] / len(q)).to(theta[name].dtype) for name in theta}
    return _by_name(products(point.columns, q.to(point.columns.dtype)), theta)


def _by_name(each: Tensor, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-mean_i of J_i^T q_i ``(B, n)``."""
    flat = -each.sum(0) / len(each)
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
    moved = unit * point.norm(point.x)
    scale, direction = point.direction(q)
    along = working.directional(direction, ((point.distance + moved) * (1 + 4 * unit)).to(dtype))
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
    along = None if point.plain else _directional(point, q)
    if along is None:
        return point.ball_constants.hessian_lipschitz.double() * q_norm, None
    return along.hessian.double(), along


def _certify(e: Estimate, q_norm: Tensor, along: Directional | None) -> Estimate:
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
    bounds = {"classical": certificates.classical(m, point.loss_grad_norm, constants.hessian_lipschitz.double())}
    if not point.plain:
        bounds["directional"] = certificates.directional(m, hessian, mixed)
    if not point.plain and point.metric is not None:
        bounds["metric"] = _metric_bound(e, m, mixed)
    local_components = None
    if e.local is not None:
        bounds["local"], local_components = certificates.local(e.local)
    representation = _representation(e, m.mixed_norm, q_norm)
    bounds = {name: replace(b, remainder=b.remainder + representation).without_nan() for name, b in bounds.items()}
    components = None
    if along is not None and along.mixed_components is not None and point.column_norms is not None:
        each = [
            certificates.directional(replace(m, mixed_norm=point.column_norms[:, j]), hessian, along_j).total
            for j, along_j in enumerate(along.mixed_components.double().unbind(1))
        ]
        components = torch.stack(each, 1) + representation.unsqueeze(1)
    if local_components is not None and point.has_columns:
        local_components = local_components + representation.unsqueeze(1)
        components = local_components if components is None else torch.minimum(components, local_components)
    if components is not None:
        components = components.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return replace(
        e,
        bounds=bounds,
        component_bounds=components,
        rounding_share=_rounding_share(e, bounds),
    )


def _representation(e: Estimate, mixed_norm: Tensor, q_norm: Tensor) -> Tensor:
    """Bound of what rounding does to the estimate, ``(B,)`` float64: J (made of what the gradient is made of) and its
    product with q are rounded, and the estimate is in the dtype of the parameters."""
    stored = max(torch.finfo(g.dtype).eps for g in e.grad.values())
    rounded = 8 * torch.finfo(e.q.dtype).eps * mixed_norm + COLUMN_UNITS * e.point.rounding
    return rounded * q_norm + stored * e.norm + accumulation(e.point, e.q)


def _certify_local(e: Estimate, q_norm: Tensor) -> Estimate:
    """The local bound alone."""
    bound, components = certificates.local(e.local)
    # ||J|| <= ||J||_{H^-1} ||H||^(1/2)
    smoothness = e.point.constants.smoothness
    size = e.local.mixed_norms.norm(dim=1) * (smoothness.double().sqrt() if smoothness is not None else torch.inf)
    representation = _representation(e, size, q_norm)
    bounds = {"local": replace(bound, remainder=bound.remainder + representation).without_nan()}
    if components is not None and e.point.has_columns:
        components = (components + representation.unsqueeze(1)).nan_to_num(nan=torch.inf, posinf=torch.inf)
    else:
        components = None
    return replace(e, bounds=bounds, component_bounds=components, rounding_share=_rounding_share(e, bounds))


def _local(
    point: Point,
    q: Tensor,
    product: Tensor | None,
    residual: Tensor | None,
    rounding: Tensor,
    known: LinearSolution | None,
    gradient: bool,
    measured: Measured | None,
) -> LocalMeasurements | None:
    """Everything in the norm of the Hessian; ``None`` where the energy does not say how its Hessian changes. A value
    has no use for the columns of J. ``product`` is H q."""
    mu = point.constants.strong_convexity.double()
    change = point.change_near(q)
    mixed = point.mixed_dual_norms if gradient else q.new_zeros(len(q), 0).double()
    if change is None or mixed is None:
        return None
    if measured is None:
        dual, energy = _dual_residual(point, residual, known), inner(q, product).double()
    else:
        dual, energy = measured_dual_residual(point, measured, known), measured.energies.adjoint
    return LocalMeasurements(
        distance=point.energy_distance,
        curvature=point.relative_curvature,
        residual_norm=dual + rounding / mu.sqrt(),
        mixed_norms=mixed,
        slopes=change.slopes,
        hessian=change.hessian,
        adjoint_energy=change.energy,
        adjoint_norm=energy.clamp(min=0).sqrt() * (1 + 1e-10) + rounding / mu.sqrt(),
        loss_smoothness=torch.full_like(mu, float(point.loss.smoothness)),
        strong_convexity=mu,
    )


def measured_dual_residual(point: Point, measured: Measured, known: LinearSolution | None) -> Tensor:
    """Bound of ||R||_{H^-1} before rounding, ``(B,)`` float64."""
    mu = point.constants.strong_convexity.double()
    dual = measured.residual_norm / lowest_multiple(mu, point.metric).sqrt()
    if known is None or known.energy_norm is None:
        return dual
    own = known.energy_norm.double() * (1 + ENERGY_SLACK) + measured.energies.drift / mu.sqrt()
    return torch.minimum(dual, own)


def _dual_residual(point: Point, residual: Tensor, known: LinearSolution | None) -> Tensor:
    """Bound of ||R||_{H^-1}, ``(B,)`` float64."""
    dual = point.dual_norm(residual)
    if known is None or known.energy_norm is None:
        return dual
    off = torch.zeros_like(dual)
    if residual is not known.residual:
        difference = residual - known.residual.to(residual.dtype)
        off = norm(difference).double() / point.constants.strong_convexity.double().sqrt()
        if not bool((off <= NEGLIGIBLE * known.energy_norm).all()):
            off = point.dual_norm(difference)
    return torch.minimum(dual, known.energy_norm.double() * (1 + ENERGY_SLACK) + off)


def forecast(point: Point, rhs: Tensor, solution: LinearSolution) -> LocalMeasurements | None:
    """What an evaluation would measure in the norm of the Hessian, before rounding: ``None`` where that is not known
    cheaply, from the columns of J and the residual of a solve of H q = ``rhs`` at the point or near it."""
    if solution.residual is None or point.plain or point.value_reason or not point.has_columns:
        return None
    product, none = rhs - solution.residual, torch.zeros_like(point.rounding)
    return _local(point, solution.q, product, solution.residual, none, solution, gradient=True, measured=None)


def _metric_bound(e: Estimate, m: Measurements, mixed: Tensor) -> Bound:
    point, lowest = e.point, e.point.metric.lowest
    if e.residual is None:  # one pass measures where the metric is a multiple of the identity
        residual_norm = e.residual_norm / lowest.sqrt()
    else:
        residual_norm = e.point.metric_norm(e.residual) + e.residual_rounding / lowest.sqrt()
    return certificates.metric(
        m, point.metric_grad_norm, residual_norm, point.metric_mixed_norm, lowest, e.hessian, mixed
    )


def _rounding_share(e: Estimate, bounds: dict[str, Bound]) -> Tensor:
    """Fraction of the smallest bound that is due to rounding: of its lower part as of ||G||, of its linear as of R."""
    point, rounding = e.point, e.residual_rounding
    root = point.constants.strong_convexity.double().sqrt()
    plain = (point.rounding / point.grad_norm, rounding / e.residual_norm)
    dual = plain
    if e.local is not None:
        dual = (point.rounding / root / point.dual_grad_norm, rounding / root / e.local.residual_norm)
    totals = torch.stack([b.total for b in bounds.values()])
    best = totals.argmin(0)
    is_local = best == (list(bounds).index("local") if "local" in bounds else -1)
    lower, linear = (
        torch.stack([getattr(b, part) for b in bounds.values()]).gather(0, best.unsqueeze(0))[0]
        for part in ("lower", "linear")
    )
    shares = [torch.where(is_local, d, p).nan_to_num(nan=0.0) for d, p in zip(dual, plain, strict=True)]
    share = (lower * shares[0] + linear * shares[1]) / (lower + linear)
    return share.nan_to_num(nan=0.0).clamp(0, 1)


def _loss_interval(e: Estimate, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection of the interval with this q and the one with q = 0, widened by the rounding of the value itself."""
    point = e.point
    convex, distance = point.loss.convex, point.distance
    smoothness = torch.full_like(distance, float(point.loss.smoothness))
    lower, upper = certificates.corrected_value_interval(e.loss, distance, e.residual_norm, smoothness, hessian, convex)
    # the corrected value holds for the exact gradient; the measured one is off by up to point.rounding
    off = point.norm(e.q) * point.rounding
    lower = (lower - off).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # 0 * inf where a kink is met
    upper = (upper + off).nan_to_num(nan=torch.inf, posinf=torch.inf)
    plain_lower, plain_upper = certificates.corrected_value_interval(
        point.loss_value, distance, point.loss_grad_norm, smoothness, torch.zeros_like(hessian), convex
    )
    if e.local is not None:
        local_lower, local_upper = certificates.local_value_interval(e.local, e.loss, convex)
        lower, upper = torch.maximum(lower, local_lower - off), torch.minimum(upper, local_upper + off)
    # rounding of sums over many pixels, on the generous side: nothing acts on a relative 1e-10 of the loss
    relative = max(16 * torch.finfo(e.q.dtype).eps, 1e-10)
    unit = relative * (point.loss_value.abs() + point.norm(e.q) * point.grad_norm)
    lower, upper = torch.maximum(lower, plain_lower) - unit, torch.minimum(upper, plain_upper) + unit
    return (lower.clamp(min=0), upper.clamp(min=0)) if point.loss.nonnegative else (lower, upper)
