"""The minimal residual method: conjugate gradients' sibling whose residual never grows."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers._iteration import IterativeSolver, Recurrence
from bilevel_imaging.linear_solvers._systems import STAGNATED, Operator, Systems
from bilevel_imaging.tensors import inner, per_sample, squared_norm

# an entry of fewer units of the last place of the Hessian is made of rounding errors
_SINGULAR_UNITS = 16.0


class _Lanczos(Recurrence):
    """Lanczos vectors v, and the QR factorization of their tridiagonal matrix by Givens rotations (cosine, sine).

    Names as in Paige & Saunders: the next column of the triangular factor is (epsilon, delta, gamma), ``corner`` is
    the entry that the last rotation has left on the diagonal, w are the columns of V R^-1.
    """

    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        size, zero = systems.residual, torch.zeros_like(systems.residual)
        self.v = systems.r * per_sample(_reciprocal(size), systems.r)
        self.v_before, self.w, self.w_before = (torch.zeros_like(self.v) for _ in range(3))
        self.cosine, self.sine, self.beta = -torch.ones_like(zero), zero, zero
        self.corner, self.epsilon, self.left = zero, zero, size.clone()
        self.largest = zero  # entry of the tridiagonal matrix so far, of the size of the Hessian

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, v = self.systems, self.v
        following = operator.hvp(v).addcmul(self.v_before, per_sample(self.beta, v), value=-1)
        alpha = inner(v, following)
        following.addcmul_(v, per_sample(alpha, v), value=-1)
        beta = squared_norm(following).sqrt()
        delta = self.cosine * self.corner + self.sine * alpha
        corner = self.sine * self.corner - self.cosine * alpha
        gamma = torch.hypot(corner, beta)
        self.largest = torch.maximum(self.largest, torch.maximum(alpha.abs(), beta))
        # the Hessian is singular on a Krylov space that has nothing more to give
        usable = ~(gamma <= _SINGULAR_UNITS * torch.finfo(gamma.dtype).eps * self.largest)
        systems.status = torch.where(running & ~usable, STAGNATED, systems.status)
        # 0 in the vectors of samples that have stopped
        inverse = torch.where(running & usable, _reciprocal(gamma), 0.0)
        w = v.addcmul(self.w_before, per_sample(self.epsilon, v), value=-1)
        w.addcmul_(self.w, per_sample(delta, v), value=-1).mul_(per_sample(inverse, v))
        self.epsilon, self.corner = self.sine * beta, -self.cosine * beta
        self.cosine = torch.where(usable, corner * _reciprocal(gamma), 1.0)
        self.sine = torch.where(usable, beta * _reciprocal(gamma), 0.0)
        along, left = self.cosine * self.left, self.sine * self.left
        advance = running & usable
        systems.q.addcmul_(w, per_sample(torch.where(advance, along, 0.0), v))
        following.mul_(per_sample(torch.where(advance, _reciprocal(beta), 0.0), v))
        # r_k = sine^2 r_{k-1} - left cosine v_{k+1}
        systems.r.mul_(per_sample(torch.where(advance, self.sine.square(), 1.0), v))
        systems.r.addcmul_(following, per_sample(torch.where(advance, -left * self.cosine, 0.0), v))
        systems.residual = torch.where(advance, left, systems.residual)
        self.left, self.beta = left, beta
        self.w_before, self.w = self.w, w
        self.v_before, self.v = v, following


def _reciprocal(a: Tensor) -> Tensor:
    """1 / a, and 0 for 0."""
    return torch.where(a == 0, 0.0, 1 / a)


class MINRES(IterativeSolver):
    """The minimal residual method (Paige & Saunders 1975, "Solution of sparse indefinite systems of linear equations").

    Every iterate has the smallest residual of its Krylov space, so that the residual never grows; on positive definite
    systems residual_k <= 2 q^k / (1 + q^{2k}) residual_0, q = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), without the factor
    sqrt(kappa) of conjugate gradients. Indefinite systems are solved too. One product per iteration, and one at the end
    for the true residual; restarts where rounding has driven the two apart.

    Args:
        max_iter: default iteration limit per sample, restarts included.
    """

    recurrence = _Lanczos
    residual_is_true = False

    def __init__(self, *, max_iter: int = 2000):
        super().__init__(max_iter=max_iter)
