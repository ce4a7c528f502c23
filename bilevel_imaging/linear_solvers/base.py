"""The linear solver contract: drive the true residual ||b - H q|| below residual_tol, sample by sample."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

from torch import Tensor

from bilevel_imaging.derivatives import Linearization


@dataclass(frozen=True, kw_only=True)
class LinearSolution:
    """Evidence of a linear solve; residuals are recomputed from the returned q, not taken from the recursion, unless a
    solution says otherwise.

    Attributes:
        q: ``(B, *image)``.
        residual_norm: ||b_i - H_i q_i||, ``(B,)``.
        iterations: per sample, int64 ``(B,)``.
        converged: ``residual_norm <= residual_tol``, bool ``(B,)``.
        reason: why each sample stopped: "converged", "max_iter", "stagnated" (rounding floor), "not positive definite",
            "not finite".
        residual: b - H q as the solver knows it, ``(B, *image)``; ``None`` from solvers that bound no energy norm.
        energy_norm: bound of ||residual||_{H^-1}, ``(B,)``, where the solver has one (see ``ConjugateGradient``); inf
            where it is not known.
        verified: False for the residual of a recursion, which drifts; only what goes on with a solve asks for that.
        memory: what the solver needs to go on where it stopped; opaque.
    """

    q: Tensor
    residual_norm: Tensor
    iterations: Tensor
    converged: Tensor
    reason: tuple[str, ...]
    residual: Tensor | None = None
    energy_norm: Tensor | None = None
    verified: bool = True
    memory: dict[str, Tensor] | None = field(default=None, repr=False)


class LinearSolver(abc.ABC):
    """Solves B symmetric positive definite systems H_i q_i = b_i; one sample never influences another."""

    @abc.abstractmethod
    def solve(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
        max_iter: int | None = None,
    ) -> LinearSolution:
        """Solve until ||b_i - H_i q_i|| <= residual_tol_i (absolute, true residual).

        Args:
            linearization: gives ``hvp`` and, where known, ``constants`` and ``preconditioner()``.
            rhs: b, ``(B, *image)``; of any scale, zero samples included.
            residual_tol: float or ``(B,)``, in the units of b.
            q0: warm start; ``None`` for 0.
            max_iter: iteration limit per sample; ``None`` for the solver's own.

        Raises:
            ValueError: wrong shapes or dtypes, negative or NaN tolerances.
        """

    def begin(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
    ) -> LinearSolution:
        """``solve`` by someone who means to ``resume``: a solver may leave the check of the residual to that."""
        return self.solve(linearization, rhs, residual_tol, q0=q0)

    def resume(
        self, linearization: Linearization, rhs: Tensor, previous: LinearSolution, residual_tol: float | Tensor
    ) -> LinearSolution:
        """Go on from an earlier solution of the same systems; a solver without memory starts afresh from its q.

        Args:
            linearization: the same as before.
            rhs: the same as before.
            previous: what ``solve`` or ``resume`` of this solver returned.
            residual_tol: as in ``solve``.
        """
        return self.solve(linearization, rhs, residual_tol, q0=previous.q)
