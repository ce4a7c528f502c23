"""Block conjugate gradients: several right-hand sides per sample that share one Krylov space."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.linear_solvers._block_algebra import combine, gram, orthonormalize, product
from bilevel_imaging.linear_solvers._iteration import _RESTART_GAIN, _STEPS_BETWEEN_CHECKS
from bilevel_imaging.linear_solvers._systems import (
    DONE,
    INDEFINITE,
    MAX_ITER,
    NOT_FINITE,
    REASONS,
    RUNNING,
    STAGNATED,
    Operator,
    PerSample,
)
from bilevel_imaging.tensors import binary_scale, norm


@dataclass(frozen=True, kw_only=True)
class BlockSolution:
    """Evidence of a solve with k right-hand sides per sample.

    Attributes:
        q: ``(B, k, *image)``.
        residual_norm: true ||b_ij - H_i q_ij||, ``(B, k)``.
        iterations: block iterations per sample, of one product per column each, int64 ``(B,)``.
        converged: ``residual_norm <= residual_tol``, bool ``(B, k)``.
        reason: why each sample stopped, as in ``LinearSolution``; "converged" means all of its columns.
    """

    q: Tensor
    residual_norm: Tensor
    iterations: Tensor
    converged: Tensor
    reason: tuple[str, ...]


@dataclass
class _Blocks(PerSample):
    """The systems in units of a power of two near the largest entry of every column; changed in place.

    Attributes:
        b, q, r: ``(A, k, *image)``; r is the true residual at the start of a run.
        tol, target, residual: ``(A, k)``; a run stops where all columns have reached their target.
        status, iterations: int64 ``(A,)``.
    """

    b: Tensor
    q: Tensor
    r: Tensor
    tol: Tensor
    target: Tensor
    residual: Tensor
    status: Tensor
    iterations: Tensor

    def settle(self, max_iter: int) -> None:
        """Mark the running samples that have reached their targets, their limit, or something not finite."""
        status = torch.where(self.iterations >= max_iter, MAX_ITER, RUNNING)
        status = torch.where((self.residual <= self.target).all(1), DONE, status)
        status = torch.where(self.residual.isfinite().all(1), status, NOT_FINITE)
        self.status = torch.where(self.status == RUNNING, status, self.status)


class _Directions:
    """Orthonormal residual directions w with R = w sigma, and search directions s.

    Dubrulle's variant of the recurrences stays stable when residuals become dependent. A column of w that vanishes in
    the rounding errors is set to 0, and so is its search direction: no product is spent on a direction that no sample
    of the batch uses.
    """

    def __init__(self, systems: _Blocks):
        self.systems = systems
        self.w, self.sigma = orthonormalize(systems.r, systems.residual.double())
        self.s = self.w.clone()
        self.unused = self.sigma.diagonal(dim1=1, dim2=2) == 0
        self.find_columns_in_use()

    def find_columns_in_use(self) -> None:
        """Waits for the device."""
        self.columns = (~self.unused).any(0).nonzero().flatten().tolist()

    def take(self, index: Tensor, systems: _Blocks) -> None:
        self.systems = systems
        self.w, self.s = self.w[index], self.s[index]
        self.sigma, self.unused = self.sigma[index], self.unused[index]

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, s = self.systems, self.s
        z = torch.zeros_like(s)
        for column in self.columns:
            z[:, column] = operator.hvp(s[:, column].contiguous())
        curvature = gram(s, z)
        finite = curvature.flatten(1).isfinite().all(1)
        identity = torch.eye(s.shape[1], dtype=torch.float64, device=s.device)
        # 1 on the diagonal of directions that are 0
        safe = torch.where(finite[:, None, None], curvature + torch.diag_embed(self.unused.double()), identity)
        factor, info = torch.linalg.cholesky_ex(safe)
        definite = info == 0
        advance = running & finite & definite
        failure = torch.where(finite, INDEFINITE, NOT_FINITE)
        systems.status = torch.where(running & ~advance, failure, systems.status)
        inverse = torch.cholesky_inverse(torch.where(definite[:, None, None], factor, identity))
        inverse = torch.where(advance[:, None, None], inverse, 0.0)
        systems.q.add_(combine(s, product(inverse, self.sigma)))
        w = self.w - combine(z, inverse)
        # w and z inverse are of size 1 and more: what is left of them may be rounding errors
        self.w, zeta = orthonormalize(w, 1 + _column_norms(w))
        self.s = self.w + combine(s, zeta.transpose(1, 2))
        self.sigma = product(zeta, self.sigma)
        self.unused = zeta.diagonal(dim1=1, dim2=2) == 0
        residual = self.sigma.square().sum(1).sqrt().to(systems.residual)
        systems.residual = torch.where(advance[:, None], residual, systems.residual)


class BlockConjugateGradient:
    """Conjugate gradients for k right-hand sides per sample (O'Leary 1980), k products per iteration.

    Every column is minimized over the Krylov spaces of all columns together. How much that saves depends on the
    spectrum: much for a few outlying eigenvalues or many columns, next to nothing for two columns on total variation
    problems, where the number of products is that of separate solves within 20 %.

    Directions are orthonormalized at each step (Dubrulle 2001, "Retooling the method of block conjugate gradients",
    BCGrQ), which allows columns of any scale, dependent ones and zeros. True residuals are computed at the end, and the
    method restarts where the recursed ones had drifted.

    Args:
        max_iter: default limit of block iterations per sample, restarts included.

    Raises:
        ValueError: if max_iter is negative.
    """

    def __init__(self, *, max_iter: int = 2000):
        self.max_iter = whole("max_iter", max_iter, 0)

    @torch.no_grad()
    def solve(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        max_iter: int | None = None,
    ) -> BlockSolution:
        """Solve until ||b_ij - H_i q_ij|| <= residual_tol_ij for all columns j (absolute, true residuals).

        Args:
            linearization: gives ``hvp``.
            rhs: b, ``(B, k, *image)``; of any scale, zero columns included.
            residual_tol: float or ``(B, k)``, in the units of b.
            max_iter: limit of block iterations per sample; ``None`` for the solver's own.

        Raises:
            ValueError: wrong shapes or dtypes, negative or NaN tolerances.
        """
        tol = _validated_tol(linearization, rhs, residual_tol)
        limit = self.max_iter if max_iter is None else whole("max_iter", max_iter, 0)
        operator = Operator(linearization, None)
        finite = rhs.isfinite().flatten(2).all(2)
        scale = binary_scale(rhs.flatten(0, 1)).reshape(tol.shape)
        systems = _start(rhs.detach(), finite, tol, scale)
        floor = torch.finfo(rhs.dtype).eps / 8
        while True:
            systems.target = torch.maximum(systems.tol, floor * systems.residual)
            systems.settle(limit)
            entered = systems.status == RUNNING
            if not bool(entered.any()):
                break
            before = systems.q.clone(), systems.r, systems.residual.clone()
            _iterate(operator, systems, limit)
            _verify(operator, systems, entered, before)
        return _solution(systems, finite, scale, tol)


def _validated_tol(linearization: Linearization, rhs: Tensor, residual_tol: float | Tensor) -> Tensor:
    grad = linearization.grad
    fits = rhs.dim() == grad.dim() + 1 and rhs.shape[0] == grad.shape[0] and rhs.shape[2:] == grad.shape[1:]
    if not fits or rhs.shape[1] == 0 or rhs.dtype != grad.dtype or rhs.device != grad.device:
        raise ValueError(
            f"Expected rhs as (B, k, *image) for gradients of shape {tuple(grad.shape)}, {grad.dtype}, {grad.device}. "
            f"Got {tuple(rhs.shape)}, {rhs.dtype}, {rhs.device}."
        )
    tol = torch.as_tensor(residual_tol, dtype=rhs.dtype, device=rhs.device).detach()
    if tol.shape not in ((), rhs.shape[:2]):
        raise ValueError(
            f"Expected residual_tol as one float or one value per column, shape {tuple(rhs.shape[:2])}. "
            f"Got shape {tuple(tol.shape)}."
        )
    if not bool((tol >= 0).all()):
        raise ValueError(f"Expected residual_tol >= 0 for every column. Got {tol.tolist()}.")
    return tol.expand(rhs.shape[:2]).clone()


def _start(rhs: Tensor, finite: Tensor, tol: Tensor, scale: Tensor) -> _Blocks:
    """Normalized systems at 0; columns that are not finite are replaced by 0."""
    b = torch.where(_per_column(finite, rhs), rhs / _per_column(scale, rhs), 0.0)
    tol = tol / scale
    status = torch.full(b.shape[:1], RUNNING, device=b.device)
    return _Blocks(b, torch.zeros_like(b), b.clone(), tol, tol, _column_norms(b).to(tol), status, status.clone())


def _iterate(operator: Operator, systems: _Blocks, max_iter: int) -> None:
    """Advance the running samples until each has stopped; the batch shrinks when half of it has."""
    work, index = systems, None
    directions = _Directions(work)
    on_cpu, can_shrink = systems.q.device.type == "cpu", True
    for step in itertools.count():
        running = work.status == RUNNING
        if on_cpu or step % _STEPS_BETWEEN_CHECKS == 0:
            count = int(running.sum())
            if count == 0:
                break
            if can_shrink and 2 * count <= running.shape[0]:
                kept = running.nonzero().squeeze(1)
                smaller = operator.subset(kept)
                can_shrink = smaller is not None
                if smaller is not None:
                    if index is not None:
                        systems.put(index, work)
                    operator, work = smaller, work.take(kept)
                    index, running = kept if index is None else index[kept], running[kept]
                    directions.take(kept, work)
            directions.find_columns_in_use()
        directions.step(operator, running)
        work.iterations += running
        work.settle(max_iter)
    if index is not None:
        systems.put(index, work)


def _verify(operator: Operator, systems: _Blocks, entered: Tensor, before: tuple[Tensor, Tensor, Tensor]) -> None:
    """Replace recursed residuals by true ones; samples whose recursion had drifted are set running again."""
    q_before, r_before, residual_before = before
    products = torch.zeros_like(systems.b)
    for column in residual_before.any(0).nonzero().flatten().tolist():
        products[:, column] = operator.hvp_where(entered, systems.q[:, column].contiguous())
    mask = entered[:, None]
    systems.r = torch.where(_per_column(mask, products), systems.b - products, r_before)
    systems.residual = torch.where(mask, _column_norms(systems.r).to(residual_before), residual_before)
    good = systems.residual <= systems.tol
    gained = (~good & (systems.residual <= _RESTART_GAIN * residual_before)).any(1)
    again = entered & ~good.all(1) & (systems.status == DONE)
    systems.status = torch.where(again, torch.where(gained, RUNNING, STAGNATED), systems.status)
    systems.status = torch.where(entered & good.all(1), DONE, systems.status)
    worse = mask & ~(systems.residual <= residual_before) & (systems.status != MAX_ITER)[:, None]
    worse = worse | (mask & (systems.status == NOT_FINITE)[:, None])
    systems.q = torch.where(_per_column(worse, q_before), q_before, systems.q)
    systems.r = torch.where(_per_column(worse, r_before), r_before, systems.r)
    systems.residual = torch.where(worse, residual_before, systems.residual)


def _solution(systems: _Blocks, finite: Tensor, scale: Tensor, tol: Tensor) -> BlockSolution:
    residual = torch.where(finite, systems.residual * scale, torch.inf)
    broken = (systems.status == NOT_FINITE) | ~finite.all(1)
    converged = (residual <= tol) & finite & (systems.status != NOT_FINITE)[:, None]
    missed = torch.where(systems.status == DONE, STAGNATED, systems.status)
    status = torch.where(converged.all(1), DONE, torch.where(broken, NOT_FINITE, missed))
    return BlockSolution(
        q=systems.q * _per_column(scale, systems.q),
        residual_norm=residual,
        iterations=systems.iterations,
        converged=converged,
        reason=tuple(REASONS[code] for code in status.tolist()),
    )


def _column_norms(vectors: Tensor) -> Tensor:
    """``(A, k, *image)`` to ``(A, k)`` float64."""
    return norm(vectors.flatten(0, 1)).double().reshape(vectors.shape[:2])


def _per_column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(*values.shape, *([1] * (like.dim() - 2)))
