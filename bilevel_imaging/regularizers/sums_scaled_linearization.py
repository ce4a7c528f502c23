"""Derivatives of a multiple of a regularizer frozen at one x, from the linearization of that regularizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.regularizers.sums_linearization import DIAGONAL, directional_of
from bilevel_imaging.tensors import norm

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.sums import Scaled


class ScaledLinearization(Linearization):
    """weight * R_0 from the linearization of R_0: g / weight is an energy with R_0 in it, which turns bounds into ones
    for g."""

    def __init__(self, regularizer: Scaled, inside: Linearization, shape: torch.Size):
        self.regularizer, self.inside, self.shape = regularizer, inside, shape
        self.weight = regularizer.log_weight.detach().double().exp()  # 0-dim: keeps the dtype of what it multiplies
        self.learned = regularizer.log_weight.requires_grad
        self.constants = regularizer.constants(shape)
        self.grad = self.weight * inside.grad

    def hvp(self, v: Tensor) -> Tensor:
        return self.weight * self.inside.hvp(v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products = {}
        if self.learned:
            products["log_weight"] = (q * self.grad).sum().to(self.regularizer.log_weight.dtype)
        for name, product in self.inside.mixed_vjp(q).items():
            products[f"regularizer.{name}"] = (self.weight * product).to(product.dtype)
        return products

    def mixed_columns(self) -> Tensor | None:
        own = [self.grad.unsqueeze(1)[:, : int(self.learned)]]
        if self.regularizer.regularizer.trainable():
            inside = self.inside.mixed_columns()
            if inside is None:
                return None
            own.append(self.weight * inside)
        return torch.cat(own, 1)

    @property
    def weight_column(self) -> int | None:
        """Which column of J is the gradient itself."""
        return 0 if self.learned else self.inside.weight_column

    def mixed_energy_norms(self) -> Tensor | None:
        """Those of R_0 times sqrt(weight); for the weight, that of a column of R_0 that is its gradient, or inf."""
        norms = self.inside.mixed_energy_norms()
        if norms is None:
            if self.regularizer.regularizer.trainable():
                return None
            norms = self.grad.new_zeros((self.shape[0], 0), dtype=torch.float64)
        norms = self.weight.sqrt() * norms
        if not self.learned:
            return norms
        same = self.inside.weight_column
        own = torch.full_like(self.grad[:, 0, 0, 0], torch.inf).double() if same is None else norms[:, same]
        return torch.cat([own.unsqueeze(1), norms], 1)

    def mixed_norm_bound(self) -> Tensor | None:
        bound = self.inside.mixed_norm_bound()
        if bound is None:
            return None
        bound = self.weight * bound
        return torch.hypot(bound, norm(self.grad).double()) if self.learned else bound

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        norms = self.inside.mixed_block_norms(strong_convexity / self.weight)
        if norms is None:
            return None
        own = norm(self.grad).double() / strong_convexity.double().sqrt()
        return torch.cat([own.unsqueeze(1)[:, : int(self.learned)], self.weight.sqrt() * norms], 1)

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        inside = self.regularizer.regularizer
        constants, learned = inside.constants(self.shape), bool(inside.trainable())
        along = directional_of(self.inside, constants, learned, q, radius)
        if along is None:
            return None
        hessian, mixed = self.weight * along.hessian, self.weight * along.mixed
        components = None if along.mixed_components is None else self.weight * along.mixed_components
        if self.learned:
            # the column of the weight is the gradient, whose derivative along q is H q
            slope = norm(self.hvp(q)) + 0.5 * hessian * radius
            mixed = torch.hypot(slope, mixed)
            components = None if components is None else torch.cat([slope.unsqueeze(1), components], 1)
        return Directional(hessian, mixed, components)

    def constants_on_ball(self, radius: Tensor) -> Constants | None:
        ball = self.inside.constants_on_ball(radius)
        return None if ball is None else self.regularizer.multiple(ball)

    @property
    def length_scale(self) -> float:
        return self.inside.length_scale

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        root = self.weight.sqrt()
        curvature = self.inside.relative_curvature(radius / root, strong_convexity / self.weight)
        return None if curvature is None else curvature / root

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        root = self.weight.sqrt()
        change = self.inside.local_change(q, radius / root, strong_convexity / self.weight)
        if change is None:
            return None
        # |<DJ[e], u>| = |<R'' e, u>| <= ||e||_H ||u||_R for the weight
        inside = change.slopes if self.regularizer.regularizer.trainable() else change.slopes.flatten()[:0]
        own = inside.new_ones((*inside.shape[:-1], int(self.learned)))
        return LocalChange(change.hessian, torch.cat([own, inside], -1), root * change.energy)

    @property
    def hessian_diagonal(self) -> Callable[[], Tensor]:
        """Diagonal of the Hessian, ``(B, C, H, W)``; no such attribute where the regularizer has none."""
        diagonal = getattr(self.inside, DIAGONAL)
        return lambda: self.weight * diagonal()

    def diffusion(self) -> Tensor | None:
        coefficient = self.inside.diffusion()
        return None if coefficient is None else self.weight * coefficient

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        return self.inside.newton_memory(cold=cold)

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        model = self.inside.newton_model(memory)
        return None if model is None else _ScaledModel(self.weight, model)

    def subset(self, index: Tensor) -> Linearization | None:
        inside = self.inside.subset(index)
        shape = torch.Size((len(index), *self.shape[1:]))
        return None if inside is None else ScaledLinearization(self.regularizer, inside, shape)


class _ScaledModel(NewtonModel):
    """weight times a model."""

    def __init__(self, weight: Tensor, model: NewtonModel):
        self.weight, self.model = weight, model

    def hvp(self, v: Tensor) -> Tensor:
        return self.weight * self.model.hvp(v)

    def diffusion(self) -> Tensor | None:
        coefficient = self.model.diffusion()
        return None if coefficient is None else self.weight * coefficient

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        return self.model.advance(d, step)
