"""TorchOpt: ``custom_root`` around gradient descent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "TorchOpt", "torchopt"


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them; ``solve_normal_cg(maxiter=5, atol=0)`` is what TorchOpt's documentation shows.

    Raises:
        ImportError: TorchOpt is not installed.
    """
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg, solve_inv, solve_normal_cg

    stationarity = torch.func.grad(partial(task.energy, torch), argnums=0)

    def implicit(steps: int, solve: Any) -> list[float]:
        @custom_root(stationarity, argnums=1, solve=solve)
        def minimize(x: Tensor, theta: Tensor) -> Tensor:
            return task.descend(steps)

        theta = task.parameters()
        return torch.autograd.grad(task.loss(torch, minimize(task.y, theta)), theta)[0].tolist()

    neumann = partial(solve_inv, ns=True, alpha=1 / task.smoothness)
    return {
        "100 gradient steps, adjoint by default": lambda: implicit(100, None),
        "100 gradient steps, normal_cg(maxiter=5, atol=0)": lambda: implicit(100, solve_normal_cg(maxiter=5, atol=0)),
        "100 gradient steps, Neumann series of 10 terms": lambda: implicit(100, neumann(maxiter=10)),
        f"{task.enough} gradient steps, CG with rtol=1e-9": lambda: implicit(task.enough, solve_cg(rtol=1e-9)),
    }
