"""Long moves along the flattest directions: a plateau of the loss looks stationary from inside."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import Objective
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.slope import Slope

# up to this many parameters, stationary points are checked for being plateaus
FEW_PARAMETERS = 16
# distance at which hypergradients beside a point give its Hessian, in log-parameters
PROBE = 0.1


def flat_moves(
    objective: Objective, h: Hypergradient | Slope, theta: Tensor, *, length: float, relative: float
) -> tuple[list[Tensor], Cost]:
    """Moves both ways along the eigenvectors of the Hessian, flattest first, and the work spent on it.

    The Hessian comes from one hypergradient per parameter, a little beside theta: none for many parameters. Leaves the
    parameters of the objective where the last of them was.

    Args:
        objective: whose loss it is.
        h: hypergradient at theta.
        theta: parameters, ``(n,)``.
        length: largest change of one parameter by a move.
        relative: accuracy of the hypergradients.

    Returns:
        moves ``(n,)``, and the work.
    """
    cost, n = Cost(), len(theta)
    if n > FEW_PARAMETERS:
        return [], cost
    columns = []
    for direction in torch.eye(n, dtype=torch.float64):
        assign(objective.theta, theta + PROBE * direction)
        beside = objective.hypergradient(relative=relative)
        cost = cost + beside.cost
        columns.append((flatten(beside.grad) - flatten(h.grad)) / PROBE)
    hessian = torch.stack(columns)
    if not bool(torch.isfinite(hessian).all()):
        return [], cost
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
    flattest_first = vectors.T[values.abs().argsort()]
    lengths = length / flattest_first.abs().amax(1, keepdim=True)
    return [sign * move for move in lengths * flattest_first for sign in (-1.0, 1.0)], cost
