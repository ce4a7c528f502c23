"""Bounds in the norm of the Hessian at the computed point, for energies whose Hessian changes slowly relative to
itself.

Write ||v||_H^2 = <v, H_eps v> and ||v||_{H^-1} for its dual. If |D^3 g[e, v, v]| <= K ||e||_H <v, H v> along the
segment to x* (self-concordance; smoothed total variation has it), then with kappa = K ||e||_H the Hessians on the
segment lie between exp(-kappa) H_eps and exp(kappa) H_eps. No constant in these bounds is divided by mu, so they stay
sharp where mu is tiny.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.certificates.a_posteriori import Bound

# the first guess of the energy distance is this multiple of ||G||_{H^-1}; it must reproduce itself
TRIAL_FACTOR = 2.0


def _growth(kappa: Tensor) -> Tensor:
    """kappa / (1 - exp(-kappa)), 1 at 0."""
    safe = torch.where(kappa > 1e-8, kappa, 1.0)
    return torch.where(kappa > 1e-8, safe / -torch.expm1(-safe), 1 + kappa)


def _mean_growth(kappa: Tensor) -> Tensor:
    """(exp(kappa) - 1) / kappa, 1 at 0: the mean of exp(kappa t) over 0 <= t <= 1."""
    safe = torch.where(kappa > 1e-8, kappa, 1.0)
    return torch.where(kappa > 1e-8, torch.expm1(safe) / safe, 1 + kappa)


def energy_distance(dual_grad_norm: Tensor, curvature: Tensor) -> Tensor:
    """Bound E of ||x_eps - x*||_H, ``(B,)``; inf where the test fails.

    Args:
        dual_grad_norm: ||G||_{H^-1} or more, ``(B,)``.
        curvature: K valid for ||e||_H <= ``TRIAL_FACTOR`` * dual_grad_norm, ``(B,)``.

    Proof: e = -Hbar^{-1} G with Hbar >= H (1 - exp(-kappa)) / kappa gives ||e||_H <= ||G||_{H^-1} growth(K ||e||_H).
    Along the homotopy g - (1 - t) <G, x> the left side starts at 0 and moves continuously, and it can't cross a radius
    E with ||G||_{H^-1} growth(K E) <= E before t = 1.
    """
    radius = TRIAL_FACTOR * dual_grad_norm
    holds = _growth(curvature * radius) <= TRIAL_FACTOR
    for _ in range(4):
        radius = torch.minimum(radius, dual_grad_norm * _growth(curvature * radius))
    return torch.where(holds, radius, torch.inf)


@dataclass(frozen=True)
class LocalMeasurements:
    """What is measured at (x_eps, q); ``(B,)`` float64 unless said otherwise.

    Attributes:
        distance: E >= ||x_eps - x*||_H.
        curvature: K on that ball.
        residual_norm: R_H >= ||grad f - H q||_{H^-1}.
        mixed_norms: ||J_j||_{H^-1}, ``(B, n)``.
        slopes: constants of DJ_j, ``(n,)`` or ``(B, n)``.
        hessian: constant of D^3 g[q].
        adjoint_energy: ||q||_R, R the part of H that depends on theta.
        adjoint_norm: ||q||_H.
        loss_smoothness: L_f.
        strong_convexity: mu.
    """

    distance: Tensor
    curvature: Tensor
    residual_norm: Tensor
    mixed_norms: Tensor
    slopes: Tensor
    hessian: Tensor
    adjoint_energy: Tensor
    adjoint_norm: Tensor
    loss_smoothness: Tensor
    strong_convexity: Tensor

    @property
    def valid(self) -> Tensor:
        """Where the local test holds, ``(B,)``."""
        return self.distance.isfinite() & self.curvature.isfinite()

    def restricted(self, valid: Tensor) -> tuple[LocalMeasurements, Tensor]:
        """The same with harmless numbers elsewhere, and kappa = K E."""
        distance, curvature = torch.where(valid, self.distance, 0.0), torch.where(valid, self.curvature, 0.0)
        hessian = torch.where(valid, self.hessian, 0.0)
        return replace(self, distance=distance, curvature=curvature, hessian=hessian), curvature * distance


def local(m: LocalMeasurements) -> tuple[Bound, Tensor]:
    """The directional bound of Ehrhardt & Roberts (2023) in the norm of H_eps: its parts, and every component ``(B,
    n)``.

    With c = q* - q: H* c = (grad f* - grad f) + r - (H* - H_eps) q, hence
    ||c||_H <= C := exp(kappa) (R_H + (L_f / mu + Lambda_H(q) growth) E), and component j of the error is
    <J_j, c> + <J_j* - J_j, q> + <J_j* - J_j, c>
    <= ||J_j||_{H^-1} C + slope_j E (exp(kappa / 2) (||q||_R^2 + (exp(kappa) - 1) ||q||_H^2)^{1/2} + exp(kappa) C).
    """
    valid = m.valid
    m, kappa = m.restricted(valid)
    factor = kappa.exp()
    first = (m.loss_smoothness / m.strong_convexity + m.hessian) * m.distance
    adjoint = factor * (
        m.residual_norm + (m.loss_smoothness / m.strong_convexity + m.hessian * _mean_growth(kappa)) * m.distance
    )
    energy = factor.sqrt() * (m.adjoint_energy**2 + torch.expm1(kappa) * m.adjoint_norm**2).sqrt()
    moved = m.slopes * m.distance.unsqueeze(1)
    components = m.mixed_norms * adjoint.unsqueeze(1) + moved * (energy + factor * adjoint).unsqueeze(1)
    components = torch.where(valid.unsqueeze(1), components, torch.inf)
    total = components.norm(dim=1)
    lower = (m.mixed_norms * first.unsqueeze(1) + moved * m.adjoint_energy.unsqueeze(1)).norm(dim=1)
    linear = m.mixed_norms.norm(dim=1) * m.residual_norm
    # the norm of a sum is less than the sum of the norms: shares of the total
    scale = (total / (lower + linear).clamp(min=1e-300)).clamp(max=1.0)
    lower, linear = torch.where(valid, scale * lower, torch.inf), torch.where(valid, scale * linear, torch.inf)
    return Bound(lower, linear, torch.where(valid, (total - lower - linear).clamp(min=0), torch.inf)), components


def local_value_interval(m: LocalMeasurements, corrected: Tensor, convex: bool) -> tuple[Tensor, Tensor]:
    """Interval of f(x*) around f(x_eps) - <q, G>, ``(B,)`` each, with the norms of H_eps.

    |F - F_c| <= R_H E + (L_f / mu + Lambda_H(q) growth) E^2 / 2, growth = 2 (exp(kappa) - 1 - kappa) / kappa^2; for
    convex f the L_f term is absent below.
    """
    valid = m.valid
    m, kappa = m.restricted(valid)
    safe = torch.where(kappa > 1e-4, kappa, 1.0)
    growth = torch.where(kappa > 1e-4, 2 * (torch.expm1(safe) - safe) / safe**2, 1 + kappa)
    common = m.residual_norm * m.distance + 0.5 * m.hessian * growth * m.distance**2
    smooth = 0.5 * m.loss_smoothness / m.strong_convexity * m.distance**2
    lower, upper = corrected - common - (0 if convex else smooth), corrected + common + smooth
    return torch.where(valid, lower, -torch.inf), torch.where(valid, upper, torch.inf)
