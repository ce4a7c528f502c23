"""Bounds of the rounding behind a hypergradient, and where it does not count."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.hypergradients.point import Point
from bilevel_imaging.linear_solvers import LinearSolution
from bilevel_imaging.native import Measured

# rounding of a residual that a solver measured in its own dtype, in units of the last place of ||H|| ||q|| + ||grad f||
SOLVER_UNITS = 32
# part of G and of the residual that rounding may be in a classical bound, which is a hundred times too large anyway
PLAINLY = 0.1


def residual_rounding(dtype: torch.dtype, smoothness: Tensor, q_norm: Tensor, loss_grad_norm: Tensor) -> Tensor:
    """Bound of the rounding of a residual that a solver measured in its own dtype, ``(B,)`` float64."""
    return SOLVER_UNITS * torch.finfo(dtype).eps * (smoothness.double() * q_norm + loss_grad_norm)


def unnoticed(point: Point, solution: LinearSolution) -> bool:
    """Whether the rounding of G and of the residual at a point in the dtype of the data is small beside them."""
    smoothness = point.constants.smoothness
    if smoothness is None or solution.residual is None or not solution.verified:
        return False
    if point.loss.x_true.dtype != solution.q.dtype:  # which would be rounded, too
        return False
    residual = residual_rounding(solution.q.dtype, smoothness, point.norm(solution.q), point.loss_grad_norm)
    fine = (point.rounding <= PLAINLY * point.measured_grad_norm) & (residual <= PLAINLY * solution.residual_norm)
    return bool(fine.all())


def measured_rounding(point: Point, measured: Measured) -> Tensor:
    """Bound of the rounding of a residual measured in float64 with a loss gradient in the dtype of the point, ``(B,)``
    float64."""
    smoothness = point.constants.smoothness.double()
    own = smoothness * measured.q_norm + point.loss_grad_norm
    return (
        8 * torch.finfo(torch.float64).eps * own
        + loss_grad_rounding(point)
        + point.loss_grad_unit * point.loss_grad_norm
    )


def loss_grad_rounding(point: Point) -> Tensor:
    """Bound of the rounding of the gradient of the loss at a point in the dtype of the data, ``(B,)`` float64."""
    unit = 0.0 if point.x.dtype == torch.float64 else SOLVER_UNITS * torch.finfo(point.x.dtype).eps
    return unit * point.loss_grad_norm


def accumulation(point: Point, q: Tensor) -> Tensor:
    """Bound of the rounding of the sums behind J^T q in a dtype coarser than float64, ``(B,)`` float64."""
    size = point.norm(q)
    if not point.accumulated:
        return torch.zeros_like(size)
    return point.accumulated * torch.finfo(q.dtype).eps * point.mixed_norm.double() * size
