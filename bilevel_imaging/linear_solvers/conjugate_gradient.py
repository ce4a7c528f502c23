"""Conjugate gradients: the linear solver of choice, needs no constants."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.kernels import fusable
from bilevel_imaging.linear_solvers._iteration import IterativeSolver, Recurrence
from bilevel_imaging.linear_solvers._systems import INDEFINITE, NOT_FINITE, Operator, PreconditionerChoice, Systems
from bilevel_imaging.linear_solvers.base import LinearSolution
from bilevel_imaging.tensors import inner, per_sample

# mu enters the recursion reduced by this factor, and is trusted while rounding (eps * L) is below a small part of it:
# rounded conjugate gradients behave like exact ones for eigenvalues smeared out by that much (Greenbaum 1989)
_REDUCED, _TRUSTED = 0.9, 1e-3


class _Directions(Recurrence):
    memory = ("p", "rz", "radau")

    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        z = systems.r if operator.precondition is None else operator.precondition(systems.r)
        self.p = z.clone()
        self.rz = systems.residual.square() if operator.precondition is None else inner(systems.r, z)
        self.scratch = torch.empty_like(self.p)
        self.lowest = self._lowest_eigenvalue(operator)
        # Gauss-Radau: ||r||_{H^-1}^2 <= radau <r, P^-1 r>
        self.radau = None if self.lowest is None else 1 / self.lowest

    @staticmethod
    def _lowest_eigenvalue(operator: Operator) -> Tensor | None:
        """Bound of lambda_min(P^-1 H), a little reduced; ``None`` where the energy norm can't be bounded."""
        constants, p = operator.linearization.constants, operator.precondition
        mu, smoothness = constants.strong_convexity, constants.smoothness
        lowest = mu if p is None else getattr(p, "lowest", None)
        if mu is None or smoothness is None or lowest is None:
            return None
        like = operator.linearization.grad
        trusted = torch.finfo(like.dtype).eps * smoothness < _TRUSTED * mu
        return torch.where(trusted, _REDUCED * lowest, torch.nan).to(like.dtype)

    def _bound_energy(self, alpha: Tensor, beta: Tensor, running: Tensor | None) -> None:
        """Golub & Meurant's recursion; NaN (a mu that is not trusted) becomes inf."""
        if self.radau is None:
            return
        gap = self.radau - alpha
        gap = torch.where(gap > 0, gap, torch.nan)  # positive in exact arithmetic
        radau = gap / (self.lowest * gap + beta)
        energy = (radau * self.rz).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)
        if running is None:
            self.radau, self.systems.energy = radau, energy
        else:
            self.radau = torch.where(running, radau, self.radau)
            self.systems.energy = torch.where(running, energy, self.systems.energy)

    def finish(self, operator: Operator, max_iter: int, *, check: bool) -> bool:
        systems, stencil = self.systems, operator.stencil()
        if stencil is None or not native.serves(systems.q):
            return False
        systems.q, systems.r, self.p = systems.q.contiguous(), systems.r.contiguous(), self.p.contiguous()
        at = native.SystemStates(
            systems.residual,
            systems.target,
            self.rz,
            self.radau,
            self.lowest,
            systems.energy,
            systems.status,
            systems.iterations,
        )
        stencil.solve(systems.q, systems.r, self.p, at, max_iter, systems.b.contiguous() if check else None)
        systems.residual, systems.energy = at.residual.to(systems.residual), at.energy.to(systems.energy)
        self.drift = at.drift.to(systems.energy) if check else None
        systems.status, systems.iterations = at.status.clone(), at.iterations.clone()
        self.rz, self.radau = at.rz.to(self.rz), None if self.radau is None else at.radau.to(self.radau)
        return True

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, p = self.systems, self.p
        product = operator.hvp(p)
        if operator.precondition is None and native.serves(systems.q, product):
            self._native_step(product.contiguous(), running)
            return
        curvature = torch.mul(p, product, out=self.scratch).flatten(1).sum(1)
        if self.everyone and operator.precondition is None and bool((torch.minimum(curvature, self.rz) > 0).all()):
            self._plain_step(product, curvature)
            return
        # rz <= 0 means that the preconditioner is not positive definite; comparisons with NaN are false
        advance = running & (curvature > 0) & (self.rz > 0)
        failure = torch.where((curvature + self.rz).isfinite(), INDEFINITE, NOT_FINITE)
        systems.status = torch.where(running & ~advance, failure, systems.status)
        step = torch.where(advance, self.rz / curvature, 0.0)
        alpha = per_sample(step, p)
        systems.q.addcmul_(p, alpha)
        systems.r.addcmul_(product, alpha, value=-1)
        if operator.precondition is None:
            z, rz = systems.r, _square(systems.r)
            square = rz
        else:
            z = operator.precondition(systems.r)
            rz, square = inner(systems.r, z), _square(systems.r)
        beta = torch.where(advance, rz / self.rz, 0.0)
        # samples that have stopped keep their direction: a resumed run needs it
        self.p = torch.where(per_sample(advance, p), torch.addcmul(z, p, per_sample(beta, p)), p)
        self.rz = torch.where(advance, rz, self.rz)
        systems.residual = torch.where(advance, square.sqrt(), systems.residual)
        self._bound_energy(step, beta, advance)

    def _native_step(self, product: Tensor, running: Tensor) -> None:
        """The step without a preconditioner in compiled code, for those samples that run."""
        systems = self.systems
        systems.q, systems.r, self.p = systems.q.contiguous(), systems.r.contiguous(), self.p.contiguous()
        curvature, before = native.inner(self.p, product), self.rz.double()
        advance = running & (curvature > 0) & (before > 0)
        failure = torch.where((curvature + before).isfinite(), INDEFINITE, NOT_FINITE)
        systems.status = torch.where(running & ~advance, failure, systems.status)
        step = torch.where(advance, before / curvature, torch.nan)
        square = native.advance(systems.q, systems.r, self.p, product, step, before)
        beta = torch.where(advance, square / before, 0.0).to(self.rz)
        self.rz = torch.where(advance, square.to(self.rz), self.rz)
        systems.residual = torch.where(advance, square.sqrt().to(systems.residual), systems.residual)
        self._bound_energy(torch.where(advance, step, 0.0).to(self.rz), beta, advance)

    def _plain_step(self, product: Tensor, curvature: Tensor) -> None:
        """The same step without masks and preconditioner: nothing in the batch has stopped."""
        systems, before = self.systems, self.rz
        systems.q, systems.r, self.p, self.rz = advance(systems.q, systems.r, self.p, product, before, curvature)
        systems.residual = self.rz.sqrt()
        self._bound_energy(before / curvature, self.rz / before, None)


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

    Where mu is known, and a bound of lambda_min(P^-1 H) if there is a preconditioner P, the coefficients bound the
    energy norm of the error for free (Gauss-Radau quadrature; Golub & Meurant 1994, Meurant & Tichy 2013):
    ``energy_norm``.

    Args:
        max_iter: default iteration limit per sample, restarts included.
        preconditioner: ``None``, ``"auto"`` for ``linearization.preconditioner()``, or a symmetric positive definite
            callable ``(B, *image) -> (B, *image)`` close to the inverse Hessians.
    """

    recurrence = _Directions
    residual_is_true = False

    def __init__(self, *, max_iter: int = 2000, preconditioner: PreconditionerChoice = None):
        super().__init__(max_iter=max_iter, preconditioner=preconditioner)

    def begin(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
    ) -> LinearSolution:
        return self._solve(linearization, rhs, residual_tol, q0=q0, check=False)
