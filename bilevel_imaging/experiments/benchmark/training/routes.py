"""The usual ways to train with other libraries: their hypergradients, and an optimizer that moves theta by them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.method import Answer
from bilevel_imaging.experiments.benchmark.peers import jaxopt, torchopt, unrolled
from bilevel_imaging.experiments.benchmark.peers.lower import accelerated, lbfgs
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

MAX_STEPS = 400

Oracle = Callable[[Tensor], tuple[float, Tensor]]
Note = Callable[[Tensor, float], None]
Outer = Callable[[Oracle, Tensor, Note], str]

TOLERANCES = (0.3, 0.1, 0.03, 0.01)
"""Norms of the gradient at which JAXopt's minimizers stop, relative to the first one of the run."""
MAX_ITER = 300
"""Of JAXopt's, which else go on and on where float32 can't do better, and of their adjoints."""
STEPS, ADJOINT = (10, 20, 40), 15
"""Steps of PyTorch's minimizers, and of TorchOpt's conjugate gradients."""
UNROLLED = ((False, 20), (False, 40), (True, 10), (True, 20))
"""Whether unrolled steps go on from the last x, and their number."""
TUNED = "ours, tuned"
ACCURACIES = ((3.0, 0.5), (1.0, 0.2), (0.3, 0.1))
"""Of our solvers, with these optimizers: error_tol, and residual_tol over the norm of the loss gradient at y."""


@dataclass(frozen=True)
class Route:
    """One setting.

    Attributes:
        library: whose hypergradients.
        setting: in words.
        compute: the hypergradient at the parameters and from the start of a task.
        outer: given the losses and hypergradients, the first theta and what is to be told every new one with the last
            loss, moves theta until that raises something; returns why it ended by itself.
    """

    library: str
    setting: str
    compute: Callable[[Task], Answer]
    outer: Outer


def adam(rate: float, oracle: Oracle, theta: Tensor, note: Note) -> str:
    """torch.optim.Adam."""
    theta = theta.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([theta], lr=rate)
    for _ in range(MAX_STEPS):
        loss, theta.grad = oracle(theta.detach())
        optimizer.step()
        note(theta, loss)
    return f"{MAX_STEPS} steps"


def quasi_newton(oracle: Oracle, theta: Tensor, note: Note) -> str:
    """SciPy's L-BFGS-B; all points that its line search tries count."""
    from scipy.optimize import minimize

    def function(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat.copy())
        loss, gradient = oracle(point)
        note(point, loss)
        return loss, gradient.numpy()

    found = minimize(function, theta.numpy(), jac=True, method="L-BFGS-B", options={"maxiter": MAX_STEPS, "ftol": 0.0})
    return str(found.message)


def outers(rates: Sequence[float]) -> dict[str, Outer]:
    """By name."""
    found: dict[str, Outer] = {"L-BFGS-B": quasi_newton}
    return found | {f"Adam lr={rate:g}": partial(adam, rate) for rate in rates}


def _jaxopt(task: Task) -> Iterator[tuple[str, Callable[[Task], Answer]]]:
    """Every minimizer is compiled once, here."""
    first = float(task.problem().grad(task.y).detach().norm())
    for name, make in jaxopt.line_searches().items():
        function = jaxopt.Hypergradient(task, make, relative=False, max_iter=MAX_ITER)
        _ = function.compiled
        for tolerance in TOLERANCES:
            residual = min(jaxopt.SHARE * tolerance, 0.5)
            yield (
                f"{name}, tol={tolerance:g} of the first gradient, CG tol={residual:g}",
                partial(function, tol=tolerance * first, residual=residual),
            )


def _torchopt(task: Task) -> Iterator[tuple[str, Callable[[Task], Answer]]]:
    from torchopt.linear_solve import solve_cg

    minimizers: dict[str, Any] = {"accelerated gradient": accelerated, "torch.optim.LBFGS": lbfgs}
    for (name, minimizer), steps in itertools.product(minimizers.items(), STEPS):

        def compute(at: Task, minimizer: Any = minimizer, steps: int = steps) -> Answer:
            return torchopt.compute(at, partial(minimizer, at, steps), solve_cg(rtol=0.0, maxiter=ADJOINT))

        yield f"{name}, {steps} steps, CG of {ADJOINT}", compute


def _unrolled(task: Task) -> Iterator[tuple[str, Callable[[Task], Answer]]]:
    for warm, steps in UNROLLED:

        def compute(at: Task, steps: int = steps, warm: bool = warm) -> Answer:
            return unrolled.compute(at if warm else replace(at, x0=task.y), steps, task.model.recorded)

        yield f"{steps} steps from {'the last x' if warm else 'the measurement'}", compute


def _fixed(task: Task) -> Iterator[tuple[str, Callable[[Task], Answer]]]:
    """Our hypergradients without MAID, which finds its accuracies by itself: these two are to be tuned as well."""
    size = float((task.y - task.x_true).flatten(1).norm(dim=1).mean())

    def compute(error_tol: float, residual_tol: float, at: Task) -> Answer:
        x0, q0 = at.x0 if isinstance(at.x0, tuple) else (at.x0, None)
        tolerances = {"error_tol": error_tol, "residual_tol": residual_tol}
        found = hypergradient(at.problem(), SquaredError(), at.x_true, x0=x0, q0=q0, **tolerances)
        return Answer(flatten(found.grad), x=(found.x, found.q), loss=found.loss)

    for error_tol, share in ACCURACIES:
        words = f"error_tol={error_tol:g}, residual_tol={share:g} ||grad f||"
        yield words, partial(compute, error_tol, share * size)


@dataclass(frozen=True)
class Library:
    """What is tried of a library.

    Attributes:
        NAME: in tables.
        PACKAGE: what pip installs.
        settings: made for a task, each in words and what computes a hypergradient.
    """

    NAME: str
    PACKAGE: str
    settings: Callable[[Task], Iterator[tuple[str, Callable[[Task], Answer]]]]


ROUTES = {
    "ours": Library(TUNED, "torch", _fixed),
    "jaxopt": Library(jaxopt.NAME, jaxopt.PACKAGE, _jaxopt),
    "torchopt": Library(torchopt.NAME, torchopt.PACKAGE, _torchopt),
    "unrolled": Library(unrolled.NAME, unrolled.PACKAGE, _unrolled),
}
"""By the name on the command line."""


def routes(name: str, task: Task, rates: Sequence[float]) -> list[Route]:
    """All settings of a library, each with every optimizer.

    Raises:
        ImportError: the library is not installed.
    """
    library, moves = ROUTES[name], outers(rates)
    return [
        Route(library.NAME, f"{words}; {outer}", compute, move)
        for words, compute in library.settings(task)
        for outer, move in moves.items()
    ]
