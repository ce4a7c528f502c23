"""Derivatives of smoothed total variation frozen at one x: products, bounds of their changes, the Newton model."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.derivatives import Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.native import Stencil
from bilevel_imaging.regularizers.differences import (
    differences_adjoint,
    divergence,
    forward_differences,
    isotropic_curvature,
    squared_operator_norm,
    weighted_laplacian_bound,
)
from bilevel_imaging.regularizers.relative_curvature import Lengths, change_along, reach, relative_norm
from bilevel_imaging.regularizers.total_variation_newton import PrimalDualModel
from bilevel_imaging.tensors import norm

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.total_variation import TotalVariation

X2 = 1.933  # sup |d^2/dt^2 of d phi'/d log nu| = X2 / nu^2 for phi(t) = sqrt(t^2 + nu^2)


class TotalVariationLinearization(Linearization):
    """Caches the unit field n = Dx / s and s, with s the smoothed length; H v = weight D^T (Dv - n <n, Dv>) / s."""

    def __init__(self, regularizer: TotalVariation, x: Tensor):
        self.regularizer = regularizer
        self.weight, self.smoothing = regularizer._parameters_like(x.detach())
        self.weight, self.smoothing = self.weight.detach(), self.smoothing.detach()
        self.shape = x.shape
        self.constants = regularizer.constants(x.shape)
        if regularizer.is_plain and native.serves(x):
            self._field, self.grad = native.linearize(x, float(self.weight), float(self.smoothing))
            self.unit, self.reciprocal = self._field[:2], self._field[2:]
            return
        self._field = None
        z = forward_differences(x)
        squared = regularizer._group(z * z)
        self.reciprocal = squared.add_(self.smoothing * self.smoothing).rsqrt_() if regularizer.isotropic else None
        if self.reciprocal is None:
            self.reciprocal = (z * z).add_(self.smoothing * self.smoothing).rsqrt_()
        self.grad = divergence(self.scale * z)
        self.unit = z.mul_(self.reciprocal)

    @cached_property
    def scale(self) -> Tensor:
        """-weight / s: the signs of D^T = -div and the weight, folded in once."""
        return -self.weight * self.reciprocal

    def stencil(self) -> Stencil | None:
        served = self._field is not None and native.serves(self._field)
        return Stencil(self._field, weight=float(self.weight)) if served else None

    def hvp(self, v: Tensor) -> Tensor:
        if self.regularizer.is_plain and native.serves(self.unit, v):
            return native.curvature_product(v, self.unit, self.reciprocal, float(self.weight))
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
        if len(self.regularizer.trainable()) == 2 and self._is_native(self.unit):
            return self._native_columns[0]
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
        if self._is_native(q):
            return self._native_directional(q, radius)
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

    def _is_native(self, v: Tensor) -> bool:
        return self.regularizer.is_plain and native.serves(self.unit, v)

    def _native_directional(self, q: Tensor, radius: Tensor) -> Directional:
        at = native.slopes(q, self.unit, self.reciprocal, float(self.smoothing), radius, self.regularizer.row_norm)
        weight, radius = float(self.weight) * (1 + 1e-12), radius.double()
        components = []
        if self.regularizer.log_weight.requires_grad:
            components.append(weight * (at.weight + 0.5 * at.hessian * radius))
        if self.regularizer.log_smoothing.requires_grad:
            components.append(weight * (at.smoothing + 0.5 * at.fourth * radius))
        stacked = (torch.stack(components, 1) if components else radius.new_zeros((len(radius), 0))).to(q.dtype)
        return Directional((weight * at.hessian).to(q.dtype), stacked.norm(dim=1), stacked)

    def _native_change(self, radius: Tensor, mu: Tensor, q: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return native.relative_change(
            self.unit,
            self.reciprocal,
            float(self.weight),
            float(self.smoothing),
            radius,
            mu,
            squared_norm=squared_operator_norm(self.shape[-2], self.shape[-1]),
            row_norm=self.regularizer.row_norm,
            q=q,
        )

    @cached_property
    def _native_columns(self) -> tuple[Tensor, Tensor]:
        """Both columns, and the sums behind ``mixed_energy_norms``."""
        columns = self.grad.new_empty((self.shape[0], 2, *self.shape[1:]))
        columns[:, 0] = self.grad
        weight, smoothing = float(self.weight), float(self.smoothing)
        sums = native.smoothing_column(self.unit, self.reciprocal, weight, smoothing, columns[:, 1])
        return columns, torch.stack(sums, 1)

    def _lengths(self, z: Tensor) -> Tensor:
        """Length of what is under one root."""
        return self.regularizer._group(z * z).sqrt()

    def _third_derivative(self, t: Tensor) -> Tensor:
        """sup of the norm of D^3 phi over vectors of length t; unimodal with its peak M3/nu^2 at nu/2."""
        s2 = t * t + self.smoothing**2
        line = 3 * (self.smoothing**2 / s2) * (t * s2.rsqrt()) / s2  # no higher power: it would leave float32
        if not self.regularizer.isotropic:
            return line
        # a vector of length t >= nu/sqrt(2) has directions with a larger third derivative than its own
        return torch.where(t * t > 0.5 * self.smoothing**2, 2 / math.sqrt(3) / s2, line)

    def _smoothing_curvature(self, dq: Tensor) -> Tensor:
        """Derivative of d phi'/d log nu along dq: -nu^2 (dq - 3 n <n, dq>) / s^3."""
        along = self.regularizer._group(self.unit * dq)
        return -((self.smoothing * self.reciprocal) ** 2) * (dq - 3 * self.unit * along) * self.reciprocal

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

    @property
    def length_scale(self) -> float:
        return float(self.smoothing)

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        if self._is_native(self.unit):
            return self._native_change(radius, strong_convexity)[0]
        at, far, across = self._local_lengths(radius, strong_convexity)
        # De stays parallel to itself while z_t = z + t De turns: |De x z_t| = |De x z|
        change = relative_norm(at, far, across * at.length if self.regularizer.isotropic else None)
        return change.transpose(0, 1).flatten(1).amax(1).double() / radius

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        if self._is_native(q):
            curvature, hessian, energy = self._native_change(radius, strong_convexity, q)
        else:
            curvature, (hessian, energy) = None, self._change_along(q, radius, strong_convexity)
        change = change_along(hessian, self.weight.double() * energy, self.regularizer.trainable(), q)
        return replace(change, curvature=curvature)

    def _change_along(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> tuple[Tensor, Tensor]:
        """Largest relative change along q, and <q, D^T phi'' D q> without the weight, ``(B,)``."""
        at, far, _ = self._local_lengths(radius, strong_convexity)
        dq = forward_differences(q)
        length_q = self._lengths(dq)
        along, across, aside = length_q, None, torch.zeros_like(length_q)
        if self.regularizer.isotropic:
            tiny = torch.finfo(q.dtype).tiny
            direction = self.unit / (at.length * self.reciprocal).clamp(min=tiny)
            along = self.regularizer._group(direction * dq)
            aside = self._lengths(dq.addcmul(direction, along, value=-1))
            # z_t leaves the direction of z by an angle whose sine is at most |De| / |z|
            turn = (far / at.length.clamp(min=tiny)).clamp(max=1)
            across = aside * at.length + length_q * far  # |dq x z_t| <= |dq x z| + |dq| |De|
            along = torch.minimum(length_q, along.abs() + aside * turn)
        hessian = relative_norm(at, along, across).transpose(0, 1).flatten(1).amax(1)
        # |dq|^2 - <n, dq>^2 without cancellation: 1 - |n|^2 = nu^2 / s^2
        energy = (aside**2 + (length_q**2 - aside**2) * (self.smoothing * self.reciprocal) ** 2) * self.reciprocal
        return hessian, energy.transpose(0, 1).flatten(1).sum(1)

    def mixed_energy_norms(self) -> Tensor:
        """||D^T p||_{H^-1}^2 <= sum <p, (weight D^2 phi)^-1 p>: for log nu that is weight sum |z|^2 nu^2 / s^3, for the
        weight weight sum |z|^2 s / nu^2."""
        trainable, nu = self.regularizer.trainable(), self.smoothing.double()
        if len(trainable) == 2 and self._is_native(self.unit):
            return (self.weight.double() * self._native_columns[1]).sqrt() * (1 + 1e-4)
        length2 = self._group_double(self.unit / self.reciprocal)
        r = self.reciprocal.double()
        terms = []
        if "log_weight" in trainable:
            terms.append(length2 / (r * nu**2))
        if "log_smoothing" in trainable:
            terms.append(length2 * nu**2 * r**3)
        sums = [(self.weight.double() * t.transpose(0, 1).flatten(1).sum(1)).sqrt() * (1 + 1e-4) for t in terms]
        return torch.stack(sums, 1) if sums else self.grad.new_zeros((self.shape[0], 0), dtype=torch.float64)

    def split_energy_norms(self, strong_convexity: Tensor) -> Tensor:
        """H >= mu I + D^T W D, W = weight D^2 phi, hence ||D^T (f + h)||_{H^-1}^2 <= <f, W^-1 f> + ||D^T h||^2 / mu.
        The columns are D^T of fields along z, where W is weight nu^2 / s^3: f is what lies where W is large."""
        trainable, mu = self.regularizer.trainable(), strong_convexity.double()
        if self._is_native(self.unit):
            numbers = float(self.weight), float(self.smoothing)
            squares = native.split_energies(self.unit, self.reciprocal, *numbers, mu)
        else:
            r, nu, weight = self.reciprocal.double(), self.smoothing.double(), self.weight.double()
            stiff, shape = weight * nu**2 * r**3, (1, -1, *([1] * (r.dim() - 2)))
            ratio = 2 * stiff / mu.reshape(shape)
            theta, rest = ratio / (1 + ratio), 1 / (1 + ratio)
            columns = []
            for field in (weight * self.unit.double(), weight * (nu * r) ** 2 * self.unit.double()):
                inside = (theta * field).square() / stiff
                outside = differences_adjoint((rest * field).expand_as(self.unit))
                columns.append(inside.transpose(0, 1).flatten(1).sum(1) + outside.flatten(1).square().sum(1) / mu)
            squares = torch.stack(columns)
        chosen = [row for row, name in zip(squares, ("log_weight", "log_smoothing"), strict=True) if name in trainable]
        return torch.stack(chosen, 1).nan_to_num(nan=torch.inf).sqrt() * (1 + 1e-4)

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
        other._field = None if self._field is None else self._field[:, index]
        if other._field is None:
            other.reciprocal, other.unit = self.reciprocal[:, index], self.unit[:, index]
        else:
            other.unit, other.reciprocal = other._field[:2], other._field[2:]
        other.grad = self.grad[index]
        return other

    def newton_memory(self, *, cold: bool) -> Tensor:
        unit = self.unit.transpose(0, 1)
        return torch.zeros_like(unit) if cold else unit.clone()

    def newton_model(self, memory: Tensor) -> NewtonModel:
        return PrimalDualModel(self, memory.transpose(0, 1))
