"""TorchDEQ: the minimizer as the fixed point of a gradient step, backward by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "TorchDEQ", "torchdeq"


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them; the defaults are 40 iterations forward and 40 backward.

    Raises:
        ImportError: TorchDEQ is not installed.
    """
    from torchdeq import get_deq

    def implicit(**settings: Any) -> list[float]:
        theta = task.parameters()
        model = get_deq(ift=True, **settings)
        x = model(lambda z: task.step(z[0], theta)[None], task.y[None])[0][-1]
        return torch.autograd.grad(task.loss(torch, x[0]), theta)[0].tolist()

    enough = {"f_max_iter": task.enough, "b_max_iter": task.enough, "f_tol": 1e-10, "b_tol": 1e-10}
    return {
        "ift=True, otherwise all defaults": implicit,
        "400 iterations forward and backward": lambda: implicit(f_max_iter=400, b_max_iter=400),
        f"{task.enough} iterations forward and backward, tol=1e-10": lambda: implicit(**enough),
    }
