"""Reverse-mode differentiation through the iterations of a first-order method: the reference, exact for x^K."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.checks import boolean
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients._first_order import (
    UNROLLED_METHODS,
    Request,
    ReverseSweep,
    UnrolledHypergradient,
    finish,
)

__all__ = ["UNROLLED_METHODS", "UnrolledHypergradient", "unrolled"]


@torch.no_grad()
def unrolled(
    problem: LowerLevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    x_true: Tensor,
    *,
    method: str = "accelerated_gradient",
    steps: int = 60,
    x0: Tensor | None = None,
    segment: int = 0,
    certify: bool = False,
) -> UnrolledHypergradient:
    """d/dtheta of mean_i f_i(x_i^K(theta)) for K iterations (Ehrhardt & Roberts 2023, Section 2).

    The reverse sweep is written out: one HVP and one product with J per step and sample, at the point where the step
    took its gradient; nothing is recorded by autograd. Step sizes count as constants, x0 is not differentiated.

    With ``certify=True`` the result is compared with h = -J(x^K)^T q for the q that the sweep accumulates:
    ||grad - dF/dtheta|| <= ||grad - h|| + (a posteriori bound of h).

    Args:
        problem: the batch; its constants must be known.
        loss: ``loss(x, x_true) -> (B,)``.
        x_true: ground truth, ``(B, *image)``.
        method: "gradient_descent", "heavy_ball", "accelerated_gradient" (varying momentum: strongly convex FISTA) or
            "nesterov" (constant momentum).
        steps: number K >= 1 of iterations.
        x0: start; ``None`` for ``problem.initial()``.
        segment: if positive, only every ``segment``-th iterate is kept and the rest is recomputed in the reverse
            sweep: memory O(K / segment + segment) instead of O(K), one more gradient per step.
        certify: whether to evaluate the bound, in float64 where the problem allows it.

    Raises:
        ValueError: unknown method, steps < 1, segment < 0, no parameters, shapes that do not fit, constants that are
            not known.
    """
    boolean("certify", certify)
    request = Request.check(problem, loss, x_true, method, steps, x0)
    if segment < 0:
        raise ValueError(f"Expected segment >= 0, 0 to keep every iterate. Got {segment}.")
    coefficients = request.method.coefficients(problem, steps)
    length = segment or steps
    segments = [coefficients[first : first + length] for first in range(0, steps, length)]
    x = previous = request.x0
    starts: list[tuple[Tensor, Tensor]] = []
    points: list[Tensor] = []
    for part in segments:
        starts.append((x, previous))
        x, previous, points = request.advance(x, previous, part)
    sweep = ReverseSweep(request.method, problem.theta, request.loss.grad(x))
    while starts:
        start, part = starts.pop(), segments.pop()
        if not points:  # those of the last segment are still in memory
            *_, points = request.advance(*start, part)
        while points:
            sweep.step(problem.linearize(points.pop()), part.pop())
    return finish(request, x, sweep, what=f"{steps} unrolled steps", certify=certify)
