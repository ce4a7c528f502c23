"""Plain PyTorch: accelerated gradient steps recorded by autograd, then backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.models import Model
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS, accelerated
from bilevel_imaging.experiments.benchmark.workloads import Task

NAME, PACKAGE = "PyTorch unrolled", "torch"


def ladders(task: Task) -> list[Ladder]:
    """The gradient of the energy by autograd, and written by hand where there is one."""
    recorded = [Ladder("gradient by autograd", partial(_settings, task, True))]
    if task.model.recorded:
        return recorded
    return [Ladder("gradient written by hand", partial(_settings, task, False)), *recorded]


def _settings(task: Task, recorded: bool) -> Iterator[Setting]:
    for steps in STEPS:
        yield Setting(f"{steps} steps", partial(compute, task, steps, recorded))


def compute(task: Task, steps: int, recorded: bool) -> Answer:
    """The derivative of the loss after so many steps, with a gradient by autograd or written by hand."""
    theta = task.leaf()
    x = accelerated(task, steps, theta, partial(Model.gradient, task.model) if recorded else None)
    loss = task.loss(x)
    gradient = torch.autograd.grad(loss, theta)[0].double().cpu()
    # one reverse sweep per step
    return Answer(gradient, float(steps), float(steps), x=x.detach(), loss=loss.item())
