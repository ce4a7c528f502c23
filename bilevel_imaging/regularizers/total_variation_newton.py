"""A Newton model of smoothed total variation that converges from afar: primal-dual linearization."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.derivatives import NewtonModel
from bilevel_imaging.native import Stencil
from bilevel_imaging.regularizers.differences import divergence, forward_differences, isotropic_primal_dual

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.total_variation_linearization import TotalVariationLinearization


class PrimalDualModel(NewtonModel):
    """weight D^T (I - (u n^T + n u^T) / 2) D / s, with a dual field |u| <= 1 in place of one n = Dx / s.

    Chan, Golub & Mulet (1999): linearizing the dual equation u s = Dx instead of u = Dx / s, whose linearization holds
    in a much larger neighborhood. u = 0 is the quadratic majorizer (lagged diffusivity), u = n is Newton's method.
    """

    def __init__(self, linearization: TotalVariationLinearization, dual: Tensor):
        self.at, self.dual = linearization, dual
        self.group = linearization.regularizer._group

    def stencil(self) -> Stencil | None:
        return self._stencil

    @cached_property
    def _stencil(self) -> Stencil | None:
        at = self.at
        if not (at.regularizer.is_plain and native.serves(at.unit)):
            return None
        return Stencil(native.model_field(at.unit, self.dual, at.reciprocal, float(at.weight)))

    def hvp(self, v: Tensor) -> Tensor:
        at = self.at
        if self._stencil is not None and native.serves(v):
            return self._stencil.product(v)
        if at.regularizer.is_plain:
            return isotropic_primal_dual(v, at.unit, self.half, at.scale, self._work)
        dv = forward_differences(v)
        along_unit, along_half = self.group(at.unit * dv), self.group(self.half * dv)
        dv.addcmul_(self.half, along_unit, value=-1).addcmul_(at.unit, along_half, value=-1)
        return divergence(dv.mul_(at.scale))

    def diffusion(self) -> Tensor:
        return self.at._diagonal(self.dual) / 4

    @cached_property
    def half(self) -> Tensor:
        """u / 2."""
        return 0.5 * self.dual

    @cached_property
    def _work(self) -> Tensor:
        return self.half.new_empty((3, *self.half.shape))

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        at = self.at
        if at.regularizer.is_plain and native.serves(d):
            return native.advance_dual(d, step, at.unit, self.dual, at.reciprocal)
        dd = forward_differences(d)
        along = self.group(at.unit * dd)
        dual = dd.addcmul_(self.dual, along, value=-1).mul_(at.reciprocal).add_(at.unit)
        if not bool((step == 1).all()):
            dual = torch.lerp(self.dual, dual, step.reshape(1, -1, *([1] * (d.dim() - 1))))
        # |u| <= 1 keeps the model positive semidefinite
        return dual.div_(self.group(dual * dual).sqrt_().clamp_(min=1)).transpose(0, 1)
