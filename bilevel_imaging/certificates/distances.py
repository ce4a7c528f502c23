"""Sharper bounds of ||x - x*|| than G / mu, from one Newton system H s = -G solved to a residual r = -G - H s.

Pure functions of ``(B,)`` float64 tensors; G = grad g(x), H the Hessian at x, e = x* - x. Each holds for every s.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kantorovich_radius(step_norm: Tensor, residual_norm: Tensor, strong_convexity: Tensor) -> Tensor:
    """2 eta with eta = ||s|| + ||r|| / mu >= ||H^{-1} G||: the ball on which ``kantorovich`` needs its L_H."""
    return 2 * (step_norm + residual_norm / strong_convexity)


def kantorovich(
    step_norm: Tensor, residual_norm: Tensor, strong_convexity: Tensor, hessian_lipschitz: Tensor
) -> Tensor:
    """||e|| <= t = (mu / L_H) (1 - sqrt(1 - 2 h)) if h = L_H eta / mu <= 1/2, eta = ||s|| + ||r|| / mu; else inf.

    t lies between eta and 2 eta (Kantorovich & Akilov 1982, Chapter XVIII; here for minimizers). Proof: H e = -G - T
    with ||T|| <= L_H ||e||^2 / 2 keeps ||e|| out of the interval between both roots of t = eta + L_H t^2 / (2 mu).
    Along g - (1 - tau) <G, .>, 0 <= tau <= 1, the minimizer moves continuously from x to x*, and so can't cross it.

    Args:
        step_norm: ||s||.
        residual_norm: ||r||, or sqrt(mu) ||r||_{H^-1}, which is less; rounding of G and of H s included.
        strong_convexity: mu.
        hessian_lipschitz: L_H on the ball of ``kantorovich_radius`` around x; inf where it has none.
    """
    eta = 0.5 * kantorovich_radius(step_norm, residual_norm, strong_convexity)
    h = hessian_lipschitz * eta / strong_convexity
    # the smaller root, written without the cancellation of 1 - sqrt(1 - 2 h)
    root = 2 * eta / (1 + (1 - 2 * h).clamp(min=0).sqrt())
    return torch.where(h <= 0.5, root, torch.inf)


def dual_gradient_norm(decrement: Tensor, step_residual: Tensor, residual_dual_norm: Tensor) -> Tensor:
    """||G||_{H^-1} from an inexact Newton step: G = -H s - r gives, for any s,

    ||G||_{H^-1}^2 = -<s, G> + <s, r> + ||r||_{H^-1}^2.

    Args:
        decrement: -<s, G>.
        step_residual: <s, r>, or more (0 in exact conjugate gradients).
        residual_dual_norm: ||r||_{H^-1}, or more.
    """
    return (decrement + step_residual + residual_dual_norm**2).clamp(min=0).sqrt()


def local_distance(
    energy_distance: Tensor,
    curvature: Tensor,
    step_norm: Tensor,
    residual_dual_norm: Tensor,
    strong_convexity: Tensor,
) -> Tensor:
    """||e|| from a bound E of ||e||_H: the smaller of E / sqrt(mu) and

    ||s|| + (||r||_{H^-1} + ((exp(kappa) - 1) / kappa - 1) E) / sqrt(mu),  kappa = K E,

    which tends to ||s|| near the minimizer. Proof: H (e - s) = r - (Hbar - H) e with Hbar the mean Hessian on the
    segment, |Hbar - H| <= ((exp(kappa) - 1) / kappa - 1) H by self-concordance, and ||v|| <= ||v||_H / sqrt(mu).

    Args:
        energy_distance: E, from ``energy_distance``; inf where that fails.
        curvature: K on that ball.
        step_norm: ||s||.
        residual_dual_norm: ||r||_{H^-1}.
        strong_convexity: mu.
    """
    valid = energy_distance.isfinite() & curvature.isfinite()
    energy = torch.where(valid, energy_distance, 0.0)
    kappa = torch.where(valid, curvature, 0.0) * energy
    beyond = residual_dual_norm + _mean_excess(kappa) * energy
    root = strong_convexity.sqrt()
    return torch.where(valid, torch.minimum(energy / root, step_norm + beyond / root), torch.inf)


def _mean_excess(kappa: Tensor) -> Tensor:
    """(exp(kappa) - 1) / kappa - 1, from above: kappa / 2 + kappa^2 / 6 + ... <= kappa / 2 (1 + kappa) near 0."""
    safe = torch.where(kappa > 1e-3, kappa, 1.0)
    return torch.where(kappa > 1e-3, (torch.expm1(safe) - safe) / safe * (1 + 1e-12), 0.5 * kappa * (1 + kappa))
