"""The two recursions of hypertorch (see ``experiments.peers.hypertorch``) after accelerated gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS, accelerated
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.experiments.peers.hypertorch import NAME, PACKAGE, conjugate_gradients, fixed_point

__all__ = ["NAME", "PACKAGE", "ladders"]


def ladders(task: Task) -> list[Ladder]:
    """Conjugate gradients, and the fixed point iteration."""
    return [_ladder(task, "CG", conjugate_gradients, 0.3), _ladder(task, "fixed point", fixed_point, 1.0)]


def _ladder(task: Task, name: str, recursion: Callable[..., Tensor], share: float) -> Ladder:
    """``share``: iterations of the adjoint per step of the minimizer."""

    def settings() -> Iterator[Setting]:
        for steps in STEPS:
            inner = max(2, round(share * steps))
            yield Setting(f"{steps} steps, adjoint of {inner}", partial(_compute, task, steps, recursion, inner))

    return Ladder(f"accelerated gradient, {name}", settings)


def _compute(task: Task, steps: int, recursion: Callable[..., Tensor], inner: int) -> Answer:
    before = task.model.gradients
    theta, x = task.leaf(), accelerated(task, steps).requires_grad_(True)
    moved = x - task.model.gradient(x, theta, task.data) / task.constants[1]
    rhs = torch.autograd.grad(task.loss(x), x)[0]
    v = recursion(lambda u: torch.autograd.grad(moved, x, u, retain_graph=True)[0], rhs, inner)
    gradient = torch.autograd.grad(moved, theta, v)[0]
    return Answer(gradient.double().cpu(), float(task.model.gradients - before), inner)
