"""JAXopt: ``GradientDescent`` with implicit differentiation (no longer developed, 0.8 is the last release)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bilevel_imaging.experiments.peers.task import Task

NAME, PACKAGE = "JAXopt", "jaxopt"


def methods(task: Task) -> dict[str, Callable[[], list[float]]]:
    """Settings and what computes them, in float64.

    Raises:
        ImportError: JAXopt or JAX is not installed.
    """
    import jax
    import jaxopt
    from jaxopt.linear_solve import solve_cg

    def implicit(**settings: Any) -> list[float]:
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            start, theta = (jax.numpy.asarray(a.numpy()) for a in (task.y, task.theta))
            solver = jaxopt.GradientDescent(partial(task.energy, jax.numpy), **settings)
            loss = lambda theta: task.loss(jax.numpy, solver.run(start, theta).params)  # noqa: E731
            return jax.grad(loss)(theta).tolist()

    few = {"stepsize": 1 / task.smoothness, "acceleration": False, "maxiter": 100}
    return {
        "all defaults": implicit,
        "100 gradient steps, adjoint by default": lambda: implicit(**few),
        "100 gradient steps, CG of 3 iterations": lambda: implicit(
            implicit_diff_solve=partial(solve_cg, maxiter=3), **few
        ),
        "tol=1e-9, maxiter=100000, CG with tol=1e-9": lambda: implicit(
            stepsize=1 / task.smoothness,
            tol=1e-9,
            maxiter=100_000,
            implicit_diff_solve=partial(solve_cg, tol=1e-9),
        ),
    }
