"""JAXopt: minimizers with implicit differentiation, compiled, one energy for the whole batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

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
    """Three minimizers; L-BFGS with fewer pairs and another line search than by default, which is faster here.

    Tolerances are arguments of the compiled functions, so that each minimizer is compiled once.

    Raises:
        ImportError: JAXopt or JAX is not installed.
    """
    import jaxopt

    lbfgs = partial(jaxopt.LBFGS, linesearch="backtracking", history_size=4)
    accelerated = partial(jaxopt.GradientDescent, stepsize=1 / task.constants[1])
    makes = {"nonlinear CG": jaxopt.NonlinearCG, "L-BFGS": lbfgs, "accelerated gradient": accelerated}
    return [Ladder(name, partial(_settings, task, make)) for name, make in makes.items()]


def _settings(task: Task, make: Callable[..., Any]) -> Iterator[Setting]:
    function = _Hypergradient(task, make)
    for rung in RUNGS:
        residual = min(SHARE * rung, 0.5)
        words = f"tol={rung:.1e} of the first gradient, CG tol={residual:.1e}"
        yield Setting(words, partial(function, rung, residual), function.memory)


class _Hypergradient:
    """By the tolerance of the minimizer, relative to the first gradient, and that of the adjoint.

    Compiled when it is called for the first time.
    """

    def __init__(self, task: Task, make: Callable[..., Any]):
        import jax
        from jaxopt.linear_solve import solve_cg

        cpu = jax.devices("cpu")[0]
        data = {name: _array(value, cpu) for name, value in task.data.items()}
        self.arrays = (*(_array(value, cpu) for value in (task.theta, task.y, task.x_true)), data)

        def energy(x: Any, theta: Any, data: Any) -> Any:
            return task.model.value(jax.numpy, x, theta, data)

        def loss(theta: Any, start: Any, x_true: Any, data: Any, tol: Any, residual: Any) -> tuple[Any, Any]:
            # relative to the gradient at the start, which the compiler shares with the first iteration
            scale = jax.numpy.linalg.norm(jax.lax.stop_gradient(jax.grad(energy)(start, theta, data)).ravel())
            adjoint = partial(solve_cg, tol=residual, maxiter=MAX_ITER)
            solver = make(energy, maxiter=MAX_ITER, tol=tol * scale, implicit_diff_solve=adjoint)
            found = solver.run(start, theta, data)
            counted = getattr(found.state, "num_grad_eval", found.state.iter_num)
            return 0.5 * ((found.params - x_true) ** 2).sum() / len(start), counted

        self.function = jax.jit(jax.grad(loss, has_aux=True))

    @cached_property
    def compiled(self) -> Any:
        return self.function.lower(*self.arrays, 1.0, 1.0).compile()

    def __call__(self, tol: float, residual: float) -> Answer:
        gradient, counted = self.compiled(*self.arrays, tol, residual)
        return Answer(torch.tensor(gradient.tolist(), dtype=torch.float64), gradients=int(counted))

    def memory(self) -> float:
        """MiB of temporaries and results, as the compiler laid them out."""
        sizes = self.compiled.memory_analysis()
        return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / 2**20


def _array(value: torch.Tensor, device: Any) -> Any:
    import jax

    return jax.device_put(value.detach().cpu().numpy(), device)
