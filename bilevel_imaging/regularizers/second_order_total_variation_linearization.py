"""Derivatives of second-order total variation frozen at one x: products, bounds of their changes, the Newton model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.regularizers.relative_curvature import Lengths, change_along, reach, relative_norm
from bilevel_imaging.regularizers.second_order_total_variation_differences import (
    ROW_NORM,
    diagonal_of_square,
    second_differences,
    second_differences_adjoint,
    squared_norm_bound,
    weighted_bound,
)
from bilevel_imaging.regularizers.total_variation_linearization import X2
from bilevel_imaging.tensors import norm, per_sample

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.second_order_total_variation import SecondOrderTotalVariation


def _length(z: Tensor) -> Tensor:
    """Length under each root, ``(3, B, C, H, W)`` to ``(B, C, H, W)``."""
    return z.square().sum(0).sqrt()


class SecondOrderLinearization(Linearization):
    """Caches the unit field n = Bx / s and 1 / s, s the smoothed length; H v = weight B^T (Bv - n <n, Bv>) / s.

    phi(z) = sqrt(|z|^2 + nu^2) for z of three components: its derivative tensors have the norms that they have for two,
    since each is attained in the plane of z and its first argument.
    """

    def __init__(self, regularizer: SecondOrderTotalVariation, x: Tensor):
        self.regularizer = regularizer
        self.weight, self.smoothing = (p.detach() for p in regularizer._parameters_like(x))
        self.constants = regularizer.constants(x.shape)
        z = second_differences(x)
        self.reciprocal = (z.square().sum(0) + self.smoothing * self.smoothing).rsqrt()
        self.unit = z.mul_(self.reciprocal)
        self.scale = self.weight * self.reciprocal
        self.grad = second_differences_adjoint(self.weight * self.unit)

    def hvp(self, v: Tensor) -> Tensor:
        return second_differences_adjoint(self._flattened(second_differences(v)).mul_(self.scale))

    def _flattened(self, dv: Tensor) -> Tensor:
        """dv - n <n, dv>, in place."""
        along = (self.unit * dv).sum(0)
        return dv.addcmul_(self.unit, along.unsqueeze(0), value=-1)

    def _smoothing_field(self) -> Tensor:
        """d phi' / d log nu = -nu^2 z / s^3."""
        return -(self.smoothing**2) * self.unit * self.reciprocal.square()

    def _smoothing_curvature(self, dq: Tensor) -> Tensor:
        """Derivative of d phi' / d log nu along dq: -nu^2 (dq - 3 n <n, dq>) / s^3."""
        along = (self.unit * dq).sum(0)
        return -((self.smoothing * self.reciprocal) ** 2) * (dq - 3 * self.unit * along) * self.reciprocal

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products: dict[str, Tensor] = {}
        trainable = self.regularizer.trainable()
        if "log_weight" in trainable:
            products["log_weight"] = (q * self.grad).sum().to(self.regularizer.log_weight.dtype)
        if "log_smoothing" in trainable:
            total = self.weight * (second_differences(q) * self._smoothing_field()).sum()
            products["log_smoothing"] = total.to(self.regularizer.log_smoothing.dtype)
        return products

    def mixed_columns(self) -> Tensor:
        columns = []
        if self.regularizer.log_weight.requires_grad:
            columns.append(self.grad)
        if self.regularizer.log_smoothing.requires_grad:
            columns.append(self.weight * second_differences_adjoint(self._smoothing_field()))
        return torch.stack(columns, 1) if columns else self.grad.unsqueeze(1)[:, :0]

    @property
    def weight_column(self) -> int | None:
        """Which column of J is the gradient itself."""
        return 0 if self.regularizer.log_weight.requires_grad else None

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """Localized: sup |phi'''| is taken over what each second difference can become inside the ball."""
        dq = second_differences(q)
        length_q, length = _length(dq), _length(self.unit / self.reciprocal)
        far, nu = ROW_NORM * per_sample(radius, length), self.smoothing
        low, high = (length - far).clamp_(min=0), length + far

        def largest(weights: Tensor, sweeps: int) -> Tensor:
            # |<(H(x) - H) q, u>| <= sum weights_i |Be|_i |Bu|_i <= lambda_max(B^T diag(weights) B) |e| |u|
            return self.weight * weighted_bound((weights * length_q).unsqueeze(0), sweeps)

        hessian = largest(self._third_derivative(torch.minimum(torch.maximum(nu / 2, low), high)), 2)
        components = []
        if self.regularizer.log_weight.requires_grad:
            components.append(norm(self.hvp(q)) + 0.5 * hessian * radius)
        if self.regularizer.log_smoothing.requires_grad:
            slope = self.weight * second_differences_adjoint(self._smoothing_curvature(dq))
            fourth = (6 * nu**2 / (low**2 + nu**2) ** 2).clamp(max=X2 / nu**2)
            remainder = largest(fourth, 1)  # multiplies a square of the radius: need not be sharp
            components.append(norm(slope) + 0.5 * remainder * radius)
        stacked = torch.stack(components, 1) if components else q.new_zeros((len(q), 0))
        return Directional(hessian, stacked.norm(dim=1), stacked)

    def _third_derivative(self, t: Tensor) -> Tensor:
        """sup of the norm of D^3 phi over vectors of length t; unimodal with its peak at nu / 2."""
        s2 = t * t + self.smoothing**2
        line = 3 * (self.smoothing**2 / s2) * (t * s2.rsqrt()) / s2  # no higher power: it would leave float32
        # a vector of length t >= nu/sqrt(2) has directions with a larger third derivative than its own
        return torch.where(t * t > 0.5 * self.smoothing**2, 2 / math.sqrt(3) / s2, line)

    def _local_lengths(self, radius: Tensor, mu: Tensor) -> tuple[Lengths, Tensor, Tensor]:
        """Lengths on the ball ||e||_H <= radius, and how far Be reaches there in all and across z."""
        length = _length(self.unit / self.reciprocal)
        radius, mu = (per_sample(t.to(length.dtype), length) for t in (radius, mu))
        floor = mu / squared_norm_bound(length.shape[-2], length.shape[-1])
        at = Lengths(length, length, length, self.weight, self.smoothing, floor)
        far, across = reach(at, radius, ROW_NORM * mu.rsqrt())
        return replace(at, low=(length - far).clamp(min=0), high=length + far), far, across

    @property
    def length_scale(self) -> float:
        return float(self.smoothing)

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        at, far, across = self._local_lengths(radius, strong_convexity)
        # Be stays parallel to itself while z_t = z + t Be turns: |Be x z_t| = |Be x z|
        change = relative_norm(at, far, across * at.length)
        return change.flatten(1).amax(1).double() / radius

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        at, far, _ = self._local_lengths(radius, strong_convexity)
        dq = second_differences(q)
        length_q = _length(dq)
        safe = at.length.clamp(min=torch.finfo(q.dtype).tiny)
        along = (self.unit * dq).sum(0).abs() / (safe * self.reciprocal).clamp(min=torch.finfo(q.dtype).tiny)
        across = (length_q**2 - along**2).clamp(min=0).sqrt()
        # z_t leaves the direction of z by an angle whose sine is at most |Be| / |z|
        along = torch.minimum(length_q, along + across * (far / safe).clamp(max=1))
        across = across * at.length + length_q * far  # |dq x z_t| <= |dq x z| + |dq| |Be|
        hessian = relative_norm(at, along, across).flatten(1).amax(1)
        energy = (dq * self._flattened(dq.clone()) * self.reciprocal).sum(0).flatten(1).sum(1)
        return change_along(hessian, self.weight * energy, self.regularizer.trainable(), q)

    def mixed_energy_norms(self) -> Tensor:
        """||B^T p||_{H^-1}^2 <= sum <p, (weight D^2 phi)^-1 p>: for log nu that is weight sum |z|^2 nu^2 / s^3, for the
        weight weight sum |z|^2 s / nu^2."""
        r, nu = self.reciprocal.double(), self.smoothing.double()
        length2 = self.unit.double().square().sum(0) / r**2
        trainable, terms = self.regularizer.trainable(), []
        if "log_weight" in trainable:
            terms.append(length2 / (r * nu**2))
        if "log_smoothing" in trainable:
            terms.append(length2 * nu**2 * r**3)
        sums = [(self.weight.double() * t.flatten(1).sum(1)).sqrt() * (1 + 1e-4) for t in terms]
        return torch.stack(sums, 1) if sums else r.new_zeros((len(r), 0))

    def hessian_diagonal(self) -> Tensor:
        """Diagonal of the Hessian, ``(B, C, H, W)``."""
        n = self.unit
        own = (1 - n * n) * self.scale
        cross = (-n[0] * n[1] * self.scale, -n[0] * n[2] * self.scale, -n[1] * n[2] * self.scale)
        return diagonal_of_square(own, cross)

    def subset(self, index: Tensor) -> Linearization:
        other = object.__new__(SecondOrderLinearization)
        other.regularizer, other.weight, other.smoothing = self.regularizer, self.weight, self.smoothing
        other.constants = self.constants.subset(index)
        other.reciprocal, other.scale, other.grad = (a[index] for a in (self.reciprocal, self.scale, self.grad))
        other.unit = self.unit[:, index]
        return other

    def newton_memory(self, *, cold: bool) -> Tensor:
        unit = self.unit.transpose(0, 1)
        return torch.zeros_like(unit) if cold else unit.clone()

    def newton_model(self, memory: Tensor) -> NewtonModel:
        return _PrimalDualModel(self, memory.transpose(0, 1))


class _PrimalDualModel(NewtonModel):
    """weight B^T (I - (u n^T + n u^T) / 2) B / s with a dual field |u| <= 1, as for total variation of first order
    (Chan, Golub & Mulet, 1999)."""

    def __init__(self, linearization: SecondOrderLinearization, dual: Tensor):
        self.at, self.dual, self.half = linearization, dual, 0.5 * dual

    def hvp(self, v: Tensor) -> Tensor:
        at, dv = self.at, second_differences(v)
        along_unit, along_half = (at.unit * dv).sum(0, keepdim=True), (self.half * dv).sum(0, keepdim=True)
        dv.addcmul_(self.half, along_unit, value=-1).addcmul_(at.unit, along_half, value=-1)
        return second_differences_adjoint(dv.mul_(at.scale))

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        at, dd = self.at, second_differences(d)
        along = (at.unit * dd).sum(0, keepdim=True)
        dual = dd.addcmul_(self.dual, along, value=-1).mul_(at.reciprocal).add_(at.unit)
        if not bool((step == 1).all()):
            dual = torch.lerp(self.dual, dual, step.reshape(1, -1, *([1] * (d.dim() - 1))))
        # |u| <= 1 keeps the model positive semidefinite
        return dual.div_(dual.square().sum(0, keepdim=True).sqrt_().clamp_(min=1)).transpose(0, 1)
