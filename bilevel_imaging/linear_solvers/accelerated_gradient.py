"""Accelerated gradients on 1/2 <q, H q> - <b, q>: what unrolling them with frozen derivatives computes."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers._iteration import IterativeSolver
from bilevel_imaging.linear_solvers._momentum import check_momentum, constant_momentum, momentum_step
from bilevel_imaging.linear_solvers._stationary import StationaryRecurrence
from bilevel_imaging.linear_solvers._systems import Operator, Systems
from bilevel_imaging.tensors import per_sample

# how far the residual may exceed its bound before an estimated L is taken to be wrong
_SLACK = 2.0


class _Accelerated(StationaryRecurrence):
    """The gradient at the point ahead is a combination of the last two residuals: no product is needed for it."""

    def __init__(self, operator: Operator, systems: Systems):
        if operator.linearization.constants.strong_convexity is None:
            raise ValueError(
                "Expected a known strong convexity constant: the momentum depends on it. Got None. "
                "Use ConjugateGradient, which needs no constants."
            )
        super().__init__(operator, systems)
        # differences of the last two iterates and of their residuals; the start is q_previous = q
        self.advance = torch.zeros_like(systems.q)
        self.change = torch.zeros_like(systems.r)
        self.steps = torch.zeros_like(systems.iterations)
        self.reference = systems.residual.clone()

    def ratio(self) -> Tensor:
        """mu / L, ``(A,)``."""
        return (self.strong_convexity / self.smoothness).clamp(max=1)

    @abc.abstractmethod
    def settling(self) -> Tensor:
        """Iterations in which the bound of the residual falls by 1 / e once it falls, ``(A,)``."""

    @abc.abstractmethod
    def momentum(self) -> Tensor:
        """Momentum of the next step, ``(A,)``."""

    @abc.abstractmethod
    def residual_factor(self) -> Tensor:
        """Bound of residual / reference after ``steps`` steps, ``(A,)``."""

    def window_length(self) -> Tensor:
        # as for heavy ball: a few times the iterations in which the bound may rise before it falls
        m = self.settling()
        return m * (6 + 2 * m.log())

    def step(self, operator: Operator, running: Tensor) -> None:
        systems = self.systems
        momentum = per_sample(self.momentum(), systems.q)
        step = per_sample(1 / self.smoothness, systems.q)
        ahead = torch.addcmul(systems.r, momentum, self.change)
        self.advance = torch.addcmul(momentum * self.advance, step, ahead)
        systems.q = torch.where(per_sample(running, systems.q), systems.q + self.advance, systems.q)
        before = systems.r.clone()
        self.measure(operator, running)
        torch.sub(systems.r, before, out=self.change)
        self.steps += 1
        if self.estimated:
            self._check_smoothness(running)

    def _check_smoothness(self, running: Tensor) -> None:
        """Start afresh with a larger L where the residual breaks the bound that holds for the right one."""
        residual = self.systems.residual
        broken = self.back_off(running & ~(residual <= _SLACK * self.residual_factor() * self.reference))
        self.reference = torch.where(broken, residual, self.reference)
        self.restart(broken)

    def restart(self, mask: Tensor) -> None:
        """Forget the momentum of the samples in ``mask``."""
        self.steps = torch.where(mask, 0, self.steps)
        for vector in (self.advance, self.change):
            vector.mul_(per_sample(~mask, vector))


class _Constant(_Accelerated):
    def settling(self) -> Tensor:
        return self.ratio().rsqrt()

    def momentum(self) -> Tensor:
        return constant_momentum(self.ratio())

    def residual_factor(self) -> Tensor:
        root = self.ratio().sqrt()
        return (1 + self.steps * root) * (1 - root) ** self.steps


class _Varying(_Accelerated):
    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        self.t = torch.zeros_like(self.smoothness)

    def settling(self) -> Tensor:
        return 2 * self.ratio().rsqrt()

    def momentum(self) -> Tensor:
        self.t, momentum = momentum_step(self.t, self.ratio())
        return momentum

    def residual_factor(self) -> Tensor:
        q = self.ratio()
        linear = (1 + q.sqrt()) * (1 - q.sqrt()) ** self.steps
        return (torch.minimum(linear, 4 / (self.steps + 1.0).square()) / q).sqrt()

    def restart(self, mask: Tensor) -> None:
        super().restart(mask)
        self.t = torch.where(mask, 0.0, self.t)


class AcceleratedGradient(IterativeSolver):
    """z = q + momentum (q - q_previous), q+ = z + (b - H z) / L: Nesterov's method, one product per iteration.

    With constant momentum (1 - sqrt(mu/L)) / (1 + sqrt(mu/L)), residual_k <= (1 + k s) (1 - s)^k residual_0 with
    s = sqrt(mu/L), attained at the eigenvalue mu. With the varying one of strongly convex FISTA (Chambolle & Pock 2016,
    Alg. 5), residual_k^2 <= kappa min((1 + s) (1 - s)^k, 4 / (k + 1)^2) residual_0^2 (from their Theorem 4.10,
    eigenvalue by eigenvalue). From q = 0, K iterations followed by -J^T q are reverse-mode differentiation of K steps
    of the lower-level solver of the same name with derivatives frozen at the last iterate (Ehrhardt & Roberts 2023).
    Where L is not known it is estimated by power iteration and doubled when the residual breaks these bounds.

    Args:
        momentum: "varying" or "constant".
        max_iter: default iteration limit per sample.

    Raises:
        ValueError: another momentum; (from ``solve``) if the strong convexity constant is not known.
    """

    residual_is_true = True

    def __init__(self, *, momentum: str = "varying", max_iter: int = 2000):
        super().__init__(max_iter=max_iter)
        self.momentum = check_momentum(momentum)
        self.recurrence = _Varying if momentum == "varying" else _Constant
