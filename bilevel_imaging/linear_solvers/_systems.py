"""Batches of linear systems H q = b in normalized units: what every iterative solver works on.

Systems whose right-hand side is not of moderate size are solved in units of a power of two near its largest entry.
That is exact in floating point: the iterates are those of the unscaled recurrence, and right-hand sides of size 1e-30
do not underflow when squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.linear_solvers.base import LinearSolution
from bilevel_imaging.native import Stencil
from bilevel_imaging.tensors import inner, norm, per_sample

PreconditionerChoice = Callable[[Tensor], Tensor] | Literal["auto"] | None

RUNNING, DONE, MAX_ITER, STAGNATED, INDEFINITE, NOT_FINITE = range(6)
REASONS = ("running", "converged", "max_iter", "stagnated", "not positive definite", "not finite")


@dataclass
class PerSample:
    """Base of records whose fields are tensors with the samples in front."""

    def take(self, index: Tensor) -> Self:
        """Copies of the samples ``index``."""
        return type(self)(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def put(self, index: Tensor, part: Self) -> None:
        """Write ``part`` back to the samples ``index``."""
        for f in fields(self):
            getattr(self, f.name)[index] = getattr(part, f.name)


@dataclass
class Systems(PerSample):
    """A batch of systems H q = b in normalized units; the tensors are owned by the solver and changed in place.

    Attributes:
        b, q, r: right-hand side, iterate, residual b - H q as the recurrence knows it, ``(A, *image)``.
        tol, target: the tolerance asked for, and the residual at which the recurrence stops, ``(A,)``.
        residual: ||r||, ``(A,)``.
        energy: bound of ||r||_{H^-1} from the recurrence, ``(A,)``; inf where it gives none.
        status, iterations: int64 ``(A,)``.
    """

    b: Tensor
    q: Tensor
    r: Tensor
    tol: Tensor
    target: Tensor
    residual: Tensor
    energy: Tensor
    status: Tensor
    iterations: Tensor

    def goes_on(self, max_iter: int) -> bool:
        """Whether every sample is running, above its target and below its limit (a comparison with NaN is false)."""
        above = (self.residual > self.target) & (self.residual < torch.inf) & (self.iterations < max_iter)
        return bool((above & (self.status == RUNNING)).all())

    def settle(self, max_iter: int) -> None:
        """Mark the running samples that have reached their target, their limit, or something not finite."""
        running = self.status == RUNNING
        status = torch.where(self.iterations >= max_iter, MAX_ITER, RUNNING)
        status = torch.where(self.residual <= self.target, DONE, status)
        status = torch.where(self.residual.isfinite(), status, NOT_FINITE)
        self.status = torch.where(running, status, self.status)


class Operator:
    """The Hessians of the samples in the working batch, and the preconditioner that goes with them."""

    def __init__(self, linearization: Linearization, preconditioner: PreconditionerChoice):
        self.linearization = linearization
        self._given = preconditioner
        self.precondition = linearization.preconditioner() if preconditioner == "auto" else preconditioner

    def hvp(self, v: Tensor) -> Tensor:
        return self.linearization.hvp(v)

    def stencil(self) -> Stencil | None:
        """The operator for compiled code, where there is no preconditioner."""
        return self.linearization.stencil() if self.precondition is None else None

    def subset(self, index: Tensor) -> Operator | None:
        """The operator of the samples ``index``; ``None`` if a part of it is known for the whole batch only."""
        if callable(self._given):
            return None
        part = self.linearization.subset(index)
        return None if part is None else Operator(part, self._given)

    def hvp_where(self, mask: Tensor, v: Tensor) -> Tensor:
        """Products of the samples in ``mask``; the others are computed too, or left 0, whichever is cheaper."""
        index = mask.nonzero().squeeze(1)
        part = self.subset(index) if 2 * index.shape[0] <= mask.shape[0] else None
        if part is None:
            return self.hvp(v)
        result = torch.zeros_like(v)
        result[index] = part.hvp(v[index])
        return result


def validate(linearization: Linearization, rhs: Tensor, q0: Tensor | None) -> None:
    """Raise ``ValueError`` unless rhs and q0 look like the gradient of the linearization."""
    for name, value in (("rhs", rhs), ("q0", q0)):
        if value is None:
            continue
        grad = linearization.grad
        if value.shape != grad.shape or value.dtype != grad.dtype or value.device != grad.device:
            raise ValueError(
                f"Expected {name} like the gradient: {tuple(grad.shape)}, {grad.dtype}, {grad.device}. "
                f"Got {tuple(value.shape)}, {value.dtype}, {value.device}."
            )


def divided(v: Tensor, scale: Tensor | None) -> Tensor:
    """In these units; ``(B,)`` or ``(B, *image)``."""
    return v if scale is None else v / per_sample(scale, v)


def multiplied(v: Tensor, scale: Tensor | None) -> Tensor:
    """Back from these units."""
    return v if scale is None else v * per_sample(scale, v)


def start(operator: Operator, b: Tensor, q0: Tensor | None, tol: Tensor, scale: Tensor | None, size: Tensor) -> Systems:
    """Normalized systems at q0, or at 0 where that is nearer in the energy norm; trivial samples are done. ``size`` is
    ||b||, ``(B,)``, without units."""
    finite = torch.ones(b.shape[:1], dtype=torch.bool, device=b.device)
    if scale is not None:  # else its norms are known to be finite
        finite = b.isfinite().flatten(1).all(1)
        b = torch.where(per_sample(finite, b), divided(b, scale), 0.0)
    residual, tol = size if scale is None else norm(b), divided(tol, scale)
    warm = torch.zeros_like(finite)
    if q0 is not None:
        start = divided(q0.detach(), scale)
        r0 = b - operator.hvp(start)
        residual0 = norm(r0)
        # ||q0 - p||_H^2 - ||p||_H^2 = -<q0, b + r0>: this costs no product
        better = (inner(start, b + r0) > 0) | (residual0 <= tol)
        warm = residual0.isfinite() & better & (residual > 0)
        residual = torch.where(warm, residual0, residual)
    if q0 is not None and bool(warm.all()):
        q, r = start.clone(), r0
    else:
        q, r = torch.zeros_like(b), b.clone()
        if bool(warm.any()):
            q, r = (torch.where(per_sample(warm, b), one, other) for one, other in ((start, q), (r0, r)))
    status = torch.where(residual == 0, DONE, RUNNING)
    status = torch.where(finite, status, NOT_FINITE)
    residual = torch.where(finite, residual, torch.inf)
    energy = torch.where(residual > 0, torch.full_like(residual, torch.inf), 0.0)
    return Systems(b, q, r, tol, tol.clone(), residual, energy, status, torch.zeros_like(status))


def resumed(
    b: Tensor, previous: LinearSolution, images: tuple[Tensor, Tensor], tol: Tensor, scale: Tensor | None
) -> Systems:
    """Normalized systems where an earlier run left them, with ``images`` q and r in these units, which are copied."""
    finite = previous.residual_norm.isfinite()
    if scale is not None:
        finite = finite & b.isfinite().flatten(1).all(1)
        b = torch.where(per_sample(finite, b), divided(b, scale), 0.0)
    residual, tol = divided(previous.residual_norm, scale), divided(tol, scale)
    status = torch.where(residual == 0, DONE, RUNNING)
    status = torch.where(finite, status, NOT_FINITE)
    return Systems(
        b,
        images[0].clone(),
        images[1].clone(),
        tol,
        tol.clone(),
        residual,
        divided(previous.energy_norm, scale),
        status,
        torch.zeros_like(status),
    )
