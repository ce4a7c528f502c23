"""Smoothed total variation with learnable weight and smoothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.checks import boolean
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.differences import (
    divergence,
    forward_differences,
    squared_operator_norm,
)
from bilevel_imaging.regularizers.total_variation_linearization import TotalVariationLinearization

# phi(t) = sqrt(t^2 + nu^2): sup |phi'''| = M3 / nu^2 (at nu/2)
M3 = 48 / (25 * math.sqrt(5))
X1 = 2 / (3 * math.sqrt(3))  # sup |d phi' / d log nu|


class TotalVariation(Regularizer):
    """R(x) = weight * sum over pixels and channels of sqrt(dx^2 + dy^2 + smoothing^2) (isotropic).

    Anisotropic: sqrt(dx^2 + smoothing^2) + sqrt(dy^2 + smoothing^2). Forward differences, zero at the last row and
    column. Color images channel by channel, unless ``couple_channels`` puts all channels of a pixel under one root.

    Args:
        weight: positive; stored as ``log_weight``.
        smoothing: positive, in the units of x; stored as ``log_smoothing``.
        isotropic: one root per pixel instead of one per difference.
        learn_weight: whether ``log_weight`` is learned.
        learn_smoothing: whether ``log_smoothing`` is learned.
        couple_channels: one root for all channels (isotropic only).

    Raises:
        ValueError: if weight or smoothing is not positive, channels are coupled without ``isotropic``, or an option
            that is true or false is something else.

    Constants: Rudin-Osher-Fatemi energies smoothed as in Ehrhardt & Roberts (2021, 2023); all bounds hold for every x.
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
        couple_channels: bool = False,
    ):
        super().__init__()
        self.isotropic = boolean("isotropic", isotropic)
        self.couple_channels = boolean("couple_channels", couple_channels)
        if couple_channels and not isotropic:
            raise ValueError("Expected isotropic=True when couple_channels=True. Got isotropic=False.")
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_smoothing = positive_parameter(smoothing, "smoothing", learn_smoothing)
        self._known: tuple[tuple[Any, ...], Constants] | None = None

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "isotropic": self.isotropic,
            "couple_channels": self.couple_channels,
            "learn_weight": self.log_weight.requires_grad,
            "learn_smoothing": self.log_smoothing.requires_grad,
        }

    def _parameters_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # exponentiated in float64: the stored numbers, whatever their dtype, define the energy
        return self.log_weight.double().exp().to(x.dtype), self.log_smoothing.double().exp().to(x.dtype)

    def _group(self, a: Tensor) -> Tensor:
        """Sum over what shares one root; a: (2, B, C, H, W)."""
        if not self.isotropic:
            return a
        return a.sum((0, 2), keepdim=True) if self.couple_channels else a[0:1] + a[1:2]

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, smoothing = self._parameters_like(x)
        z = forward_differences(x)
        s = (self._group(z * z) + smoothing * smoothing).sqrt()
        return weight * s.transpose(0, 1).flatten(1).sum(1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, smoothing = self._parameters_like(x)
        if self.is_plain and native.serves(x):
            return native.gradient(x, float(weight), float(smoothing))
        z = forward_differences(x)
        s = (self._group(z * z) + smoothing * smoothing).sqrt()
        return divergence(z * (-weight / s))

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return TotalVariationLinearization(self, x.detach())

    def descent(self, quadratic: native.Quadratic) -> native.Descent | None:
        if not self.is_plain:
            return None
        weight, smoothing = self._parameters_like(quadratic.b)
        return native.Descent(quadratic, float(weight), float(smoothing))

    @property
    def has_whole_runs(self) -> bool:
        return self.is_plain

    @property
    def measures(self) -> bool:
        return self.is_plain and self.log_weight.requires_grad and self.log_smoothing.requires_grad

    def measure(
        self, x: Tensor, q: Tensor, b: Tensor, loss_grad: Tensor, constant: float, **local: Any
    ) -> native.Measured:
        weight, smoothing = (float(p.detach().double().exp()) for p in (self.log_weight, self.log_smoothing))
        return native.measure(x, q, b, loss_grad, constant=constant, weight=weight, smoothing=smoothing, **local)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        """See :meth:`Regularizer.constants`; the same object while nothing that they depend on changes."""
        parameters = (self.log_weight, self.log_smoothing)
        key = (tuple(shape), *((float(p.detach()), p.requires_grad, p.device) for p in parameters))
        if self._known is None or self._known[0] != key:
            self._known = key, self._constants(shape)
        return self._known[1]

    def _constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight, smoothing = (float(p.detach().double().exp()) for p in (self.log_weight, self.log_smoothing))
        norm2 = squared_operator_norm(shape[-2], shape[-1])
        roots = self._roots(shape)
        lipschitz = weight * norm2 / smoothing  # of both columns: sup phi'' = Lip(d phi'/d log nu) = 1/nu
        columns = int(self.log_weight.requires_grad) + int(self.log_smoothing.requires_grad)
        sizes = [1.0] * self.log_weight.requires_grad + [X1] * self.log_smoothing.requires_grad
        bounds = (
            0.0,
            lipschitz,
            weight * M3 / smoothing**2 * norm2 * self.row_norm,
            weight * math.sqrt(norm2 * roots) * math.hypot(*sizes),
            lipschitz * math.sqrt(columns),
        )
        device = self.log_weight.device
        return Constants(*(torch.full((shape[0],), b, dtype=torch.float64, device=device) for b in bounds))

    def _roots(self, shape: torch.Size | tuple[int, ...]) -> float:
        """Their number per image."""
        return math.prod(shape[1:]) * (1 if self.isotropic else 2) / (shape[1] if self.couple_channels else 1)

    @property
    def is_plain(self) -> bool:
        """Isotropic, channel by channel: the case with fused kernels."""
        return self.isotropic and not self.couple_channels

    @property
    def row_norm(self) -> float:
        """||D||_{2 -> inf} over the groups under one root: largest norm of the rows of one group."""
        return math.sqrt(3) if self.isotropic else math.sqrt(2)

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight, smoothing = self._parameters_like(x)
            if self.is_plain and native.serves(x):
                return math.sqrt(8) * weight.double() * native.unit_squares(x, float(smoothing)).sqrt()
            z = forward_differences(x.detach())
            n = z / (self._group(z * z) + smoothing * smoothing).sqrt()
            size = n.transpose(0, 1).double().flatten(1).norm(dim=1)
            return weight.double() * math.sqrt(8) * size

    def coarse_gradient_scale(self, x: Tensor) -> Tensor:
        """No unit vector is longer than 1."""
        size = self.log_weight.detach().double().exp() * math.sqrt(8 * self._roots(x.shape))
        return size.to(x.device).expand(x.shape[0])
