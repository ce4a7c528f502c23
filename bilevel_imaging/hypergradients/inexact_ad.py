"""Inexact automatic differentiation: the reverse sweep with all second derivatives frozen at the last iterate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.checks import boolean
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients._first_order import Request, ReverseSweep, UnrolledHypergradient, finish


@torch.no_grad()
def inexact_ad(
    problem: LowerLevelProblem,
    loss: Callable[[Tensor, Tensor], Tensor],
    x_true: Tensor,
    *,
    method: str = "accelerated_gradient",
    steps: int = 60,
    adjoint_steps: int | None = None,
    x0: Tensor | None = None,
    certify: bool = False,
) -> UnrolledHypergradient:
    """Reverse-mode differentiation of K iterations as if H and J were those of x^K everywhere (Mehmood & Ochs 2020).

    No iterate but the last is kept. For methods whose steps are fixed in advance this equals -J^T q with q the iterate
    number ``adjoint_steps`` of the same method on H q = grad f from q = 0: Ehrhardt & Roberts (2023) for gradient
    descent and heavy ball; it holds for all methods here, since their K-th iterate is Q(H) grad f with a polynomial Q
    and a symmetric H. Here it is computed as automatic differentiation would, from its own recursion on the
    co-states, with one HVP and one product with J per step.

    With ``certify=True``, ||grad - dF/dtheta|| <= (a posteriori bound of -J^T q), which holds for any q.

    Args:
        problem: the batch; its constants must be known.
        loss: ``loss(x, x_true) -> (B,)``.
        x_true: ground truth, ``(B, *image)``.
        method: "gradient_descent", "heavy_ball", "accelerated_gradient" (varying momentum: strongly convex FISTA) or
            "nesterov" (constant momentum).
        steps: number K >= 1 of iterations of the lower level.
        adjoint_steps: number >= 1 of iterations that are differentiated, with the first coefficients of the method;
            ``None`` for ``steps``.
        x0: start; ``None`` for ``problem.initial()``. Not differentiated.
        certify: whether to evaluate the bound, in float64 where the problem allows it.

    Raises:
        ValueError: unknown method, steps < 1, no parameters, shapes that do not fit, constants that are not known.
    """
    boolean("certify", certify)
    request = Request.check(problem, loss, x_true, method, steps, x0)
    reverse_steps = steps if adjoint_steps is None else adjoint_steps
    if reverse_steps < 1:
        raise ValueError(f"Expected adjoint_steps >= 1. Got {adjoint_steps}.")
    coefficients = request.method.coefficients(problem, max(steps, reverse_steps))
    x = previous = request.x0
    for pair in coefficients[:steps]:
        x, previous, _ = request.advance(x, previous, [pair])
    linearization = problem.linearize(x)
    sweep = ReverseSweep(request.method, problem.theta, request.loss.grad(x))
    for pair in reversed(coefficients[:reverse_steps]):
        sweep.step(linearization, pair)
    what = f"{reverse_steps} steps of inexact automatic differentiation"
    return finish(request, x, sweep, what=what, certify=certify)
