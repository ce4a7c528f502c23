"""Forward differences of images, zero at the last row and column, and their exact norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def forward_differences(x: Tensor) -> Tensor:
    """D x: horizontal and vertical differences, ``(..., H, W)`` to ``(2, ..., H, W)``.

    The last column of the first and the last row of the second are 0 (Neumann boundary).
    """
    if torch.is_grad_enabled():
        horizontal = pad(x[..., 1:] - x[..., :-1], (0, 1))
        vertical = pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
        return torch.stack([horizontal, vertical])
    z = x.new_empty((2, *x.shape))
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
