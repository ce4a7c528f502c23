"""Where a batch of Newton solves stands: what stops a sample, and what is reported of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.lower_solvers.base import CERTIFIED_SLACK, LowerSolution

RUNNING, CONVERGED, MAX_ITER, STAGNATED, NOT_FINITE = range(5)
_REASONS = ("running", "converged", "max_iter", "stagnated", "not finite")

# Iterations without a fall of the gradient norm, near the rounding floor, until a solve counts as stagnated.
_PATIENCE = 3
_NEAR_FLOOR = 4.0
# Part of an accuracy by which a coarse bound of rounding may tighten it.
_TOLERATED = 0.1
# A predicted decrease of fewer units of the last place of the energy can't be told from rounding.
ENERGY_UNITS = 16.0


@dataclass
class NewtonState:
    """The samples in work; ``(A,)`` unless said otherwise.

    Attributes:
        size: ||grad|| at the current point.
        best_x, best_size: the point with the smallest gradient so far, which is what is returned, ``(A, *image)``.
        curvature: strong convexity constant, or the smallest curvature met so far where none is known.
        error_tol: accuracy asked for, without what rounding takes of it.
        status, iterations, idle (iterations without progress): int64.
    """

    size: Tensor
    best_x: Tensor
    best_size: Tensor
    curvature: Tensor
    error_tol: Tensor
    status: Tensor
    iterations: Tensor
    idle: Tensor

    @property
    def target(self) -> Tensor:
        """Gradient norm to reach. An infinite curvature (none met yet) asks for one step first."""
        return torch.where(self.curvature.isfinite(), self.curvature * self.error_tol, 0.0)

    @property
    def runs(self) -> bool:
        """Whether any sample does."""
        return bool((self.status == RUNNING).any())


def within_rounding(problem: LowerLevelProblem, x: Tensor, error_tol: Tensor) -> tuple[Tensor, Tensor]:
    """Curvature and accuracy to begin with at x: what is certified is the measured gradient plus its rounding."""
    mu = problem.constants().strong_convexity
    if mu is None:
        return torch.full_like(error_tol, torch.inf), error_tol
    curvature = mu.to(error_tol).expand_as(error_tol).clone()
    rounding = problem.gradient_rounding_beside(x, curvature * error_tol, _TOLERATED).to(error_tol) / curvature
    return curvature, error_tol - torch.minimum(rounding, 0.5 * error_tol)


def settle(problem: LowerLevelProblem, state: NewtonState, max_iter: int) -> None:
    """Mark the running samples that have converged, stagnated, reached the limit or left the finite numbers."""
    running = state.status == RUNNING
    status = torch.where(state.iterations >= max_iter, MAX_ITER, RUNNING)
    if bool((running & (state.idle >= _PATIENCE)).any()):
        status = torch.where((state.idle >= _PATIENCE) & _at_floor(problem, state), STAGNATED, status)
    status = torch.where(state.size <= state.target, CONVERGED, status)
    status = torch.where(state.size.isfinite(), status, NOT_FINITE)
    state.status = torch.where(running, status, state.status)


def _at_floor(problem: LowerLevelProblem, state: NewtonState) -> Tensor:
    """Whether the gradient is at its rounding errors, or no decrease of the energy can be seen any more."""
    unit = torch.finfo(state.best_x.dtype).eps
    at_gradient_floor = state.best_size <= _NEAR_FLOOR * problem.gradient_rounding(state.best_x)
    # the energy exceeds its minimum by at most ||G||^2 / (2 mu)
    excess = state.best_size.square() / (2 * state.curvature)
    return at_gradient_floor | (excess <= ENERGY_UNITS * unit * problem.value(state.best_x).abs())


def solution_of(problem: LowerLevelProblem, state: NewtonState, error_tol: Tensor) -> LowerSolution:
    """What is reported of a solve that was asked for ``error_tol`` ``(B,)``."""
    size = torch.where(state.best_size.isfinite(), state.best_size, torch.inf)
    mu = problem.constants().strong_convexity
    status, coarse = state.status, problem.coarse_gradient_rounding(state.best_x)
    # a bound that costs less will do where the accuracy asked for is met with it
    allowed = None if mu is None or coarse is None else (1 + CERTIFIED_SLACK) * mu.to(size) * error_tol
    if allowed is not None and bool((size + coarse.to(size) <= allowed).all()):
        rounding, known = coarse.to(size), None
    else:
        rounding = known = problem.gradient_rounding_beside(state.best_x, size).to(size)
    bound = torch.full_like(size, torch.inf) if mu is None else (size + rounding) / mu.to(size)
    if mu is not None:
        rounded = (status == CONVERGED) & (bound > (1 + CERTIFIED_SLACK) * error_tol)
        status = torch.where(rounded, STAGNATED, status)
    return LowerSolution(
        x=state.best_x,
        grad_norm=size,
        distance_bound=bound,
        iterations=state.iterations,
        converged=status == CONVERGED,
        reason=tuple(_REASONS[code] for code in status.tolist()),
        grad_rounding=known,
    )
