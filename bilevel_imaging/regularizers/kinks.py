"""Regularizers of differences whose second derivative jumps: smooth on every ball that no kink reaches.

With phi piecewise quadratic, the Hessian of sum phi((Dx)_i) has no Lipschitz constant. Where every (Dx)_i is farther
from the kinks of phi' than ||D||_{2->inf} radius, though, none is met on the ball of that radius around x: the Hessian
is constant there, the gradient and J are affine in x, and one exact Newton step gives the minimizer if it lies inside.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization
from bilevel_imaging.regularizers.base import Regularizer
from bilevel_imaging.regularizers.differences import (
    differences_adjoint,
    divergence,
    forward_differences,
    weighted_laplacian_bound,
)
from bilevel_imaging.tensors import norm


class DifferenceRegularizer(Regularizer):
    """weight * sum phi((Dx)_i) with forward differences D and a ``log_weight``; the subclass defines phi.

    Attributes:
        row_norm: ||D||_{2->inf}, the largest change of what phi is applied to per change of x.
    """

    log_weight: torch.nn.Parameter
    row_norm: float

    @abc.abstractmethod
    def _slope(self, z: Tensor) -> Tensor:
        """phi'(z) for differences z ``(2, B, C, H, W)``; differentiable in z and theta."""

    @abc.abstractmethod
    def _linearization(self, x: Tensor) -> Linearization: ...

    def _weight(self, x: Tensor) -> Tensor:
        # exponentiated in float64: the stored number is what defines R
        return self.log_weight.double().exp().to(x.dtype)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return divergence(-self._weight(x) * self._slope(forward_differences(x)))

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return self._linearization(x.detach())


class KinkedLinearization(Linearization):
    """Products and constants from what a subclass sets for differences z = Dx ``(2, B, C, H, W)``.

    Attributes:
        x: ``(B, C, H, W)``.
        weight: 0-dim.
        curvature: the second derivative of phi in every difference (of a vector under one root: its upper bound).
        shape_parameter: name of the parameter that shapes phi.
        margin: smallest distance of any z_i from a kink, less its rounding, ``(B,)`` float64; <= 0 at a kink.
    """

    shape_parameter: str
    curvature: Tensor
    margin: Tensor

    def __init__(self, regularizer: DifferenceRegularizer, x: Tensor, slope: Tensor):
        self.regularizer, self.x = regularizer, x
        self.weight = regularizer._weight(x).detach()
        self.constants = regularizer.constants(x.shape)
        self.grad = divergence(-self.weight * slope)

    @abc.abstractmethod
    def _fields(self) -> Iterable[tuple[Tensor, Tensor]]:
        """(d phi' / d theta_j, its derivative in z) for the learned parameters but the weight, ``(2, B, C, H, W)``."""

    def _mixed_slopes(self) -> list[Tensor]:
        """Bounds of the derivatives of the fields in z, on the ball, for groups of columns of J."""
        return [slope for _, slope in self._fields()]

    def _curvature_on_ball(self, reach: Tensor) -> Tensor:
        """Bound of the second derivative of phi where z moves by at most ``reach`` and meets no kink."""
        return self.curvature

    def _third_derivative(self, reach: Tensor) -> Tensor | None:
        """Likewise of the third; ``None`` if it is 0."""
        return None

    def hvp(self, v: Tensor) -> Tensor:
        return divergence(forward_differences(v).mul_(self._scale))

    @cached_property
    def _scale(self) -> Tensor:
        return -self.weight * self.curvature  # the sign of D^T = -div and the weight, folded in once

    @property
    def weight_column(self) -> int | None:
        """Which column of J is the gradient itself."""
        return 0 if self.regularizer.log_weight.requires_grad else None

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products = {}
        if self.regularizer.log_weight.requires_grad:
            products["log_weight"] = (q * self.grad).sum().to(self.regularizer.log_weight.dtype)
        dq = forward_differences(q)
        others = [self.weight * (dq * field).sum() for field, _ in self._fields()]
        if others:
            parameter = getattr(self.regularizer, self.shape_parameter)
            products[self.shape_parameter] = torch.stack(others).reshape(parameter.shape).to(parameter.dtype)
        return products

    def mixed_columns(self) -> Tensor:
        columns = [self.grad] if self.regularizer.log_weight.requires_grad else []
        columns += [self.weight * differences_adjoint(field) for field, _ in self._fields()]
        return torch.stack(columns, 1) if columns else self.grad.unsqueeze(1)[:, :0]

    def _reach(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """(how far z moves on the ball, broadcastable to z; whether no kink is met, ``(B,)``)."""
        reach = self.regularizer.row_norm * radius.double()
        return reach.reshape(1, -1, *([1] * (self.x.dim() - 1))).to(self.x.dtype), reach < self.margin

    def constants_on_ball(self, radius: Tensor) -> Constants:
        """The Hessian is constant (isotropic: smooth) where no kink is met; inf for the samples that meet one."""
        reach, clear = self._reach(radius)

        def bound(weights: Tensor) -> Tensor:
            return self._up(self.weight * weighted_laplacian_bound(weights))

        third = self._third_derivative(reach)
        row = self.regularizer.row_norm
        hessian = torch.zeros_like(self.margin) if third is None else row * bound(third)
        slopes = [self._curvature_on_ball(reach)] if self.regularizer.log_weight.requires_grad else []
        each = [bound(s) for s in slopes + self._mixed_slopes()]
        mixed = torch.stack(each).norm(dim=0) if each else torch.zeros_like(self.margin)
        return replace(
            self.constants,
            hessian_lipschitz=torch.where(clear, hessian, torch.inf),
            mixed_lipschitz=torch.where(clear, mixed, torch.inf),
            reason="",
        )

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """Exact norms of the constant derivatives along q where no kink is met; inf for the samples that meet one."""
        reach, clear = self._reach(radius)
        dq = forward_differences(q)
        third = self._third_derivative(reach)
        hessian = torch.zeros_like(radius)
        if third is not None:
            hessian = self.weight * weighted_laplacian_bound(third * self._lengths(dq))
        components = []
        if self.regularizer.log_weight.requires_grad:
            components.append(norm(self.hvp(q)) + 0.5 * hessian * radius)  # d grad R / dx is the Hessian itself
        components += [norm(self.weight * differences_adjoint(slope * dq)) for _, slope in self._fields()]
        stacked = torch.stack(components, 1) if components else q.new_zeros((len(q), 0))
        stacked = torch.where(clear.unsqueeze(1), stacked, torch.inf)
        return Directional(torch.where(clear, hessian, torch.inf), stacked.norm(dim=1), stacked)

    def _lengths(self, z: Tensor) -> Tensor:
        """Length of what is under one root, for those that have roots."""
        return z.square().sum(0, keepdim=True).sqrt().expand_as(z)

    def _up(self, bound: Tensor) -> Tensor:
        """In float64, rounded up."""
        return bound.double() * (1 + (1e-4 if bound.dtype == torch.float32 else 1e-10))

    def _directed(self) -> tuple[Tensor, Tensor | None]:
        """Second derivatives of phi: along each difference, and across the two of a pixel (``None`` if 0)."""
        return self.curvature, None

    def hessian_diagonal(self) -> Tensor:
        """Diagonal of the Hessian, ``(B, C, H, W)``."""
        own, cross = self._directed()
        # a pixel is the start of its own two differences and the end of its left and upper neighbors' ones
        start = own.clone()
        start[0][..., -1] = 0
        start[1][..., -1, :] = 0
        diagonal = start[0] + start[1] if cross is None else start[0] + start[1] + 2 * cross
        diagonal[..., 1:] += start[0][..., :-1]
        diagonal[..., 1:, :] += start[1][..., :-1, :]
        return self.weight * diagonal

    def diffusion(self) -> Tensor:
        return self.hessian_diagonal() / 4

    def subset(self, index: Tensor) -> Linearization:
        return self.regularizer.linearize(self.x[index])
