"""A Newton model of ridge regularizers that converges from afar: primal-dual linearization of psi'(z)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import NewtonModel

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.ridge_linearization import RidgeLinearization


class RidgeNewtonModel(NewtonModel):
    """W^T diag(c) W with c = (psi'(z) / z) (1 - u (psi' - z psi'') / psi'^2) and a dual field u that tends to psi'(z).

    As Chan, Golub & Mulet (1999) for total variation: u z = psi'(z) z is linearized instead of u = psi'(z). u = 0 is
    the quadratic majorizer of even potentials with falling psi'', u = psi'(z) is Newton's method. Far from the
    minimizer, where psi'' is small and a Newton step much too long, c is not.
    """

    def __init__(self, linearization: RidgeLinearization, dual: Tensor):
        self.at, self.dual = linearization, dual
        self.coefficient, self.slope = torch.empty_like(dual), torch.empty_like(dual)
        coefficient, slope, field = (linearization.by_planes(f) for f in (self.coefficient, self.slope, dual))
        for part, z in linearization.bank.responses(linearization.x):
            linearization.profile.primal_dual(z, field[part], coefficient[part], slope[part])

    def hvp(self, v: Tensor) -> Tensor:
        return self.at.bank.product(v, self._weights)

    @cached_property
    def _weights(self) -> Tensor:
        return self.at.bank.weights(self.at.by_planes(self.coefficient))

    def cosine_spectrum(self) -> Tensor:
        return self.at.bank.mean_spectrum(self.coefficient, self.at.x.shape)

    def local_curvature(self) -> Tensor:
        return self.at.bank.diagonal(self.coefficient)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        at = self.at
        limit, full = at.profile.slope_limit, bool((step == 1).all())
        ahead, coefficient = at.by_planes(self.slope), at.by_planes(self.coefficient)
        for part, z in at.bank.responses(d):
            ahead[part] += z.mul_(coefficient[part])  # the slope is not needed any more
        dual = self.slope if full else torch.lerp(self.dual, self.slope, step.reshape(-1, 1, 1, 1))
        return torch.minimum(torch.maximum(dual, -limit, out=dual), limit, out=dual)
