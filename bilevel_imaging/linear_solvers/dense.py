"""The direct solver: assembles the Hessians; ground truth for tests and tiny problems."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.linear_solvers._systems import validate
from bilevel_imaging.linear_solvers.base import LinearSolution, LinearSolver
from bilevel_imaging.tensors import as_per_sample, binary_scale, norm, per_sample


def assemble_hessian(linearization: Linearization) -> Tensor:
    """The Hessians column by column, ``(B, d, d)`` with d the number of entries of one image; costs d products."""
    like = linearization.grad
    columns = []
    for j in range(like[0].numel()):
        unit = torch.zeros_like(like)
        unit.flatten(1)[:, j] = 1
        columns.append(linearization.hvp(unit).flatten(1))
    return torch.stack(columns, dim=2)


class DenseSolver(LinearSolver):
    """Cholesky factorization in float64 of the assembled, symmetrized Hessian; costs d + 1 products, 0 iterations.

    A Hessian that is not symmetric shows in the residual, which is computed with ``hvp``.

    Args:
        max_size: largest number d of entries of an image; memory is B d^2 numbers.
    """

    def __init__(self, *, max_size: int = 4096):
        self.max_size = max_size

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
        """See ``LinearSolver.solve``; q0 and max_iter have no meaning here."""
        validate(linearization, rhs, q0)
        tol = as_per_sample(residual_tol, rhs, "residual_tol")
        size = rhs[0].numel()
        if size > self.max_size:
            raise ValueError(f"Expected images of at most {self.max_size} entries. Got {size}. Use ConjugateGradient.")
        scale = per_sample(binary_scale(rhs), rhs)
        b = rhs.detach() / scale
        finite = b.isfinite().flatten(1).all(1)
        b = torch.where(per_sample(finite, b), b, 0.0)
        matrix = assemble_hessian(linearization).double()
        known = matrix.isfinite().flatten(1).all(1)
        safe = torch.where(known[:, None, None], matrix, 0.0)
        factor, info = torch.linalg.cholesky_ex((safe + safe.transpose(1, 2)) / 2)
        definite = info == 0
        usable = per_sample(definite, matrix)
        factor = torch.where(usable, factor, torch.eye(size, dtype=factor.dtype, device=factor.device))
        q = torch.cholesky_solve(b.double().flatten(1).unsqueeze(2), factor).squeeze(2) * usable.squeeze(2)
        q = q.to(rhs.dtype).reshape(rhs.shape)
        residual = norm(b - linearization.hvp(q)) * scale.flatten()
        residual = torch.where(finite & residual.isfinite(), residual, torch.inf)
        converged = residual <= tol
        return LinearSolution(
            q=q * scale,
            residual_norm=residual,
            iterations=torch.zeros(rhs.shape[0], dtype=torch.int64, device=rhs.device),
            converged=converged & finite,
            reason=_reasons(converged, finite & known, definite),
        )


def _reasons(converged: Tensor, finite: Tensor, definite: Tensor) -> tuple[str, ...]:
    reasons = []
    for good, is_finite, is_definite in zip(converged.tolist(), finite.tolist(), definite.tolist(), strict=True):
        if not is_finite:
            reasons.append("not finite")
        elif good:
            reasons.append("converged")
        else:
            reasons.append("stagnated" if is_definite else "not positive definite")
    return tuple(reasons)
