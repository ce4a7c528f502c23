"""Gradient descent with the optimal constant step 2 / (L + mu)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import IterativeSolver, Run, State
from bilevel_imaging.lower_solvers._smoothness import grow_smoothness, start_smoothness
from bilevel_imaging.tensors import per_sample

__all__ = ["GradientDescent", "schedule"]


def schedule(mu: float | Tensor, L: float | Tensor, k: int) -> tuple[float | Tensor, float | Tensor]:
    """Step and momentum of iteration k = 0, 1, ...: x_{k+1} = x_k - step * G(x_k); the momentum is 0.

    Args:
        mu: strong convexity, float or ``(B,)``.
        L: smoothness, float or ``(B,)``.
        k: iteration; the schedule is constant.

    Returns:
        step 2 / (L + mu) and momentum 0, of the type of the constants.
    """
    return 2 / (L + mu), 0 * L


class GradientDescent(IterativeSolver):
    """x_{k+1} = x_k - 2 / (L + mu) G(x_k).

    Both ||x_k - x*|| and ||G(x_k)|| shrink by q = (L - mu) / (L + mu) per iteration, on every mu-strongly convex and
    L-smooth energy (Nesterov 2018, Theorem 2.1.15; the map is q-Lipschitz). Where mu or L is not known the step is
    1 / L, with L estimated if necessary.

    Args:
        max_iter: default iteration limit per sample.
    """

    extrapolates_gradient: ClassVar[bool] = False
    schedule = staticmethod(schedule)

    def __init__(self, *, max_iter: int = 10_000):
        super().__init__(max_iter)

    def _start(self, run: Run, state: State) -> State:
        start_smoothness(run, state)
        known = (run.strong_convexity > 0) & ~state["estimated"]
        # mu = L gives the step 1 / L: safe where 2 / (L + mu) relies on something not known
        state["step"], _ = schedule(torch.where(known, run.strong_convexity, state["L"]), state["L"], 0)  # type: ignore[assignment]
        return state

    def _propose(self, run: Run, state: State) -> Tensor:
        return torch.addcmul(state["x"], per_sample(state["step"], state["x"]), state["g"], value=-1)

    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        if not run.knows_smoothness:
            grow_smoothness(state, point - state["x"], gradient - state["g"])
            state["step"] = torch.where(state["estimated"], 1 / state["L"], state["step"])
        state["x"], state["g"] = point, gradient
        return state
