"""Momentum of Nesterov's method for strongly convex functions: one source for lower-level and linear solvers."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Real = TypeVar("Real", float, Tensor)

MOMENTA = ("varying", "constant")


def momentum_step(t: Real, q: Real) -> tuple[Real, Real]:
    """One step t_k -> (t_{k+1}, momentum_k) of the recursion, q = mu / L in [0, 1] (Chambolle & Pock 2016, Alg. 5).

    t_{k+1} = (1 - q t_k^2 + sqrt((1 - q t_k^2)^2 + 4 t_k^2)) / 2 and
    momentum_k = (t_k - 1) (1 - q t_{k+1}) / (t_{k+1} (1 - q)), from t_0 = 0. Use it to list a schedule in linear time.
    """
    a = 1 - q * t * t
    t_next = (a + (a * a + 4 * t * t) ** 0.5) / 2
    # the tiny number makes 0 / 0 at q = 1 a zero momentum and is lost in rounding otherwise
    return t_next, (t - 1) * (1 - q * t_next) / (t_next * (1 - q + 1e-30))


def constant_momentum(q: Real) -> Real:
    """(1 - sqrt(q)) / (1 + sqrt(q)), q = mu / L in [0, 1]: the limit of the above (Nesterov 2018, Section 2.2.1)."""
    root = q**0.5
    return (1 - root) / (1 + root)


def check_momentum(momentum: str) -> str:
    """The name itself.

    Raises:
        ValueError: if it is not one of ``MOMENTA``.
    """
    if momentum not in MOMENTA:
        raise ValueError(f"Expected momentum as one of {list(MOMENTA)}. Got {momentum!r}.")
    return momentum
