"""SciPy: L-BFGS-B and conjugate gradients, energy and products by PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.peers.lower import STEPS
from bilevel_imaging.experiments.benchmark.workloads import Task

NAME, PACKAGE = "SciPy", "scipy"


def ladders(task: Task) -> list[Ladder]:
    """One ladder; the adjoint gets half as many iterations as the minimizer."""
    return [Ladder("L-BFGS-B, CG", partial(_settings, task))]


def _settings(task: Task) -> Iterator[Setting]:
    for steps in STEPS:
        yield Setting(f"{steps} iterations, adjoint of {steps // 2}", partial(_compute, task, steps, steps // 2))


def _compute(task: Task, steps: int, inner: int) -> Answer:
    from scipy.optimize import minimize
    from scipy.sparse.linalg import LinearOperator, cg

    before = task.model.gradients

    def image(flat: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(flat).to(task.y).view_as(task.y)

    def flat(tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().double().cpu().numpy().ravel()

    def energy(point: np.ndarray) -> tuple[float, np.ndarray]:
        x = image(point)
        with torch.no_grad():
            value = task.model.value(torch, x, task.theta, task.data)
            return float(value), flat(task.model.gradient(x, task.theta, task.data))

    options = {"maxiter": steps, "maxfun": 2 * steps + 20, "ftol": 0.0, "gtol": 0.0}
    found = minimize(energy, flat(task.x0), jac=True, method="L-BFGS-B", options=options)
    theta, x = task.leaf(), image(found.x).requires_grad_(True)
    gradient = task.model.gradient(x, theta, task.data)

    def product(v: np.ndarray) -> np.ndarray:
        return flat(torch.autograd.grad(gradient, x, image(v), retain_graph=True)[0])

    rhs = flat(torch.autograd.grad(task.loss(x), x)[0])
    operator = LinearOperator((rhs.size, rhs.size), matvec=product, dtype=np.float64)
    q = image(cg(operator, rhs, rtol=0.0, atol=0.0, maxiter=inner)[0])
    hypergradient = -torch.autograd.grad(gradient, theta, q)[0]
    return Answer(hypergradient.double().cpu(), float(task.model.gradients - before), inner)
