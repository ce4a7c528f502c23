"""Polyak's heavy ball with a safeguard: textbook on quadratics, convergent on every smooth convex energy."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import IterativeSolver, Run, State
from bilevel_imaging.lower_solvers._smoothness import grow_smoothness, measure_smoothness, start_smoothness
from bilevel_imaging.tensors import per_sample

__all__ = ["HeavyBall", "schedule"]

# condition number assumed for the momentum where mu is not known; it affects the speed only
_GUESSED_CONDITION = 1000.0
# every failure raises the strong convexity pretended for step and momentum by this factor, up to gradient descent
_DAMPING = 4.0


def schedule(mu: float | Tensor, L: float | Tensor, k: int) -> tuple[float | Tensor, float | Tensor]:
    """Step and momentum of iteration k = 0, 1, ... of

        x_{k+1} = x_k - step * G(x_k) + momentum * (x_k - x_{k-1}),   x_{-1} = x_0.

    Args:
        mu: strong convexity, float or ``(B,)``.
        L: smoothness, float or ``(B,)``.
        k: iteration; the schedule is constant.

    Returns:
        step 4 / (sqrt(L) + sqrt(mu))^2 and momentum ((sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)))^2 (Polyak 1964).
    """
    small, large = mu**0.5, L**0.5
    return 4 / (large + small) ** 2, ((large - small) / (large + small)) ** 2


class HeavyBall(IterativeSolver):
    """x_{k+1} = x_k - step G(x_k) + momentum (x_k - x_{k-1}) with Polyak's constants.

    On quadratics ||G(x_k)|| <= (1 + k (1 + q)) q^k ||G(x_0)||, q = (sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)), and the
    iterates are the textbook ones. On other energies the method may cycle for ever (Lessard, Recht & Packard 2016,
    Section 4.6). So each sample is held to a weak form of that bound: if ||G|| exceeds its largest value, or has not
    halved when the bound promises a tenth, the sample starts afresh where it is, without velocity and with less
    momentum: Polyak's constants for 4, 16, ... times mu, which end in gradient descent with step 1 / L. No quadratic
    with spectrum in [mu, L] ever triggers this, apart from rounding.

    Where mu is not known L / 1000 takes its place in step and momentum; where L is not known, it is estimated.

    Args:
        max_iter: default iteration limit per sample.
    """

    extrapolates_gradient: ClassVar[bool] = False
    schedule = staticmethod(schedule)

    def __init__(self, *, max_iter: int = 10_000):
        super().__init__(max_iter)

    def _start(self, run: Run, state: State) -> State:
        start_smoothness(run, state)
        state["previous"] = state["x"]
        mu = run.strong_convexity
        state["mu"] = torch.minimum(torch.where(mu > 0, mu, state["L"] / _GUESSED_CONDITION), state["L"])
        state["pretended"] = state["mu"]
        # a guessed mu promises no rate: then any progress that is not lost in cycling is enough
        state["share"] = torch.where(mu > 0, 0.5, 0.9).to(mu)
        state["size"] = run.grad_norm
        state.update(_settings(state, run.grad_norm, run.count))
        return state

    def _propose(self, run: Run, state: State) -> Tensor:
        x, previous = state["x"], state["previous"]
        moved = torch.addcmul(x, per_sample(state["momentum"], x), x - previous)
        return torch.addcmul(moved, per_sample(state["step"], x), state["g"], value=-1)

    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        previous, previous_gradient = state["x"], state["g"]
        state["previous"], state["x"], state["g"] = previous, point, gradient
        # from the deadline to the renewal every norm counts: a cycle could hide its peaks from a single look
        late = (state["deadline"] <= run.count) & (size > state["target"])
        failed = (size > state["ceiling"]) | late
        if not run.knows_smoothness:
            failed = failed | grow_smoothness(state, point - previous, gradient - previous_gradient)
        due = state["renewal"] <= run.count
        if point.is_cuda or bool((due | failed).any()):
            self._safeguard(run, state, size, due, failed)
        state["size"] = size
        return state

    @staticmethod
    def _safeguard(run: Run, state: State, size: Tensor, due: Tensor, failed: Tensor) -> None:
        """New goals for the samples that met theirs (``due``); a fresh start with less momentum for the ``failed``."""
        if not run.knows_smoothness:
            measure_smoothness(run, state, failed)
        damped = torch.minimum(_DAMPING * state["pretended"], state["L"])
        state["pretended"] = torch.where(failed, damped, state["pretended"])
        state["previous"] = torch.where(per_sample(failed, state["x"]), state["x"], state["previous"])
        reference = torch.where(failed, size, torch.maximum(size, state["size"]))
        for name, fresh in _settings(state, reference, run.count).items():
            state[name] = torch.where(due | failed, fresh, state[name])
        # cycling is cured here; it is not a rounding floor
        run.last_at = torch.where(failed, run.count, run.last_at)


def _settings(state: State, size: Tensor, count: int) -> State:
    """Step, momentum and what the safeguard expects of them after gradient norms up to ``size``, all ``(b,)``.

    With q = sqrt(momentum), a quadratic obeys ||G_{k+j}|| <= (1 + j (1 + q)) q^j max(||G_k||, ||G_{k-1}||), as the
    Chebyshev form of the recursion shows. "ceiling" is the maximum over j; from the "deadline" on
    undamped heavy ball stays below ``size / 10``, and "target" leaves a margin.
    """
    step, momentum = schedule(state["pretended"], state["L"], 0)
    # largest (1 + j (1 + q)) q^j over real j >= 0; increasing in q, so that q may be bounded below
    q = momentum.sqrt().clamp_min(1e-3)
    j = (-1 / q.log() - 1 / (1 + q)).clamp_min(0)
    growth = (1 + j * (1 + q)) * q**j
    _, undamped = schedule(state["mu"], state["L"], 0)
    gap = (1 - undamped.sqrt()).clamp_min(torch.finfo(step.dtype).eps)
    # u = gap * iterations with (1 + 2 u / gap) exp(-u) = 1/10, by fixed-point iteration
    u = torch.full_like(gap, math.log(10))
    for _ in range(5):
        u = math.log(10) + (1 + 2 * u / gap).log()
    patience = ((u + 0.5) / gap).ceil()
    return {
        "step": step,
        "momentum": momentum,
        "ceiling": 1.01 * growth * size,
        "deadline": count + patience,
        "renewal": count + 2 * patience,
        "target": state["share"] * size,
    }
