"""Chebyshev semi-iteration: how many iterations a tolerance needs is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers import _stationary
from bilevel_imaging.linear_solvers._iteration import IterativeSolver, Recurrence
from bilevel_imaging.linear_solvers._systems import Operator, Systems
from bilevel_imaging.tensors import norm, per_sample

# how far a residual may exceed its bound before an estimated L is taken to be wrong
_SLACK = 2.0
# a residual of fewer units of the last place of its terms says nothing about L
_ROUNDING_UNITS = 16.0


class _SemiIteration(Recurrence):
    """``systems.residual`` is the a priori bound 2 q^k / (1 + q^{2k}) R_0, which decides when to stop.

    With theta and delta the center and half the width of [mu, L], the direction d_k = q_{k+1} - q_k obeys
    d_k = delta^2 s_k s_{k-1} d_{k-1} + 2 s_k r_k, s_k = 1 / (2 theta - delta^2 s_{k-1}), d_0 = s_0 r_0, s_0 = 1 / theta
    (Saad, Iterative Methods for Sparse Linear Systems, algorithm 12.1, without its division by delta: mu = L is fine).
    """

    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        constants = operator.linearization.constants
        if constants.strong_convexity is None:
            raise ValueError(
                "Expected a known strong convexity constant: the steps of Chebyshev semi-iteration depend on it. Got "
                "None. Use ConjugateGradient, which needs no constants."
            )
        self.estimated = constants.smoothness is None
        smoothness = constants.smoothness
        if smoothness is None:
            smoothness = _stationary.estimate_smoothness(operator, systems.b)
        self.mu, self.smoothness = constants.strong_convexity.double(), smoothness.double()
        self.s, self.power = torch.zeros_like(self.mu), torch.ones_like(self.mu)
        self.start = systems.residual.double()
        self.d = torch.zeros_like(systems.q)
        self.first = True

    @property
    def rate(self) -> Tensor:
        root_l, root_mu = self.smoothness.sqrt(), self.mu.sqrt()
        return ((root_l - root_mu) / (root_l + root_mu)).clamp(min=0)

    def bound(self) -> Tensor:
        """What the residual of the present iterate is at most."""
        return 2 * self.power / (1 + self.power.square()) * self.start

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, d = self.systems, self.d
        seen = self.start if self.estimated else torch.zeros_like(self.start)
        afresh = torch.full_like(running, self.first)
        if not self.first:
            torch.sub(systems.b, operator.hvp(systems.q), out=systems.r)
            if self.estimated:
                seen, afresh = self._check_smoothness(running)
        self.first = False
        center, delta2 = (self.smoothness + self.mu) / 2, ((self.smoothness - self.mu) / 2).square()
        s = torch.where(afresh, 1 / center, 1 / (2 * center - delta2 * self.s))
        keep, turn = torch.where(afresh, 0.0, delta2 * s * self.s), torch.where(afresh, s, 2 * s)
        self.s, self.power = s, self.power * self.rate
        d.mul_(per_sample(keep.to(d), d)).addcmul_(systems.r, per_sample(turn.to(d), d))
        systems.q.addcmul_(d, per_sample(running.to(d), d))
        # a guess of L is not trusted until a residual has been seen below the tolerance, and the bound does not see a
        # broken Hessian
        finite = d.flatten(1).sum(1).isfinite()
        known = torch.where(finite, torch.maximum(self.bound(), seen), torch.nan)
        systems.residual = torch.where(running, known.to(systems.residual), systems.residual)

    def _check_smoothness(self, running: Tensor) -> tuple[Tensor, Tensor]:
        """Double L where the residual breaks the bound that holds for the right one.

        Returns the residual, 0 where it is rounding errors alone, and which samples start afresh.
        """
        systems = self.systems
        residual = norm(systems.r).double()
        terms = self.smoothness * norm(systems.q) + norm(systems.b)
        residual = torch.where(residual <= _ROUNDING_UNITS * torch.finfo(systems.b.dtype).eps * terms, 0.0, residual)
        broken = running & ~(residual <= _SLACK * self.bound())
        self.smoothness = torch.where(broken, 2 * self.smoothness, self.smoothness)
        self.start = torch.where(broken, residual, self.start)
        self.power = torch.where(broken, 1.0, self.power)
        return residual, broken


class Chebyshev(IterativeSolver):
    """Chebyshev semi-iteration (Golub & Varga 1961), one product per iteration and no inner products.

    With q = (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)), residual_k <= 2 q^k / (1 + q^{2k}) residual_0, the best that
    holds for every spectrum in [mu, L]. The iteration runs until that bound is below the tolerance; the residual is
    then measured, once. The number of iterations depends on the tolerance, the constants and the residual at the start
    alone; a residual above the tolerance afterwards (rounding) is a reason to start again from there.

    Where L is not known it is estimated by power iteration; the residual is then measured in every iteration, L doubled
    when it breaks the bound, and the iteration goes on until the measured residual too is below the tolerance.

    Args:
        max_iter: default iteration limit per sample.

    Raises:
        ValueError: (from ``solve``) if the strong convexity constant is not known.
    """

    recurrence = _SemiIteration
    residual_is_true = False

    def __init__(self, *, max_iter: int = 2000):
        super().__init__(max_iter=max_iter)
