"""Newton's method where compiled code makes whole runs of steps; the steps are those of ``newton_cg``."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.lower_solvers._newton_state import NewtonState, settle, solution_of, within_rounding
from bilevel_imaging.lower_solvers.base import LowerSolution
from bilevel_imaging.native import Descent, DescentStates


def descend(
    problem: LowerLevelProblem,
    descent: Descent,
    x: Tensor,
    error_tol: Tensor,
    max_iter: int,
    max_inner: int,
    *,
    cold: bool,
) -> LowerSolution:
    """Minimize from x ``(B, *image)`` to accuracies ``(B,)``; between the runs, see which images have stagnated."""
    asked = error_tol
    curvature, error_tol = within_rounding(problem, x, error_tol)
    counts = torch.zeros(x.shape[0], dtype=torch.int64)
    if not cold:  # a cold start is the solver's own
        x = x.clone()
    x = x.contiguous()
    state = NewtonState(
        size=torch.full_like(error_tol, torch.inf),
        best_x=torch.empty_like(x),
        best_size=torch.full_like(error_tol, torch.inf),
        curvature=curvature,
        error_tol=error_tol,
        status=counts,
        iterations=counts,
        idle=counts,
    )
    dual = x.new_empty((x.shape[0], 2, *x.shape[1:]))
    at = DescentStates(state.target.double(), descent.quadratic.offset)
    begin, initial = "cold" if cold else "warm", None if cold else problem.initial().contiguous()
    while True:
        descent.run(x, state.best_x, dual, at, begin=begin, initial=initial, max_iter=max_iter, max_inner=max_inner)
        state.size, state.best_size = at.size.to(error_tol), at.best_size.to(error_tol)
        state.status, state.iterations, state.idle = (v.clone() for v in (at.status, at.iterations, at.idle))
        settle(problem, state, max_iter)
        if not state.runs:
            return solution_of(problem, state, asked)
        at.status.copy_(state.status)
        begin, initial = "continued", None
