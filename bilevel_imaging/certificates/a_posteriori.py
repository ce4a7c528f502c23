"""A posteriori bounds: measured residuals and true constants to distances. Pure functions of ``(B,)`` float64 tensors.

Notation (Ehrhardt & Roberts 2023): x_eps computed point, x* minimizer, G = ||grad_x g(x_eps)||, q any adjoint
vector, R = ||grad f(x_eps) - H_eps q|| its true residual, h = -J_eps^T q the hypergradient, mu strong convexity,
distance = a bound of ||x_eps - x*||. All bounds hold for every x_eps and every q, converged or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bound:
    """||h - grad F|| <= lower + linear + remainder, sample by sample ``(B,)``.

    Attributes:
        lower: first order in the lower-level error.
        linear: due to the adjoint residual alone.
        remainder: products of the two and second order.
    """

    lower: Tensor
    linear: Tensor
    remainder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, ``(B,)``."""
        return self.lower + self.linear + self.remainder

    def without_nan(self) -> Bound:
        """The same with inf in place of NaN, which is what an infinite constant times 0 gives."""
        return Bound(
            *(p.nan_to_num(nan=torch.inf, posinf=torch.inf) for p in (self.lower, self.linear, self.remainder))
        )


@dataclass(frozen=True)
class Measurements:
    """What is measured at (x_eps, q), each ``(B,)`` float64.

    Attributes:
        distance: bound of ||x_eps - x*||.
        residual_norm: R.
        strong_convexity: mu.
        mixed_norm: ||J_eps||.
        mixed_lipschitz: L_J.
        loss_smoothness: L_f, Lipschitz constant of the gradient of the upper-level loss.
    """

    distance: Tensor
    residual_norm: Tensor
    strong_convexity: Tensor
    mixed_norm: Tensor
    mixed_lipschitz: Tensor
    loss_smoothness: Tensor


def distance(grad_norm: Tensor, strong_convexity: Tensor) -> Tensor:
    """||x_eps - x*|| <= G / mu, for a mu-strongly convex differentiable energy (Nesterov 2018, Section 2.1.3)."""
    return grad_norm / strong_convexity


def classical(m: Measurements, loss_grad_norm: Tensor, hessian_lipschitz: Tensor) -> Bound:
    """The bound of Ehrhardt & Roberts (2023), with the Lipschitz constant L_H / mu^2 of the inverse Hessian.

    ||h - grad F|| <= ||J|| R / mu + c distance + L_J L_f / mu distance^2,
    c = L_f ||J|| / mu + L_J ||grad f|| / mu + L_H ||grad f|| ||J|| / mu^2.

    Args:
        m: measurements.
        loss_grad_norm: ||grad f(x_eps)||, ``(B,)``.
        hessian_lipschitz: global L_H, ``(B,)``.
    """
    mu = m.strong_convexity
    slope = (m.loss_smoothness * m.mixed_norm + m.mixed_lipschitz * loss_grad_norm) / mu
    slope = slope + hessian_lipschitz * loss_grad_norm * m.mixed_norm / mu**2
    return Bound(
        lower=slope * m.distance,
        linear=m.mixed_norm * m.residual_norm / mu,
        remainder=m.mixed_lipschitz * m.loss_smoothness / mu * m.distance**2,
    )


def directional(m: Measurements, hessian: Tensor, mixed: Tensor) -> Bound:
    """The bound with constants along q: rho = (R + (L_f + Lambda_H(q)) distance) / mu bounds ||q - q*||, and

    ||h - grad F|| <= (||J|| + L_J distance) rho + Lambda_J(q) distance.

    Proof: H*(q* - q) = (grad f* - grad f) + r + (H_eps - H*) q; h - grad F = J*^T (q* - q) + (J* - J_eps)^T q.

    Args:
        m: measurements; ``mixed_norm`` may be that of one column, the result is then the bound of that component.
        hessian: Lambda_H(q) on the ball of radius ``distance``, ``(B,)``.
        mixed: Lambda_J(q) there, ``(B,)``.
    """
    mu = m.strong_convexity
    from_lower = (m.loss_smoothness + hessian) * m.distance / mu
    from_linear = m.residual_norm / mu
    return Bound(
        lower=m.mixed_norm * from_lower + mixed * m.distance,
        linear=m.mixed_norm * from_linear,
        remainder=m.mixed_lipschitz * m.distance * (from_lower + from_linear),
    )


def metric(
    m: Measurements,
    grad_norm: Tensor,
    residual_norm: Tensor,
    mixed_norm: Tensor,
    strong_convexity: Tensor,
    hessian: Tensor,
    mixed: Tensor,
) -> Bound:
    """The directional bound in the norm of a matrix M that lies below every Hessian (for example A^T A + ridge I).

    rho_M = R_M + (L_f + Lambda_H(q)) / lambda_min(M) * distance_M,
    ||h - grad F|| <= (j_M + L_J distance_M / lambda_min(M)) rho_M + Lambda_J(q) distance_M / sqrt(lambda_min(M)).

    Args:
        m: measurements (its L_f and L_J are used).
        grad_norm: distance_M = ||grad_x g||_{M^{-1}} >= ||x_eps - x*||_M.
        residual_norm: R_M = ||r||_{M^{-1}}.
        mixed_norm: j_M = ||M^{-1/2} J_eps||.
        strong_convexity: lambda_min(M).
        hessian: Lambda_H(q) on the ball.
        mixed: Lambda_J(q) on the ball.
    """
    mu = strong_convexity
    from_lower = (m.loss_smoothness + hessian) / mu * grad_norm
    return Bound(
        lower=mixed_norm * from_lower + mixed * grad_norm / mu.sqrt(),
        linear=mixed_norm * residual_norm,
        remainder=m.mixed_lipschitz / mu * grad_norm * (from_lower + residual_norm),
    )


def corrected_value_interval(
    corrected: Tensor, distance: Tensor, residual_norm: Tensor, loss_smoothness: Tensor, hessian: Tensor, convex: bool
) -> tuple[Tensor, Tensor]:
    """Interval of f(x*) around the corrected value f(x_eps) - <q, grad_x g(x_eps)>; any q, ``(B,)`` each.

    |F - F_c| <= (L_f + Lambda_H(q)) / 2 * distance^2 + R * distance; for convex f the L_f term is absent below.
    With q = 0 it is the sandwich of MAID (Salehi et al. 2023, Lemma 3.5), then R = ||grad f||, Lambda_H = 0.
    """
    common = 0.5 * hessian * distance**2 + residual_norm * distance
    curvature = 0.5 * loss_smoothness * distance**2
    return corrected - common - (0 if convex else curvature), corrected + common + curvature
