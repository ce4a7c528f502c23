"""The cost of certainty: a hypergradient certified to 1 %, beside an oracle that knows its true error and stops there.

Both use the same solvers, Newton-CG and preconditioned conjugate gradients, in float64, from the same cold start; work
is counted in lower-level gradients and Hessian-vector products per image.

The oracle is given, for nothing, the best pair of tolerances: the cheapest pair (lower-level accuracy, adjoint
residual) of a grid such that it *and every tighter pair of the grid* has a true error of at most the goal. Without the
second condition it would pick a lucky pair: each entry of the error is a signed sum of the errors of both solves, which
can cancel far away from the solution, and nobody who can't see the error could stop there. Only the two solves are
counted, neither evaluations of bounds nor products that check a residual. The oracle with one tolerance is the same on
the path residual_tol = L_f * error_tol, the balance that is used where only one of the two is given.

A ratio of 1 would be certainty for nothing. What is above it pays for errors being bounded rather than known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolution
from bilevel_imaging.lower_solvers import NewtonCG
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.tensors import norm
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

Record = dict[str, Any]

# the oracle's grid, from loose to tight: certified distances, and adjoint residuals relative to ||grad f||
ERROR_TOLS = tuple(10 ** (k / 4) for k in range(12, -13, -1))
RESIDUALS = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.003)
TRUTH = 1e-6  # certified relative error of what counts as the truth


@dataclass(frozen=True)
class Workload:
    """Smoothed total variation with one forward operator.

    Attributes:
        degradation: operator and noise.
        weight: TV weight.
        smoothing: TV smoothing.
        ridge: of the energy.
    """

    degradation: Degradation
    weight: float
    smoothing: float = 0.01
    ridge: float = 0.0

    def build(self, crops: Sequence[tuple[str, Tensor]]) -> tuple[LowerLevelProblem, Tensor]:
        """One batch of problems and its ground truth ``(B, 1, H, W)``, float64."""
        pairs = ImagePairs.build(crops, self.degradation, torch.float64)
        energy = VariationalEnergy(TotalVariation(self.weight, self.smoothing), ridge=self.ridge)
        x_true = torch.stack(pairs.x)
        return energy.bind(torch.stack(pairs.y), self.degradation.physics(x_true.shape[1:])), x_true


WORKLOADS = {
    "denoising": Workload(Degradation("denoising", sigma=0.1), weight=0.1),
    "deblurring": Workload(Degradation("deblurring", sigma=0.01, blur_size=9, blur_std=1.5), weight=0.01, ridge=1e-3),
    "inpainting": Workload(Degradation("inpainting", sigma=0.02, kept_fraction=0.5), weight=0.05, ridge=1e-3),
}


def run(*, crops: int = 11, size: int = 64, goal: float = 0.01) -> Record:
    """Every workload on every crop alone and on all of them as one batch; returns the record that is saved as JSON.

    Args:
        crops: one from each photograph, this many photographs.
        size: pixels along each side.
        goal: relative error asked for, certified or true.
    """
    patches = extract_patches(photographs(), size, 1, seed=0)[:crops]
    workloads = {}
    for name, workload in WORKLOADS.items():
        batch, x_true = workload.build(patches)
        # the problem of a crop is the same alone and in the batch, its noise included
        alone = [
            {"name": crop} | compare(batch.subset(torch.tensor([i])), x_true[i : i + 1], goal)
            for i, (crop, _) in enumerate(patches)
        ]
        workloads[name] = asdict(workload) | {"crops": alone, "batch": compare(batch, x_true, goal)}
    return {
        "size": size,
        "goal": goal,
        "truth": TRUTH,
        "error_tols": list(ERROR_TOLS),
        "residuals": list(RESIDUALS),
        "environment": environment("cpu"),
        "workloads": workloads,
    }


def compare(problem: LowerLevelProblem, x_true: Tensor, goal: float) -> Record:
    """The certified hypergradient, both oracles, and the ratios of work.

    Raises:
        RuntimeError: not even the tightest pair of the grid is accurate enough.
    """
    loss, batch = SquaredError(), problem.batch_size
    true = flatten(hypergradient(problem, loss, x_true, relative=TRUTH).grad)
    h = hypergradient(problem, loss, x_true, relative=goal)
    certified = {
        "work": _work(h.cost) / batch,
        "gradients": h.cost.gradients / batch,
        "hvps": h.cost.hvps / batch,
        "bound": h.relative_bound,
        "error": _relative_error(flatten(h.grad), true),
        "certificate": h.certificate,
        "reason": h.reason,
    }
    work, error = trials(problem, x_true, true)
    oracle = _cheapest(work[:, :-1], error[:, :-1], goal)
    balanced = _cheapest(work[:, -1:], error[:, -1:], goal)
    del balanced["residual"]
    return {
        "certified": certified,
        "oracle": oracle,
        "one_tolerance": balanced,
        "ratio": certified["work"] / oracle["work"],
        "ratio_one_tolerance": certified["work"] / balanced["work"],
    }


def trials(problem: LowerLevelProblem, x_true: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Work per image and true relative error of every pair, one row for each of ``ERROR_TOLS``.

    The columns are ``RESIDUALS``; the last one is residual_tol = L_f * error_tol.
    """
    loss, lower, linear = SquaredError(), NewtonCG(), ConjugateGradient(preconditioner="auto")
    oracle, batch = LossOracle(loss, x_true, problem.shape), problem.batch_size
    work = torch.empty(len(ERROR_TOLS), len(RESIDUALS) + 1, dtype=torch.float64)
    error = torch.empty_like(work)
    for i, error_tol in enumerate(ERROR_TOLS):
        before = problem.cost.copy()
        x = lower.solve(problem, None, error_tol).x
        spent = _work(problem.cost - before)
        linearization, rhs = problem.linearize(x), oracle.grad(x)  # the solver had it: not counted
        solutions: list[LinearSolution] = []
        for tol in (residual * norm(rhs) for residual in RESIDUALS):  # one run, continued
            again = linear.resume(linearization, rhs, solutions[-1], tol) if solutions else None
            solutions.append(again or linear.solve(linearization, rhs, tol))
        solutions.append(linear.solve(linearization, rhs, loss.smoothness * error_tol))
        for j, solution in enumerate(solutions):
            work[i, j] = (spent + int(solution.iterations.sum())) / batch  # one product per iteration
            estimate = -flatten(linearization.mixed_vjp(solution.q)) / batch
            error[i, j] = _relative_error(estimate, true)
    return work, error


def _cheapest(work: Tensor, error: Tensor, goal: float) -> Record:
    """The cheapest pair with no larger error than the goal there and at all tighter pairs."""
    tighter = error.flip(0, 1).cummax(0).values.cummax(1).values.flip(0, 1)
    allowed = torch.where(tighter <= goal, work, torch.inf)
    i, j = divmod(int(allowed.argmin()), work.shape[1])
    if allowed[i, j] == torch.inf:
        raise RuntimeError(
            f"Expected the tightest pair of tolerances to have a relative error <= {goal:g}. Got {error[-1, -1]:.3g}; "
            "extend ERROR_TOLS and RESIDUALS."
        )
    found = {"error_tol": ERROR_TOLS[i], "residual": RESIDUALS[j]}
    return found | {"work": float(work[i, j]), "error": float(error[i, j])}


def _relative_error(estimate: Tensor, true: Tensor) -> float:
    return float((estimate - true).norm() / true.norm())


def _work(cost: Cost) -> int:
    return cost.gradients + cost.hvps


def table(record: Record) -> str:
    """The record as text: work and ratios, medians over the crops with their range, and the batch."""
    goal, count = record["goal"], len(next(iter(record["workloads"].values()))["crops"])
    lines = [
        f"hypergradients certified to {100 * goal:g} % on {count} crops of {record['size']}x{record['size']}; work: "
        "gradients and Hessian-vector products per image",
        "",
        f"{'':12s} {'certified':>27s}   {'oracle':>6s} {'certified / oracle':>25s}   "
        f"{'certified / oracle with one tolerance':>37s}",
        f"{'workload':12s} {'work':>6s} {'bound':>10s} {'error':>9s}   {'work':>6s} "
        f"{'median (range)':>18s} {'batch':>6s}   {'median (range)':>30s} {'batch':>6s}",
    ]
    for name, workload in record["workloads"].items():
        certified = [crop["certified"] for crop in workload["crops"]]
        work, bound, error = (median(c[key] for c in certified) for key in ("work", "bound", "error"))
        oracle = median(crop["oracle"]["work"] for crop in workload["crops"])
        ratio, one = (_spread(workload["crops"], key) for key in ("ratio", "ratio_one_tolerance"))
        batch = workload["batch"]
        lines.append(
            f"{name:12s} {work:6.0f} {bound:10.1e} {error:9.1e}   {oracle:6.0f} {ratio:>18s} {batch['ratio']:6.2f}   "
            f"{one:>30s} {batch['ratio_one_tolerance']:6.2f}"
        )
    return "\n".join(lines)


def _spread(crops: list[Record], key: str) -> str:
    values = [crop[key] for crop in crops]
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
