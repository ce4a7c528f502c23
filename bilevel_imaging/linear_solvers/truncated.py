"""Adjoints that are cheap instead of accurate: truncated series, one step, or one that is left over from before.

They do not look at the tolerance, but report the true residual like every solver, so a hypergradient made from them is
certified like any other: the a posteriori bounds hold for every q (Ehrhardt & Roberts 2023).
"""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.linear_solvers._systems import validate
from bilevel_imaging.linear_solvers.base import LinearSolution, LinearSolver
from bilevel_imaging.tensors import as_per_sample, norm, per_sample


class _Truncated(LinearSolver):
    """Base of the solvers whose work is fixed in advance."""

    @torch.no_grad()
    def solve(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
        max_iter: int | None = None,
    ) -> LinearSolution:
        """See ``LinearSolver.solve``; the tolerance only decides what is called converged."""
        validate(linearization, rhs, q0)
        tol = as_per_sample(residual_tol, rhs, "residual_tol")
        finite = rhs.isfinite().flatten(1).all(1)
        b = torch.where(per_sample(finite, rhs), rhs.detach(), 0.0)
        q, residual, steps = self._approximate(linearization, b, q0, max_iter)
        size = torch.where(finite, norm(residual).nan_to_num(nan=torch.inf), torch.inf)
        converged = size <= tol
        return LinearSolution(
            q=q,
            residual_norm=size,
            iterations=torch.full_like(size, steps, dtype=torch.int64),
            converged=converged,
            reason=tuple(
                "converged" if good else "max_iter" if known else "not finite"
                for good, known in zip(converged.tolist(), size.isfinite().tolist(), strict=True)
            ),
            residual=residual,
        )

    @abc.abstractmethod
    def _approximate(
        self, linearization: Linearization, b: Tensor, q0: Tensor | None, max_iter: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """q, b - H q from a product with q itself, and the number of steps made."""


class Neumann(_Truncated):
    """q = step sum_{j < terms} (I - step H)^j b, the truncated Neumann series of H^{-1} b, for ``terms`` products.

    The same as ``terms`` gradient steps from 0, or from ``q0`` if there is one (one more product), and as reverse-mode
    differentiation of so many steps of gradient descent with derivatives frozen at the last iterate;
    residual <= (1 - step mu)^terms residual_0 for step <= 1/L.

    Args:
        terms: number of terms K >= 1; a ``max_iter`` below it wins.
        step: step size; ``None`` for 1 / L.

    Raises:
        ValueError: no terms, a step that is not positive; (from ``solve``) no step and L not known.
    """

    def __init__(self, terms: int, *, step: float | None = None):
        if terms < 1:
            raise ValueError(f"Expected terms >= 1. Got {terms}.")
        self.terms, self.step = terms, _check_step(step)

    def _approximate(
        self, linearization: Linearization, b: Tensor, q0: Tensor | None, max_iter: int | None
    ) -> tuple[Tensor, Tensor, int]:
        step = _step_size(linearization, b, self.step)
        terms = self.terms if max_iter is None else min(self.terms, max_iter)
        q, residual = (torch.zeros_like(b), b) if q0 is None else (q0.detach(), b - linearization.hvp(q0.detach()))
        for _ in range(terms):
            q = torch.addcmul(q, step, residual)
            residual = b - linearization.hvp(q)
        return q, residual, terms


class JacobianFree(_Truncated):
    """q = step b: differentiates the last gradient step alone, "Jacobian-free backpropagation" (Fung et al. 2022).

    The first term of ``Neumann``, whatever ``q0`` and ``max_iter``; residual <= (1 - step mu) ||b|| for step <= 1/L.
    One product, for the residual.

    Args:
        step: step size; ``None`` for 1 / L.

    Raises:
        ValueError: a step that is not positive; (from ``solve``) no step and L not known.
    """

    def __init__(self, *, step: float | None = None):
        self.step = _check_step(step)

    def _approximate(
        self, linearization: Linearization, b: Tensor, q0: Tensor | None, max_iter: int | None
    ) -> tuple[Tensor, Tensor, int]:
        q = _step_size(linearization, b, self.step) * b
        return q, b - linearization.hvp(q), 1


class Recycled(_Truncated):
    """q = q0 as it is, 0 without one: the adjoint of an earlier theta or iterate, for the product of its residual."""

    def _approximate(
        self, linearization: Linearization, b: Tensor, q0: Tensor | None, max_iter: int | None
    ) -> tuple[Tensor, Tensor, int]:
        if q0 is None:
            return torch.zeros_like(b), b, 0
        q = q0.detach().clone()
        return q, b - linearization.hvp(q), 0


def _check_step(step: float | None) -> float | None:
    if step is not None and not 0 < step < float("inf"):
        raise ValueError(f"Expected step as a positive number, or None for 1 / L. Got {step!r}.")
    return step


def _step_size(linearization: Linearization, b: Tensor, step: float | None) -> Tensor:
    """The step, ``(B, 1, ...)``."""
    smoothness = linearization.constants.smoothness
    if step is None and smoothness is None:
        raise ValueError("Expected a known smoothness constant L for the step 1 / L. Got None. Pass step.")
    size = b.new_full((b.shape[0],), step) if step is not None else 1 / smoothness.to(b)
    return per_sample(size, b)
