"""Derivatives of a ridge regularizer frozen at one x: products, and bounds of their changes in two norms.

With z = W x, R(x) = sum psi(z): grad = W^T psi'(z), H = W^T diag(psi''(z)) W, and for a change d_k of filter k

    <J d, u> = sum_k <psi_k'(z_k), d_k * u> + <psi_k''(z_k) (d_k * x), W_k u>.

Bounds in the norm of the Hessian use H >= W^T diag(psi'' + m) W with m = mu / ||W||^2: entries of psi''' are compared
with psi'' + m of the same response, so that no constant of the whole image enters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.regularizers.filter_bank import Part
from bilevel_imaging.regularizers.potentials import Block
from bilevel_imaging.regularizers.ridge_newton import RidgeNewtonModel
from bilevel_imaging.tensors import norm

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.ridge import RidgeRegularizer


# responses of whole images evaluated together for bounds: on a CPU what a core's own cache holds
IMAGES = {"cpu": 2**18, "cuda": 2**27}


def _together(block: Block, squares: Tensor) -> Tensor:
    """Square of the norm of a block of columns from those of every filter, ``(B, K)`` to ``(B,)``."""
    return squares.sum(1) if block.shared else squares.amax(1)


class RidgeLinearization(Linearization):
    """Caches psi''(z), ``(B, H, W, K)``; everything else is evaluated again where it is needed, part by part."""

    def __init__(self, regularizer: RidgeRegularizer, x: Tensor):
        self.regularizer, self.x = regularizer, x
        self.bank, self.profile = regularizer.frozen(x)
        self.constants = regularizer.constants(x.shape)
        planes, height, width = self.bank.planes, x.shape[-2], x.shape[-1]
        self.curvature = x.new_empty((len(x), planes * height, width, len(self.bank.kernels)))
        field = self.by_planes(self.curvature)

        def slope(z: Tensor, part: Part) -> Tensor:
            return self.profile.slope_and_curvature(z, field[part])[0]

        self.grad = self.bank.through(x, slope)

    def by_planes(self, field: Tensor) -> Tensor:
        """``(B, P H, W, K)`` as ``(B P, H, W, K)``."""
        return field.view(-1, self.x.shape[-2], *field.shape[2:])

    def _parts(self) -> Iterator[slice]:
        """Parts of the batch, of whole images: bounds are reduced over an image."""
        size = self.curvature[0].numel()
        step = max(1, IMAGES.get(self.x.device.type, IMAGES["cuda"]) // size)
        return (slice(start, start + step) for start in range(0, len(self.x), step))

    @property
    def learns_filters(self) -> bool:
        """Whether the filters are among the parameters."""
        return self.regularizer.filter_layers[0].requires_grad

    def hvp(self, v: Tensor) -> Tensor:
        return self.bank.product(v, self._weights)

    @cached_property
    def _weights(self) -> Tensor:
        return self.bank.weights(self.by_planes(self.curvature))

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products: dict[str, Tensor] = {}
        filters = torch.zeros_like(self.bank.kernels, dtype=torch.float64)
        for part in self._parts():
            z, g = self.bank.apply(self.x[part]), self.bank.apply(q[part])
            for name, product in self.profile.mixed_vjp(z, g).items():
                products[name] = products[name] + product if name in products else product
            if self.learns_filters:
                slope, curvature = self.profile.slope_and_curvature(z)
                filters += self.bank.correlation(slope, q[part])
                filters += self.bank.correlation(curvature.mul_(g), self.x[part])
        if self.learns_filters:
            products |= self.regularizer.pull_back(filters)
        stored = self.regularizer.trainable()
        return {name: products[name].to(p.dtype).reshape(p.shape) for name, p in stored.items()}

    def subset(self, index: Tensor) -> Linearization:
        other = object.__new__(RidgeLinearization)
        other.regularizer, other.bank, other.profile = self.regularizer, self.bank, self.profile
        other.constants = self.constants.subset(index)
        other.x, other.grad, other.curvature = self.x[index], self.grad[index], self.curvature[index]
        return other

    def cosine_spectrum(self) -> Tensor:
        """With every psi'' replaced by its mean over the image."""
        return self.bank.mean_spectrum(self.curvature, self.x.shape)

    def local_curvature(self) -> Tensor:
        return self.bank.diagonal(self.curvature)

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        if not self.profile.even:
            return None
        if cold:
            return torch.zeros_like(self.curvature)
        memory = torch.empty_like(self.curvature)
        field = self.by_planes(memory)
        for part, z in self.bank.responses(self.x):
            field[part] = self.profile.slope(z)
        return memory

    def newton_model(self, memory: Tensor) -> NewtonModel:
        return RidgeNewtonModel(self, memory)

    @cached_property
    def _operator_norm(self) -> Tensor:
        """||W||^2, 0-dim float64."""
        return self.bank.squared_norm(torch.ones(len(self.bank.kernels), device=self.x.device))

    @cached_property
    def _sensitivity(self) -> float:
        return self.regularizer.kernel_sensitivity()

    @cached_property
    def _patches(self) -> Tensor:
        """Norms of the centered patches of x, ``(B, H, W)``, rounded up."""
        largest = self.x.abs().amax((1, 2, 3)).reshape(-1, 1, 1)
        return self.bank.patch_deviations(self.x) * (1 + 1e-4) + 1e-6 * largest

    def _floor(self, mu: Tensor) -> Tensor:
        """m = mu / ||W||^2, ``(B, 1, 1, 1)`` in the dtype of x."""
        return (mu.double() / self._operator_norm).to(self.x.dtype).reshape(-1, 1, 1, 1)

    # -------------------------------------------------------------------------------------------- Euclidean bounds

    def constants_on_ball(self, radius: Tensor) -> Constants:
        """With the mixed derivative's constant, which exists near a point only: filters act on x itself."""
        whole = self.constants
        smoothness, sizes = whole.smoothness, []
        for block in self._blocks_on(radius):
            sizes.append(smoothness * block)
        if self.learns_filters:
            limit, third = self.profile.curvature_limit.double(), self.profile.third_limit.double()
            first = self.bank.patch_factor * self.bank.squared_norm(limit.square()).sqrt()
            second = self._largest_patch * self.bank.squared_norm(third)
            sizes.append(self._sensitivity * (2 * first + second))
        total = torch.zeros_like(smoothness)
        for size in sizes:
            total = total + size.square()
        return Constants(whole.strong_convexity, smoothness, whole.hessian_lipschitz, mixed_lipschitz=total.sqrt())

    @property
    def _largest_patch(self) -> Tensor:
        return self._patches.flatten(1).amax(1).double()

    def _blocks_on(self, radius: Tensor) -> list[Tensor]:
        """Bound of |d/dt sum_j d_j dpsi'/dtheta_j| / sup psi'' for ||d|| = 1 on a Euclidean ball, by blocks, ``(B,)``
        each."""
        if not self._any_stretches:
            return [torch.ones_like(radius, dtype=torch.float64) for _ in self._blocks]
        largest = [self.bank.apply(self.x[part]).abs_().flatten(1, 2).amax(1) for part in self._parts()]
        far = torch.cat(largest).double() + radius.double().unsqueeze(1) * self.bank.row_norms()
        ratio = self.profile.third_limit.double() / self.profile.curvature_limit.double()
        stretched = (1 + far * ratio).amax(1) * (1 + 1e-3)
        return [stretched if block.stretches else torch.ones_like(stretched) for block in self._blocks]

    @cached_property
    def _blocks(self) -> list[Block]:
        """The blocks of the potentials' parameters, for what they say without responses."""
        z = self.x.new_zeros((1, 1, 1, len(self.bank.kernels)))
        return self.profile.blocks(z, z, z)

    @property
    def _any_stretches(self) -> bool:
        return any(block.stretches for block in self._blocks)

    def _sums(self, floor: Tensor | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
        """Per block sum_i field^2 ``(B, K)``, or with a floor sum_i field^2 / (psi'' + floor); sum psi'^2 ``(B,)``;
        sum_i psi'' ||patch||^2 ``(B, K)``."""
        fields: list[list[Tensor]] = []
        slopes, traces = [], []
        for part in self._parts():
            slope, curvature = self.profile.slope_and_curvature(z := self.bank.apply(self.x[part]))
            blocks = self.profile.blocks(z, slope, curvature)
            weight = 1.0 if floor is None else 1 / (curvature + floor[part])
            fields.append([(block.field.square() * weight).flatten(1, 2).sum(1) for block in blocks])
            slopes.append(slope.square().flatten(1).sum(1))
            traces.append((curvature * self._patches[part].square().unsqueeze(-1)).flatten(1, 2).sum(1))
        up = 1 + 1e-3  # sums in float32
        columns = [up * torch.cat(parts).double() for parts in zip(*fields, strict=True)]
        return columns, up * torch.cat(slopes).double(), up * torch.cat(traces).double()

    def mixed_norm_bound(self) -> Tensor:
        """Upper bound of ||J(x)||, ``(B,)`` float64."""
        fields, slopes, traces = self._sums()
        total = torch.zeros_like(slopes)
        for block, columns in zip(self._blocks, fields, strict=True):
            total = total + self._operator_norm * _together(block, columns)
        if self.learns_filters:
            smoothness = self.bank.squared_norm(self.curvature.flatten(1, 2).amax(1))
            size = self.bank.patch_factor * slopes.sqrt() + (traces.amax(1) * smoothness).sqrt()
            total = total + (self._sensitivity * size).square()
        return total.sqrt()

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """Localized: sup |psi'''| is taken over what each response can become inside the ball."""
        reach = radius.to(self.x.dtype).reshape(-1, 1, 1, 1) * self.bank.row_norms()
        limit, third_limit = self.profile.curvature_limit.double(), self.profile.third_limit.double()
        largest, sizes, patched = [], [], []
        for part in self._parts():
            g = self.bank.apply(q[part]).abs_()
            third, _ = self.profile.change(self.bank.apply(self.x[part]), reach[part])
            largest.append((third * g).flatten(1, 2).amax(1))
            sizes.append(g.flatten(1, 2).norm(dim=1))
            if self.learns_filters:
                patched.append((g * self._patches[part].unsqueeze(-1)).flatten(1, 2).norm(dim=1))
        up = 1 + 1e-3
        root = self._operator_norm.sqrt()
        hessian = up * self.bank.squared_norm(torch.cat(largest))
        along = up * limit * torch.cat(sizes).double()
        total = torch.zeros_like(hessian)
        for block, factor in zip(self._blocks, self._blocks_on(radius), strict=True):
            total = total + (factor * root).square() * _together(block, along.square())
        if self.learns_filters:
            first = self.bank.squared_norm(limit.square()).sqrt() * norm(q).double() + along.norm(dim=1)
            second = root * (up * third_limit * torch.cat(patched).double()).amax(1)
            total = total + (self._sensitivity * (self.bank.patch_factor * first + second)).square()
        return Directional(hessian.to(q.dtype), (total.sqrt() * up).to(q.dtype))

    # ------------------------------------------------------------------------------------ in the norm of the Hessian

    @property
    def length_scale(self) -> float:
        ratio = self.profile.curvature_limit / self.profile.third_limit.clamp(min=1e-30)
        return float(ratio.min()) / self.bank.patch_factor

    def _reach(self, part: slice, radius: Tensor, mu: Tensor) -> Tensor:
        """Largest change of every response for ||e||_H <= radius, ``(b, H, W, K)``."""
        along = (self.curvature[part] + self._floor(mu)[part]).rsqrt_()
        rows = self.bank.row_norms() * mu[part].to(along.dtype).reshape(-1, 1, 1, 1).rsqrt()
        return torch.minimum(along, rows).mul_(radius[part].to(along.dtype).reshape(-1, 1, 1, 1))

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        found, floor = [], self._floor(strong_convexity)
        for part in self._parts():
            reach = self._reach(part, radius, strong_convexity)
            third, lowest = self.profile.change(self.bank.apply(self.x[part]), reach)
            found.append(third.div_(lowest.add_(floor[part])).mul_(reach).flatten(1).amax(1))
        return torch.cat(found).double() / radius

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        mu, floor = strong_convexity, self._floor(strong_convexity)
        along, rates, energies, stretched = [], [], [], []
        for part in self._parts():
            z, g = self.bank.apply(self.x[part]), self.bank.apply(q[part]).abs_()
            reach = self._reach(part, radius, mu)
            energies.append((self.curvature[part] * g.square()).flatten(1).sum(1))
            third, lowest = self.profile.change(z, reach)
            base = lowest + floor[part]
            if self._any_stretches:
                # of psi'' and t times the third derivative, over what t can become
                rise = lowest.addcmul_(third, reach, value=2).addcmul_(third, z.abs_().add_(reach))
                stretched.append(rise.div_(base).flatten(1).amax(1))
            rate = third.div_(base)
            rates.append(rate.flatten(1).amax(1))
            along.append(rate.mul_(g).flatten(1).amax(1))
        one = torch.ones_like(mu, dtype=torch.float64)
        slopes = [torch.cat(stretched).double() if block.stretches else one for block in self._blocks]
        if self.learns_filters:
            root = mu.double().sqrt()
            patch = self._largest_patch + 2 * radius.double() / root
            steep = float(self.profile.curvature_limit.max()) ** 0.5
            slopes.append(
                self._sensitivity * (2 * self.bank.patch_factor * steep / root + torch.cat(rates).double() * patch)
            )
        up = 1 + 1e-3
        energy = up * torch.cat(energies).double() + mu.double() * norm(q).double().square()
        stacked = up * torch.stack(slopes, 1) if slopes else energy.new_zeros((len(energy), 0))
        return LocalChange(up * torch.cat(along).double(), stacked, energy.sqrt())

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor:
        fields, slopes, traces = self._sums(self._floor(strong_convexity))
        norms = [_together(block, columns).sqrt() for block, columns in zip(self._blocks, fields, strict=True)]
        if self.learns_filters:
            far = self.bank.patch_factor * (slopes / strong_convexity.double()).sqrt()
            norms.append(self._sensitivity * (far + traces.amax(1).sqrt()))
        return torch.stack(norms, 1) if norms else slopes.new_zeros((len(slopes), 0))
