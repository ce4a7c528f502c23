"""A first step for methods whose steps have the units of theta / hypergradient, and no scale of their own."""

from __future__ import annotations

from torch import Tensor

# parameters are logarithms or of order 1: large enough to get somewhere, far from what overshoots
FIRST_MOVE = 0.1
# where a line search follows, which shortens what overshoots
LARGEST_FIRST_MOVE = 0.5


def first_step_size(h: Tensor) -> float:
    """The step along a hypergradient ``(n,)`` that moves the parameter with the largest entry by ``FIRST_MOVE``.

    1 if the hypergradient is zero: any step will do.
    """
    largest = float(h.abs().max())
    return FIRST_MOVE / largest if largest > 0 else 1.0
