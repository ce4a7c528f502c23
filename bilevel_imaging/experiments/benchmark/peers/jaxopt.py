"""JAXopt: minimizers with implicit differentiation, compiled, one energy for the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.workloads import Task

NAME, PACKAGE = "JAXopt", "jaxopt"

RUNGS = tuple(10 ** (-k / 4) for k in range(3, 23))
"""Norms of the gradient at which the minimizer stops, relative to that at the start."""
SHARE = 10.0
"""Relative residuals at which the adjoint stops, relative to those; on W1, 1 and 30 are slower at the same error."""
MAX_ITER = 2000


def one_thread() -> None:
    """Keep JAX to one thread; to be called before its first computation."""
    os.environ["NPROC"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


def ladders(task: Task) -> list[Ladder]:
    """Three minimizers. Tolerances are arguments of the compiled functions, so that each minimizer is compiled once.

    Raises:
        ImportError: JAXopt or JAX is not installed.
    """
    import jaxopt

    accelerated = partial(jaxopt.GradientDescent, stepsize=1 / task.constants[1])
    makes = {**line_searches(), "accelerated gradient": accelerated}
    return [Ladder(name, partial(_settings, task, make)) for name, make in makes.items()]


def line_searches() -> dict[str, Callable[..., Any]]:
    """Minimizers that need no constants; L-BFGS with fewer pairs and another line search than by default, which is
    faster here."""
    import jaxopt

    lbfgs = partial(jaxopt.LBFGS, linesearch="backtracking", history_size=4)
    return {"nonlinear CG": jaxopt.NonlinearCG, "L-BFGS": lbfgs}


def _settings(task: Task, make: Callable[..., Any]) -> Iterator[Setting]:
    function = Hypergradient(task, make)
    for rung in RUNGS:
        residual = min(SHARE * rung, 0.5)
        words = f"tol={rung:.1e} of the first gradient, CG tol={residual:.1e}"
        yield Setting(words, partial(function, task, rung, residual), function.memory)


class Hypergradient:
    """By the data, the tolerance of the minimizer and the relative one of the adjoint; compiled when first called.

    Args:
        task: the data.
        make: the minimizer, from the energy and options.
        relative: whether the tolerance of the minimizer is relative to the first gradient.
        max_iter: iterations of the minimizer and of the adjoint at most.
    """

    def __init__(self, task: Task, make: Callable[..., Any], *, relative: bool = True, max_iter: int = MAX_ITER):
        import jax
        from jaxopt.linear_solve import solve_cg

        self.device = jax.devices("cpu")[0]
        data = {name: self._array(value) for name, value in task.data.items()}
        self.fixed = (self._array(task.x_true), data)
        self.task = task

        def energy(x: Any, theta: Any, data: Any) -> Any:
            return task.model.value(jax.numpy, x, theta, data)

        def loss(theta: Any, start: Any, x_true: Any, data: Any, tol: Any, residual: Any) -> tuple[Any, Any]:
            if relative:  # the compiler shares this gradient with the first iteration
                tol *= jax.numpy.linalg.norm(jax.lax.stop_gradient(jax.grad(energy)(start, theta, data)).ravel())
            adjoint = partial(solve_cg, tol=residual, maxiter=max_iter)
            solver = make(energy, maxiter=max_iter, tol=tol, implicit_diff_solve=adjoint)
            found = solver.run(start, theta, data)
            counted = getattr(found.state, "num_grad_eval", found.state.iter_num)
            return 0.5 * ((found.params - x_true) ** 2).sum() / len(start), (counted, found.params)

        self.function = jax.jit(jax.value_and_grad(loss, has_aux=True))

    @cached_property
    def compiled(self) -> Any:
        start, theta = self._array(self.task.x0), self._array(self.task.theta)
        return self.function.lower(theta, start, *self.fixed, 1.0, 1.0).compile()

    def __call__(self, task: Task, tol: float, residual: float) -> Answer:
        """At the parameters and from the start of this task, which has the same data."""
        arrays = self._array(task.theta), self._array(task.x0)
        (loss, (counted, x)), gradient = self.compiled(*arrays, *self.fixed, tol, residual)
        found = torch.from_numpy(np.array(gradient, dtype=np.float64))
        return Answer(found, gradients=int(counted), x=x, loss=float(loss))

    def memory(self) -> float:
        """MiB of temporaries and results, as the compiler laid them out."""
        sizes = self.compiled.memory_analysis()
        return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / 2**20

    def _array(self, value: Any) -> Any:
        """On the CPU; what is there already stays as it is."""
        import jax

        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        return jax.device_put(value, self.device)
