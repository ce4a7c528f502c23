"""How fast the Hessian of smoothed total variation changes relative to itself: self-concordance, pixel by pixel.

phi(z) = sqrt(|z|^2 + nu^2) =: s has, for k with parts k1 along z and k2 across it (b = nu / s, t = |z|),

    D^2 phi = diag(nu^2 / s^3, 1 / s),
    D^3 phi[k] = -[[3 nu^2 t k1 / s^5, t k2 / s^3], [t k2 / s^3, t k1 / s^3]]         (first coordinate along z).

Since H >= D^T (weight D^2 phi + floor I) D with floor = mu / ||D||^2, the change of H along k is at most
``relative_norm``
times H, where each entry is divided by the geometric mean of the two diagonal entries below it. All quantities are
bounded over the ball that the lengths can reach.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.derivatives import LocalChange


@dataclass(frozen=True)
class Lengths:
    """What is known of the lengths |z| under each root, for x and for all points of a ball around it.

    Attributes:
        length: at x; any shape.
        low, high: bounds over the ball.
        weight, smoothing: 0-dim.
        floor: mu / ||D||^2, broadcastable to ``length``.
    """

    length: Tensor
    low: Tensor
    high: Tensor
    weight: Tensor
    smoothing: Tensor
    floor: Tensor

    def along_curvature(self, length: Tensor) -> Tensor:
        """weight nu^2 / s^3 + floor."""
        s2 = length**2 + self.smoothing**2
        return self.weight * self.smoothing**2 * s2**-1.5 + self.floor

    def across_curvature(self, length: Tensor) -> Tensor:
        """weight / s + floor."""
        return self.weight * (length**2 + self.smoothing**2).rsqrt() + self.floor


def reach(at: Lengths, radius: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Largest |De| of each root, and largest part across z, for ||e||_H <= radius; ``row`` = ||D_i|| / sqrt(mu)."""
    along = torch.minimum(row, at.along_curvature(at.length).rsqrt())
    across = torch.minimum(row, at.across_curvature(at.length).rsqrt())
    return radius * along, radius * across


def relative_norm(at: Lengths, along: Tensor, across: Tensor | None) -> Tensor:
    """sup over the ball of the norm of D^3 phi[k] relative to the Hessian, root by root.

    Args:
        at: lengths.
        along: bound of the part of k along z_t over the ball.
        across: bound of |k across z_t| |z_t| over the ball; ``None`` where z is a scalar.
    """
    nu, w, m = at.smoothing, at.weight, at.floor
    low2 = at.low**2 + nu**2
    low_s = low2.sqrt()
    peak = torch.minimum(torch.maximum(nu.expand_as(at.low), at.low), at.high)  # t / s^2 is largest at t = nu
    slope = peak / (peak**2 + nu**2) * along
    stiff = w * nu**2
    first = 3 * slope * stiff / (stiff + m * low_s * low2)
    if across is None:
        return first
    second = slope * w / (w + m * low_s)
    mixed = w * across / ((stiff + m * low_s * low2).sqrt() * (w * low2 + m * low_s * low2).sqrt())
    # the norm of a symmetric 2 x 2 matrix with diagonal entries of one sign
    return 0.5 * (first + second) + torch.hypot(0.5 * (first - second), mixed)


def change_along(hessian: Tensor, energy: Tensor, trainable: Collection[str], q: Tensor) -> LocalChange:
    """``hessian`` and the square ``energy`` along q, ``(B,)``, as a ``LocalChange``, rounded up for the dtype of q.

    Args:
        hessian: largest relative change of the Hessian along q.
        energy: <q, H_R q>, of the regularizer with its weight.
        trainable: names of the parameters, of "log_weight" and "log_smoothing".
        q: direction.
    """
    # |d chi| <= 2 phi'' for chi = d phi' / d log nu: -nu^2 (I - 3 n n^T) / s^3 against (I - n n^T) / s
    slopes = [1.0] * ("log_weight" in trainable) + [2.0] * ("log_smoothing" in trainable)
    up = 1 + 1e-4 if q.dtype == torch.float32 else 1 + 1e-10
    slope = torch.tensor(slopes, dtype=torch.float64, device=q.device)
    return LocalChange(up * hessian.double(), slope, up * energy.double().clamp(min=0).sqrt())
