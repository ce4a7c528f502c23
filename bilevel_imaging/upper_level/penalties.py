"""Terms of the upper level that depend on theta alone: their values and gradients are exact."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.tensors import entries, length


class SamplingPenalty:
    """beta * mean(S), the price of measuring: S is the sampling mask of an energy, learned as its data weight.

    Sherry et al. (2020), "Learning the sampling pattern for MRI".

    Args:
        energy: with a learned :class:`SamplingMask`.
        beta: what all of k-space costs, in the units of the upper-level loss.

    Raises:
        ValueError: an energy without a learned sampling mask, or beta negative or not finite.
    """

    NAME = "data_weight.logits"

    def __init__(self, energy: VariationalEnergy, beta: float):
        if not isinstance(energy.data_weight, SamplingMask) or not energy.data_weight.learned:
            raise ValueError(
                f"Expected an energy with a learned SamplingMask. Got {type(energy.data_weight).__name__}; give "
                "VariationalEnergy(data_weight=SamplingMask(...))."
            )
        if not 0 <= beta < math.inf:
            raise ValueError(f"Expected beta as a finite number >= 0. Got {beta!r}.")
        self.weight, self.beta = energy.data_weight, float(beta)

    def value(self) -> float:
        """At the current theta."""
        return self.beta * float(self.weight.mask.detach().mean())

    def grad(self) -> Tensor:
        """In the logits."""
        mask = self.weight.mask.detach()
        return self.beta / mask.numel() * mask * (1 - mask)

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
