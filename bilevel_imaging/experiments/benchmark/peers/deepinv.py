"""deepinv: ``GD`` with ``DEQ``, whose backward pass iterates on the adjoint fixed point equation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.experiments.peers.deepinv import energy_prior

NAME, PACKAGE = "deepinv", "deepinv"


def ladders(task: Task) -> list[Ladder]:
    """Plain iterations, and Anderson acceleration in both directions."""
    names = {False: "GD, DEQ", True: "GD, DEQ, Anderson acceleration"}
    return [Ladder(name, partial(_settings, task, anderson)) for anderson, name in names.items()]


def _settings(task: Task, anderson: bool) -> Iterator[Setting]:
    for steps in STEPS:
        yield Setting(f"{steps} iterations forward and backward", partial(_compute, task, anderson, steps))


def _compute(task: Task, anderson: bool, steps: int) -> Answer:
    from deepinv.optim import GD, L2, DEQConfig

    ridge = getattr(task.model, "ridge", 0.0)

    def value(x: Tensor, theta: Tensor) -> Tensor:
        return task.model.prior(torch, x, theta) + 0.5 * ridge * (x**2).sum((1, 2, 3))

    prior = energy_prior(value, task.theta)
    backward = DEQConfig(max_iter_backward=steps, anderson_acceleration_backward=anderson)
    # trainable_params=None would try to make a parameter of g_param=None, too, and fail
    solver = GD(
        data_fidelity=L2(),
        prior=prior,
        stepsize=1 / task.constants[1],
        trainable_params=[],
        max_iter=steps,
        thres_conv=1e-7,
        anderson_acceleration=anderson,
        DEQ=backward,
    )
    x = solver(task.y, task.physics(), init=task.x0)
    gradient = torch.autograd.grad(task.loss(x), prior.theta)[0]
    return Answer(gradient.double().cpu())
