"""Terms of the upper level that depend on theta alone: their values and gradients are exact."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.tensors import entries, length

# part of a run after which the price of S (1 - S) begins to rise
ONSET = 1 / 3


class SamplingPenalty:
    """mean(beta S + binary S (1 - S)), the price of measuring: S is the mask of an energy, learned as its data weight.

    The first part alone makes S small rather than zero: half of twice as many frequencies costs the same. The second
    drives S to 0 or 1. From the beginning it would keep every S where it starts; :meth:`advance` lets it grow later.
    Sherry et al. (2020), "Learning the sampling pattern for MRI".

    Args:
        energy: with a learned :class:`SamplingMask`.
        beta: what all of k-space costs, in the units of the upper-level loss.
        binary: four times what S = 1/2 everywhere costs in addition, in the same units.

    Raises:
        ValueError: an energy without a learned sampling mask, or beta or binary negative or not finite.
    """

    NAME = "data_weight.logits"

    def __init__(self, energy: VariationalEnergy, beta: float, binary: float = 0.0):
        if not isinstance(energy.data_weight, SamplingMask) or not energy.data_weight.learned:
            raise ValueError(
                f"Expected an energy with a learned SamplingMask. Got {type(energy.data_weight).__name__}; give "
                "VariationalEnergy(data_weight=SamplingMask(...))."
            )
        for name, price in (("beta", beta), ("binary", binary)):
            if not 0 <= price < math.inf:
                raise ValueError(f"Expected {name} as a finite number >= 0. Got {price!r}.")
        self.weight, self.beta, self.binary = energy.data_weight, float(beta), float(binary)
        self._grown = 1.0

    def advance(self, done: float) -> None:
        """The price of S (1 - S) in a run of which this part, between 0 and 1, is done: nothing in its first third,
        then growing steadily to all of it at the end."""
        self._grown = min(max((done - ONSET) / (1 - ONSET), 0.0), 1.0)

    def value(self) -> float:
        """At the current theta."""
        mask = self.weight.mask.detach()
        return float((self.beta * mask + self._grown * self.binary * mask * (1 - mask)).mean())

    def grad(self) -> Tensor:
        """In the logits."""
        mask = self.weight.mask.detach()
        slope = self.beta + self._grown * self.binary * (1 - 2 * mask)
        return slope / mask.numel() * mask * (1 - mask)

    def added_to(self, h: Hypergradient) -> Hypergradient:
        """The hypergradient of the loss plus this: every bound of an error stays what it is."""
        slope, value = self.grad(), self.value()

        def shifted(grad: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**grad, self.NAME: grad[self.NAME] + slope.to(grad[self.NAME])}

        def shifted_pair(pair: tuple[dict[str, Tensor], float] | None) -> tuple[dict[str, Tensor], float] | None:
            return None if pair is None else (shifted(pair[0]), pair[1])

        grad = shifted(h.grad)
        size = length(entries(grad))
        return replace(
            h,
            grad=grad,
            relative_bound=h.bound / size if size > 0 else math.inf,
            before_polish=shifted_pair(h.before_polish),
            verified_by=shifted_pair(h.verified_by),
            loss=h.loss + value,
            loss_interval=(h.loss_interval[0] + value, h.loss_interval[1] + value),
        )
