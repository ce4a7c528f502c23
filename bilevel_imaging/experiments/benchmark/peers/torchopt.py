"""TorchOpt: ``custom_root`` around a minimizer, adjoint by conjugate gradients or a Neumann series."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS, accelerated, lbfgs
from bilevel_imaging.experiments.benchmark.workloads import Task

NAME, PACKAGE = "TorchOpt", "torchopt"


def ladders(task: Task) -> list[Ladder]:
    """Two minimizers with conjugate gradients, and one with a Neumann series.

    Raises:
        ImportError: TorchOpt is not installed.
    """
    from torchopt.linear_solve import solve_cg, solve_inv

    def cg(steps: int) -> Any:
        return solve_cg(rtol=0.0, maxiter=steps)

    def neumann(steps: int) -> Any:
        return solve_inv(ns=True, maxiter=steps, alpha=1 / task.constants[1])

    return [
        _ladder(task, "accelerated gradient, CG", accelerated, cg, 0.3),
        _ladder(task, "torch.optim.LBFGS, CG", lbfgs, cg, 0.5),
        _ladder(task, "accelerated gradient, Neumann series", accelerated, neumann, 1.0),
    ]


def _ladder(task: Task, name: str, minimizer: Callable[..., Tensor], adjoint: Any, share: float) -> Ladder:
    """``share``: iterations of the adjoint per step of the minimizer."""

    def settings() -> Iterator[Setting]:
        for steps in STEPS:
            inner = max(2, round(share * steps))
            words = f"{steps} steps, adjoint of {inner}"
            yield Setting(words, partial(compute, task, partial(minimizer, task, steps), adjoint(inner)))

    return Ladder(name, settings)


def compute(task: Task, minimize: Callable[[], Tensor], solve: Any) -> Answer:
    """The hypergradient at what ``minimize`` returns."""
    from torchopt.diff.implicit import custom_root

    before = task.model.gradients

    def stationarity(x: Tensor, theta: Tensor) -> Tensor:
        if task.model.recorded:
            return torch.func.grad(partial(task.model.value, torch))(x, theta, task.data)
        return task.model.gradient(x, theta, task.data)

    @custom_root(stationarity, argnums=1, solve=solve)
    def root(start: Tensor, theta: Tensor) -> Tensor:
        return minimize()

    theta = task.leaf()
    x = root(task.x0, theta)
    loss = task.loss(x)
    gradient = torch.autograd.grad(loss, theta)[0].double().cpu()
    return Answer(gradient, float(task.model.gradients - before), x=x.detach(), loss=loss.item())
