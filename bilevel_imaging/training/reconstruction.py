"""Reconstructions with a certified distance to the minimizer, measured in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.tensors import as_per_sample, norm

# error_tol where none is given: root mean square of the error of a pixel
PIXEL_ACCURACY = 1e-4


@dataclass(frozen=True, kw_only=True)
class ReconstructionInfo:
    """What is known of a batch of reconstructions.

    Attributes:
        distance_bound: ||x_i - x_i*|| <= distance_bound_i, rounding included, ``(B,)`` float64; inf if not certified.
        converged: whether the accuracy asked for is certified, ``(B,)``.
        reason: in words where it is not, one string per image; empty where it is.
        iterations: of the lower-level solver, ``(B,)``.
        error_tol: the accuracy asked for, ``(B,)`` float64.
    """

    distance_bound: Tensor
    converged: Tensor
    reason: tuple[str, ...]
    iterations: Tensor
    error_tol: Tensor


def energy_of(prior: Regularizer, device: str | torch.device, ridge: float | None = None) -> VariationalEnergy:
    """The energy that a loaded regularizer was learned in: with its ridge and its learned weights of the data term.

    Args:
        prior: any :class:`Regularizer`; its attributes ``ridge`` and ``data_weight`` count if it has them.
        device: of the measurements; the weights of the data term are moved there.
        ridge: instead of that of the prior.
    """
    weight = getattr(prior, "data_weight", None)
    weight = None if weight is None else weight.to(device)
    ridge = float(getattr(prior, "ridge", 0.0)) if ridge is None else ridge
    return VariationalEnergy(prior, ridge=ridge, data_weight=weight)


def minimize(
    problem: LowerLevelProblem,
    x0: Tensor | None = None,
    error_tol: float | Tensor | None = None,
    solver: LowerSolver | None = None,
) -> tuple[Tensor, ReconstructionInfo]:
    """Minimize a batch of energies and certify the distance to the minimizers.

    What float32 cannot reach is finished in float64 and rounded.

    Args:
        problem: the batch.
        x0: start ``(B, *image)``; ``None`` for that of the problem.
        error_tol: distance asked for, float or ``(B,)``; ``None`` for a root mean square error of 1e-4 per pixel.
        solver: ``None`` for Newton-CG.

    Returns:
        reconstructions in the dtype of the problem, and what is known of them.
    """
    solver = NewtonCG() if solver is None else solver
    start = problem.initial() if x0 is None else x0
    if error_tol is None:
        error_tol = PIXEL_ACCURACY * start[0].numel() ** 0.5
    wanted = as_per_sample(error_tol, start.double(), "error_tol")
    # Half of it, because the certificate adds a bound of the rounding errors to what the solver measures.
    solution = solver.solve(problem, x0, (0.5 * wanted).to(start.dtype))
    x, iterations, reasons = solution.x, solution.iterations, solution.reason
    exact = problem.double() or problem
    bound = certified_distance(exact, x)
    if exact is not problem and bool((bound > wanted).any()) and bool(bound.isfinite().any()):
        finer = solver.solve(exact, x.double(), 0.5 * wanted)
        rounded = finer.x.to(problem.dtype)
        moved = norm(rounded.double() - finer.x) + certified_distance(exact, finer.x)
        better = moved < bound
        x = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), rounded, x)
        bound, iterations, reasons = torch.minimum(bound, moved), iterations + finer.iterations, finer.reason
    converged = bound <= wanted
    words = tuple(
        "" if ok else _explain(problem, reason, float(b))
        for ok, reason, b in zip(converged.tolist(), reasons, bound.tolist(), strict=True)
    )
    info = ReconstructionInfo(
        distance_bound=bound, converged=converged, reason=words, iterations=iterations, error_tol=wanted
    )
    return x, info


def certified_distance(problem: LowerLevelProblem, x: Tensor) -> Tensor:
    """Bound of ||x_i - x_i*||, rounding of the gradient included, ``(B,)`` float64; inf if mu is not known.

    Args:
        problem: in float64 where that is possible.
        x: any point, ``(B, *image)``; cast to the problem's dtype.
    """
    mu = problem.constants().strong_convexity
    x = x.detach().to(problem.dtype)
    if mu is None:
        return torch.full((x.shape[0],), torch.inf, dtype=torch.float64, device=x.device)
    with torch.no_grad():
        size = norm(problem.grad(x)).double()
        size = size + problem.gradient_rounding(x).double()
    return torch.where(size.isfinite(), size / mu.double(), torch.inf)


def _explain(problem: LowerLevelProblem, reason: str, bound: float) -> str:
    if bound == float("inf") and problem.constants().strong_convexity is None:
        return f"not certified: {problem.constants().reason}"
    words = {
        "max_iter": "iteration limit reached",
        "stagnated": "rounding floor reached",
        "not finite": "the iteration is not finite",
        "converged": "the solver stopped just short of it because of rounding",
    }
    return f"{words.get(reason, reason)}; certified distance {bound:.3g}"
