"""The lower-level solver contract: drive ||grad_x g|| below mu * error_tol, sample by sample."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from bilevel_imaging.energies.problem import LowerLevelProblem


@dataclass(frozen=True, kw_only=True)
class LowerSolution:
    """Evidence of a lower-level solve; everything is measured at the returned x.

    Attributes:
        x: ``(B, *image)``.
        grad_norm: ||grad_x g_i(x_i)||, ``(B,)``.
        distance_bound: ||x_i - x_i*|| <= (grad_norm + its rounding error) / mu, ``(B,)``; inf where mu is not known.
        iterations: per sample, int64 ``(B,)``.
        converged: ``grad_norm <= mu * error_tol``, and so is, to a hundredth, what is certified of it: rounding may be
            more than was asked for; bool ``(B,)``.
        reason: why each sample stopped: "converged", "max_iter", "stagnated" (rounding floor), "not finite".
        grad_rounding: bound of the rounding error in the gradient, ``(B,)``, where it is known.
    """

    x: Tensor
    grad_norm: Tensor
    distance_bound: Tensor
    iterations: Tensor
    converged: Tensor
    reason: tuple[str, ...]
    grad_rounding: Tensor | None = None


# part of an accuracy by which the rounding at the end may exceed that at the start
CERTIFIED_SLACK = 1e-2


class LowerSolver(abc.ABC):
    """Minimizes B strongly convex energies; a finished sample is frozen, a failed one is reported, never raised."""

    @abc.abstractmethod
    def solve(
        self,
        problem: LowerLevelProblem,
        x0: Tensor | None,
        error_tol: float | Tensor,
        *,
        max_iter: int | None = None,
    ) -> LowerSolution:
        """Solve until ||grad_x g_i(x_i)|| <= mu_i * error_tol_i, which certifies ||x_i - x_i*|| <= error_tol_i.

        Args:
            problem: the batch.
            x0: start ``(B, *image)``; ``None`` for ``problem.initial()``.
            error_tol: certified distance asked for, float or ``(B,)``, in the units of x.
            max_iter: iteration limit per sample; ``None`` for the solver's own.

        Raises:
            ValueError: wrong shapes or dtypes, negative or NaN tolerances.
        """
