"""The least-squares data term of any linear physics, through its ``A`` and ``A_adjoint``."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from bilevel_imaging.energies.data_terms import DataTerm, FourierModel
from bilevel_imaging.energies.matrix_physics import MatrixPhysics
from bilevel_imaging.energies.norm_bounds import NormBounds, norm_bounds
from bilevel_imaging.energies.operators import MISFITS, Operator
from bilevel_imaging.tensors import norm, per_sample, squared_norm
from bilevel_imaging.transforms import fourier_filter

REMEDY = "Check the shape of y, physics.to(y.dtype) and, for Tomography, its argument dtype."


class GenericTerm(DataTerm):
    """1/2 ||A_i x_i - y_i||^2 with the true bounds of ``norm_bounds``; use :func:`generic_term` for a checked one.

    Args:
        y: measurements, ``(B, ...)``.
        operator: for images ``(B, C, H, W)``.
        bounds: of A^T A.
        aty: A^T y.
    """

    applications = 2

    def __init__(self, y: Tensor, operator: Operator, bounds: NormBounds, aty: Tensor):
        self.y, self.operator, self.bounds, self.aty = y, operator, bounds, aty
        self.shape = operator.shape
        self.lowest, self.highest, self.reason = bounds.lowest, bounds.highest, bounds.reason

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(self.operator.apply(x) - self.y)

    def grad(self, x: Tensor) -> Tensor:
        return self.operator.adjoint(self.operator.apply(x) - self.y)

    def hvp(self, v: Tensor) -> Tensor:
        return self.operator.normal(v)

    def apply(self, x: Tensor) -> Tensor:
        return self.operator.apply(x)

    def initial(self) -> Tensor:
        """The steepest descent step from 0: A^T y times what minimizes the misfit."""
        with torch.no_grad():
            descent, change = norm(self.aty).double(), norm(self.operator.apply(self.aty)).double()
            step = torch.where(change > 0, descent / change.clamp(min=1e-300), 0).square()
            return per_sample(step, self.aty).to(self.aty.dtype) * self.aty

    def subset(self, index: Tensor) -> DataTerm | None:
        operator = self.operator.subset(index)
        if operator is None:
            return None
        return GenericTerm(self.y[index], operator, self.bounds.subset(index), self.aty[index])

    def double(self) -> DataTerm | None:
        if self.y.dtype == torch.float64:
            return self
        operator = self.operator.double()
        if operator is None:
            return None
        y = self.y.double()
        with torch.no_grad():
            return GenericTerm(y, operator, self.bounds, operator.adjoint(y))

    def fourier_model(self) -> FourierModel | None:
        physics = self.operator.physics
        power = physics.convolution if type(physics) is MatrixPhysics else None
        return None if power is None else FourierModel(power.to(self.y.dtype), fourier_filter)

    def gradient_scale(self, x: Tensor) -> Tensor:
        residual = self.operator.apply(x) - self.y
        scale = norm(self.operator.adjoint(residual.abs() + self.y.abs())).double()
        # entries of both signs cancel in that; the operator's size does not
        size = self.size * norm(x).double() + self.size.sqrt() * norm(self.y).double()
        return torch.maximum(scale, size) * math.log2(max(4, self.aty[0].numel()))

    @cached_property
    def size(self) -> Tensor:
        """||A||^2 for rounding errors, ``(B,)`` float64: its bound, or a few power iterations from a fixed start."""
        if self.highest is not None:
            return self.highest
        with torch.no_grad():
            v = torch.randn(self.aty.shape, generator=torch.Generator().manual_seed(0)).to(self.aty)
            for _ in range(5):
                v = self.operator.normal(v / per_sample(norm(v), v).clamp(min=1e-30))
            return norm(v).double()


def generic_term(y: Tensor, physics: LinearPhysics) -> GenericTerm:
    """The data term for measurements ``(B, ...)`` that the physics maps to images ``(B, C, H, W)``.

    Raises:
        ValueError: if y does not fit the physics, or ``A_adjoint`` is not the transpose of ``A``.
    """
    name = type(physics).__name__
    with torch.no_grad():
        try:
            aty = physics.A_adjoint(y)
            back = physics.A(aty)
        except MISFITS as error:
            raise ValueError(
                f"Expected measurements that {name} can be applied to. Got y of shape {tuple(y.shape)} and {y.dtype}, "
                f"and in A or A_adjoint: {_first_line(error)}. {REMEDY}"
            ) from error
        if aty.dim() != 4 or aty.shape[0] != y.shape[0] or back.shape != y.shape or aty.dtype != y.dtype:
            raise ValueError(
                f"Expected A_adjoint of {name} to map y of shape {tuple(y.shape)} and {y.dtype} to real images "
                f"(B, C, H, W), and A to map back. Got {tuple(aty.shape)} and {aty.dtype}, and {tuple(back.shape)}. "
                f"{REMEDY}"
            )
        if not bool(torch.isfinite(aty).all() and torch.isfinite(back).all()):
            raise ValueError(f"Expected {name} with finite entries. Got NaN or inf in A_adjoint(y) or A(A_adjoint(y)).")
        operator = Operator(physics, aty.shape, aty)
        operator.check_adjoint(y.shape)
        return GenericTerm(y, operator, norm_bounds(operator), aty)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200].rstrip(".") or type(error).__name__
