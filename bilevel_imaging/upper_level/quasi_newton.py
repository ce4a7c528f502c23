"""Limited-memory BFGS in the parameters, from hypergradients with known error bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.tensors import entries


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
        if not float(s @ z) > max(0.01 * noise * float(s.norm()), 1e-12 * float(s.norm() * z.norm())):
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
