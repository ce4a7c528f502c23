"""Derivatives of the potentials of filter responses, in one pass."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, reals, threads


@dataclass(frozen=True)
class SplinePotentials:
    """psi_k is a cubic on every piece of |t|, of which piece p begins at reach (p / n)^2 and the last never ends.

    Attributes:
        tables: coefficients of 1, |t|, |t|^2, |t|^3, contiguous, ``(4, K, n + 1)``.
        reach: see above.
    """

    tables: Tensor
    reach: float
    kind = "spline"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What must be like the responses."""
        return (self.tables,)

    @property
    def arguments(self) -> tuple:
        """As the C functions expect them."""
        pieces = self.tables.shape[2]
        return pointer(self.tables), *reals(self.tables.dtype, 1 / self.reach), *integers(pieces - 1)


@dataclass(frozen=True)
class AbsolutePotentials:
    """psi_k(t) = weight_k (sqrt(t^2 + nu_k^2) - nu_k).

    Attributes:
        weight, nu: contiguous, ``(K,)``.
    """

    weight: Tensor
    nu: Tensor
    kind = "absolute"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What must be like the responses."""
        return self.weight, self.nu

    @property
    def arguments(self) -> tuple:
        """As the C functions expect them."""
        return pointer(self.weight), pointer(self.nu)


Potentials = SplinePotentials | AbsolutePotentials


def derivatives(potentials: Potentials, z: Tensor, curvature: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """psi'(z) and psi''(z) for responses ``(..., K)``; the latter into ``curvature``, contiguous, if given."""
    z = z.contiguous()
    slope, curvature = torch.empty_like(z), torch.empty_like(z) if curvature is None else curvature
    kernel = function(f"{potentials.kind}_derivatives", z.dtype)
    kernel(pointer(z), *potentials.arguments, pointer(slope), pointer(curvature), *_sizes(z), threads())
    return slope, curvature


def slope(potentials: Potentials, z: Tensor) -> Tensor:
    """psi'(z)."""
    z = z.contiguous()
    out = torch.empty_like(z)
    kernel = function(f"{potentials.kind}_derivatives", z.dtype)
    kernel(pointer(z), *potentials.arguments, pointer(out), pointer(None), *_sizes(z), threads())
    return out


def total(potentials: Potentials, z: Tensor) -> Tensor:
    """Sums of psi(z) by sample, for responses ``(B, ..., K)``, float64 ``(B,)``."""
    z = z.contiguous()
    totals = torch.empty(len(z), dtype=torch.float64)
    kernel = function(f"{potentials.kind}_total", z.dtype)
    sizes = integers(len(z), z.numel() // max(len(z) * z.shape[-1], 1), z.shape[-1])
    kernel(pointer(z), *potentials.arguments, pointer(totals), *sizes, threads())
    return totals


def primal_dual(potentials: Potentials, z: Tensor, u: Tensor, c: Tensor, out: Tensor) -> None:
    """c and psi'(z) of the primal-dual Newton model into ``c`` and ``out``, contiguous; see
    ``regularizers.potentials.Profile.primal_dual``."""
    z, u = z.contiguous(), u.contiguous()
    kernel = function(f"{potentials.kind}_primal_dual", z.dtype)
    kernel(pointer(z), pointer(u), *potentials.arguments, pointer(c), pointer(out), *_sizes(z), threads())


def change(potentials: Potentials, z: Tensor, reach: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Largest third and smallest second derivative over [z - reach, z + reach], for z and reach ``(..., K)``.

    The former is inf where something is not finite.

    Args:
        potentials: which.
        z: responses.
        reach: their largest change.
        extra: largest third derivatives of splines ``(K,)``, or where that of phi is in units of nu, ``()``.
    """
    z, reach = z.contiguous(), reach.contiguous()
    third, lowest = torch.empty_like(z), torch.empty_like(z)
    kernel = function(f"{potentials.kind}_change", z.dtype)
    outputs = (pointer(third), pointer(lowest))
    kernel(pointer(z), pointer(reach), *potentials.arguments, pointer(extra), *outputs, *_sizes(z), threads())
    return third, lowest


def spline_sums(potentials: SplinePotentials, z: Tensor, g: Tensor) -> Tensor:
    """sum over responses of order |z|^(order - 1) sign(z) g by order 1, 2, 3, filter and piece, float64
    ``(3, K, n + 1)``."""
    z, g = z.contiguous(), g.contiguous()
    sums = torch.zeros((3, *potentials.tables.shape[1:]), dtype=torch.float64)
    kernel = function("spline_sums", z.dtype)
    kernel(pointer(z), pointer(g), *potentials.arguments[1:], pointer(sums), *_sizes(z))
    return sums


def _sizes(z: Tensor) -> tuple[ctypes.c_int64, ...]:
    return integers(z.numel() // z.shape[-1] if z.shape[-1] else 0, z.shape[-1])
