"""Heavy ball on 1/2 <q, H q> - <b, q>: what unrolling heavy ball with frozen derivatives computes."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers._iteration import IterativeSolver
from bilevel_imaging.linear_solvers._stationary import StationaryRecurrence
from bilevel_imaging.linear_solvers._systems import Operator, Systems
from bilevel_imaging.tensors import per_sample

# how far the residual may exceed its bound before an estimated L is taken to be wrong
_SLACK = 2.0


class _Momentum(StationaryRecurrence):
    def __init__(self, operator: Operator, systems: Systems):
        if operator.linearization.constants.strong_convexity is None:
            raise ValueError(
                "Expected a known strong convexity constant: the momentum of heavy ball depends on it. Got None. "
                "Use ConjugateGradient, which needs no constants."
            )
        super().__init__(operator, systems)
        # (q - q_previous) / alpha; the start is q_previous = q
        self.velocity = torch.zeros_like(systems.q)
        self.steps = torch.zeros_like(systems.iterations)
        self.reference = systems.residual.clone()

    def window_length(self) -> Tensor:
        # the bound of the residual first rises to about 2m/e, m = 1/(1 - rate), before it falls like rate^k
        m = 1 / (1 - self._rate())
        return m * (6 + 2 * m.log())

    def _rate(self) -> Tensor:
        root_l, root_mu = self.smoothness.sqrt(), self.strong_convexity.sqrt()
        return ((root_l - root_mu) / (root_l + root_mu)).clamp(min=0)

    def step(self, operator: Operator, running: Tensor) -> None:
        systems = self.systems
        alpha = 4 / (self.smoothness.sqrt() + self.strong_convexity.sqrt()).square()
        beta = self._rate().square()
        torch.addcmul(systems.r, self.velocity, per_sample(beta, systems.q), out=self.velocity)
        systems.q.addcmul_(self.velocity, per_sample(torch.where(running, alpha, 0.0), systems.q))
        self.measure(operator, running)
        if self.estimated:
            self._check_smoothness(running)

    def _check_smoothness(self, running: Tensor) -> None:
        """Start afresh with a larger L where the residual breaks the bound that holds for the right one."""
        residual, rate = self.systems.residual, self._rate()
        self.steps += 1
        bound = (1 + self.steps * (1 + rate)) * rate**self.steps * self.reference
        broken = self.back_off(running & ~(residual <= _SLACK * bound))
        self.reference = torch.where(broken, residual, self.reference)
        self.steps = torch.where(broken, 0, self.steps)
        self.velocity.mul_(per_sample(~broken, self.velocity))


class HeavyBall(IterativeSolver):
    """q+ = q + alpha (b - H q) + beta (q - q_previous) with Polyak's constants, one product per iteration.

    alpha = 4 / (sqrt(L) + sqrt(mu))^2, beta = rate^2, rate = (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)), and
    residual_k <= (1 + k (1 + rate)) rate^k residual_0. From q = 0, K iterations followed by -J^T q are reverse-mode
    differentiation of K heavy ball steps with derivatives frozen at the last iterate (Ehrhardt & Roberts 2023). Where
    L is not known it is estimated by power iteration and doubled when the residual breaks that bound.

    Args:
        max_iter: default iteration limit per sample.

    Raises:
        ValueError: (from ``solve``) if the strong convexity constant is not known.
    """

    recurrence = _Momentum
    residual_is_true = True

    def __init__(self, *, max_iter: int = 2000):
        super().__init__(max_iter=max_iter)
