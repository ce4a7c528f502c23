"""Plain PyTorch: gradient steps recorded by autograd, then backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "PyTorch autograd", "torch"


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them."""

    def unroll(steps: int) -> list[float]:
        theta = task.parameters()
        x = task.y
        for _ in range(steps):
            x = task.step(x, theta)
        return torch.autograd.grad(task.loss(torch, x), theta)[0].tolist()

    return {f"{steps} gradient steps, unrolled": lambda steps=steps: unroll(steps) for steps in (20, 100)}
