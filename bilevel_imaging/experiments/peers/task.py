"""A bilevel problem that every library can read: its energy in array code that PyTorch and JAX both run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor


def tikhonov(xp: Any, x: Any, theta: Any) -> Any:
    """exp(theta_0) / 2 * ||D x||^2 with forward differences, zero at the last row and column."""
    return 0.5 * xp.exp(theta[0]) * (((x[:, 1:] - x[:, :-1]) ** 2).sum() + ((x[1:] - x[:-1]) ** 2).sum())


def total_variation(xp: Any, x: Any, theta: Any) -> Any:
    """exp(theta_0) * sum over pixels of sqrt(dx^2 + dy^2 + exp(theta_1)^2), the same differences."""
    dx = xp.concatenate((x[:, 1:] - x[:, :-1], 0 * x[:, :1]), 1)
    dy = xp.concatenate((x[1:] - x[:-1], 0 * x[:1]), 0)
    return xp.exp(theta[0]) * xp.sqrt(dx**2 + dy**2 + xp.exp(2 * theta[1])).sum()


@dataclass(frozen=True)
class Task:
    """min over theta of 1/2 ||x* - x_true||^2, x* = argmin 1/2 ||A x - y||^2 + R(x; theta) + ridge/2 ||x||^2.

    Attributes:
        x_true: ground truth, float64, ``(H, W)``.
        y: measurement, float64, ``(H, W)``; every solve starts here.
        theta: parameters at which the hypergradient is wanted, float64, ``(P,)``.
        physics: A as a deepinv operator.
        transfer: A as a real factor of the half spectrum, ``(H, W // 2 + 1)``; ``None`` for the identity.
        regularizer: R, as ``regularizer(xp, x, theta)`` with ``xp`` either ``torch`` or ``jax.numpy``.
        ridge: coefficient of 1/2 ||x||^2.
        smoothness: Lipschitz constant L of the gradient of the energy; gradient steps are 1 / L long.
        enough: gradient steps after which the solve is finished for all practical purposes.
    """

    x_true: Tensor
    y: Tensor
    theta: Tensor
    physics: LinearPhysics
    transfer: Tensor | None
    regularizer: Callable[[Any, Any, Any], Any]
    ridge: float
    smoothness: float
    enough: int

    def prior(self, xp: Any, x: Any, theta: Any) -> Any:
        """R(x; theta) + ridge/2 ||x||^2."""
        return self.regularizer(xp, x, theta) + 0.5 * self.ridge * (x**2).sum()

    def energy(self, xp: Any, x: Any, theta: Any) -> Any:
        """The lower-level energy of one image ``(H, W)``."""
        blurred = x
        if self.transfer is not None:
            blurred = xp.fft.irfft2(_array(xp, self.transfer) * xp.fft.rfft2(x), s=tuple(self.y.shape))
        return 0.5 * ((blurred - _array(xp, self.y)) ** 2).sum() + self.prior(xp, x, theta)

    def loss(self, xp: Any, x: Any) -> Any:
        """1/2 ||x - x_true||^2."""
        return 0.5 * ((x - _array(xp, self.x_true)) ** 2).sum()

    def gradient(self, x: Tensor, theta: Tensor) -> Tensor:
        """Gradient of the energy in x, itself differentiable in x and theta."""
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            return torch.autograd.grad(self.energy(torch, leaf, theta), leaf, create_graph=True)[0]

    def step(self, x: Tensor, theta: Tensor) -> Tensor:
        """One gradient step of length 1 / L: the map whose fixed point is the minimizer."""
        return x - self.gradient(x, theta) / self.smoothness

    def descend(self, steps: int) -> Tensor:
        """x after so many gradient steps from y, nothing recorded."""
        x, theta = self.y, self.theta.detach()
        for _ in range(steps):
            x = self.step(x, theta).detach()
        return x

    def parameters(self) -> Tensor:
        """A copy of theta that records gradients."""
        return self.theta.detach().clone().requires_grad_(True)


def _array(xp: Any, tensor: Tensor) -> Any:
    return tensor if xp is torch else xp.asarray(tensor.numpy())
