"""Potentials whose second derivative is a nonnegative piecewise linear function: learned C^1 nondecreasing activations.

psi'' interpolates values c_j >= 0 at the knots t_j = reach (j / n)^2, which lie densest at 0 where convex potentials
bend, and is 0 from the last knot on: psi grows linearly there. psi' is a quadratic spline, psi a cubic one. Activations
of convex ridge regularizers are linear splines in Goujon et al. (2023); one degree more makes the Hessian Lipschitz.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging import native
from bilevel_imaging.regularizers.potentials import Block, Profile, blockwise


def knots(count: int, reach: Tensor) -> Tensor:
    """t_0 = 0, ..., t_count = reach, ``(count + 1,)`` in the dtype of reach."""
    return reach * (torch.arange(count + 1, dtype=reach.dtype, device=reach.device) / count) ** 2


class SplineProfile(Profile):
    """psi_k with psi_k''(t_j) = curvatures_kj.

    Args:
        curvatures: psi'' at all knots but the last, where it is 0, ``(K, n)`` float64, >= 0; differentiable.
        reach: last knot, 0-dim float64; differentiable.
        like: dtype and device of the responses.
        learned: names among "log_weight" (common factor), "log_scale" (psi(scale t) / scale) and "log_curvatures".
        shared: whether all filters have the same potential.
    """

    def __init__(self, curvatures: Tensor, reach: Tensor, like: Tensor, learned: tuple[str, ...], shared: bool):
        self.curvatures, self.reach, self.learned, self.shared = curvatures, reach, learned, shared
        self.count = curvatures.shape[1]
        tables = _pieces(curvatures, reach)
        self.tables = tables.to(like)  # constant, linear, quadratic, cubic coefficient of psi in |t|: (4, K, n + 1)
        self.flat = self.tables.flatten(1)
        self.compiled = native.SplinePotentials(self.tables.detach().contiguous(), float(reach.detach()))
        bends = 6 * tables[3]
        self.curvature_limit = curvatures.detach().amax(1).to(like)
        self.third_limit = bends.detach().abs().amax(1).to(like)
        self.slope_limit = tables[1, :, -1].detach().to(like)
        self.offsets = torch.arange(curvatures.shape[0], device=like.device) * (self.count + 1)

    def _piece(self, size: Tensor) -> Tensor:
        """Number of the piece of |t|, plus the offset of the filter: int64 as ``size``."""
        scaled = size.detach() * (1 / self.reach.detach().to(size.dtype))
        # the square root through its reciprocal, which is vectorized
        scaled.mul_((scaled + torch.finfo(size.dtype).tiny).rsqrt_()).mul_(self.count)
        return scaled.nan_to_num_(nan=0.0).clamp_(max=self.count).long().add_(self.offsets)

    def _coefficient(self, order: int, piece: Tensor) -> Tensor:
        return self.flat[order].index_select(0, piece.reshape(-1)).view(piece.shape)

    @blockwise
    def value(self, z: Tensor) -> Tensor:
        size, _ = _folded(z)
        piece = self._piece(size)
        a, b, c, d = (self._coefficient(k, piece) for k in range(4))
        return a + size * (b + size * (c + size * d))

    @blockwise
    def _slope(self, z: Tensor) -> Tensor:
        size, sign = _folded(z)
        piece = self._piece(size)
        b, c, d = (self._coefficient(k, piece) for k in range(1, 4))
        return sign * (b + size * (2 * c + 3 * size * d))

    @blockwise
    def _slope_and_curvature(self, z: Tensor) -> tuple[Tensor, Tensor]:
        size = z.abs()
        piece = self._piece(size)
        b, c, d = (self._coefficient(k, piece) for k in range(1, 4))
        # 2 c + 6 d t and b + 2 c t + 3 d t^2, in place
        bend = d.mul_(size).mul_(3)
        curvature = c.mul_(2).add_(bend)
        slope = torch.addcmul(b, curvature, size).mul_(z.sign())
        curvature = curvature.add_(bend).clamp_(min=0)
        return slope, curvature

    @blockwise
    def _change(self, z: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        size = z.abs()
        low, high = (size - reach).clamp_(min=0), size + reach
        first, last = self._piece(low), self._piece(high)
        c, d = self._coefficient(2, first), self._coefficient(3, first)
        lowest = (2 * c).addcmul_(d, low, value=6)
        third = 6 * d.abs()
        c, d = self._coefficient(2, last), self._coefficient(3, last)
        end = (2 * c).addcmul_(d, high, value=6)
        third = torch.maximum(third, 6 * d.abs())
        # a knot in between: psi'' is at least the smaller of the ends and of the value at the knot
        knot_slope = 2 * c + 6 * d * self._knots.index_select(0, last.reshape(-1)).view(last.shape)
        lowest = torch.minimum(torch.minimum(lowest, end), torch.where(last > first, knot_slope, end)).clamp_(min=0)
        far = last > first + 1
        return torch.where(far, self.third_limit, third), torch.where(far, 0.0, lowest)

    @property
    def _knots(self) -> Tensor:
        """The knot at which every piece begins, by piece number with offset, ``(K (n + 1),)``."""
        return knots(self.count, self.reach.detach()).to(self.flat).repeat(self.curvatures.shape[0])

    def blocks(self, z: Tensor, slope: Tensor, curvature: Tensor) -> list[Block]:
        found = []
        if "log_weight" in self.learned:
            found.append(Block("log_weight", True, slope.abs()))
        if "log_scale" in self.learned:
            found.append(Block("log_scale", True, z.abs() * curvature, stretches=True))
        if "log_curvatures" in self.learned:
            # psi' and psi'' are sums of the columns, which have one sign
            found.append(Block("log_curvatures", self.shared, slope.abs()))
        return found

    def mixed_vjp(self, z: Tensor, g: Tensor) -> dict[str, Tensor]:
        sums = native.spline_sums(self.compiled, z, g) if self._is_compiled(z) else self._sums(z, g)
        weights = torch.cat([torch.zeros_like(sums[:1]), sums])
        products: dict[str, Tensor] = {}
        # the coefficients are linear in the curvatures: basis[order, j, piece] are those of psi''(t_j) = 1
        basis = _pieces(torch.eye(self.count, dtype=sums.dtype, device=z.device), self.reach.detach())
        products["log_curvatures"] = self.curvatures.detach() * torch.einsum("okp,ojp->kj", weights, basis)
        if "log_weight" in self.learned:
            products["log_weight"] = products["log_curvatures"].sum()
        if "log_scale" in self.learned:
            # t psi'' = 2 c t + 6 d t^2, in terms of the sums over order t^(order - 1)
            square, cubic = torch.einsum("kj,ojp->okp", self.curvatures.detach(), basis[2:])
            products["log_scale"] = (square * weights[2] + 2 * cubic * weights[3]).sum()
        if self.shared:
            products["log_curvatures"] = products["log_curvatures"].sum(0, keepdim=True)
        return {name: products[name] for name in self.learned}

    def _sums(self, z: Tensor, g: Tensor) -> Tensor:
        """Derivative of sum psi'(z) g in the coefficients of |z|, |z|^2, |z|^3, float64 ``(3, K, n + 1)``."""
        size = z.abs()
        piece, odd = self._piece(size).reshape(-1), (g * z.sign()).reshape(-1).double()
        size = size.reshape(-1).double()
        sums = []
        for order in range(1, 4):  # d psi' / d coefficient = order |t|^(order - 1)
            sums.append(order * torch.bincount(piece, odd, minlength=self.flat.shape[1]))
            odd = odd * size
        return torch.stack(sums).view(3, *self.tables.shape[1:])


def _folded(z: Tensor) -> tuple[Tensor, Tensor]:
    """|z|, and the sign of z, which is 1 at 0: autograd then has the derivatives of z^2 there."""
    if not torch.is_grad_enabled():
        return z.abs(), z.sign()
    sign = torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z)).detach()
    return z * sign, sign


def _pieces(curvatures: Tensor, reach: Tensor) -> Tensor:
    """Coefficients of 1, t, t^2, t^3 of psi on every piece, ``(4, K, n + 1)``; the last piece is the linear end."""
    at = knots(curvatures.shape[1], reach)
    step = at.diff()
    c = functional.pad(curvatures, (0, 1))
    bend = c.diff(dim=1) / step
    slope = functional.pad((0.5 * (c[:, :-1] + c[:, 1:]) * step).cumsum(1), (1, 0))
    rise = slope[:, :-1] * step + 0.5 * c[:, :-1] * step**2 + bend * step**3 / 6
    value = functional.pad(rise.cumsum(1), (1, 0))
    bend = functional.pad(bend, (0, 1))
    # from powers of t - t_j to powers of t
    cubic = bend / 6
    square = 0.5 * (c - bend * at)
    linear = slope - c * at + 0.5 * bend * at**2
    constant = value - slope * at + 0.5 * c * at**2 - bend * at**3 / 6
    return torch.stack([constant, linear, square, cubic])
