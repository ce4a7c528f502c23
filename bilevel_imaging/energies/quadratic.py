"""Quadratic lower level with a parameter-dependent linear term: closed-form minimizer, the paper's first experiment."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Directional, Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem


class QuadraticProblem(LowerLevelProblem):
    """g_i(x, theta) = 1/2 <x, H_i x> - <x, b_i> + <x, M_i theta>, with minimizer H_i^{-1} (b_i - M_i theta).

    Ehrhardt & Roberts (2023), Section 4.1, with H = 2 D^T D, b = 2 D^T e, M = 2 D^T C.

    Args:
        hessian: symmetric positive definite, ``(B, d, d)``, float64 or float32.
        b: ``(B, d)``.
        mixed: ``(B, d, n)``.
        theta: ``(n,)`` parameter, shared by the batch.

    Raises:
        ValueError: if shapes do not fit or a Hessian is not symmetric positive definite.
    """

    def __init__(self, hessian: Tensor, b: Tensor, mixed: Tensor, theta: Tensor, *, cost: Cost | None = None):
        if hessian.dim() != 3 or b.shape != hessian.shape[:2] or mixed.shape != (*b.shape, theta.shape[0]):
            raise ValueError(
                "Expected hessian (B, d, d), b (B, d), mixed (B, d, n), theta (n,). "
                f"Got {tuple(hessian.shape)}, {tuple(b.shape)}, {tuple(mixed.shape)}, {tuple(theta.shape)}."
            )
        eigenvalues = torch.linalg.eigvalsh(hessian.double())
        if not bool((eigenvalues[:, 0] > 0).all()):
            raise ValueError(
                f"Expected positive definite Hessians. Smallest eigenvalues: {eigenvalues[:, 0].tolist()}."
            )
        self.hessian, self.b, self.mixed = hessian, b, mixed
        self.theta = {"theta": theta}
        self.shape, self.dtype, self.device = b.shape, b.dtype, b.device
        self.cost = Cost() if cost is None else cost
        # eigvalsh is backward stable: errors of a few eps * ||H|| on either side
        slack = 1e-12 * eigenvalues[:, -1]
        zero = torch.zeros_like(slack)
        self._constants = Constants(
            strong_convexity=(eigenvalues[:, 0] - slack).to(b.dtype),
            smoothness=(eigenvalues[:, -1] + slack).to(b.dtype),
            hessian_lipschitz=zero.to(b.dtype),
            mixed_norm=(torch.linalg.matrix_norm(mixed.double(), ord=2) * (1 + 1e-12)).to(b.dtype),
            mixed_lipschitz=zero.to(b.dtype),
        )

    def _apply(self, v: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", self.hessian, v)

    def _linear(self) -> Tensor:
        return self.b - self.mixed @ self.theta["theta"].to(self.dtype)

    def _value(self, x: Tensor) -> Tensor:
        return (0.5 * x * self._apply(x) - x * self._linear()).sum(1)

    def _grad(self, x: Tensor) -> Tensor:
        return self._apply(x) - self._linear()

    def _linearize(self, x: Tensor) -> Linearization:
        return _QuadraticLinearization(self, x)

    def constants(self) -> Constants:
        return self._constants

    def initial(self) -> Tensor:
        return torch.zeros_like(self.b)

    def minimizer(self) -> Tensor:
        """The exact minimizer, ``(B, d)``."""
        return torch.linalg.solve(self.hessian, self._linear().detach())

    def subset(self, index: Tensor) -> QuadraticProblem:
        return QuadraticProblem(
            self.hessian[index], self.b[index], self.mixed[index], self.theta["theta"], cost=self.cost
        )

    def double(self) -> QuadraticProblem:
        if self.dtype == torch.float64:
            return self
        return QuadraticProblem(
            self.hessian.double(), self.b.double(), self.mixed.double(), self.theta["theta"], cost=self.cost
        )

    def gradient_rounding(self, x: Tensor) -> Tensor:
        unit = torch.finfo(self.dtype).eps
        scale = self._constants.smoothness * x.norm(dim=1) + self.b.norm(dim=1)
        return 4 * unit * self.b.shape[1] ** 0.5 * scale


class _QuadraticLinearization(Linearization):
    def __init__(self, problem: QuadraticProblem, x: Tensor):
        self.problem = problem
        self.x = x
        self.grad = problem._grad(x)
        self.constants = problem.constants()

    def hvp(self, v: Tensor) -> Tensor:
        return self.problem._apply(v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {"theta": torch.einsum("bdn,bd->n", self.problem.mixed, q)}

    def mixed_columns(self) -> Tensor:
        return self.problem.mixed.transpose(1, 2)

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        zero = torch.zeros_like(radius)
        return Directional(zero, zero, zero.unsqueeze(1).expand(-1, self.problem.mixed.shape[2]))

    def subset(self, index: Tensor) -> Linearization:
        return _QuadraticLinearization(self.problem.subset(index), self.x[index])
