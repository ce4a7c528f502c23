"""Nesterov's accelerated gradient method for strongly convex energies (FISTA without a proximal part)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import IterativeSolver, Run, State
from bilevel_imaging.lower_solvers._smoothness import grow_smoothness, start_smoothness
from bilevel_imaging.tensors import inner, per_sample

__all__ = ["AcceleratedGradient", "momentum_step", "schedule"]


def momentum_step(t: float | Tensor, q: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """One step t_k -> (t_{k+1}, momentum_k) of the recursion, q = mu / L in [0, 1] (Chambolle & Pock 2016, Alg. 5).

    t_{k+1} = (1 - q t_k^2 + sqrt((1 - q t_k^2)^2 + 4 t_k^2)) / 2 and
    momentum_k = (t_k - 1) (1 - q t_{k+1}) / (t_{k+1} (1 - q)), from t_0 = 0. Use it to list a schedule in linear time.
    """
    a = 1 - q * t * t
    t_next = (a + (a * a + 4 * t * t) ** 0.5) / 2
    # the tiny number makes 0 / 0 at q = 1 a zero momentum and is lost in rounding otherwise
    return t_next, (t - 1) * (1 - q * t_next) / (t_next * (1 - q + 1e-30))


def schedule(mu: float | Tensor, L: float | Tensor, k: int) -> tuple[float | Tensor, float | Tensor]:
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


class AcceleratedGradient(IterativeSolver):
    """Strongly convex FISTA: x_{k+1} = z_k - G(z_k) / L, z_{k+1} = x_{k+1} + momentum (x_{k+1} - x_k).

    ||x_k - x*||^2 <= kappa min((1 + sqrt(q)) (1 - sqrt(q))^k, 4 / (k + 1)^2) ||x_0 - x*||^2 with q = mu / L
    (Chambolle & Pock 2016, Theorem 4.10 and Alg. 5). The gradients are measured at z_k, so the points returned and
    certified are the z_k. Where mu is not known, q = 0 with restarts; where L is not known, it is estimated.

    Args:
        max_iter: default iteration limit per sample.
        restart: drop the momentum of a sample whenever it points uphill, <G(z_k), x_{k+1} - x_k> > 0 (O'Donoghue &
            Candes 2015, gradient scheme): helps if mu is far below the curvature met. Always on where mu is not known.
    """

    extrapolates_gradient: ClassVar[bool] = True
    schedule = staticmethod(schedule)

    def __init__(self, *, max_iter: int = 10_000, restart: bool = False):
        super().__init__(max_iter)
        self.restart = restart

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
        if self.restart or not run.knows_strong_convexity:
            uphill = state["restarts"] & (inner(g, advance) > 0)
            state["t"] = torch.where(uphill, 1.0, state["t"])
        state["t"], momentum = momentum_step(state["t"], (state["mu"] / state["L"]).clamp(max=1))  # type: ignore[assignment]
        state["x"] = x_next
        return torch.addcmul(x_next, per_sample(momentum, z), advance)

    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        if not run.knows_smoothness:
            grew = grow_smoothness(state, point - state["z"], gradient - state["g"])
            state["t"] = torch.where(grew, 1.0, state["t"])
        state["z"], state["g"] = point, gradient
        return state
