"""Minimizers that users of PyTorch libraries without one would write or take from torch.optim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.workloads import Task

STEPS = (10, 14, 20, 28, 36, 45, 56, 70, 90, 112, 140, 180, 224, 280, 360, 450, 560, 700, 900)
"""Iterations that are tried."""


def accelerated(
    task: Task, steps: int, theta: Tensor | None = None, gradient: Callable[..., Tensor] | None = None
) -> Tensor:
    """x after so many steps of Nesterov's method for strongly convex functions.

    Args:
        task: the problem.
        steps: number of steps.
        theta: recorded parameters; ``None`` to record nothing.
        gradient: of the energy; ``None`` for that of the model.
    """
    gradient = gradient or task.model.gradient
    convexity, smoothness = task.constants
    root = (smoothness / convexity) ** 0.5
    momentum = (root - 1) / (root + 1)
    with torch.set_grad_enabled(theta is not None):
        theta = task.theta if theta is None else theta
        x = z = task.x0
        for _ in range(steps):
            ahead = z - gradient(z, theta, task.data) / smoothness
            x, z = ahead, ahead + momentum * (ahead - x)
    return x


def lbfgs(task: Task, steps: int) -> Tensor:
    """x after so many iterations of torch.optim.LBFGS with a line search."""
    x = task.x0.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [x], max_iter=steps, tolerance_grad=0, tolerance_change=0, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        with torch.no_grad():
            value = task.model.value(torch, x, task.theta, task.data)
            x.grad = task.model.gradient(x.detach(), task.theta, task.data)
        return value

    optimizer.step(closure)
    return x.detach()
