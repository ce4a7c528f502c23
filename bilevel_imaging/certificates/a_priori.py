"""A priori bounds: what a number of iterations guarantees before anything is run. Pure functions of constants.

Everywhere 0 < mu <= L bound the spectrum of the Hessian, kappa = L / mu, and k >= 0 counts iterations. ``mu`` and ``L``
are floats or ``(B,)`` tensors, ``k`` is an int or an integer tensor; all broadcast, and a tensor k gives float64.
Nothing here knows rounding: in floating point the bounds hold down to the rounding floor of the solver.

Three kinds of factors, each to be multiplied by a norm at the start:

- ``*_residual``: ||b - H q_k|| / ||b - H q_0|| for a linear system H q = b;
- ``*_error``: ||q_k - H^{-1} b|| / ||b|| for a linear system started at q_0 = 0;
- ``*_distance``: ||x_k - x*|| / ||x_0 - x*|| for a lower-level problem.

``hypergradient`` turns a distance and a residual into a bound of the hypergradient's error.
"""

from __future__ import annotations

import torch
from torch import Tensor

Real = float | Tensor


def gradient_descent_rate(mu: Real, L: Real) -> Real:
    """(L - mu) / (L + mu): gradient descent with its best constant step 2 / (L + mu).

    Raises:
        ValueError: unless 0 < mu <= L.
    """
    _check(mu, L)
    return (L - mu) / (L + mu)


def heavy_ball_rate(mu: Real, L: Real) -> Real:
    """(sqrt(L) - sqrt(mu)) / (sqrt(L) + sqrt(mu)): heavy ball with Polyak's constants, and conjugate gradients.

    Raises:
        ValueError: unless 0 < mu <= L.
    """
    _check(mu, L)
    return (L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)


def gradient_descent_residual(k: int | Tensor, mu: Real, L: Real) -> Real:
    """q^k, q = ``gradient_descent_rate``: the residual is (I - alpha H)^k times the first one, and no kappa enters."""
    return gradient_descent_rate(mu, L) ** _count(k)


def heavy_ball_residual(k: int | Tensor, mu: Real, L: Real) -> Real:
    """(1 + k (1 + q)) q^k, q = ``heavy_ball_rate``: a bound with its constant, attained at the eigenvalue L.

    The popular q^k alone is not a bound: at the eigenvalue mu the residual is (1 + k (1 - q)) q^k.

    Proof. Along an eigenvector of lambda in [mu, L] the residuals obey e_{k+1} = (1 + q^2 - alpha lambda) e_k -
    q^2 e_{k-1} with e_{-1} = e_0, and 1 + q^2 - alpha lambda = 2 q c, where c runs from 1 at mu to -1 at L. So the
    e_k / q^k obey the recursion of the Chebyshev polynomials of the second kind, e_k = q^k (U_k(c) - q U_{k-1}(c)) e_0,
    and |U_k| <= k + 1 on [-1, 1], with U_k(1) = k + 1 and U_k(-1) = (-1)^k (k + 1).
    """
    q, k = heavy_ball_rate(mu, L), _count(k)
    return (1 + k * (1 + q)) * q**k


def chebyshev_residual(k: int | Tensor, mu: Real, L: Real) -> Real:
    """2 q^k / (1 + q^{2k}), q = ``heavy_ball_rate``: Chebyshev semi-iteration (Golub & Varga 1961), and MINRES.

    No polynomial of degree k with value 1 at 0 is smaller than that on all of [mu, L], and MINRES finds the polynomial
    with the smallest residual.
    """
    power = heavy_ball_rate(mu, L) ** _count(k)
    return 2 * power / (1 + power**2)


def conjugate_gradient_residual(k: int | Tensor, mu: Real, L: Real) -> Real:
    """sqrt(kappa) * ``chebyshev_residual`` (at most 2 sqrt(kappa) q^k), and 1 at k = 0.

    The error is the smallest in the norm of H among all polynomials, ||q_k - p||_H <= chebyshev_residual ||q_0 - p||_H,
    and ||r|| <= sqrt(L) ||q - p||_H, ||q_0 - p||_H <= ||r_0|| / sqrt(mu). The residual itself may grow at first, so the
    factor sqrt(kappa) can't be dropped.
    """
    bound = chebyshev_residual(k, mu, L) * (L / mu) ** 0.5
    if isinstance(k, Tensor):
        return torch.where(k == 0, torch.ones_like(bound), bound)
    return bound if k > 0 else bound * 0 + 1


def conjugate_gradient_error(k: int | Tensor, mu: Real, L: Real) -> Real:
    """``chebyshev_residual`` / mu (at most 2 q^k / mu) bounds ||q_k - p|| / ||b|| for H p = b and q_0 = 0.

    From ||q_k - p||_H <= chebyshev_residual ||p||_H with ||q_k - p|| <= ||q_k - p||_H / sqrt(mu) and
    ||p||_H <= ||b|| / sqrt(mu). Times mu it may take the place of a residual bound in ``hypergradient``, which uses the
    residual only to bound ||q_k - p|| by residual / mu; it is smaller than ``conjugate_gradient_residual`` by
    sqrt(kappa) for k > 0.
    """
    return chebyshev_residual(k, mu, L) / mu


def accelerated_gradient_residual(k: int | Tensor, mu: Real, L: Real, *, momentum: str = "varying") -> Real:
    """Nesterov's method with step 1 / L, s = sqrt(mu / L).

    "varying": the same as ``accelerated_gradient_distance``, because residual and error are the same polynomial of H
    times their first value. "constant": (1 + k s) (1 - s)^k, attained at the eigenvalue mu.

    Proof of the latter. Along an eigenvector of lambda in [mu, L], with c^2 = (1 - lambda / L) / (1 - s^2) in [0, 1],
    the residuals are e_k = (1 - s)^k c^k (U_k(c) - (1 - s) c U_{k-1}(c)) e_0 with Chebyshev polynomials of the second
    kind, and U_k(c) = c U_{k-1}(c) + T_k(c), so the last factor is T_k(c) + s c U_{k-1}(c), at most 1 + k s.

    Raises:
        ValueError: unless 0 < mu <= L, and for another momentum.
    """
    if momentum != "constant":
        return accelerated_gradient_distance(k, mu, L, momentum=momentum)
    _check(mu, L, momentum)
    root, k = (mu / L) ** 0.5, _count(k)
    return (1 + k * root) * (1 - root) ** k


def gradient_descent_distance(k: int | Tensor, mu: Real, L: Real) -> Real:
    """q^k, q = ``gradient_descent_rate``, on every mu-strongly convex, L-smooth energy (Nesterov 2018, Thm 2.1.15)."""
    return gradient_descent_rate(mu, L) ** _count(k)


def heavy_ball_distance(k: int | Tensor, mu: Real, L: Real) -> Real:
    """(1 + k (1 + q)) q^k, q = ``heavy_ball_rate``, on quadratic energies only: there the error obeys the recursion of
    ``heavy_ball_residual``. On other energies the method may cycle (Lessard, Recht & Packard 2016, Section 4.6)."""
    return heavy_ball_residual(k, mu, L)


def accelerated_gradient_distance(k: int | Tensor, mu: Real, L: Real, *, momentum: str = "varying") -> Real:
    """Nesterov's method with step 1 / L, s = sqrt(mu / L), on every mu-strongly convex, L-smooth energy.

    "varying" (strongly convex FISTA): sqrt(kappa min((1 + s) (1 - s)^k, 4 / (k + 1)^2)) from Chambolle & Pock (2016),
    Theorem 4.10 and Algorithm 5. "constant": sqrt((kappa + 1) (1 - s)^k) from Nesterov (2018), Section 2.2.1,
    g(x_k) - g(x*) <= (1 - s)^k (g(x_0) - g(x*) + mu / 2 ||x_0 - x*||^2). Both use that g grows at least like
    mu / 2 ||x - x*||^2 and at most like L / 2 ||x - x*||^2.

    These are the x_k. ``AcceleratedGradient`` measures the points z_k = x_k + momentum (x_k - x_{k-1}) with a momentum
    in [0, 1): their distance is at most 3 times the bound for k - 1.

    Raises:
        ValueError: unless 0 < mu <= L, and for another momentum.
    """
    _check(mu, L, momentum)
    root, k = (mu / L) ** 0.5, _count(k)
    if momentum == "constant":
        return ((L / mu + 1) * (1 - root) ** k) ** 0.5
    linear, sublinear = (1 + root) * (1 - root) ** k, 4 / (k + 1) ** 2
    if isinstance(linear, Tensor):
        smaller = torch.minimum(linear, torch.as_tensor(sublinear, dtype=linear.dtype, device=linear.device))
    else:
        smaller = min(linear, sublinear)
    return (L / mu * smaller) ** 0.5


def hypergradient(
    distance: Real,
    residual: Real,
    *,
    strong_convexity: Real,
    mixed_norm: Real,
    loss_grad_norm: Real,
    loss_smoothness: Real,
    mixed_lipschitz: Real = 0.0,
    hessian_lipschitz: Real = 0.0,
) -> Real:
    """The a priori bound of Ehrhardt & Roberts (2023), with the Lipschitz constant L_H / mu^2 of the inverse Hessian:

    ||h - grad F|| <= ||J|| residual / mu + L_J residual distance / mu + L_J L_f distance^2 / mu
                      + (L_J ||grad f|| / mu + L_f ||J|| / mu + L_H ||J|| ||grad f|| / mu^2) distance.

    It holds for distances and residuals of any size. The norms are those at the exact minimizer, which is what tells it
    from the a posteriori bound ``classical``.

    Args:
        distance: bound of ||x_eps - x*||.
        residual: bound of ||grad f(x_eps) - H_eps q||. After k iterations from q = 0 it is one of the factors
            ``*_residual`` times ||grad f(x_eps)|| <= loss_grad_norm + loss_smoothness * distance.
        strong_convexity: mu.
        mixed_norm: ||J(x*)||.
        loss_grad_norm: ||grad f(x*)||.
        loss_smoothness: L_f, Lipschitz constant of the gradient of the upper-level loss.
        mixed_lipschitz: L_J.
        hessian_lipschitz: L_H.
    """
    mu = strong_convexity
    slope = mixed_lipschitz * loss_grad_norm / mu + loss_smoothness * mixed_norm / mu
    slope = slope + hessian_lipschitz * mixed_norm * loss_grad_norm / mu**2
    linear = (mixed_norm + mixed_lipschitz * distance) * residual / mu
    return linear + slope * distance + mixed_lipschitz * loss_smoothness / mu * distance**2


def _count(k: int | Tensor) -> int | Tensor:
    """The exponent; an integer tensor would make a power of a float a float32."""
    return k.double() if isinstance(k, Tensor) else k


def _check(mu: Real, L: Real, momentum: str = "varying") -> None:
    if not bool(torch.as_tensor((mu > 0) & (mu <= L)).all()):
        raise ValueError(f"Expected 0 < mu <= L. Got mu={mu}, L={L}; mu is the strong convexity, L the smoothness.")
    if momentum not in ("varying", "constant"):
        raise ValueError(f'Expected momentum "varying" or "constant". Got {momentum!r}.')
