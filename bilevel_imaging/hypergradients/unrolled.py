"""Reverse-mode differentiation through the iterations of a first-order solver: the reference, exact for x_K."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.lower_solvers import AcceleratedGradient, GradientDescent, HeavyBall
from bilevel_imaging.tensors import per_sample

UNROLLED_METHODS: dict[str, Any] = {
    "gradient_descent": GradientDescent,
    "heavy_ball": HeavyBall,
    "accelerated_gradient": AcceleratedGradient,
}


@dataclass(frozen=True, kw_only=True)
class UnrolledHypergradient:
    """d/dtheta of mean_i f_i(x_i^K(theta)): exact for the K-th iterate, of unknown distance to dF/dtheta.

    Attributes:
        grad: by parameter name.
        loss: mean_i f_i(x_i^K).
        x: x^K, ``(B, *image)``.
        certified: always False.
        reason: why, in words.
        cost: gradients of the forward sweep; the reverse sweep's products are counted as one HVP and one mixed
            product per step and sample.
    """

    grad: dict[str, Tensor]
    loss: float
    x: Tensor
    certified: bool
    reason: str
    cost: Cost


def unrolled(
    problem: LowerLevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    x_true: Tensor,
    *,
    method: str = "accelerated_gradient",
    steps: int = 60,
    x0: Tensor | None = None,
    segment: int = 0,
) -> UnrolledHypergradient:
    """Differentiate ``steps`` iterations of a first-order method (Ehrhardt & Roberts 2023, Section 2).

    Args:
        problem: the batch; its constants must be known.
        loss: ``loss(x, x_true) -> (B,)``.
        x_true: ground truth, ``(B, *image)``.
        method: "gradient_descent", "heavy_ball" or "accelerated_gradient".
        steps: number K >= 1 of iterations.
        x0: start; ``None`` for ``problem.initial()``. Not differentiated.
        segment: if positive, only every ``segment``-th iterate is kept and the rest is recomputed in the reverse
            sweep: memory O(K / segment + segment) instead of O(K), one more gradient per step.

    Raises:
        ValueError: unknown method, steps < 1, or constants that are not known.
    """
    if method not in UNROLLED_METHODS:
        raise ValueError(f"Unknown method {method!r}. Choose from {sorted(UNROLLED_METHODS)}.")
    if steps < 1:
        raise ValueError(f"Expected steps >= 1. Got {steps}.")
    constants = problem.constants().to(problem.dtype)
    mu, smoothness = constants.strong_convexity, constants.smoothness
    if mu is None or smoothness is None:
        raise ValueError(f"Unrolling needs step sizes from mu and L. {constants.reason or 'L is not known'}.")
    started, before = time.perf_counter(), problem.cost.copy()
    solver = UNROLLED_METHODS[method]
    x = (problem.initial() if x0 is None else x0).detach()

    def run(x: Tensor, previous: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        for k in range(first, last):
            step, momentum = (per_sample(torch.as_tensor(a, dtype=x.dtype).expand(len(x)), x)
                              for a in solver.schedule(mu, smoothness, k))  # fmt: skip
            ahead = x + momentum * (x - previous)
            at = ahead if solver.extrapolates_gradient else x
            x, previous = ahead - step * problem.grad(at), x
        return x, previous

    with torch.enable_grad():
        previous = x
        for first in range(0, steps, segment or steps):
            last = min(steps, first + (segment or steps))
            if segment:
                x, previous = checkpoint(run, x, previous, first, last, use_reentrant=False)
            else:
                x, previous = run(x, previous, first, last)
        value = loss(x, x_true.to(x.dtype)).mean()
        names = list(problem.theta)
        grads = torch.autograd.grad(value, [problem.theta[n] for n in names], allow_unused=True)
    cost = problem.cost - before
    sweep = steps * x.shape[0]
    cost = cost + Cost(hvps=sweep, mixed_products=sweep, seconds=time.perf_counter() - started)
    return UnrolledHypergradient(
        grad={n: torch.zeros_like(problem.theta[n]) if g is None else g for n, g in zip(names, grads, strict=True)},
        loss=float(value.detach()),
        x=x.detach(),
        certified=False,
        reason=f"not certified: {steps} unrolled steps, distance to the minimizer not used",
        cost=cost,
    )
