"""Inexact automatic differentiation is a linear solver in disguise (Ehrhardt & Roberts 2023), shown on TV denoising.

For K = 1, 2, ...: the reverse sweep of K iterations with derivatives frozen at x^K, beside K iterations of the same
method on H q = grad f from q = 0 and one product with J. For contrast the true errors, and the certified bounds, of
three hypergradients at the same x^K: unrolled, inexact automatic differentiation, and K conjugate gradient iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import deepinv
import torch
from torch import Tensor

from bilevel_imaging import linear_solvers, lower_solvers
from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient, UnrolledHypergradient, hypergradient, inexact_ad, unrolled
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

# name of the method -> label, and the linear solver that it turns out to be
METHODS: dict[str, tuple[str, Callable[..., LinearSolver]]] = {
    "gradient_descent": ("gradient descent", linear_solvers.GradientDescent),
    "heavy_ball": ("heavy ball", linear_solvers.HeavyBall),
    "nesterov": ("Nesterov", partial(linear_solvers.AcceleratedGradient, momentum="constant")),
    "accelerated_gradient": ("FISTA", linear_solvers.AcceleratedGradient),
}
ESTIMATES = {"unrolled": "unrolled", "inexact": "inexact AD", "cg": "CG"}
# where a difference of exactly 0 is drawn
_SMALLEST = 1e-18


@dataclass(frozen=True)
class Workload:
    """Smoothed TV denoising of photograph crops, float64; K = 60 iterations come near the minimizer.

    Attributes:
        images: crops, one from each of so many photographs.
        size: pixels along each side.
        weight: TV weight.
        smoothing: TV smoothing.
        sigma: standard deviation of the noise.
    """

    images: int = 1
    size: int = 64
    weight: float = 0.1
    smoothing: float = 0.05
    sigma: float = 0.1

    def build(self) -> tuple[VariationalEnergy, Tensor, Tensor]:
        """Energy, ground truth and measurements, ``(images, 1, size, size)``."""
        crops = extract_patches(photographs(), self.size, 1, seed=0)[: self.images]
        pairs = ImagePairs.build(crops, Degradation("denoising", sigma=self.sigma))
        return (
            VariationalEnergy(TotalVariation(self.weight, self.smoothing)),
            torch.stack(pairs.x),
            torch.stack(pairs.y),
        )


WORKLOAD = Workload()


def run(workload: Workload = WORKLOAD, *, steps: int = 60) -> Record:
    """The record: for every method a list over K = 1, ..., ``steps`` of each quantity, relative to norms.

    Args:
        workload: the images and the energy.
        steps: largest K.

    Returns:
        "workload", "steps", "reference_relative_bound" and, by method, "difference" of inexact automatic
        differentiation from the linear solver and {"error", "bound"} of every estimate.
    """
    energy, x_true, y = workload.build()
    problem, loss = energy.bind(y, deepinv.physics.Denoising()), SquaredError()
    exact = hypergradient(problem, loss, x_true, error_tol=1e-12, residual_tol=1e-12)
    methods = {}
    for name in METHODS:
        rows = [_compare(problem, loss, x_true, exact, name, k) for k in range(1, steps + 1)]
        methods[name] = {"difference": [row["difference"] for row in rows]} | {
            estimate: {kind: [row[estimate][kind] for row in rows] for kind in ("error", "bound")}
            for estimate in ESTIMATES
        }
    return {
        "workload": asdict(workload),
        "steps": steps,
        "reference_relative_bound": exact.relative_bound,
        "methods": methods,
    }


def _compare(
    problem: LowerLevelProblem, loss: SquaredError, x_true: Tensor, exact: Hypergradient, method: str, steps: int
) -> Record:
    """Everything about one method and one K."""
    full = unrolled(problem, loss, x_true, method=method, steps=steps, certify=True)
    frozen = inexact_ad(problem, loss, x_true, method=method, steps=steps, certify=True)
    conjugate = hypergradient(
        problem,
        loss,
        x_true,
        lower=lower_solvers.HeavyBall(max_iter=0),  # x^K as it is
        linear=ConjugateGradient(max_iter=steps),
        error_tol=0.0,
        residual_tol=0.0,
        x0=frozen.x,
    )
    solved = _linear_solver(problem, loss, x_true, frozen.x, METHODS[method][1](max_iter=steps))
    return {
        "difference": float((flatten(frozen.grad) - solved).norm() / solved.norm()),
        "unrolled": _accuracy(full, exact),
        "inexact": _accuracy(frozen, exact),
        "cg": _accuracy(conjugate, exact),
    }


def _linear_solver(
    problem: LowerLevelProblem, loss: SquaredError, x_true: Tensor, x: Tensor, solver: LinearSolver
) -> Tensor:
    """-J^T q at x, all entries in one vector."""
    linearization = problem.linearize(x)
    q = solver.solve(linearization, loss.grad(x, x_true), 0.0).q
    return -flatten(linearization.mixed_vjp(q)) / x.shape[0]


def _accuracy(estimate: Hypergradient | UnrolledHypergradient, exact: Hypergradient) -> dict[str, float]:
    error = float((flatten(estimate.grad) - flatten(exact.grad)).norm())
    return {"error": error / exact.norm, "bound": estimate.bound / exact.norm}


def figure(record: Record, method: str = "heavy_ball") -> Figure:
    """Left: how far inexact differentiation is from the linear solver. Right: errors and bounds for one method."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    count = range(1, record["steps"] + 1)
    for i, (name, found) in enumerate(record["methods"].items()):
        difference = [max(value, _SMALLEST) for value in found["difference"]]
        left.plot(count, difference, ".", color=f"C{i}", label=METHODS[name][0])
    left.axhline(torch.finfo(torch.float64).eps, color="black", linestyle=":", label="unit of float64")
    left.set(ylim=(_SMALLEST / 2, 1e-10), title="Inexact AD and K iterations on H q = ∇f")
    left.set_ylabel("relative difference (0 at the bottom)")
    for i, (name, label) in enumerate(ESTIMATES.items()):
        found = record["methods"][method][name]
        right.plot(count, found["error"], color=f"C{i}", label=label)
        right.plot(count, found["bound"], color=f"C{i}", linestyle="--")
    right.plot([], [], color="black", label="true error")
    right.plot([], [], color="black", linestyle="--", label="certified bound")
    right.set(title=f"Hypergradients after K iterations, {METHODS[method][0]}", ylabel="relative error, bound")
    for axis in (left, right):
        axis.set(yscale="log", xlabel="K")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return drawing


def table(record: Record) -> str:
    """For every method the largest difference, and errors with bounds at the largest K."""
    lines = [
        f"{'':18s}{'max difference':>16s}" + "".join(f"{label + ': error, bound':>25s}" for label in ESTIMATES.values())
    ]
    for name, found in record["methods"].items():
        cells = (f"{found[e]['error'][-1]:15.1e}{found[e]['bound'][-1]:10.1e}" for e in ESTIMATES)
        lines.append(f"{METHODS[name][0]:18s}{max(found['difference']):16.1e}" + "".join(cells))
    lines.append(
        f"difference: inexact AD from the linear solver, over K = 1, ..., {record['steps']}; "
        f"errors and bounds at K = {record['steps']}; all relative"
    )
    return "\n".join(lines)
