"""A Newton model of ridge regularizers that converges from afar: primal-dual linearization of psi'(z)."""

from __future__ import annotations

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
        for part in linearization._parts():
            z = linearization.bank.apply(linearization.x[part])
            slope, curvature = linearization.profile.slope_and_curvature(z)
            self.slope[part] = slope
            tiny = torch.finfo(z.dtype).tiny
            secant = torch.where(z == 0, curvature, slope / torch.where(z == 0, 1.0, z))
            turn = (slope - z * curvature) / slope.square().clamp_(min=tiny)
            c = secant * (1 - dual[part] * turn)
            # at least Newton's, and bounded where rounding of a tiny psi' has spoiled the turn
            most = 2 * torch.maximum(secant, curvature)
            self.coefficient[part] = torch.minimum(torch.maximum(c.nan_to_num(nan=0.0), curvature), most)

    def hvp(self, v: Tensor) -> Tensor:
        at, out = self.at, torch.empty_like(v)
        for part in at._parts():
            out[part] = at.bank.adjoint(at.bank.apply(v[part]).mul_(self.coefficient[part]))
        return out

    def cosine_spectrum(self) -> Tensor:
        return self.at.bank.mean_spectrum(self.coefficient, self.at.x.shape)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        at, dual = self.at, torch.empty_like(self.dual)
        limit = at.profile.slope_limit
        for part in at._parts():
            ahead = self.slope[part].addcmul_(self.coefficient[part], at.bank.apply(d[part]))
            ahead = torch.lerp(self.dual[part], ahead, step[part].reshape(-1, 1, 1, 1))
            dual[part] = torch.minimum(torch.maximum(ahead, -limit), limit)
        return dual
