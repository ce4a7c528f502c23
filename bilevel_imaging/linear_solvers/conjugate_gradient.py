"""Conjugate gradients: the linear solver of choice, needs no constants."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.kernels import fusable
from bilevel_imaging.linear_solvers._iteration import (
    INDEFINITE,
    NOT_FINITE,
    IterativeSolver,
    Operator,
    Preconditioner,
    Recurrence,
    Systems,
)
from bilevel_imaging.tensors import inner, per_sample


class _Directions(Recurrence):
    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        z = systems.r if operator.precondition is None else operator.precondition(systems.r)
        self.p = z.clone()
        self.rz = inner(systems.r, z)
        self.scratch = torch.empty_like(self.p)

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, p = self.systems, self.p
        product = operator.hvp(p)
        curvature = torch.mul(p, product, out=self.scratch).flatten(1).sum(1)
        if self.everyone and operator.precondition is None and bool((torch.minimum(curvature, self.rz) > 0).all()):
            self._plain_step(product, curvature)
            return
        # rz <= 0 means that the preconditioner is not positive definite; comparisons with NaN are false
        advance = running & (curvature > 0) & (self.rz > 0)
        failure = torch.where((curvature + self.rz).isfinite(), INDEFINITE, NOT_FINITE)
        systems.status = torch.where(running & ~advance, failure, systems.status)
        alpha = per_sample(torch.where(advance, self.rz / curvature, 0.0), p)
        systems.q.addcmul_(p, alpha)
        systems.r.addcmul_(product, alpha, value=-1)
        if operator.precondition is None:
            z, rz = systems.r, _square(systems.r)
            square = rz
        else:
            z = operator.precondition(systems.r)
            rz, square = inner(systems.r, z), _square(systems.r)
        beta = torch.where(advance, rz / self.rz, 0.0)
        torch.addcmul(z, p, per_sample(beta, p), out=p)
        self.rz = torch.where(advance, rz, self.rz)
        systems.residual = torch.where(advance, square.sqrt(), systems.residual)

    def _plain_step(self, product: Tensor, curvature: Tensor) -> None:
        """The same step without masks and preconditioner: nothing in the batch has stopped."""
        systems = self.systems
        systems.q, systems.r, self.p, self.rz = advance(systems.q, systems.r, self.p, product, self.rz, curvature)
        systems.residual = self.rz.sqrt()


def _fused_advance(q: Tensor, r: Tensor, p: Tensor, product: Tensor, rz: Tensor, curvature: Tensor):
    alpha = per_sample(rz / curvature, p)
    q, r = q + alpha * p, r - alpha * product
    new = (r * r).flatten(1).sum(1)
    return q, r, r + per_sample(new / rz, p) * p, new


def _square(r: Tensor) -> Tensor:
    """||r||^2 without a temporary; systems are scaled, so nothing underflows. The same on every path, bit for bit."""
    return torch.linalg.vector_norm(r.flatten(1), dim=1).square()


@fusable(_fused_advance)
def advance(
    q: Tensor, r: Tensor, p: Tensor, product: Tensor, rz: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One conjugate gradient update of (q, r, p, ||r||^2), in place where that saves memory traffic."""
    alpha = per_sample(rz / curvature, p)
    q.addcmul_(p, alpha)
    r.addcmul_(product, alpha, value=-1)
    new = _square(r)
    return q, r, torch.addcmul(r, p, per_sample(new / rz, p), out=p), new


class ConjugateGradient(IterativeSolver):
    """Conjugate gradients (Hestenes & Stiefel 1952), one product per iteration.

    After k iterations without a preconditioner, residual_k <= 2 sqrt(kappa) q^k residual_0 with
    q = (sqrt(kappa) - 1) / (sqrt(kappa) + 1) in exact arithmetic. The recursed residual drifts from the true one, so
    the latter is computed when the former passes (one product), and the method restarts where it does not.

    Args:
        max_iter: default iteration limit per sample, restarts included.
        preconditioner: ``None``, ``"auto"`` for ``linearization.preconditioner()``, or a symmetric positive definite
            callable ``(B, *image) -> (B, *image)`` close to the inverse Hessians.
    """

    recurrence = _Directions
    residual_is_true = False

    def __init__(self, *, max_iter: int = 2000, preconditioner: Preconditioner = None):
        super().__init__(max_iter=max_iter, preconditioner=preconditioner)
