"""Smoothed total variation of second order: the Hessian matrix of the image in place of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.second_order_total_variation_differences import (
    ROW_NORM,
    differences_of_differences,
    second_differences,
    second_differences_adjoint,
    squared_norm_bound,
)
from bilevel_imaging.regularizers.second_order_total_variation_linearization import SecondOrderLinearization
from bilevel_imaging.regularizers.total_variation import M3, X1


class SecondOrderTotalVariation(Regularizer):
    """R(x) = weight * sum over pixels and channels of sqrt(dxx^2 + 2 dxy^2 + dyy^2 + smoothing^2).

    Second differences, zero where they would need pixels outside of the image: R is smallest for affine images, which
    total variation of first order turns into staircases. ``Sum(TotalVariation(), SecondOrderTotalVariation())``
    penalizes both edges and curvature, like the total generalized variation of Bredies, Kunisch & Pock (2010), without
    its auxiliary field. Color images channel by channel.

    Args:
        weight: positive; stored as ``log_weight``.
        smoothing: positive, in the units of x; stored as ``log_smoothing``.
        learn_weight: whether ``log_weight`` is learned.
        learn_smoothing: whether ``log_smoothing`` is learned.

    Raises:
        ValueError: if weight or smoothing is not positive.

    Constants: as for :class:`TotalVariation` with ||B||^2 <= ||D||^4; all bounds hold for every x. The functional is
    that of Lysaker, Lundervold & Tai (2003).
    """

    known_parameters = ("log_weight", "log_smoothing")

    def __init__(
        self,
        weight: float = 0.1,
        smoothing: float = 0.01,
        *,
        learn_weight: bool = True,
        learn_smoothing: bool = True,
    ):
        super().__init__()
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_smoothing = positive_parameter(smoothing, "smoothing", learn_smoothing)

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "learn_weight": self.log_weight.requires_grad,
            "learn_smoothing": self.log_smoothing.requires_grad,
        }

    def _parameters_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # exponentiated in float64: the stored numbers, whatever their dtype, define the energy
        return self.log_weight.double().exp().to(x.dtype), self.log_smoothing.double().exp().to(x.dtype)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, smoothing = self._parameters_like(x)
        s = (second_differences(x).square().sum(0) + smoothing * smoothing).sqrt()
        return weight * s.flatten(1).sum(1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, smoothing = self._parameters_like(x)
        z = second_differences(x)
        return second_differences_adjoint(z * (weight / (z.square().sum(0) + smoothing * smoothing).sqrt()))

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return SecondOrderLinearization(self, x.detach())

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight, smoothing = (float(p.detach().double().exp()) for p in (self.log_weight, self.log_smoothing))
        norm2 = squared_norm_bound(shape[-2], shape[-1])
        lipschitz = weight * norm2 / smoothing  # of both columns: sup phi'' = Lip(d phi'/d log nu) = 1/nu
        sizes = [1.0] * self.log_weight.requires_grad + [X1] * self.log_smoothing.requires_grad
        bounds = (
            0.0,
            lipschitz,
            weight * M3 / smoothing**2 * norm2 * ROW_NORM,
            weight * math.sqrt(norm2 * math.prod(shape[1:])) * math.hypot(*sizes),
            lipschitz * math.sqrt(len(sizes)),
        )
        device = self.log_weight.device
        return Constants(*(torch.full((shape[0],), b, dtype=torch.float64, device=device) for b in bounds))

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight, x = self.log_weight.double().exp(), x.detach().double()
            across, down = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
            z = differences_of_differences(across, down, x.shape)
            # a second difference is rounded relative to the first ones, which a slope makes large
            terms = differences_of_differences(across.abs(), down.abs(), x.shape, 1)
            s = (z.square().sum(0) + (2 * self.log_smoothing.double()).exp()).sqrt()
            size = ((z.square().sum(0).sqrt() + terms.square().sum(0).sqrt()) / s).flatten(1).norm(dim=1)
            return weight * 8 * size  # ||B|| <= 8
