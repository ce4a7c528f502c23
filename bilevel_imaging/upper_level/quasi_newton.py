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
# decay of the mean squares of hypergradients, and the part of the largest root that is added to all of them
DECAY, DAMPING = 0.9, 3e-2


class InverseHessian:
    """Two-loop L-BFGS (Nocedal 1980) from noisy gradients, in float64 on the CPU.

    A pair (s, z) with z = h(theta + s) - h(theta) is kept only if <s, z> exceeds a hundredth of noise * ||s||, where
    ``noise`` bounds the error of z: worst-case bounds are that much larger than typical errors, and what a wrong pair
    costs is work, not correctness (steps are accepted by certified values only).

    Where no pair tells the curvature, parameters move in proportion to h over the root of its mean square (RMSProp,
    Tieleman & Hinton 2012): those of filters and of smoothings differ in sensitivity by orders of magnitude.

    Args:
        memory: pairs kept.
    """

    def __init__(self, memory: int = 10):
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.squares: Tensor | None = None  # running mean of h^2, of which this part has come together so far:
        self.weight = 0.0

    def observe(self, h: Tensor) -> None:
        """Take in the size of every entry of a hypergradient."""
        before = torch.zeros_like(h) if self.squares is None else self.squares
        self.squares = DECAY * before + (1 - DECAY) * h.square()
        self.weight = DECAY * self.weight + (1 - DECAY)

    def _diagonal(self, h: Tensor) -> Tensor:
        """Diagonal of the first P, at most 1; 1 before anything was observed."""
        if self.squares is None or not float(self.squares.max()) > 0:
            return torch.ones_like(h)
        size = (self.squares / self.weight).sqrt()
        size = size + DAMPING * size.max()
        return size.min() / size

    def update(self, s: Tensor, z: Tensor, noise: float) -> bool:
        """Add a pair; returns whether it was trusted."""
        if not float(s @ z) > max(TYPICAL * noise * float(s.norm()), 1e-12 * float(s.norm() * z.norm())):
            return False
        self.pairs = [*self.pairs, (s, z)][-self.memory :]
        return True

    def apply(self, h: Tensor) -> Tensor:
        """P h, with P positive definite."""
        diagonal = self._diagonal(h)
        if not self.pairs:
            return diagonal * h
        q, coefficients = h.clone(), []
        for s, z in reversed(self.pairs):
            a = (s @ q) / (s @ z)
            coefficients.append(a)
            q = q - a * z
        s, z = self.pairs[-1]
        q = diagonal * q * ((s @ z) / (z @ (diagonal * z)))
        for (s, z), a in zip(self.pairs, reversed(coefficients), strict=True):
            q = q + s * (a - (z @ q) / (s @ z))
        return q

    def reset(self) -> None:
        """Forget all curvature, but not the sizes."""
        self.pairs = []

    def state_dict(self) -> dict[str, Any]:
        """The pairs and the sizes."""
        return {"pairs": [[s, z] for s, z in self.pairs], "squares": self.squares, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; states of older versions have no sizes."""
        if "pairs" not in state:
            raise ValueError(f"Expected a state of curvature with pairs. Got {sorted(state)}.")
        self.pairs = [(s.clone(), z.clone()) for s, z in state["pairs"]]
        self.squares, self.weight = state.get("squares"), float(state.get("weight", 0.0))


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
