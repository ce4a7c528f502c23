"""The two recursions of hypertorch (Grazzi, Franceschi, Pontil & Salzo 2020, "On the iteration complexity of
hypergradient computation", Section 3: fixed point and conjugate gradients), in plain PyTorch.

The map is Phi(x, theta) = x - grad g(x, theta) / L; the hypergradient is d_theta Phi(x, theta)^T v with
(I - d_x Phi^T) v = grad f, of which K iterations are done from v = 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "as in hypertorch", "torch"


def fixed_point(transposed: Callable[[Tensor], Tensor], rhs: Tensor, iterations: int) -> Tensor:
    """v = d_x Phi^T v + rhs, iterated from 0."""
    v = torch.zeros_like(rhs)
    for _ in range(iterations):
        v = transposed(v) + rhs
    return v


def conjugate_gradients(transposed: Callable[[Tensor], Tensor], rhs: Tensor, iterations: int) -> Tensor:
    """(I - d_x Phi^T) v = rhs by conjugate gradients from 0."""
    v = torch.zeros_like(rhs)
    residual = direction = rhs
    for _ in range(iterations):
        product = direction - transposed(direction)
        square = residual.square().sum()
        alpha = square / (direction * product).sum()
        v = v + alpha * direction
        residual = residual - alpha * product
        direction = residual + residual.square().sum() / square * direction
    return v


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them."""

    def implicit(steps: int, solver: Callable[..., Tensor], iterations: int) -> list[float]:
        theta, x = task.parameters(), task.descend(steps).requires_grad_(True)
        moved = task.step(x, theta)
        rhs = torch.autograd.grad(task.loss(torch, x), x)[0]
        v = solver(lambda u: torch.autograd.grad(moved, x, u, retain_graph=True)[0], rhs, iterations)
        return torch.autograd.grad(moved, theta, v)[0].tolist()

    return {
        "100 gradient steps, fixed point of 20 iterations": lambda: implicit(100, fixed_point, 20),
        "100 gradient steps, CG of 20 iterations": lambda: implicit(100, conjugate_gradients, 20),
        f"{task.enough} gradient steps, CG of 200 iterations": lambda: implicit(task.enough, conjugate_gradients, 200),
    }
