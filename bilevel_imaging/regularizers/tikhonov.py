"""Quadratic regularizers: the simplest convex model, with a closed-form minimizer to test against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.differences import differences_adjoint, forward_differences, squared_operator_norm
from bilevel_imaging.tensors import inner, norm, squared_norm


class Tikhonov(Regularizer):
    """R(x) = weight/2 * ||x||^2, or weight/2 * ||Dx||^2 with forward differences D (``operator="gradient"``).

    Args:
        weight: positive; stored as ``log_weight``.
        operator: "identity" or "gradient".
        learn_weight: whether ``log_weight`` is learned.

    Raises:
        ValueError: unknown operator, or a weight that is not positive.
    """

    known_parameters = ("log_weight",)
    OPERATORS = ("identity", "gradient")

    def __init__(self, weight: float = 0.1, operator: str = "identity", *, learn_weight: bool = True):
        super().__init__()
        if operator not in self.OPERATORS:
            raise ValueError(f"Unknown operator {operator!r}. Choose from {list(self.OPERATORS)}.")
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.operator = operator

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {"operator": self.operator, "learn_weight": self.log_weight.requires_grad}

    def _normal(self, x: Tensor) -> Tensor:
        return x if self.operator == "identity" else differences_adjoint(forward_differences(x))

    def _weight(self, x: Tensor) -> Tensor:
        return self.log_weight.double().exp().to(x.dtype)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.operator == "identity":
            return 0.5 * self._weight(x) * squared_norm(x)
        return 0.5 * self._weight(x) * squared_norm(forward_differences(x).transpose(0, 1))

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._weight(x) * self._normal(x)

    def linearize(self, x: Tensor) -> Linearization:
        with torch.no_grad():
            return _TikhonovLinearization(self, x.detach())

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight = float(self.log_weight.detach().double().exp())
        norm2 = 1.0 if self.operator == "identity" else squared_operator_norm(shape[-2], shape[-1])
        mu = weight if self.operator == "identity" else 0.0
        lipschitz = weight * norm2 if self.log_weight.requires_grad else 0.0
        bounds = (mu, weight * norm2, 0.0, None, lipschitz)
        device = self.log_weight.device
        return Constants(
            *(None if b is None else torch.full((shape[0],), b, dtype=torch.float64, device=device) for b in bounds)
        )

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight, x = self.log_weight.double().exp(), x.detach().double()
            if self.operator == "identity":
                return weight * norm(x)
            # differences cancel on smooth images: what is added up is Dx, not D^T D x
            return weight * 8**0.5 * norm(forward_differences(x).transpose(0, 1))


class _TikhonovLinearization(Linearization):
    def __init__(self, regularizer: Tikhonov, x: Tensor):
        self.regularizer = regularizer
        self.x = x
        self.weight = regularizer._weight(x).detach()
        self.constants = regularizer.constants(x.shape)
        self.grad = self.weight * regularizer._normal(x)

    def hvp(self, v: Tensor) -> Tensor:
        return self.weight * self.regularizer._normal(v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        parameter = self.regularizer.log_weight
        return {"log_weight": inner(q, self.grad).sum().to(parameter.dtype)} if parameter.requires_grad else {}

    def mixed_columns(self) -> Tensor:
        column = self.grad.unsqueeze(1)
        return column if self.regularizer.log_weight.requires_grad else column[:, :0]

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        zero = torch.zeros_like(radius)
        if not self.regularizer.log_weight.requires_grad:
            return Directional(zero, zero, zero.unsqueeze(1)[:, :0])
        slope = norm(self.hvp(q))  # J is linear in x: exact
        return Directional(zero, slope, slope.unsqueeze(1))

    @property
    def weight_column(self) -> int | None:
        """Which column of J is the gradient itself."""
        return 0 if self.regularizer.log_weight.requires_grad else None

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        return torch.zeros_like(radius)

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        energy = inner(q, self.hvp(q)).double().clamp(min=0).sqrt() * (1 + 1e-4)
        return LocalChange(torch.zeros_like(energy), energy.new_ones(self.mixed_columns().shape[1]), energy)

    def mixed_energy_norms(self) -> Tensor:
        """J = R x with R the Hessian: ||R x||_{H^-1} <= ||x||_R."""
        energy = inner(self.x, self.grad).double().clamp(min=0).sqrt() * (1 + 1e-4)
        return energy.unsqueeze(1)[:, : self.mixed_columns().shape[1]]

    def hessian_diagonal(self) -> Tensor:
        """Diagonal of the Hessian, ``(B, C, H, W)``."""
        ones = torch.ones_like(self.x)
        if self.regularizer.operator == "identity":
            return self.weight * ones
        count = 4 * ones
        for edge in (count[..., 0], count[..., -1]):
            edge -= 1
        for edge in (count[..., 0, :], count[..., -1, :]):
            edge -= 1
        return self.weight * count

    def diffusion(self) -> Tensor | None:
        return (self.weight * torch.ones_like(self.x)) if self.regularizer.operator == "gradient" else None

    def subset(self, index: Tensor) -> Linearization:
        return _TikhonovLinearization(self.regularizer, self.x[index])
