"""Forward differences of images, zero at the last row and column, and their exact norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from bilevel_imaging.kernels import fusable


def forward_differences(x: Tensor, out: Tensor | None = None) -> Tensor:
    """D x: horizontal and vertical differences, ``(..., H, W)`` to ``(2, ..., H, W)``.

    The last column of the first and the last row of the second are 0 (Neumann boundary). ``out`` is used only while no
    gradients are recorded.
    """
    if torch.is_grad_enabled():
        horizontal = pad(x[..., 1:] - x[..., :-1], (0, 1))
        vertical = pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
        return torch.stack([horizontal, vertical])
    z = x.new_empty((2, *x.shape)) if out is None else out
    torch.sub(x[..., 1:], x[..., :-1], out=z[0][..., :-1])
    torch.sub(x[..., 1:, :], x[..., :-1, :], out=z[1][..., :-1, :])
    z[0][..., -1] = 0
    z[1][..., -1, :] = 0
    return z


def divergence(p: Tensor) -> Tensor:
    """-D^T p by backward differences, ``(2, ..., H, W)`` to ``(..., H, W)``.

    p must be 0 where D x is (last column of the first, last row of the second).
    """
    horizontal, vertical = p[0], p[1]
    if torch.is_grad_enabled():
        return horizontal + vertical - pad(horizontal[..., :-1], (1, 0)) - pad(vertical[..., :-1, :], (0, 0, 1, 0))
    out = torch.add(horizontal, vertical)
    out[..., 1:] -= horizontal[..., :-1]
    out[..., 1:, :] -= vertical[..., :-1, :]
    return out


def differences_adjoint(p: Tensor) -> Tensor:
    """D^T p; see :func:`divergence`."""
    return -divergence(p)


def squared_operator_norm(height: int, width: int) -> float:
    """||D||^2 for H x W images, exact: 4 cos^2(pi / 2H) + 4 cos^2(pi / 2W) < 8."""
    return 4 * math.cos(math.pi / (2 * height)) ** 2 + 4 * math.cos(math.pi / (2 * width)) ** 2


def weighted_laplacian_bound(c: Tensor, sweeps: int = 2) -> Tensor:
    """Upper bound of lambda_max(D^T diag(c) D) for weights c >= 0 of the differences, ``(2, B, ...)`` to ``(B,)``.

    D^T diag(c) D is a weighted graph Laplacian, at most the signless one |L| = degrees + adjacency; for any positive v,
    lambda_max(|L|) <= max_i (|L| v)_i / v_i (Collatz-Wielandt). v = 1 (one sweep) gives twice the largest degree; every
    further sweep replaces v by |L| v, which brings the bound close to the local truth where c has a peak.
    """
    c = c.clone()
    c[0][..., -1] = 0
    c[1][..., -1, :] = 0
    largest = c.transpose(0, 1).flatten(1).amax(1)
    v = torch.ones_like(c[0])
    for _ in range(sweeps):
        product = _signless(c, v)
        bound = (product / v).flatten(1).amax(1)
        # a floor keeps v positive where all weights around a pixel are 0
        v = product / _largest(product) + 1e-3
    return torch.where(largest == 0, 0.0, bound * (1 + 1e-12))  # a NaN stays one


def _largest(v: Tensor) -> Tensor:
    """Largest entry of every sample, broadcastable, at least the smallest normal number."""
    return v.flatten(1).amax(1).clamp(min=torch.finfo(v.dtype).tiny).reshape(-1, *([1] * (v.dim() - 1)))


def _signless(c: Tensor, v: Tensor) -> Tensor:
    """(degrees + adjacency) v of the grid graph with edge weights c."""
    horizontal, vertical = c[0][..., :-1], c[1][..., :-1, :]
    across = horizontal * (v[..., :-1] + v[..., 1:])
    down = vertical * (v[..., :-1, :] + v[..., 1:, :])
    out = torch.zeros_like(v)
    out[..., :-1] += across
    out[..., 1:] += across
    out[..., :-1, :] += down
    out[..., 1:, :] += down
    return out


def _fused_differences(v: Tensor) -> tuple[Tensor, Tensor]:
    return pad(v[..., 1:] - v[..., :-1], (0, 1)), pad(v[..., 1:, :] - v[..., :-1, :], (0, 0, 0, 1))


def _fused_divergence(horizontal: Tensor, vertical: Tensor) -> Tensor:
    left, above = pad(horizontal[..., :-1], (1, 0)), pad(vertical[..., :-1, :], (0, 0, 1, 0))
    return horizontal + vertical - left - above


def _fused_curvature(v: Tensor, unit: Tensor, scale: Tensor, work: Tensor) -> Tensor:
    horizontal, vertical = _fused_differences(v)
    along = unit[0] * horizontal + unit[1] * vertical
    return _fused_divergence((horizontal - unit[0] * along) * scale[0], (vertical - unit[1] * along) * scale[0])


@fusable(_fused_curvature)
def isotropic_curvature(v: Tensor, unit: Tensor, scale: Tensor, work: Tensor) -> Tensor:
    """div(scale (Dv - n <n, Dv>)) for a field n = ``unit`` ``(2, B, C, H, W)`` and ``scale`` ``(1, B, C, H, W)``.

    ``work`` is scratch space ``(2, 2, B, C, H, W)``: memory that is asked for again in every product of a long loop
    is given back to the system and cleared each time, which takes longer than the arithmetic.
    """
    dv = forward_differences(v, work[0])
    along = torch.mul(unit, dv, out=work[1])
    along = along[0].add_(along[1])
    return divergence(dv.addcmul_(unit, along, value=-1).mul_(scale))


def _fused_primal_dual(v: Tensor, unit: Tensor, half: Tensor, scale: Tensor, work: Tensor) -> Tensor:
    horizontal, vertical = _fused_differences(v)
    along_unit = unit[0] * horizontal + unit[1] * vertical
    along_half = half[0] * horizontal + half[1] * vertical
    return _fused_divergence(
        (horizontal - half[0] * along_unit - unit[0] * along_half) * scale[0],
        (vertical - half[1] * along_unit - unit[1] * along_half) * scale[0],
    )


@fusable(_fused_primal_dual)
def isotropic_primal_dual(v: Tensor, unit: Tensor, half: Tensor, scale: Tensor, work: Tensor) -> Tensor:
    """div(scale (Dv - (u/2) <n, Dv> - n <u/2, Dv>)) with n = ``unit`` and u/2 = ``half``; ``work`` (3, 2, ...)."""
    dv = forward_differences(v, work[0])
    along_unit, along_half = torch.mul(unit, dv, out=work[1]), torch.mul(half, dv, out=work[2])
    along_unit, along_half = along_unit[0].add_(along_unit[1]), along_half[0].add_(along_half[1])
    dv.addcmul_(half, along_unit, value=-1).addcmul_(unit, along_half, value=-1)
    return divergence(dv.mul_(scale))
