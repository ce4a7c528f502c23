"""Total variation smoothed by Huber's function: quadratic up to a threshold, exactly linear beyond it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.checks import boolean
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import positive_parameter
from bilevel_imaging.regularizers.differences import forward_differences, isotropic_curvature, squared_operator_norm
from bilevel_imaging.regularizers.kinks import DifferenceRegularizer, KinkedLinearization


class HuberTotalVariation(DifferenceRegularizer):
    """R(x) = weight * sum of phi(sqrt(dx^2 + dy^2)), phi(t) = t^2 / (2 nu) for t <= nu, t - nu / 2 beyond; nu =
    smoothing.

    Anisotropic: phi(|dx|) + phi(|dy|). Forward differences, zero at the last row and column, channel by channel.

    The second derivative jumps at t = nu: there are no Lipschitz constants for all x, but there are on balls that no
    difference leaves its side of nu on. There the Hessian of the anisotropic form is constant, while that of the
    isotropic one varies smoothly beyond nu.

    Args:
        weight: positive; stored as ``log_weight``.
        smoothing: positive threshold nu, in the units of x; stored as ``log_smoothing``.
        isotropic: one root per pixel instead of one per difference.
        learn_weight: whether ``log_weight`` is learned.
        learn_smoothing: whether ``log_smoothing`` is learned.

    Raises:
        ValueError: if weight or smoothing is not positive.
    """

    known_parameters = ("log_weight", "log_smoothing")

    def __init__(
        self,
        weight: float = 0.1,
        smoothing: float = 0.01,
        isotropic: bool = True,
        *,
        learn_weight: bool = True,
        learn_smoothing: bool = True,
    ):
        super().__init__()
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_smoothing = positive_parameter(smoothing, "smoothing", learn_smoothing)
        self.isotropic = boolean("isotropic", isotropic)
        self.row_norm = math.sqrt(3 if isotropic else 2)

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "isotropic": self.isotropic,
            "learn_weight": self.log_weight.requires_grad,
            "learn_smoothing": self.log_smoothing.requires_grad,
        }

    def _smoothing(self, x: Tensor) -> Tensor:
        return self.log_smoothing.double().exp().to(x.dtype)

    def _squared(self, z: Tensor) -> Tensor:
        """Squared lengths, one per root."""
        return z[0:1].square() + z[1:2].square() if self.isotropic else z.square()

    def _beyond(self, squared: Tensor, nu: Tensor) -> tuple[Tensor, Tensor]:
        """(where the length exceeds nu; the squared length there and 1 elsewhere, so that no root is taken of 0)."""
        beyond = squared > nu * nu
        return beyond, torch.where(beyond, squared, 1.0)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nu = self._smoothing(x)
        squared = self._squared(forward_differences(x))
        beyond, safe = self._beyond(squared, nu)
        phi = torch.where(beyond, safe.sqrt() - nu / 2, squared / (2 * nu))
        return self._weight(x) * phi.transpose(0, 1).flatten(1).sum(1)

    def _slope(self, z: Tensor) -> Tensor:
        nu = self._smoothing(z)
        beyond, safe = self._beyond(self._squared(z), nu)
        return z * torch.where(beyond, safe.rsqrt(), 1 / nu)

    def _linearization(self, x: Tensor) -> Linearization:
        return _HuberLinearization(self, x)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight, nu = (float(p.detach().double().exp()) for p in (self.log_weight, self.log_smoothing))
        norm2 = squared_operator_norm(shape[-2], shape[-1])
        roots = math.prod(shape[1:]) * (1 if self.isotropic else 2)
        columns = int(self.log_weight.requires_grad) + int(self.log_smoothing.requires_grad)
        # d phi' / d log nu jumps from -t / nu to 0; the weight's column is the gradient
        lipschitz = None if self.log_smoothing.requires_grad else weight * norm2 / nu * columns
        bounds = (0.0, weight * norm2 / nu, None, weight * math.sqrt(norm2 * roots * columns), lipschitz)
        device = self.log_weight.device
        return Constants(
            *(None if b is None else torch.full((shape[0],), b, dtype=torch.float64, device=device) for b in bounds),
            reason="the second derivative of the Huber function jumps",
        )

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            slope = self._slope(forward_differences(x.detach())).transpose(0, 1).double()
            return self.log_weight.double().exp() * math.sqrt(8) * slope.flatten(1).norm(dim=1)


class _HuberLinearization(KinkedLinearization):
    """H v = weight D^T (Dv - n <n, Dv>) / max(|z|, nu) with n = z / |z| beyond nu, 0 up to it."""

    shape_parameter = "log_smoothing"

    def __init__(self, regularizer: HuberTotalVariation, x: Tensor):
        z = forward_differences(x)
        nu = self.smoothing = regularizer._smoothing(x).detach()
        self.isotropic = regularizer.isotropic
        self.squared = regularizer._squared(z)
        self.beyond, safe = regularizer._beyond(self.squared, nu)
        reciprocal = torch.where(self.beyond, safe.rsqrt(), 1 / nu)
        self.slope = z * reciprocal
        super().__init__(regularizer, x, self.slope)
        if self.isotropic:
            self.unit = torch.where(self.beyond, self.slope, 0.0)
            self.scale_of_root = -self.weight * reciprocal
            self.curvature = reciprocal.expand_as(z)
        else:
            self.curvature = torch.where(self.beyond, 0.0, reciprocal)
        self.margin = self._distance_to_threshold()

    def _distance_to_threshold(self) -> Tensor:
        length, nu = self.squared.double().sqrt(), self.smoothing.double()
        # a difference is rounded relative to itself, never to the pixels that it is taken of
        parameter = self.regularizer.log_smoothing.detach()
        stored = torch.finfo(parameter.dtype).eps * (1 + parameter.abs().double())
        distance = (length - nu).abs() - 8 * torch.finfo(self.x.dtype).eps * (length + nu) - stored * nu
        return distance.transpose(0, 1).flatten(1).amin(1)

    def hvp(self, v: Tensor) -> Tensor:
        return isotropic_curvature(v, self.unit, self.scale_of_root, self._work) if self.isotropic else super().hvp(v)

    @cached_property
    def _work(self) -> Tensor:
        return self.unit.new_empty((2, *self.unit.shape))

    def _fields(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.regularizer.log_smoothing.requires_grad:
            # d phi' / d log nu = -z / nu up to nu, 0 beyond
            yield (
                torch.where(self.beyond, 0.0, -self.slope),
                torch.where(self.beyond, 0.0, -1 / self.smoothing).expand_as(self.slope),
            )

    def _mixed_slopes(self) -> list[Tensor]:
        return [slope.abs() for _, slope in self._fields()]

    def _curvature_on_ball(self, reach: Tensor) -> Tensor:
        return (1 / self._shortest(reach)).expand_as(self.slope) if self.isotropic else self.curvature

    def _third_derivative(self, reach: Tensor) -> Tensor | None:
        """Of the length |z| itself: 2 / (sqrt(3) |z|^2), attained at 55 degrees from z."""
        if not self.isotropic:
            return None
        return torch.where(self.beyond, 2 / math.sqrt(3) / self._shortest(reach) ** 2, 0.0).expand_as(self.slope)

    def _shortest(self, reach: Tensor) -> Tensor:
        """max(|z|, nu) at its smallest."""
        return torch.maximum(self.squared.sqrt() - reach, self.smoothing)

    def _directed(self) -> tuple[Tensor, Tensor | None]:
        if not self.isotropic:
            return self.curvature, None
        return (1 - self.unit**2) * self.curvature, -self.unit[0] * self.unit[1] * self.curvature[0]
