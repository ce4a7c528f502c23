"""Smoothed total variation with learnable weight and smoothing."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.differences import (
    differences_adjoint,
    divergence,
    forward_differences,
    isotropic_curvature,
    isotropic_primal_dual,
    squared_operator_norm,
    weighted_laplacian_bound,
)
from bilevel_imaging.regularizers.relative_curvature import Lengths, reach, relative_norm
from bilevel_imaging.tensors import norm

# phi(t) = sqrt(t^2 + nu^2): sup |phi'''| = M3 / nu^2 (at nu/2), sup |d^2/dt^2 of d phi'/d log nu| = X2 / nu^2
M3 = 48 / (25 * math.sqrt(5))
X1 = 2 / (3 * math.sqrt(3))  # sup |d phi' / d log nu|
X2 = 1.933


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
        ValueError: if weight or smoothing is not positive, or channels are coupled without ``isotropic``.

    Constants: Rudin-Osher-Fatemi energies smoothed as in Ehrhardt & Roberts (2021, 2023); all bounds hold for every x.
    """

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
        if couple_channels and not isotropic:
            raise ValueError("Expected isotropic=True when couple_channels=True. Got isotropic=False.")
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_smoothing = positive_parameter(smoothing, "smoothing", learn_smoothing)
        self.isotropic = isotropic
        self.couple_channels = couple_channels

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "isotropic": self.isotropic,
            "couple_channels": self.couple_channels,
            "learn_weight": self.log_weight.requires_grad,
            "learn_smoothing": self.log_smoothing.requires_grad,
        }

    def _parameters_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # exponentiated in the parameters' own precision, so that float32 images do not round the weights twice
        return self.log_weight.exp().to(x.dtype), self.log_smoothing.exp().to(x.dtype)

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
        z = forward_differences(x)
        s = (self._group(z * z) + smoothing * smoothing).sqrt()
        return divergence(z * (-weight / s))

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return TotalVariationLinearization(self, x.detach())

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight, smoothing = float(self.log_weight.detach().exp()), float(self.log_smoothing.detach().exp())
        norm2 = squared_operator_norm(shape[-2], shape[-1])
        roots = math.prod(shape[1:]) * (1 if self.isotropic else 2) / (shape[1] if self.couple_channels else 1)
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
            z = forward_differences(x.detach())
            n = z / (self._group(z * z) + smoothing * smoothing).sqrt()
            size = n.transpose(0, 1).double().flatten(1).norm(dim=1)
            return weight.double() * math.sqrt(8) * size


class TotalVariationLinearization(Linearization):
    """Caches the unit field n = Dx / s and s, with s the smoothed length; H v = weight D^T (Dv - n <n, Dv>) / s."""

    def __init__(self, regularizer: TotalVariation, x: Tensor):
        self.regularizer = regularizer
        self.weight, self.smoothing = regularizer._parameters_like(x.detach())
        self.weight, self.smoothing = self.weight.detach(), self.smoothing.detach()
        self.shape = x.shape
        self.constants = regularizer.constants(x.shape)
        z = forward_differences(x)
        squared = regularizer._group(z * z)
        self.reciprocal = squared.add_(self.smoothing * self.smoothing).rsqrt_() if regularizer.isotropic else None
        if self.reciprocal is None:
            self.reciprocal = (z * z).add_(self.smoothing * self.smoothing).rsqrt_()
        self.scale = -self.weight * self.reciprocal  # the signs of D^T = -div and the weight, folded in once
        self.grad = divergence(self.scale * z)
        self.unit = z.mul_(self.reciprocal)

    def hvp(self, v: Tensor) -> Tensor:
        if self.regularizer.is_plain:
            return isotropic_curvature(v, self.unit, self.scale, self._work)
        dv = forward_differences(v)
        along = self.regularizer._group(self.unit * dv)
        return divergence(dv.addcmul_(self.unit, along, value=-1).mul_(self.scale))

    def _curvature(self, dv: Tensor) -> Tensor:
        """phi''(Dx) dv, in place."""
        along = self.regularizer._group(self.unit * dv)
        return dv.addcmul_(self.unit, along, value=-1).mul_(self.reciprocal)

    @cached_property
    def _work(self) -> Tensor:
        return self.unit.new_empty((2, *self.unit.shape))

    def _smoothing_field(self) -> Tensor:
        """d phi' / d log nu = -nu^2 z / s^3."""
        return -(self.smoothing**2) * self.unit * self.reciprocal.square()

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products: dict[str, Tensor] = {}
        trainable = self.regularizer.trainable()
        if "log_weight" in trainable:
            products["log_weight"] = (q * self.grad).sum().to(self.regularizer.log_weight.dtype)
        if "log_smoothing" in trainable:
            total = self.weight * (forward_differences(q) * self._smoothing_field()).sum()
            products["log_smoothing"] = total.to(self.regularizer.log_smoothing.dtype)
        return products

    def mixed_columns(self) -> Tensor:
        columns = []
        if self.regularizer.log_weight.requires_grad:
            columns.append(self.grad)
        if self.regularizer.log_smoothing.requires_grad:
            columns.append(self.weight * differences_adjoint(self._smoothing_field()))
        if not columns:
            return self.grad.new_zeros((self.shape[0], 0, *self.shape[1:]))
        return torch.stack(columns, 1)

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """Localized: sup |phi'''| is taken over what each difference can become inside the ball."""
        dq = forward_differences(q)
        length_q = self._lengths(dq)
        length = self._lengths(self.unit / self.reciprocal)
        reach = self.regularizer.row_norm * radius.reshape(1, -1, *([1] * (length.dim() - 2)))
        low, high = (length - reach).clamp_(min=0), length + reach
        nu = self.smoothing

        def largest(weights: Tensor, sweeps: int) -> Tensor:
            # |<(H(x) - H) q, u>| <= sum weights_i |De|_i |Du|_i <= lambda_max(D^T diag(weights) D) |e| |u|
            return self.weight * weighted_laplacian_bound((weights * length_q).expand((2, *self.shape)), sweeps)

        third = self._third_derivative(torch.minimum(torch.maximum(nu / 2, low), high))
        hessian = largest(third, 2)
        components = []
        if self.regularizer.log_weight.requires_grad:
            slope = self.weight * differences_adjoint(self._curvature(dq.clone()))
            components.append(norm(slope) + 0.5 * hessian * radius)
        if self.regularizer.log_smoothing.requires_grad:
            slope = self.weight * differences_adjoint(self._smoothing_curvature(dq))
            fourth = torch.where(low >= nu / 2, (6 * nu**2 / (low**2 + nu**2) ** 2), X2 / nu**2).clamp_(max=X2 / nu**2)
            remainder = largest(fourth, 1)  # multiplies a square of the radius: need not be sharp
            components.append(norm(slope) + 0.5 * remainder * radius)
        stacked = torch.stack(components, 1) if components else q.new_zeros((self.shape[0], 0))
        return Directional(hessian, stacked.norm(dim=1), stacked)

    def _lengths(self, z: Tensor) -> Tensor:
        """Length of what is under one root."""
        return self.regularizer._group(z * z).sqrt()

    def _third_derivative(self, t: Tensor) -> Tensor:
        """sup of the norm of D^3 phi over vectors of length t; unimodal with its peak M3/nu^2 at nu/2."""
        s2 = t * t + self.smoothing**2
        line = 3 * self.smoothing**2 * t * s2 ** (-2.5)
        if not self.regularizer.isotropic:
            return line
        # a vector of length t >= nu/sqrt(2) has directions with a larger third derivative than its own
        return torch.where(t * t > 0.5 * self.smoothing**2, 2 / math.sqrt(3) / s2, line)

    def _smoothing_curvature(self, dq: Tensor) -> Tensor:
        """Derivative of d phi'/d log nu along dq: -nu^2 (dq - 3 n <n, dq>) / s^3."""
        along = self.regularizer._group(self.unit * dq)
        return -(self.smoothing**2) * (dq - 3 * self.unit * along) * self.reciprocal**3

    @property
    def weight_column(self) -> int | None:
        """Which column of J is the gradient itself."""
        return 0 if self.regularizer.log_weight.requires_grad else None

    def _local_lengths(self, radius: Tensor, mu: Tensor) -> tuple[Lengths, Tensor, Tensor]:
        """Lengths on the ball ||e||_H <= radius, and how far De reaches there in all and across z."""
        length = self._lengths(self.unit / self.reciprocal)
        shape = (1, -1, *([1] * (length.dim() - 2)))
        radius, mu = radius.to(length.dtype).reshape(shape), mu.to(length.dtype).reshape(shape)
        floor = mu / squared_operator_norm(self.shape[-2], self.shape[-1])
        at = Lengths(length, length, length, self.weight, self.smoothing, floor)
        far, across = reach(at, radius, self.regularizer.row_norm * mu.rsqrt())
        return replace(at, low=(length - far).clamp(min=0), high=length + far), far, across

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        at, far, across = self._local_lengths(radius, strong_convexity)
        # De stays parallel to itself while z_t = z + t De turns: |De x z_t| = |De x z|
        change = relative_norm(at, far, across * at.length if self.regularizer.isotropic else None)
        return change.transpose(0, 1).flatten(1).amax(1).double() / radius

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        at, far, _ = self._local_lengths(radius, strong_convexity)
        dq = forward_differences(q)
        length_q = self._lengths(dq)
        along, across = length_q, None
        if self.regularizer.isotropic:
            tiny = torch.finfo(q.dtype).tiny
            along = self.regularizer._group(self.unit / (at.length * self.reciprocal).clamp(min=tiny) * dq).abs()
            across = (length_q**2 - along**2).clamp(min=0).sqrt()
            # z_t leaves the direction of z by an angle whose sine is at most |De| / |z|
            along = torch.minimum(length_q, along + across * (far / at.length.clamp(min=tiny)).clamp(max=1))
            across = across * at.length + length_q * far  # |dq x z_t| <= |dq x z| + |dq| |De|
        hessian = relative_norm(at, along, across).transpose(0, 1).flatten(1).amax(1)
        energy = (dq * self._curvature(dq.clone())).transpose(0, 1).flatten(1).sum(1)
        trainable = self.regularizer.trainable()
        # |d chi| <= 2 phi'' for chi = d phi' / d log nu: -nu^2 (I - 3 n n^T) / s^3 against (I - n n^T) / s
        slopes = [1.0] * ("log_weight" in trainable) + [2.0] * ("log_smoothing" in trainable)
        up = 1 + 1e-4 if q.dtype == torch.float32 else 1 + 1e-10
        return LocalChange(
            up * hessian.double(),
            torch.tensor(slopes, dtype=torch.float64, device=q.device),
            up * (self.weight * energy).double().clamp(min=0).sqrt(),
        )

    def mixed_energy_norms(self) -> Tensor:
        """||D^T p||_{H^-1}^2 <= sum <p, (weight D^2 phi)^-1 p>: for log nu that is weight sum |z|^2 nu^2 / s^3, for the
        weight weight sum |z|^2 s / nu^2."""
        length2 = self._group_double(self.unit / self.reciprocal)
        r = self.reciprocal.double()
        trainable, nu = self.regularizer.trainable(), self.smoothing.double()
        terms = []
        if "log_weight" in trainable:
            terms.append(length2 / (r * nu**2))
        if "log_smoothing" in trainable:
            terms.append(length2 * nu**2 * r**3)
        sums = [(self.weight.double() * t.transpose(0, 1).flatten(1).sum(1)).sqrt() * (1 + 1e-4) for t in terms]
        return torch.stack(sums, 1) if sums else self.grad.new_zeros((self.shape[0], 0), dtype=torch.float64)

    def _group_double(self, z: Tensor) -> Tensor:
        return self.regularizer._group(z.double().square())

    def hessian_diagonal(self) -> Tensor:
        """Diagonal of the Hessian, ``(B, C, H, W)``."""
        return self._diagonal(self.unit)

    def _diagonal(self, dual: Tensor) -> Tensor:
        """Diagonal of weight D^T (I - (u n^T + n u^T) / 2) D / s with u = ``dual``."""
        own = (1 - self.unit * dual) * self.reciprocal.expand_as(self.unit)
        # a pixel is the start of its own two differences and the end of its left and upper neighbors' ones
        own[0][..., -1] = 0
        own[1][..., -1, :] = 0
        diagonal = own[0] + own[1]
        if self.regularizer.isotropic:
            cross = self.unit[0] * dual[1] + self.unit[1] * dual[0]
            diagonal = diagonal - cross * self.reciprocal[0]
        diagonal[..., 1:] += own[0][..., :-1]
        diagonal[..., 1:, :] += own[1][..., :-1, :]
        return self.weight * diagonal

    def diffusion(self) -> Tensor:
        return self.hessian_diagonal() / 4

    def subset(self, index: Tensor) -> Linearization:
        other = object.__new__(TotalVariationLinearization)
        other.regularizer, other.weight, other.smoothing = self.regularizer, self.weight, self.smoothing
        other.shape = torch.Size((len(index), *self.shape[1:]))
        other.constants = self.constants.subset(index)
        other.reciprocal, other.unit, other.scale = (
            field[:, index] for field in (self.reciprocal, self.unit, self.scale)
        )
        other.grad = self.grad[index]
        return other

    def newton_memory(self, *, cold: bool) -> Tensor:
        unit = self.unit.transpose(0, 1)
        return torch.zeros_like(unit) if cold else unit.clone()

    def newton_model(self, memory: Tensor) -> NewtonModel:
        return PrimalDualModel(self, memory.transpose(0, 1))


class PrimalDualModel(NewtonModel):
    """weight D^T (I - (u n^T + n u^T) / 2) D / s, with a dual field |u| <= 1 in place of one n = Dx / s.

    Chan, Golub & Mulet (1999): linearizing the dual equation u s = Dx instead of u = Dx / s, whose linearization holds
    in a much larger neighborhood. u = 0 is the quadratic majorizer (lagged diffusivity), u = n is Newton's method.
    """

    def __init__(self, linearization: TotalVariationLinearization, dual: Tensor):
        self.at, self.dual, self.half = linearization, dual, 0.5 * dual
        self.group = linearization.regularizer._group

    def hvp(self, v: Tensor) -> Tensor:
        at = self.at
        if at.regularizer.is_plain:
            return isotropic_primal_dual(v, at.unit, self.half, at.scale, self._work)
        dv = forward_differences(v)
        along_unit, along_half = self.group(at.unit * dv), self.group(self.half * dv)
        dv.addcmul_(self.half, along_unit, value=-1).addcmul_(at.unit, along_half, value=-1)
        return divergence(dv.mul_(at.scale))

    def diffusion(self) -> Tensor:
        return self.at._diagonal(self.dual) / 4

    @cached_property
    def _work(self) -> Tensor:
        return self.half.new_empty((3, *self.half.shape))

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        at = self.at
        dd = forward_differences(d)
        along = self.group(at.unit * dd)
        dual = dd.addcmul_(self.dual, along, value=-1).mul_(at.reciprocal).add_(at.unit)
        if not bool((step == 1).all()):
            dual = torch.lerp(self.dual, dual, step.reshape(1, -1, *([1] * (d.dim() - 1))))
        # |u| <= 1 keeps the model positive semidefinite
        return dual.div_(self.group(dual * dual).sqrt_().clamp_(min=1)).transpose(0, 1)
