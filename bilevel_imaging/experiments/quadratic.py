"""The first experiment of Ehrhardt & Roberts (2023), Section 4.1: a quadratic problem whose solution is known.

    min_theta ||A x*(theta) - b||^2   with   x*(theta) = argmin_x ||C theta + D x - e||^2,

squared norms without a factor 1/2, at theta = (1, ..., 1). Errors of lower-level and adjoint solvers beside what can be
said before the run (a priori) and after it (a posteriori).

Rounding. An a posteriori bound is that of the library: it contains an allowance for the rounding errors of what was
measured. An a priori bound is a statement about exact arithmetic: it falls to 0, the error found in float64 does not.
So "rounding", the bound certified at the directly solved x* and adjoint, is added to it wherever the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel_imaging import certificates, linear_solvers, lower_solvers
from bilevel_imaging.certificates import a_priori
from bilevel_imaging.energies import QuadraticProblem
from bilevel_imaging.experiments.quadratic_report import EXACT, curves, figures, table
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.linear_solvers import LinearSolver
from bilevel_imaging.tensors import norm

__all__ = ["LeastSquaresLoss", "Setting", "curves", "figures", "iterates", "run", "table"]

EQUATIONS, UNKNOWNS, NOISE = 1000, 10, 0.01
FirstOrder = lower_solvers.AcceleratedGradient | lower_solvers.GradientDescent | lower_solvers.HeavyBall
# solvers, and what bounds them a priori
LOWER: dict[str, tuple[type[FirstOrder], Callable[..., Any]]] = {
    "FISTA": (lower_solvers.AcceleratedGradient, a_priori.accelerated_gradient_distance),
    "gradient descent": (lower_solvers.GradientDescent, a_priori.gradient_descent_distance),
    "heavy ball": (lower_solvers.HeavyBall, a_priori.heavy_ball_distance),
}
ADJOINT: dict[str, Callable[..., LinearSolver]] = {
    "CG": linear_solvers.ConjugateGradient,
    "gradient descent": linear_solvers.GradientDescent,
    "heavy ball": linear_solvers.HeavyBall,
}
ADJOINT_FACTORS: dict[str, Callable[..., Any]] = {
    # the bound of the error serves in place of a residual, see its docstring
    "CG": lambda k, mu, L: mu * a_priori.conjugate_gradient_error(k, mu, L),
    "gradient descent": a_priori.gradient_descent_residual,
    "heavy ball": a_priori.heavy_ball_residual,
}
# heavy ball iterations of the lower-level solves whose hypergradients are compared
LOWER_ITERATIONS = (20, 40, 60, 80, 100)

Record = dict[str, Any]


class LeastSquaresLoss:
    """f(x) = ||A x - b||^2 per sample; the ground truth that losses are called with is not used.

    Attributes:
        smoothness: Lipschitz constant of the gradient in x, 2 ||A||^2.
        convex: True.
    """

    convex = True

    def __init__(self, A: Tensor, b: Tensor):
        self.A, self.b = A, b
        self.smoothness = 2 * float(torch.linalg.matrix_norm(A, ord=2)) ** 2 * (1 + 1e-12)

    def __call__(self, x: Tensor, x_true: Tensor | None = None) -> Tensor:
        """``(B, d)`` to ``(B,)``."""
        return (x @ self.A.T - self.b).square().sum(1)

    def grad(self, x: Tensor, x_true: Tensor | None = None) -> Tensor:
        """Gradient in x, ``(B, d)``."""
        return 2 * (x @ self.A.T - self.b) @ self.A


@dataclass(frozen=True)
class Setting:
    """The problem, as drawn in the paper's code, and its exact solution by a direct solver.

    Attributes:
        data: the arrays A, b, C, D, e, float64.
        problem: H = 2 D^T D, b = 2 D^T e, M = 2 D^T C, one sample.
        loss: the upper-level loss.
        x: minimizer, ``(1, d)``.
        gradient: grad F, ``(n,)``.
    """

    data: dict[str, np.ndarray]
    problem: QuadraticProblem
    loss: LeastSquaresLoss
    x: Tensor
    gradient: Tensor

    @classmethod
    def draw(cls) -> Setting:
        """Legacy NumPy draws with seed 0 in the order A, the truth and noise of b, C, D, the truths and noise of e."""
        rng = np.random.RandomState(0)
        A = rng.uniform(size=(EQUATIONS, UNKNOWNS))
        b = A @ rng.uniform(size=UNKNOWNS) + NOISE * rng.standard_normal(EQUATIONS)
        C = rng.uniform(size=(EQUATIONS, UNKNOWNS))
        D = rng.uniform(size=(EQUATIONS, UNKNOWNS))
        e = C @ rng.uniform(size=UNKNOWNS) + D @ rng.uniform(size=UNKNOWNS) + NOISE * rng.standard_normal(EQUATIONS)
        hessian, linear, mixed = (torch.from_numpy(2 * D.T @ v).unsqueeze(0) for v in (D, e, C))
        problem = QuadraticProblem(hessian, linear, mixed, torch.ones(UNKNOWNS, dtype=torch.float64))
        loss = LeastSquaresLoss(torch.from_numpy(A), torch.from_numpy(b))
        x = problem.minimizer()
        adjoint = torch.linalg.solve(hessian, loss.grad(x))
        data = {"A": A, "b": b, "C": C, "D": D, "e": e}
        return cls(data, problem, loss, x, _hypergradients(problem, adjoint)[0])

    @property
    def constants(self) -> dict[str, float]:
        """Everything that the bounds need to know, and the norms at the solution."""
        known = self.problem.constants()
        mu, smoothness = float(known.strong_convexity), float(known.smoothness)
        return {
            "smoothness": smoothness,
            "strong_convexity": mu,
            "condition": smoothness / mu,
            "gradient_descent_rate": a_priori.gradient_descent_rate(mu, smoothness),
            "heavy_ball_rate": a_priori.heavy_ball_rate(mu, smoothness),
            "loss_smoothness": self.loss.smoothness,
            "mixed_norm": float(known.mixed_norm),
            "solution_norm": float(norm(self.x)),
            "loss": float(self.loss(self.x)),
            "loss_grad_norm": float(norm(self.loss.grad(self.x))),
            "hypergradient_norm": float(self.gradient.norm()),
        }

    def copies(self, count: int) -> QuadraticProblem:
        """The same problem ``count`` times in one batch."""
        p = self.problem
        return QuadraticProblem(*(v.expand(count, *v.shape[1:]) for v in (p.hessian, p.b, p.mixed)), p.theta["theta"])


class _Observed(QuadraticProblem):
    """Keeps every point at which a gradient is taken: the iterates of a first-order solver."""

    points: list[Tensor]

    def _grad(self, x: Tensor) -> Tensor:
        self.points.append(x.clone())
        return super()._grad(x)


def iterates(solver: FirstOrder, problem: QuadraticProblem, count: int) -> Tensor:
    """x_0, ..., x_count of one sample, ``(count + 1, d)``; a solver that stops at its rounding floor stays there."""
    observed = _Observed(problem.hessian, problem.b, problem.mixed, problem.theta["theta"])
    observed.points = []
    solver.solve(observed, None, 0.0, max_iter=count)
    x = torch.cat(observed.points)
    if solver.extrapolates_gradient:  # the gradients are taken at z_k, and x_{k+1} = z_k - step * G(z_k)
        known = problem.constants()
        step, _ = solver.schedule(known.strong_convexity, known.smoothness, 0)
        x = torch.cat([x[:1], x - step * problem.grad(x)])[: count + 1]
    return torch.cat([x, x[-1:].expand(count + 1 - len(x), -1)])


def run(
    *,
    lower_iterations: int = 100,
    adjoint_iterations: int = 200,
    counts: tuple[int, ...] = LOWER_ITERATIONS,
) -> Record:
    """Everything that the figures and the table show; some seconds on one core.

    Args:
        lower_iterations: iterations of the lower-level solvers that are compared.
        adjoint_iterations: iterations of the adjoint solvers.
        counts: numbers of heavy ball iterations after which hypergradients are computed, beside the exact x*.

    Returns:
        a JSON-able record: "constants", "data" (three entries, to recognize the draw), "lower"[solver] and
        "adjoint"[solver][lower level], each with the curves "error", "a_priori" (without rounding) and "a_posteriori",
        and "rounding" of the two kinds of errors.
    """
    setting = Setting.draw()
    return {
        "constants": setting.constants,
        "data": {
            "A[0,0]": float(setting.data["A"][0, 0]),
            "b[0]": float(setting.data["b"][0]),
            "e[0]": float(setting.data["e"][0]),
        },
        "rounding": _rounding(setting),
        "counts": list(counts),
        "lower": {name: _lower_curves(setting, name, lower_iterations) for name in LOWER},
        "adjoint": _adjoint_curves(setting, adjoint_iterations, counts),
    }


def _rounding(setting: Setting) -> dict[str, float]:
    """What is certified at the directly solved x* and adjoint, where all that is measured is rounding."""
    problem, x = setting.problem, setting.x
    grad_norm = norm(problem.grad(x)) + problem.gradient_rounding(x)
    return {
        "distance": float(certificates.distance(grad_norm, problem.constants().strong_convexity)),
        "hypergradient": float(_certified(setting, x, linear_solvers.DenseSolver())[1]),
    }


def _lower_curves(setting: Setting, name: str, count: int) -> dict[str, list[float]]:
    solver, factor = LOWER[name]
    known = setting.problem.constants()
    mu, smoothness = float(known.strong_convexity), float(known.smoothness)
    x = iterates(solver(), setting.problem, count)
    grad_norm = norm(setting.problem.grad(x)) + setting.problem.gradient_rounding(x)
    first = float(norm(x[:1] - setting.x))
    return {
        "error": norm(x - setting.x).tolist(),
        "a_priori": [factor(k, mu, smoothness) * first for k in range(count + 1)],
        "a_posteriori": certificates.distance(grad_norm, known.strong_convexity).tolist(),
    }


def _adjoint_curves(setting: Setting, iterations: int, counts: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """All lower-level points in one batch: the exact one first, then heavy ball after each of ``counts``."""
    labels = [EXACT, *map(str, counts)]
    visited = iterates(lower_solvers.HeavyBall(), setting.problem, max(counts))
    x = torch.cat([setting.x, visited[list(counts)]])
    found: dict[str, dict[str, Any]] = {}
    for name, solver in ADJOINT.items():
        measured = [_certified(setting, x, solver(max_iter=k)) for k in range(iterations + 1)]
        errors, bounds = (torch.stack(column, 1) for column in zip(*measured, strict=True))
        expected = [_a_priori_curve(setting, name, n, iterations) for n in (None, *counts)]
        found[name] = {
            label: {"error": errors[i].tolist(), "a_priori": expected[i], "a_posteriori": bounds[i].tolist()}
            for i, label in enumerate(labels)
        }
    return found


def _certified(setting: Setting, x: Tensor, linear: LinearSolver) -> tuple[Tensor, Tensor]:
    """True errors and a posteriori bounds of the hypergradients at x ``(B, d)``, each ``(B,)``."""
    problem = setting.copies(x.shape[0])
    h = hypergradient(
        problem,
        setting.loss,
        torch.zeros_like(x),
        lower=lower_solvers.HeavyBall(max_iter=0),  # x as it is
        linear=linear,
        error_tol=0.0,
        residual_tol=0.0,
        x0=x,
        certificate="classical",
    )
    return (_hypergradients(problem, h.q) - setting.gradient).norm(dim=1), h.sample_bounds


def _hypergradients(problem: QuadraticProblem, q: Tensor) -> Tensor:
    """-J^T q of every sample, ``(B, n)``."""
    return -torch.einsum("bdn,bd->bn", problem.mixed, q)


def _a_priori_curve(setting: Setting, name: str, lower: int | None, iterations: int) -> list[float]:
    """Bounds for adjoint iterations 0, 1, ... after ``lower`` heavy ball iterations (``None``: with the exact x*)."""
    c = setting.constants
    mu, smoothness = c["strong_convexity"], c["smoothness"]
    distance = 0.0
    if lower is not None:
        start = float(norm(setting.problem.initial() - setting.x))
        distance = float(a_priori.heavy_ball_distance(lower, mu, smoothness)) * start
    first = c["loss_grad_norm"] + c["loss_smoothness"] * distance
    names = ("strong_convexity", "mixed_norm", "loss_grad_norm", "loss_smoothness")
    constants = {n: c[n] for n in names}
    factors = (ADJOINT_FACTORS[name](k, mu, smoothness) for k in range(iterations + 1))
    return [float(a_priori.hypergradient(distance, first * factor, **constants)) for factor in factors]
