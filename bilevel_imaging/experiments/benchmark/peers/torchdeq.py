"""TorchDEQ: the minimizer as the fixed point of a gradient step, backward by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS
from bilevel_imaging.experiments.benchmark.workloads import Task

NAME, PACKAGE = "TorchDEQ", "torchdeq"

SOLVERS = ("anderson", "fixed_point_iter")


def ladders(task: Task) -> list[Ladder]:
    """Anderson acceleration and plain iteration, the same in both directions.

    Raises:
        ImportError: TorchDEQ is not installed.
    """
    import torchdeq  # noqa: F401

    return [Ladder(solver, partial(_settings, task, solver)) for solver in SOLVERS]


def _settings(task: Task, solver: str) -> Iterator[Setting]:
    for steps in STEPS:
        yield Setting(f"{steps} iterations forward and backward", partial(_compute, task, solver, steps))


def _compute(task: Task, solver: str, steps: int) -> Answer:
    from torchdeq import get_deq

    before = task.model.gradients
    theta = task.leaf()
    limits = {"f_max_iter": steps, "b_max_iter": steps, "f_tol": 1e-7, "b_tol": 1e-7}
    model = get_deq(ift=True, f_solver=solver, b_solver=solver, f_stop_mode="rel", b_stop_mode="rel", **limits)

    def step(z: torch.Tensor) -> torch.Tensor:
        return z - task.model.gradient(z, theta, task.data) / task.constants[1]

    x = model(step, task.x0)[0][-1]
    gradient = torch.autograd.grad(task.loss(x), theta)[0]
    return Answer(gradient.double().cpu(), float(task.model.gradients - before))
