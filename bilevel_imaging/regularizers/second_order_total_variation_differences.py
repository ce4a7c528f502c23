"""Second differences of images, zero where their stencil leaves the image, and bounds of their norms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel_imaging.regularizers.differences import squared_operator_norm

ROOT2 = math.sqrt(2)
# ||B||_{2 -> inf} over the three differences of one pixel: the largest eigenvalue of the Gram matrix of their stencils,
# [[6, -3 sqrt(2), 4], [-3 sqrt(2), 8, -3 sqrt(2)], [4, -3 sqrt(2), 6]], is 9 + sqrt(37)
ROW_NORM = math.sqrt(9 + math.sqrt(37))


def second_differences(x: Tensor, sign: int = -1) -> Tensor:
    """B x = (dxx, sqrt(2) dxy, dyy), ``(..., H, W)`` to ``(3, ..., H, W)``; |B x|^2 is that of the Hessian matrix.

    dxx and dyy are centered and 0 at the first and last column and row; dxy spans a pixel and those right of it and
    below, and is 0 at the last column and row. So B x = 0 for affine x, up to the boundary. With ``sign=1`` all
    coefficients are taken absolute: |B| x.
    """
    across = torch.add(x[..., 1:], x[..., :-1], alpha=sign)
    down = torch.add(x[..., 1:, :], x[..., :-1, :], alpha=sign)
    return differences_of_differences(across, down, x.shape, sign)


def differences_of_differences(across: Tensor, down: Tensor, shape: torch.Size, sign: int = -1) -> Tensor:
    """B x from the first differences ``(..., H, W - 1)`` and ``(..., H - 1, W)``; rounding is relative to these."""
    z = across.new_zeros((3, *shape))
    z[0][..., 1:-1] = torch.add(across[..., 1:], across[..., :-1], alpha=sign)
    z[1][..., :-1, :-1] = ROOT2 * torch.add(across[..., 1:, :], across[..., :-1, :], alpha=sign)
    z[2][..., 1:-1, :] = torch.add(down[..., 1:, :], down[..., :-1, :], alpha=sign)
    return z


def second_differences_adjoint(p: Tensor, sign: int = -1) -> Tensor:
    """B^T p, or |B|^T p with ``sign=1``; ``(3, ..., H, W)`` to ``(..., H, W)``."""
    horizontal, mixed, vertical = p[0][..., 1:-1], ROOT2 * p[1][..., :-1, :-1], p[2][..., 1:-1, :]
    out = torch.zeros_like(p[0])
    across, down = torch.zeros_like(out[..., 1:]), torch.zeros_like(out[..., 1:, :])
    _add_adjoint(across, horizontal, sign)
    _add_adjoint(across.mT, mixed.mT, sign)
    _add_adjoint(down.mT, vertical.mT, sign)
    _add_adjoint(out, across, sign)
    _add_adjoint(out.mT, down.mT, sign)
    return out


def _add_adjoint(out: Tensor, values: Tensor, sign: int) -> None:
    """Add the adjoint of horizontal differences, in place."""
    out[..., 1:].add_(values)
    out[..., :-1].add_(values, alpha=sign)


def squared_norm_bound(height: int, width: int) -> float:
    """A bound of ||B||^2, sharp for large images: ||D||^4 < 64.

    With the Laplacians L = D^T D of rows and columns (Neumann boundary; they commute), ||dxy x||^2 = <x, Lx Ly x>,
    and dxx x is -Lx x without its ends; so B^T B <= Lx^2 + 2 Lx Ly + Ly^2 = (Lx + Ly)^2 = (D^T D)^2.
    """
    return squared_operator_norm(height, width) ** 2


def weighted_bound(c: Tensor, sweeps: int = 2) -> Tensor:
    """Upper bound of lambda_max(B^T diag(c) B) for weights c >= 0, ``(3, B, ...)`` or ``(1, B, ...)``, to ``(B,)``.

    At most that of |B|^T diag(c) |B|, and for any positive v that is at most max_i (|B|^T diag(c) |B| v)_i / v_i
    (Collatz-Wielandt). v = 1 in the first sweep; every further sweep replaces v by its product.
    """
    v = c.new_ones(c.shape[1:])
    for _ in range(sweeps):
        product = second_differences_adjoint(c * second_differences(v, 1), 1)
        bound = (product / v).flatten(1).amax(1)
        largest = product.flatten(1).amax(1).clamp(min=torch.finfo(c.dtype).tiny)
        # a floor keeps v positive where all weights around a pixel are 0
        v = product / largest.reshape(-1, *([1] * (v.dim() - 1))) + 1e-3
    return bound * (1 + 1e-12)


def diagonal_of_square(own: Tensor, cross: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Diagonal of B^T M B for a symmetric 3 x 3 matrix M per pixel, ``(..., H, W)``.

    Args:
        own: diagonal of M, ``(3, ..., H, W)``; values where B is 0 are ignored.
        cross: entries 01, 02 and 12 of M, each 0 where one of its two differences is.
    """
    horizontal, vertical = torch.zeros_like(own[0]), torch.zeros_like(own[0])
    mixed = torch.zeros_like(own[0])
    horizontal[..., 1:-1], vertical[..., 1:-1, :] = own[0][..., 1:-1], own[2][..., 1:-1, :]
    mixed[..., :-1, :-1] = 2 * own[1][..., :-1, :-1]
    first, both, last = cross
    # coefficients of the pixel itself: (-2, sqrt(2), -2); right of it: (1, -sqrt(2), 0); left: (1, 0, 0); ...
    diagonal = 4 * horizontal + mixed + 4 * vertical + 8 * both - 4 * ROOT2 * (first + last)
    diagonal[..., 1:] += (horizontal + mixed - 2 * ROOT2 * first)[..., :-1]
    diagonal[..., :-1] += horizontal[..., 1:]
    diagonal[..., 1:, :] += (vertical + mixed - 2 * ROOT2 * last)[..., :-1, :]
    diagonal[..., :-1, :] += vertical[..., 1:, :]
    diagonal[..., 1:, 1:] += mixed[..., :-1, :-1]
    return diagonal
