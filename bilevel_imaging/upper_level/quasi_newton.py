"""Limited-memory BFGS in the parameters, from hypergradients with known error bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.tensors import entries

# typical errors are this part of their worst-case bounds
TYPICAL = 0.01
# the curvature at the end of a step is trusted to be so many times the mean one, at most
LARGEST_RATIO = 3.0


class InverseHessian:
    """Two-loop L-BFGS (Nocedal 1980) from noisy gradients, in float64 on the CPU.

    A pair (s, z) with z = h(theta + s) - h(theta) is kept only if <s, z> exceeds a hundredth of noise * ||s||, where
    ``noise`` bounds the error of z: worst-case bounds are that much larger than typical errors, and what a wrong pair
    costs is work, not correctness (steps are accepted by certified values only).

    Args:
        memory: pairs kept.
    """

    def __init__(self, memory: int = 10):
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, s: Tensor, z: Tensor, noise: float) -> bool:
        """Add a pair; returns whether it was trusted."""
        if not float(s @ z) > max(TYPICAL * noise * float(s.norm()), 1e-12 * float(s.norm() * z.norm())):
            return False
        self.pairs = [*self.pairs, (s, z)][-self.memory :]
        return True

    def apply(self, h: Tensor) -> Tensor:
        """P h, with P positive definite; h itself while no curvature is known."""
        if not self.pairs:
            return h.clone()
        q, coefficients = h.clone(), []
        for s, z in reversed(self.pairs):
            a = (s @ q) / (s @ z)
            coefficients.append(a)
            q = q - a * z
        s, z = self.pairs[-1]
        q = q * (s @ z) / (z @ z)
        for (s, z), a in zip(self.pairs, reversed(coefficients), strict=True):
            q = q + s * (a - (z @ q) / (s @ z))
        return q

    def reset(self) -> None:
        """Forget all curvature."""
        self.pairs = []

    def state_dict(self) -> dict[str, Any]:
        """The pairs."""
        return {"pairs": [[s, z] for s, z in self.pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the pairs."""
        self.pairs = [(s.clone(), z.clone()) for s, z in state["pairs"]]


def curvature_at_end(s: Tensor, z: Tensor, rise: float, slopes: float, noise: float) -> Tensor:
    """z changed along s so that <s, z> is the curvature where the step s ended, not the mean of the curvatures on it.

    The cubic through values and slopes at both ends has the second derivative <s, z> - 6 rise + 3 slopes there: the
    modified secant equation of Zhang, Deng & Chen (1999). Of a positive mean curvature it is between a third and three
    times.

    Args:
        s: change of the parameters, ``(n,)``, not 0.
        z: change of the hypergradient, ``(n,)``.
        rise: change of the loss.
        slopes: <s, h> at the beginning plus <s, h> at the end.
        noise: bound of the error of ``rise``; z itself is returned where typical errors would matter.
    """
    mean = float(s @ z)
    end = mean - 6 * rise + 3 * slopes
    if not 6 * TYPICAL * noise <= 0.1 * abs(end - mean):
        return z
    if mean > 0:
        end = min(max(end, mean / LARGEST_RATIO), LARGEST_RATIO * mean)
    return z + (end - mean) / float(s @ s) * s


def flatten(values: dict[str, Tensor]) -> Tensor:
    """All entries in one float64 vector on the CPU, in the order of the dict."""
    return entries(values).cpu()


def assign(theta: dict[str, Tensor], flat: Tensor) -> None:
    """Write a flat vector back into the parameters, in place."""
    offset = 0
    with torch.no_grad():
        for tensor in theta.values():
            piece = flat[offset : offset + tensor.numel()]
            tensor.copy_(piece.reshape(tensor.shape).to(tensor.dtype).to(tensor.device))
            offset += tensor.numel()
