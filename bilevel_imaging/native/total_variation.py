"""Smoothed isotropic total variation, channel by channel: what Newton's method and the certificates need."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, reals, threads


def linearize(x: Tensor, weight: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """Unit field n = Dx / s and 1 / s, together ``(3, B, C, H, W)``, and the gradient weight D^T n, with
    s = sqrt(|Dx|^2 + smoothing^2), at x ``(B, C, H, W)``."""
    x = x.contiguous()
    field = x.new_empty((3, *x.shape))
    return field, _linearize(x, weight, smoothing, field[:2], field[2:])


def _linearize(x: Tensor, weight: float, smoothing: float, unit: Tensor | None, reciprocal: Tensor | None) -> Tensor:
    """The gradient; the fields are written where they are given."""
    grad = torch.empty_like(x)
    function("tv_linearize", x.dtype)(
        pointer(x),
        *reals(x.dtype, weight, smoothing),
        pointer(unit),
        *integers(x.numel()),
        pointer(reciprocal),
        pointer(grad),
        *integers(x.shape[0] * x.shape[1], *x.shape[-2:]),
        threads(),
    )
    return grad


def gradient(x: Tensor, weight: float, smoothing: float) -> Tensor:
    """The gradient alone, weight D^T (Dx / s), at x ``(B, C, H, W)``."""
    return _linearize(x.contiguous(), weight, smoothing, None, None)


def curvature_product(v: Tensor, unit: Tensor, reciprocal: Tensor, weight: float) -> Tensor:
    """The Hessian product weight D^T (I - n n^T) D v / s with v ``(B, C, H, W)``, of the point of :func:`linearize`."""
    v, unit, reciprocal = v.contiguous(), unit.contiguous(), reciprocal.contiguous()
    out = torch.empty_like(v)
    kernel = function("tv_product", v.dtype)
    kernel(
        pointer(v),
        *reals(v.dtype, weight),
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(reciprocal),
        pointer(out),
        *integers(v.shape[0] * v.shape[1], *v.shape[-2:]),
        threads(),
    )
    return out


def unit_squares(x: Tensor, smoothing: float) -> Tensor:
    """||n||^2 of the unit field n = Dx / s at x ``(B, C, H, W)``, float64 ``(B,)``."""
    x = x.contiguous()
    batch, channels, height, width = x.shape
    squares = torch.empty(batch, dtype=torch.float64)
    kernel = function("tv_unit_squares", x.dtype)
    sizes = integers(batch, channels * height, height, width)
    kernel(pointer(x), *reals(x.dtype, smoothing), pointer(squares), *sizes, threads())
    return squares


def model_field(unit: Tensor, dual: Tensor, reciprocal: Tensor, weight: float) -> Tensor:
    """M = weight (I - (u n^T + n u^T) / 2) / s as ``Stencil.field``, for fields n = ``unit`` and u = ``dual``,
    ``(2, B, C, H, W)``, that are 0 where Dx is."""
    unit, dual = unit.contiguous(), _samples_contiguous(dual)
    field = unit.new_empty((3, *unit.shape[1:]))
    batch = unit.shape[1]
    size = reciprocal.numel() // max(batch, 1)
    kernel = function("tv_field", unit.dtype)
    kernel(
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(dual),
        *integers(dual.stride(0), dual.stride(1)),
        pointer(reciprocal.contiguous()),
        *reals(unit.dtype, weight),
        *(pointer(plane) for plane in field),
        *integers(batch, size),
        threads(),
    )
    return field


def advance_dual(d: Tensor, step: Tensor, unit: Tensor, dual: Tensor, reciprocal: Tensor) -> Tensor:
    """The dual field after a step of length ``step`` ``(B,)`` along d ``(B, C, H, W)``, ``(B, 2, C, H, W)``."""
    d, unit, dual = d.contiguous(), unit.contiguous(), _samples_contiguous(dual)
    batch, channels, height, width = d.shape
    out = d.new_empty((batch, 2, channels, height, width))
    kernel = function("tv_advance_dual", d.dtype)
    kernel(
        pointer(d),
        pointer(step.to(d.dtype).contiguous()),
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(dual),
        *integers(dual.stride(0), dual.stride(1)),
        pointer(reciprocal.contiguous()),
        pointer(out),
        *integers(batch, channels * height, height, width),
        threads(),
    )
    return out


def smoothing_column(
    unit: Tensor, reciprocal: Tensor, weight: float, smoothing: float, column: Tensor
) -> tuple[Tensor, Tensor]:
    """Write the column of J of log smoothing to ``column`` ``(B, C, H, W)``, of contiguous samples; returns
    sum |z|^2 s / nu^2 and sum |z|^2 nu^2 / s^3 with z = Dx, float64 ``(B,)``; see :func:`linearize`."""
    unit, reciprocal = unit.contiguous(), reciprocal.contiguous()
    batch, channels, height, width = unit.shape[1:]
    sums = torch.empty((2, batch), dtype=torch.float64)
    kernel = function("tv_smoothing_column", unit.dtype)
    kernel(
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(reciprocal),
        *reals(unit.dtype, weight, smoothing),
        pointer(column),
        *integers(column.stride(0)),
        *(pointer(row) for row in sums),
        *integers(batch, channels * height, height, width),
        threads(),
    )
    return sums[0], sums[1]


def split_energies(
    unit: Tensor, reciprocal: Tensor, weight: float, smoothing: float, strong_convexity: Tensor
) -> Tensor:
    """Squares of bounds of ||J_j||_{H^-1} for the columns of log weight and log smoothing, float64 ``(2, B)``; see
    ``TotalVariationLinearization.split_energy_norms``."""
    unit, reciprocal = unit.contiguous(), reciprocal.contiguous()
    batch, channels, height, width = unit.shape[1:]
    squares = torch.empty((2, batch), dtype=torch.float64)
    kernel = function("tv_split", unit.dtype)
    kernel(
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(reciprocal),
        *reals(unit.dtype, weight, smoothing),
        pointer(strong_convexity.double().contiguous()),
        *(pointer(row) for row in squares),
        *integers(batch, channels * height, height, width),
        threads(),
    )
    return squares


@dataclass(frozen=True)
class Slopes:
    """Euclidean bounds along q, of TV with weight 1; all ``(B,)`` float64.

    Attributes:
        hessian: bound of ||(H(x_t) - H) q|| / ||x_t - x|| on the ball.
        weight, smoothing: norms of the derivatives along q of D^T phi' and D^T d phi' / d log smoothing.
        fourth: bound of the change of the last one per length.
    """

    hessian: Tensor
    weight: Tensor
    smoothing: Tensor
    fourth: Tensor


def slopes(q: Tensor, unit: Tensor, reciprocal: Tensor, smoothing: float, radius: Tensor, row_norm: float) -> Slopes:
    """Bounds along q ``(B, C, H, W)`` on the ball of the given radius ``(B,)``; inf where something is not finite.

    Args:
        q: direction.
        unit: of the point, see :func:`linearize`.
        reciprocal: likewise.
        smoothing: of the total variation.
        radius: of the ball.
        row_norm: ||D_i||, the largest change of a difference per length.
    """
    q, unit, reciprocal = q.contiguous(), unit.contiguous(), reciprocal.contiguous()
    batch, channels, height, width = q.shape
    radius = radius.double().contiguous()
    bounds = torch.empty((4, batch), dtype=torch.float64)
    kernel = function("tv_directional", q.dtype)
    kernel(
        pointer(q),
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(reciprocal),
        *reals(q.dtype, smoothing),
        pointer(radius),
        ctypes.c_double(row_norm),
        *(pointer(row) for row in bounds),
        *integers(batch, channels * height, height, width),
        threads(),
    )
    return Slopes(*bounds)


def relative_change(
    unit: Tensor,
    reciprocal: Tensor,
    weight: float,
    smoothing: float,
    radius: Tensor,
    strong_convexity: Tensor,
    *,
    squared_norm: float,
    row_norm: float,
    q: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest changes of the Hessian relative to itself for ||e||_H <= radius, and <q, D^T phi''(Dx) D q>.

    Along e, per radius; along q ``(B, C, H, W)``, per ||e||_H. The formulas are those of
    ``regularizers.relative_curvature``.

    Args:
        unit: of the point, see :func:`linearize`.
        reciprocal: likewise.
        weight: of the total variation.
        smoothing: likewise.
        radius: of the ball, ``(B,)``.
        strong_convexity: mu of the energy, ``(B,)``.
        squared_norm: ||D||^2.
        row_norm: ||D_i||.
        q: direction, or ``None``.

    Returns:
        The three, float64 ``(B,)``; the last two are 0 with ``q=None``, and the last has no factor weight.
    """
    unit, reciprocal = unit.contiguous(), reciprocal.contiguous()
    batch, channels, height, width = unit.shape[1:]
    q = None if q is None else q.contiguous()
    length = 2.0 ** math.frexp(smoothing)[1]  # exact: only what would leave the range changes
    radius, strong_convexity = (radius.double() / length).contiguous(), strong_convexity.double().contiguous()
    bounds = torch.empty((3, batch), dtype=torch.float64)
    kernel = function("tv_relative", unit.dtype)
    kernel(
        pointer(unit),
        *integers(unit.stride(0)),
        pointer(reciprocal),
        *reals(unit.dtype, length),
        pointer(q),
        *reals(unit.dtype, weight / length, smoothing / length),
        pointer(radius),
        pointer(strong_convexity),
        ctypes.c_double(squared_norm),
        ctypes.c_double(row_norm),
        *(pointer(row) for row in bounds),
        *integers(batch, channels * height, height, width),
        threads(),
    )
    return tuple(bounds / length)


def _samples_contiguous(field: Tensor) -> Tensor:
    """A field ``(2, B, C, H, W)`` whose images are contiguous, whatever the order of the first two dimensions."""
    return field if field.shape[1] > 0 and field[0, 0].is_contiguous() else field.contiguous()
