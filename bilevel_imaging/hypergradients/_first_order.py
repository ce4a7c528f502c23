"""Reverse-mode differentiation of first-order methods, written out: what ``unrolled`` and ``inexact_ad`` share.

All methods are x_{k+1} = z_k - step_k G(a_k) with z_k = x_k + momentum_k (x_k - x_{k-1}), x_{-1} = x_0, and the
gradient taken at a_k = x_k or a_k = z_k; steps and momenta are fixed in advance and count as constants.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.refinement import Refiner
from bilevel_imaging.linear_solvers import ConjugateGradient
from bilevel_imaging.lower_solvers import GradientDescent, HeavyBall, NewtonCG
from bilevel_imaging.lower_solvers.accelerated_gradient import constant_schedule, momentum_step
from bilevel_imaging.tensors import entries, length

# (step, momentum), each (B, 1, ...)
Coefficients = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Method:
    """Steps and momenta of a first-order method.

    Attributes:
        schedule: from mu and L, each ``(B,)``, the pairs (step, momentum) for k = 0, 1, ..., endlessly.
        extrapolates_gradient: whether the gradient is taken at z_k instead of x_k.
    """

    schedule: Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor]]]
    extrapolates_gradient: bool

    def coefficients(self, problem: LowerLevelProblem, steps: int) -> list[Coefficients]:
        """The first ``steps`` pairs, shaped to multiply images.

        Raises:
            ValueError: if mu or L is not known.
        """
        constants = problem.constants().to(problem.dtype)
        mu, smoothness = constants.strong_convexity, constants.smoothness
        if mu is None or smoothness is None:
            raise ValueError(f"Unrolling needs step sizes from mu and L. {constants.reason or 'L is not known'}.")
        shape = (problem.shape[0], *([1] * (len(problem.shape) - 1)))
        pairs = itertools.islice(self.schedule(mu.detach(), smoothness.detach()), steps)
        return [(step.reshape(shape), momentum.reshape(shape)) for step, momentum in pairs]


def _constant(schedule: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Iterator[tuple[Tensor, Tensor]]]:
    return lambda mu, L: itertools.repeat(schedule(mu, L, 0))


def _varying(mu: Tensor, L: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    t = torch.zeros_like(mu)
    while True:
        t, momentum = momentum_step(t, mu / L)
        yield 1 / L, momentum


UNROLLED_METHODS: dict[str, Method] = {
    "gradient_descent": Method(_constant(GradientDescent.schedule), False),
    "heavy_ball": Method(_constant(HeavyBall.schedule), False),
    "accelerated_gradient": Method(_varying, True),
    "nesterov": Method(_constant(constant_schedule), True),
}


@dataclass(frozen=True, kw_only=True)
class UnrolledHypergradient:
    """A hypergradient from the reverse sweep of a first-order method, see ``unrolled`` and ``inexact_ad``.

    Attributes:
        grad: by parameter name.
        loss: mean_i f_i(x_i^K).
        x: x^K, ``(B, *image)``.
        q: the adjoint that the sweep has accumulated, sum of step times co-state, ``(B, *image)``.
        bound: ||grad - dF/dtheta||_2 <= bound; inf if not certified.
        certified: whether ``bound`` is finite and rests on true constants only.
        reason: why not, in words; empty if certified.
        certificate: which bound of -J^T q at x^K is part of ``bound``; "none" if not certified.
        cost: work spent, that of the certificate included.
    """

    grad: dict[str, Tensor]
    loss: float
    x: Tensor
    q: Tensor
    bound: float
    certified: bool
    reason: str
    certificate: str
    cost: Cost

    @property
    def norm(self) -> float:
        """||grad||_2 over all parameters."""
        return length(entries(self.grad))


@dataclass(frozen=True)
class Request:
    """The checked arguments of a sweep.

    Attributes:
        problem: the batch.
        loss: the upper-level loss with its ground truth.
        method: which iteration.
        x0: start, ``(B, *image)``.
        started, before: clock and work counters when the request was made.
    """

    problem: LowerLevelProblem
    loss: LossOracle
    method: Method
    x0: Tensor
    started: float
    before: Cost

    @classmethod
    def check(
        cls,
        problem: LowerLevelProblem,
        loss: Callable[[Tensor, Tensor], Tensor],
        x_true: Tensor,
        method: str,
        steps: int,
        x0: Tensor | None,
    ) -> Request:
        """Raise ``ValueError`` for what makes no sense."""
        started, before = time.perf_counter(), problem.cost.copy()
        if method not in UNROLLED_METHODS:
            raise ValueError(f"Unknown method {method!r}. Choose from {sorted(UNROLLED_METHODS)}.")
        whole("steps", steps, 1)
        if not problem.theta:
            raise ValueError("Expected at least one parameter with requires_grad=True in the energy. Got none.")
        start = problem.initial() if x0 is None else x0
        if start.shape != problem.shape or start.dtype != problem.dtype:
            raise ValueError(
                f"Expected x0 with the problem's shape {tuple(problem.shape)} and dtype {problem.dtype}. "
                f"Got {tuple(start.shape)}, {start.dtype}."
            )
        oracle = LossOracle(loss, x_true, problem.shape)
        return cls(problem, oracle, UNROLLED_METHODS[method], start.detach(), started, before)

    def advance(
        self, x: Tensor, previous: Tensor, coefficients: list[Coefficients]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(x_k, x_{k-1}) after these iterations, and the points a_k at which gradients were taken."""
        points = []
        for step, momentum in coefficients:
            ahead = x + momentum * (x - previous)
            points.append(ahead if self.method.extrapolates_gradient else x)
            x, previous = ahead - step * self.problem.grad(points[-1]), x
        return x, previous, points


class ReverseSweep:
    """Co-states of the iteration, from the last step to the first.

    Args:
        method: the iteration that is differentiated.
        theta: the parameters.
        costate: gradient of the loss at the last iterate, ``(B, *image)``.

    Attributes:
        q: sum of step times co-state, ``(B, *image)``.
        mixed: sum of J^T (step times co-state), by parameter name, over the steps made and the batch.
    """

    def __init__(self, method: Method, theta: dict[str, Tensor], costate: Tensor):
        self.method = method
        # what the loss says of x_{k+1}, and what the steps behind say of x_k through their momentum
        self.costate, self.earlier = costate, torch.zeros_like(costate)
        self.q = torch.zeros_like(costate)
        self.mixed = {name: torch.zeros_like(parameter) for name, parameter in theta.items()}

    def step(self, linearization: Linearization, coefficients: Coefficients) -> None:
        """Back through x_{k+1} = z_k - step G(a_k), with the derivatives of G given by ``linearization``."""
        step, momentum = coefficients
        scaled = step * self.costate
        self.q = self.q + scaled
        for name, product in linearization.mixed_vjp(scaled).items():
            self.mixed[name] = self.mixed[name] + product
        through_gradient = linearization.hvp(scaled)
        if self.method.extrapolates_gradient:
            ahead = self.costate - through_gradient
            here = ahead
        else:
            ahead, here = self.costate, self.costate - through_gradient
        # x_k enters z_k with weight 1 + momentum (once inside `here`), x_{k-1} with weight -momentum
        self.costate, self.earlier = self.earlier + here + momentum * ahead, -momentum * ahead


def finish(request: Request, x: Tensor, sweep: ReverseSweep, *, what: str, certify: bool) -> UnrolledHypergradient:
    """The result of a sweep that ended at x; ``what`` names it in the reason why it is not certified."""
    problem = request.problem
    result = UnrolledHypergradient(
        grad={n: (-product / x.shape[0]).to(problem.theta[n].dtype) for n, product in sweep.mixed.items()},
        loss=float(request.loss.value(x).mean()),
        x=x,
        q=sweep.q,
        bound=float("inf"),
        certified=False,
        reason=f"not certified: {what}, distance to the minimizer not used",
        certificate="none",
        cost=Cost(),
    )
    if certify:
        result = _certify(request, result)
    return replace(result, cost=problem.cost - request.before + Cost(seconds=time.perf_counter() - request.started))


def _certify(request: Request, result: UnrolledHypergradient) -> UnrolledHypergradient:
    """||grad - dF/dtheta|| <= ||grad - h|| + B with h = -J^T q at x^K, whose error B bounds whatever q is."""
    refiner = Refiner(request.problem, request.loss, NewtonCG(), ConjugateGradient())
    point = refiner.point(result.x)
    implicit = estimate(point, result.q.to(point.x.dtype))
    if not implicit.bounds:
        return replace(result, reason=f"not certified: {point.reason}")
    totals, _, name = implicit.best(tuple(implicit.bounds))
    bound = length(entries(result.grad) - implicit.flat) + float(totals.mean())
    if not bound < float("inf"):
        return replace(result, reason="not certified: the bound is not finite")
    return replace(result, bound=bound, certified=True, reason="", certificate=name)
