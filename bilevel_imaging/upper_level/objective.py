"""The mean upper-level loss over one batch of lower-level problems of any kind, as an objective for every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from bilevel_imaging.checks import instance
from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients import (
    Hypergradient,
    check_certificate,
    check_solvers,
    hypergradient,
    loss_interval,
)
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.upper_level.base import CertifiedValue

# of the first x, which only tells its size
FIRST_ERROR = 0.1


class ProblemObjective:
    """F(theta) = mean of loss(x_i*(theta), x_i) over a batch of problems; x and the adjoint start from the last ones.

    For images, and many batches of them, see :class:`bilevel_imaging.training.BilevelObjective`.

    Args:
        problem: the lower level, of B samples; its theta is changed in place by a method.
        loss: upper-level loss, ``loss(x, x_true)`` to ``(B,)``.
        x_true: what the loss compares with, of the shape of x; ``None`` for zeros, where the loss does not use it.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for preconditioned conjugate gradients.
        start: x to start from, ``(B, ...)``; ``None`` for a rough solution at the current theta.
        certificate: passed to :func:`bilevel_imaging.hypergradient`.

    Attributes:
        theta: parameters by name.
        x: the last lower-level point, ``(B, ...)``.
        q: the last adjoint, likewise; ``None`` before the first hypergradient.
    """

    def __init__(
        self,
        problem: LowerLevelProblem,
        loss: Callable[[Tensor, Tensor], Tensor],
        x_true: Tensor | None = None,
        *,
        lower: LowerSolver | None = None,
        linear: LinearSolver | None = None,
        start: Tensor | None = None,
        certificate: str = "auto",
    ):
        check_solvers(lower, linear)
        check_certificate(certificate)
        instance("problem", problem, LowerLevelProblem, "a lower-level problem, e.g. energy.bind(y, physics)")
        self.problem, self.loss, self.theta = problem, loss, problem.theta
        self.lower = lower or NewtonCG()
        self.linear = linear or ConjugateGradient(preconditioner="auto")
        self.certificate = certificate
        # accuracies relative to the size of x need one that is not 0
        self.x = self.lower.solve(problem, None, FIRST_ERROR).x if start is None else start
        self.q: Tensor | None = None
        self.x_true = torch.zeros_like(self.x) if x_true is None else x_true
        LossOracle(loss, self.x_true, problem.shape)  # refuses what does not fit

    def value(self, error_tol: float) -> CertifiedValue:
        """Certified interval of F, the lower level solved to ``error_tol``; the last adjoint sharpens it."""
        started, before = time.perf_counter(), self.problem.cost.copy()
        solution = self.lower.solve(self.problem, self.x, error_tol)
        found = loss_interval(self.problem, self.loss, self.x_true, solution.x, self.q, error_tol=error_tol)
        self.x = solution.x
        cost = self.problem.cost - before + Cost(seconds=time.perf_counter() - started)
        value, lower, upper = (float(v.mean()) for v in found)
        return CertifiedValue(value=value, lower=lower, upper=upper, cost=cost)

    def hypergradient(
        self,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        *,
        relative: float | None = None,
        bound_tol: float | None = None,
    ) -> Hypergradient:
        """Certified hypergradient at the current theta, to the accuracy asked for."""
        result = hypergradient(
            self.problem,
            self.loss,
            self.x_true,
            lower=self.lower,
            linear=self.linear,
            error_tol=error_tol,
            residual_tol=residual_tol,
            relative=relative,
            bound_tol=bound_tol,
            x0=self.x,
            q0=self.q,
            certificate=self.certificate,
        )
        self.x, self.q = cast(Tensor, result.x), cast(Tensor, result.q)  # one batch: no tuples
        return result
