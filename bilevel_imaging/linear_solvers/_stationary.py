"""What gradient descent and heavy ball share: the constants, the residual b - H q, and how rounding is noticed."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers._iteration import Recurrence
from bilevel_imaging.linear_solvers._systems import STAGNATED, Operator, Systems
from bilevel_imaging.tensors import norm, per_sample, squared_norm

# The largest eigenvalue is approached from below; what remains missing is made up for when the residual grows.
_POWER_ITERATIONS = 10
_POWER_SAFETY = 1.2
# Within its window a method that converges as predicted divides the residual by more than this.
_WINDOW_GAIN = 0.7
# Rounding errors of single steps must not count as stagnation.
_SHORTEST_WINDOW = 20
# A residual of fewer units of the last place of its terms says nothing about the step size.
_ROUNDING_UNITS = 16.0


class StationaryRecurrence(Recurrence):
    """A method with fixed steps; r is b - H q itself, so one product per iteration also checks the result.

    ``estimated`` says whether ``smoothness`` is a guess, which subclasses double (``back_off``) where the residual
    shows that it is too small.
    """

    def __init__(self, operator: Operator, systems: Systems):
        super().__init__(operator, systems)
        constants = operator.linearization.constants
        self.estimated = constants.smoothness is None
        if constants.smoothness is None:
            self.smoothness = estimate_smoothness(operator, systems.b)
        else:
            self.smoothness = constants.smoothness.to(systems.b)
        self.strong_convexity = None if constants.strong_convexity is None else constants.strong_convexity.to(systems.b)
        self.age = torch.zeros_like(systems.iterations)
        self.mark = systems.residual.clone()
        self.window = self.window_length().clamp(min=_SHORTEST_WINDOW)

    @abc.abstractmethod
    def window_length(self) -> Tensor:
        """Iterations after which less than the factor ``_WINDOW_GAIN`` means that rounding has stopped the method."""

    def measure(self, operator: Operator, running: Tensor) -> None:
        """Residual at the new iterate, and whether it still falls."""
        systems = self.systems
        torch.sub(systems.b, operator.hvp(systems.q), out=systems.r)
        residual = squared_norm(systems.r).sqrt()
        systems.residual = torch.where(running, residual, systems.residual)
        gained = systems.residual < _WINDOW_GAIN * self.mark
        self.mark = torch.where(gained, systems.residual, self.mark)
        self.age = torch.where(gained, 0, self.age + 1)
        systems.status = torch.where(running & (self.age > self.window), STAGNATED, systems.status)

    def back_off(self, suspect: Tensor) -> Tensor:
        """Double L for the samples whose residual is too large for it, rounding errors aside; returns which."""
        systems = self.systems
        terms = self.smoothness * squared_norm(systems.q).sqrt() + squared_norm(systems.b).sqrt()
        wrong = suspect & ~(systems.residual <= _ROUNDING_UNITS * torch.finfo(systems.b.dtype).eps * terms)
        self.smoothness = torch.where(wrong, 2 * self.smoothness, self.smoothness)
        self.window = self.window_length().clamp(min=_SHORTEST_WINDOW)
        self.mark = torch.where(wrong, systems.residual, self.mark)
        self.age = torch.where(wrong, 0, self.age)
        return wrong


def estimate_smoothness(operator: Operator, like: Tensor) -> Tensor:
    """A guess of the largest eigenvalue by power iteration from one seeded vector, ``(A,)``; no upper bound."""
    generator = torch.Generator().manual_seed(0)
    # the same vector for every sample, so that a sample does not depend on its place in the batch
    v = torch.randn(like.shape[1:], generator=generator, dtype=like.dtype).to(like.device)
    v = v.expand_as(like) / norm(v.unsqueeze(0))
    for _ in range(_POWER_ITERATIONS):
        product = operator.hvp(v)
        size = norm(product)
        v = product / per_sample(torch.where(size > 0, size, 1.0), product)
    return _POWER_SAFETY * size
