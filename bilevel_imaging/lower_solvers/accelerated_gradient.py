"""Nesterov's accelerated gradient method for strongly convex energies (FISTA without a proximal part)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bilevel_imaging.checks import boolean
from bilevel_imaging.linear_solvers._momentum import Real, check_momentum, constant_momentum, momentum_step
from bilevel_imaging.lower_solvers._iteration import IterativeSolver, Run, State
from bilevel_imaging.lower_solvers._smoothness import grow_smoothness, start_smoothness
from bilevel_imaging.tensors import inner, per_sample

__all__ = ["AcceleratedGradient", "constant_schedule", "momentum_step", "schedule"]


def schedule(mu: Real, L: Real, k: int) -> tuple[Real, Real]:
    """Step and momentum of iteration k = 0, 1, ... of

        z = x_k + momentum * (x_k - x_{k-1}),   x_{k+1} = z - step * G(z),   x_{-1} = x_0.

    Args:
        mu: strong convexity, float or ``(B,)``.
        L: smoothness, float or ``(B,)``.
        k: iteration; runs the recursion k + 1 times, see :func:`momentum_step`.

    Returns:
        step 1 / L and the momentum (-1 for k = 0, where it multiplies zero, then 0, then towards
        (1 - sqrt(q)) / (1 + sqrt(q))), of the type of the constants.
    """
    q = mu / L
    t, momentum = 0 * q, 0 * q
    for _ in range(k + 1):
        t, momentum = momentum_step(t, q)
    return 1 / L, momentum


def constant_schedule(mu: Real, L: Real, k: int) -> tuple[Real, Real]:
    """Step and momentum of the same iteration with constant momentum (Nesterov 2018, Section 2.2.1).

    Args:
        mu: strong convexity, float or ``(B,)``.
        L: smoothness, float or ``(B,)``.
        k: iteration; the schedule is constant.

    Returns:
        step 1 / L and momentum (1 - sqrt(q)) / (1 + sqrt(q)), q = mu / L, of the type of the constants.
    """
    return 1 / L, constant_momentum(mu / L)


class AcceleratedGradient(IterativeSolver):
    """Strongly convex FISTA: x_{k+1} = z_k - G(z_k) / L, z_{k+1} = x_{k+1} + momentum (x_{k+1} - x_k).

    ||x_k - x*||^2 <= kappa min((1 + sqrt(q)) (1 - sqrt(q))^k, 4 / (k + 1)^2) ||x_0 - x*||^2 with q = mu / L
    (Chambolle & Pock 2016, Theorem 4.10 and Alg. 5). With constant momentum, g(x_k) - g(x*) <=
    (1 - sqrt(q))^k (g(x_0) - g(x*) + mu / 2 ||x_0 - x*||^2) (Nesterov 2018, Section 2.2.1). The gradients are measured
    at z_k, so the points returned and certified are the z_k. Where mu is not known, q = 0 with varying momentum and
    restarts; where L is not known, it is estimated.

    Args:
        momentum: "varying" or "constant".
        max_iter: default iteration limit per sample.
        restart: drop the momentum of a sample whenever it points uphill, <G(z_k), x_{k+1} - x_k> > 0 (O'Donoghue &
            Candes 2015, gradient scheme): helps if mu is far below the curvature met. Always on where mu is not known.
    """

    extrapolates_gradient: ClassVar[bool] = True
    schedule = staticmethod(schedule)

    def __init__(self, *, momentum: str = "varying", max_iter: int = 10_000, restart: bool = False):
        super().__init__(max_iter)
        self.momentum = check_momentum(momentum)
        self.restart = boolean("restart", restart)

    def _start(self, run: Run, state: State) -> State:
        start_smoothness(run, state)
        state["z"] = state["x"]
        # z_0 = x_0 used up t_0 = 0
        state["t"] = torch.ones_like(state["L"])
        state["mu"] = run.strong_convexity
        state["restarts"] = (run.strong_convexity == 0) | self.restart
        return state

    def _propose(self, run: Run, state: State) -> Tensor:
        z, x, g = state["z"], state["x"], state["g"]
        x_next = torch.addcmul(z, per_sample(1 / state["L"], z), g, value=-1)
        advance = x_next - x
        state["x"] = x_next
        if self.restart or not run.knows_strong_convexity:
            uphill = state["restarts"] & (inner(g, advance) > 0)
            state["t"] = torch.where(uphill, 1.0, state["t"])
            momentum = torch.where(uphill, 0.0, self._momentum(state))
        else:
            momentum = self._momentum(state)
        return torch.addcmul(x_next, per_sample(momentum, z), advance)

    def _momentum(self, state: State) -> Tensor:
        """The momentum of this iteration, ``(b,)``; advances the recursion of the varying one."""
        q = (state["mu"] / state["L"]).clamp(max=1)
        state["t"], momentum = momentum_step(state["t"], q)
        if self.momentum == "constant":
            momentum = torch.where(state["mu"] > 0, constant_momentum(q), momentum)
        return momentum

    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        if not run.knows_smoothness:
            grew = grow_smoothness(state, point - state["z"], gradient - state["g"])
            state["t"] = torch.where(grew, 1.0, state["t"])
        state["z"], state["g"] = point, gradient
        return state
