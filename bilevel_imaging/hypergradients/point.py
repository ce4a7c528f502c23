"""A lower-level point and what is measured there, whatever the adjoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.derivatives import Constants, Linearization, LocalChange, Metric
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.mixed_operators import randomized_mixed_norms
from bilevel_imaging.native import Measured
from bilevel_imaging.tensors import column_norms, inner, largest_entries, norm, per_sample, units


def dual_norm(
    size: Tensor, strong_convexity: Tensor, metric: Metric | None, metric_norm: Callable[[], Tensor]
) -> Tensor:
    """Bound of ||v||_{H^-1} at any x, without a solve: ||v||_{M^-1}, or ||v|| / sqrt(mu), ``(B,)`` float64.

    ``size``, ``metric_norm``: ||v||, and what makes ||v||_{M^-1}.
    """
    plain = size / lowest_multiple(strong_convexity, metric).sqrt()
    if metric is None or metric.multiple:
        return plain
    return torch.minimum(plain, metric_norm() * (1 + 1e-12))


def lowest_multiple(strong_convexity: Tensor, metric: Metric | None) -> Tensor:
    """The largest known m with H >= m I at any x, ``(B,)`` float64."""
    return strong_convexity if metric is None else torch.maximum(strong_convexity, metric.lowest)


# radii of balls on which changes of derivatives are evaluated
RADII = {torch.float32: (1e-30, 1e15), torch.float64: (1e-100, 1e100)}
# curvature times radius below which it does not matter how large a ball is
ALIKE = 0.1
# images whose norms a point keeps: x, G, grad f, q, a residual
REMEMBERED = 6


class Point:
    """A lower-level point x with everything that does not depend on the adjoint, in the dtype of ``problem``.

    ``working`` is a linearization for solvers, in the dtype of the data; by default the same as that of the point.
    ``working_is_there`` says that it is at x itself, not at x rounded. ``given`` is the problem of such a one: x comes
    in its dtype, and what is needed in the dtype of ``problem`` is made when that is the case.
    ``gradient_energy`` is a bound of ||G||_{H^-1}, ``(B,)``, from whoever computed x, rounding of G not included.
    ``accumulated``: how many numbers are added up in the dtype of ``problem`` for an entry of J^T q, if that counts.
    ``plain``: no more than the classical certificate needs, which takes ||G|| / mu for the distance.
    With ``measures``, where the problem does, one pass says everything once an adjoint is known, and no image is made
    for it.
    A randomized bound made here appends the probability that it fails to ``failures``.
    """

    def __init__(
        self,
        problem: LowerLevelProblem,
        loss: LossOracle,
        x: Tensor,
        working: Linearization | None = None,
        working_is_there: bool = True,
        gradient_energy: Tensor | None = None,
        failures: list[float] | None = None,
        plain: bool = False,
        given: LowerLevelProblem | None = None,
        measures: bool = False,
    ):
        self.problem, self.loss, self.given, self._x = problem, loss, given, x
        self.measures = measures and problem.measures
        if working is None:
            working = self.linearization = problem.linearize(self.x)
        self.working = working
        self.working_is_there = working_is_there
        self.plain = plain
        self.constants = problem.constants() if self.measures else self.linearization.constants
        self._norms: list[tuple[Tensor, Tensor]] = []
        self.gradient_energy = gradient_energy
        self.accumulated = 0
        self.failures = [] if failures is None else failures
        self._direction: tuple[Tensor, Tensor, Tensor] | None = None
        self._gram_of_columns: Tensor | None = None
        self._in_metric: tuple[Tensor, Tensor] | None = None
        self._measured: tuple[Tensor, Measured] | None = None
        self.loss_grad_unit = 0.0  # relative rounding of the gradient of the loss in what was measured last

    @cached_property
    def x(self) -> Tensor:
        """The point, in the dtype of ``problem``."""
        return self._x.to(self.problem.dtype)

    def in_dtype(self, problem: LowerLevelProblem) -> Tensor:
        """The point in the dtype of ``problem``."""
        return self._x if self._x.dtype == problem.dtype else self.x.to(problem.dtype)

    @cached_property
    def loss_value(self) -> Tensor:
        """f, ``(B,)`` float64."""
        return self.loss.value(self.x).double()

    @cached_property
    def loss_grad(self) -> Tensor:
        """Its gradient."""
        return self.loss.grad(self.x)

    @cached_property
    def loss_grad_norm(self) -> Tensor:
        """||grad f||, ``(B,)`` float64."""
        return self.norm(self.loss_grad)

    @cached_property
    def rhs(self) -> Tensor:
        """grad f in the dtype of solvers, rounded once."""
        if self._forms_loss:
            return self.loss.grad(self._x)
        return self.loss_grad.to(self.working.grad.dtype)

    @property
    def _forms_loss(self) -> bool:
        """Whether grad f is the difference of two images of the dtype of the data."""
        return self.given is not None and self.loss.squared_error and self.loss.x_true.dtype == self._x.dtype

    @cached_property
    def linearization(self) -> Linearization:
        """That of the problem at x."""
        return self.problem.linearize(self.x)

    @cached_property
    def gradient(self) -> Tensor:
        """G."""
        return self.linearization.grad

    def measured(self, q: Tensor, residual: Tensor | None = None) -> Measured | None:
        """Everything about the adjoint q, and the residual it was solved with, in one pass; ``None`` where there is
        none, or numbers leave its range. The latest is remembered."""
        if not self.measures:
            return None
        if self._measured is None or self._measured[0] is not q:
            found, rounding = self._measure(q, residual)
            if not self.in_range(found):
                self.measures = False
                return None
            self.take(found, rounding, q)
            if self._forms_loss and found.energies is not None:
                self.loss_grad_norm = found.energies.loss_grad_norm
                self.loss_value = 0.5 * self.loss_grad_norm.square()
            self._measured = q, found
        return self._measured[1]

    def _measure(self, q: Tensor, residual: Tensor | None) -> tuple[Measured, Tensor]:
        """In numbers of the dtype of the data, read as they are, where x and q are of these."""
        problem, x, self.loss_grad_unit = self.problem, self._x, 0.0
        difference = False
        if self.given is None or q.dtype != x.dtype:
            x, loss_grad = self.x, self.loss_grad
        elif self._forms_loss:
            problem, loss_grad, difference = self.given, self.loss.x_true, True
        else:
            problem, loss_grad = self.given, self.loss_grad.to(x.dtype)
            self.loss_grad_unit = 0.5 * torch.finfo(x.dtype).eps
        own = None if residual is None else residual.to(x.dtype)
        return problem.measure(x, q.to(x.dtype), loss_grad, residual=own, difference=difference, local=True)

    def in_range(self, measured: Measured) -> bool:
        """Whether squares of what was measured are far from the limits of numbers."""
        usual = units(measured.gram.diagonal(dim1=1, dim2=2).sum(1).sqrt(), self._x) is None
        return usual and bool((measured.grad_norm + measured.residual_norm + measured.q_norm).isfinite().all())

    def take(self, measured: Measured, rounding: Tensor, q: Tensor) -> None:
        """Let numbers that were measured here in one pass, and q's norm, stand for what would be evaluated."""
        self.measured_grad_norm, self.rounding = measured.grad_norm, rounding
        self._norms = [*self._norms[-REMEMBERED + 1 :], (q, measured.q_norm)]
        self._gram_of_columns = measured.gram
        self.column_norms = measured.gram.diagonal(dim1=1, dim2=2).sqrt()
        if measured.energies is not None:
            self._largest = measured.energies.largest.max()
            own, lowest = measured.energies.columns, lowest_multiple(self._mu, self.metric)
            self.mixed_dual_norms = torch.minimum(self.column_norms / lowest.sqrt().unsqueeze(1), own)

    @cached_property
    def _mu(self) -> Tensor:
        return self.constants.strong_convexity.double()

    @property
    def has_columns(self) -> bool:
        """Whether parameters are so few that J has columns."""
        return self.measures or self.columns is not None

    @cached_property
    def measured_grad_norm(self) -> Tensor:
        """||G|| as evaluated, ``(B,)`` float64."""
        return self.norm(self.gradient)

    @cached_property
    def rounding(self) -> Tensor:
        """Bound of the rounding of G, ``(B,)`` float64."""
        return self.problem.gradient_rounding_beside(self.x, self.measured_grad_norm).double()

    @cached_property
    def grad_norm(self) -> Tensor:
        """||G|| with rounding, ``(B,)`` float64."""
        return self.measured_grad_norm + self.rounding

    def norm(self, v: Tensor) -> Tensor:
        """||v||, ``(B,)`` float64; those of the latest images are remembered."""
        for image, size in self._norms:
            if image is v:
                return size
        size = norm(v).double()
        self._norms = [*self._norms[-REMEMBERED + 1 :], (v, size)]
        return size

    @cached_property
    def ball_constants(self) -> Constants:
        """Constants on the ball that holds the minimizer, where the energy has better ones there than everywhere."""
        constants = self.constants
        if constants.strong_convexity is None:
            return constants
        ball = None if self.measures else self.linearization.constants_on_ball(self.distance)
        return constants if ball is None else ball

    @property
    def near_kink(self) -> str:
        """In words, that Euclidean bounds are infinite because of a kink; "" otherwise."""
        lipschitz = self.ball_constants.hessian_lipschitz
        if lipschitz is None or not bool(lipschitz.isinf().any()):
            return ""
        return "a kink of the regularizer lies within the certified distance of x; reduce error_tol"

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

    @cached_property
    def reason(self) -> str:
        """Why nothing can be certified at this point; empty if it can."""
        finite = bool(self.measured_grad_norm.isfinite().all())
        reason = self._missing() if finite else "the gradient of the lower level is not finite"
        return reason and (self.problem.not_finite() or reason)

    def _missing(self) -> str:
        """Which constant is not known."""
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
        return None if self.columns is None else column_norms(self.columns)

    @cached_property
    def mixed_norm(self) -> Tensor:
        """||J||, ``(B,)``: exact from its columns where they are few, else the a priori bound, else from products."""
        if self._gram_of_columns is not None:
            return certificates.operator_norms.from_gram(self._gram_of_columns)
        if self.columns is not None:
            return certificates.operator_norms.from_columns(self.columns)
        if (bound := self.linearization.mixed_norm_bound()) is not None:
            return bound
        if self.constants.mixed_norm is not None:
            return self.constants.mixed_norm
        bounds, failure_probability = randomized_mixed_norms(self.problem, self.linearization, self.x)
        self.failures.append(failure_probability)
        return bounds

    @cached_property
    def metric(self) -> Metric | None:
        """The problem's metric."""
        return self.problem.metric()

    @cached_property
    def metric_grad_norm(self) -> Tensor:
        """||G||_{M^-1} with rounding, ``(B,)`` float64."""
        return self._gradient_metric_norm + self.rounding / self.metric.lowest.sqrt()

    def metric_norm(self, v: Tensor) -> Tensor:
        """||v||_{M^-1}, ``(B,)`` float64; that of the latest v is remembered."""
        if self._in_metric is None or self._in_metric[0] is not v:
            metric = self.metric
            size = self.norm(v) / metric.lowest.sqrt() if metric.multiple else metric.squared_norm(v).sqrt()
            self._in_metric = v, size
        return self._in_metric[1]

    @cached_property
    def _gradient_metric_norm(self) -> Tensor:
        metric = self.metric
        if metric.multiple:
            return self.measured_grad_norm / metric.lowest.sqrt()
        return metric.squared_norm(self.gradient).sqrt()

    @cached_property
    def _gram(self) -> Tensor:
        """J^T M^{-1} J, ``(B, n, n)`` float64."""
        white = [self.metric.whiten(column) for column in self.columns.unbind(1)]
        gram = self.columns.new_empty((len(self.columns), len(white), len(white)), dtype=torch.float64)
        for j, column in enumerate(white):
            for k, other in enumerate(white[: j + 1]):
                gram[:, j, k] = gram[:, k, j] = inner(column, other).double()
        return gram

    @cached_property
    def metric_mixed_norm(self) -> Tensor:
        """||M^{-1/2} J|| from the Gram matrix of the columns, ``(B,)`` float64; without columns from ||J||."""
        if self.metric.multiple or self.columns is None:
            return self.mixed_norm / self.metric.lowest.sqrt()
        return torch.linalg.eigvalsh(self._gram)[:, -1].clamp(min=0).sqrt() * (1 + 1e-10)

    @cached_property
    def distance(self) -> Tensor:
        """Certified bound of ||x - x*||, the smallest available, ``(B,)`` float64; inf if unknown."""
        if self.constants.strong_convexity is None:
            return torch.full_like(self.grad_norm, torch.inf)
        bound = certificates.distance(self.grad_norm, self._mu)
        if self.plain:
            return bound
        if self.metric is not None:  # asks for no column of J, which a value has no use for
            bound = torch.minimum(bound, self.metric_grad_norm / self.metric.lowest.sqrt())
        return torch.minimum(bound, self.energy_distance / self._mu.sqrt())

    def dual_norm(self, v: Tensor) -> Tensor:
        """Bound of ||v||_{H^-1} that needs no solve: the norm of the metric, or ||v|| / sqrt(mu), ``(B,)`` float64."""
        return dual_norm(self.norm(v), self._mu, self.metric, lambda: self.metric_norm(v))

    @cached_property
    def dual_grad_norm(self) -> Tensor:
        """||G||_{H^-1} with rounding, ``(B,)`` float64."""
        size = dual_norm(self.measured_grad_norm, self._mu, self.metric, lambda: self._gradient_metric_norm)
        if self.gradient_energy is not None:
            size = torch.minimum(size, self.gradient_energy)
        return size + self.rounding / self._mu.sqrt()

    @cached_property
    def relative_curvature(self) -> Tensor | None:
        """K on the ball where ``energy_distance`` looks for x*, ``(B,)`` float64; ``None`` if not known."""
        return self.curvature_on(certificates.TRIAL_FACTOR * self.dual_grad_norm)

    def curvature_on(self, radius: Tensor) -> Tensor | None:
        """K for ||e||_H <= radius ``(B,)``, evaluated in the dtype of the data and rounded up."""
        mu, at, within = self.constants.strong_convexity, self.working, self._ball(radius)
        curvature = at.relative_curvature(within, mu.to(within.dtype))
        return None if curvature is None else self._reached(curvature.double() * self._rounded_up, radius, within)

    def local_change(self, q: Tensor, radius: Tensor) -> LocalChange | None:
        """How derivatives change along q for ||e||_H <= radius ``(B,)``, likewise."""
        mu, at, within = self.constants.strong_convexity, self.working, self._ball(radius)
        scale, direction = self.direction(q)
        change = at.local_change(direction, within, mu.to(within.dtype))
        if change is None:
            return None
        up = scale.double() * self._rounded_up
        hessian = self._reached(change.hessian * up, radius, within)
        curvature = change.curvature
        if curvature is not None:
            curvature = self._reached(curvature.double() * self._rounded_up, radius, within)
        return LocalChange(hessian, change.slopes, change.energy * up, curvature)

    def change_near(self, q: Tensor) -> LocalChange | None:
        """How derivatives change along q on the ball that holds x*; or on the one where that is looked for, if it comes
        with the curvature there, which is then so small that the balls hardly differ."""
        if self.measures and "relative_curvature" not in self.__dict__:
            radius = certificates.TRIAL_FACTOR * self.dual_grad_norm
            change = self.local_change(q, radius)
            if change is None or change.curvature is None:
                return change
            self.relative_curvature = change.curvature
            if bool((change.curvature * radius < ALIKE).all()):
                return change
        return self.local_change(q, self.energy_distance)

    def _ball(self, radius: Tensor) -> Tensor:
        """The radius as a number whose powers can be represented in the dtype of the data, if it can be enlarged."""
        dtype = self.working.grad.dtype
        return radius.clamp(*RADII[dtype]).to(dtype)

    @staticmethod
    def _reached(bound: Tensor, radius: Tensor, within: Tensor) -> Tensor:
        """inf where the ball had to be made smaller."""
        return torch.where(radius * (1 - 1e-6) <= within.double(), bound, torch.inf)

    def direction(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Powers of two s ``(B,)`` and q / s in the dtype of the data: what is homogeneous in q is evaluated there, and
        squares of a tiny q must not underflow to a bound of 0. The latest is remembered."""
        if self._direction is None or self._direction[0] is not q:
            scale = units(self.norm(q), q)
            direction = (q if scale is None else q / per_sample(scale, q)).to(self.working.grad.dtype)
            self._direction = q, q.new_ones(len(q)) if scale is None else scale, direction
        return self._direction[1:]

    @cached_property
    def _largest(self) -> Tensor:
        return largest_entries(self.x).amax()

    @cached_property
    def _rounded_up(self) -> float:
        """What the rounding of x and of lengths does to a bound: relative to the scale on which derivatives change."""
        at = self.working
        size = float(self._largest)
        return 1 + 64 * torch.finfo(at.grad.dtype).eps * (1 + size / at.length_scale)

    @cached_property
    def energy_distance(self) -> Tensor:
        """Certified bound of ||x - x*||_H, ``(B,)`` float64; inf where the local test fails."""
        if self.constants.strong_convexity is None or self.relative_curvature is None:
            return torch.full_like(self.grad_norm, torch.inf)
        return certificates.energy_distance(self.dual_grad_norm, self.relative_curvature)

    @cached_property
    def mixed_dual_norms(self) -> Tensor | None:
        """||J_j||_{H^-1}, the smaller of what a solve-free bound gives and of the energy's own, ``(B, n)`` float64; by
        blocks, or ``None``, where there are no columns."""
        if self.columns is None:
            return self.linearization.mixed_block_norms(self.constants.strong_convexity)
        mu, metric = self._mu, self.metric
        norms = self.column_norms / lowest_multiple(mu, metric).sqrt().unsqueeze(1)
        if metric is not None and not metric.multiple:
            norms = torch.minimum(norms, self._gram.diagonal(dim1=1, dim2=2).sqrt() * (1 + 1e-12))
        own = self.linearization.mixed_energy_norms()
        return norms if own is None else torch.minimum(norms, own)
