"""Symmetric rank-one models of the Hessian from hypergradients with error bounds, and their trust-region steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.upper_level.quasi_newton import TYPICAL

# an update whose denominator is smaller than this part of what it could be is skipped (Nocedal & Wright 2006, (6.26))
SMALLEST_DENOMINATOR = 1e-8


class RankOneHessian:
    """B with B s = z for the last pairs s = change of theta, z = change of the hypergradient; indefinite where F is.

    SR1 with limited memory: B = gamma I + sum_j v_j v_j^T / <v_j, s_j>, in float64 on the CPU. On a quadratic F, n
    pairs of independent s give the Hessian itself, whatever the steps were.

    Args:
        memory: pairs kept.
    """

    def __init__(self, memory: int):
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, s: Tensor, z: Tensor, noise: float) -> bool:
        """Add a pair unless B knows it to within what is typical of ``noise``, a bound of the error of z."""
        surprise = float((z - self.build()(s)).norm()) if self.pairs else float("inf")
        usable = bool(torch.isfinite(z).all()) and float(s.norm()) > 0 and float(z.norm()) > 0
        if not usable or surprise <= TYPICAL * noise:
            return False
        self.pairs = [*self.pairs, (s, z)][-self.memory :]
        return True

    def build(self) -> Callable[[Tensor], Tensor]:
        """The product v -> B v; B = 0 while nothing is known, so that the first step goes to the boundary."""
        if not self.pairs:
            return torch.zeros_like
        s, z = self.pairs[-1]
        gamma = float((s @ z).abs() / (s @ s))
        updates: list[tuple[Tensor, float]] = []

        def product(v: Tensor) -> Tensor:
            result = gamma * v
            for direction, weight in updates:
                result = result + weight * (direction @ v) * direction
            return result

        for s, z in self.pairs:
            v = z - product(s)
            denominator = float(v @ s)
            if abs(denominator) > SMALLEST_DENOMINATOR * float(v.norm() * s.norm()):
                updates.append((v, 1 / denominator))
        return product

    def state_dict(self) -> dict[str, Any]:
        """The pairs."""
        return {"pairs": [[s, z] for s, z in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the pairs."""
        self.pairs = [(s.clone(), z.clone()) for s, z in state["pairs"]]


def trust_region_step(product: Callable[[Tensor], Tensor], g: Tensor, radius: float) -> tuple[Tensor, float]:
    """Approximate minimizer s of <g, s> + 1/2 <s, B s> over ||s|| <= radius, and the decrease of the model.

    Truncated conjugate gradients (Steihaug 1983): at least the decrease of the best step along -g.

    Args:
        product: v -> B v, B symmetric.
        g: gradient, ``(n,)``, not 0.
        radius: > 0.
    """
    s, bs = torch.zeros_like(g), torch.zeros_like(g)
    r, d = g.clone(), -g
    for _ in range(2 * len(g)):
        bd = product(d)
        curvature, rr = float(d @ bd), float(r @ r)
        a = rr / curvature if curvature > 0 else float("inf")
        if curvature <= 0 or float((s + a * d).norm()) >= radius:
            a = _to_boundary(s, d, radius)
            s, bs = s + a * d, bs + a * bd
            break
        s, bs, r = s + a * d, bs + a * bd, r + a * bd
        if float(r.norm()) <= 1e-12 * float(g.norm()):
            break
        d = -r + float(r @ r) / rr * d
    return s, -float(g @ s) - 0.5 * float(s @ bs)


def _to_boundary(s: Tensor, d: Tensor, radius: float) -> float:
    """Positive root a of ||s + a d|| = radius."""
    dd, sd, room = float(d @ d), float(s @ d), max(radius**2 - float(s @ s), 0.0)
    return room / (sd + (sd**2 + dd * room) ** 0.5) if room > 0 else 0.0
