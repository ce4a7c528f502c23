"""Small random operators, their dense matrices, and hypergradients by dense linear algebra and autograd alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepinv.physics import LinearPhysics, Tomography
from torch import Tensor

F64 = torch.float64


def drawn(*shape: int, seed: int = 0, low: float = 0.0) -> Tensor:
    return low + (1 - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def kernel(batch: int = 1, channels: int = 1, size: int = 3, *, signed: bool = False, seed: int = 0) -> Tensor:
    """Nonnegative, or of both signs; the sum of absolute values is 1."""
    k = drawn(batch, channels, size, size, seed=seed, low=-1.0 if signed else 0.0)
    return k / k.abs().sum((-2, -1), keepdim=True)


def maps(batch: int, coils: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, coils, height, width, generator=generator, dtype=torch.complex128)


def tomography(width: int = 7, angles: int = 5, **options) -> Tomography:
    return Tomography(angles=angles, img_width=width, **{"normalize": False, "dtype": F64, **options})


def dense(physics: LinearPhysics, x: Tensor, sample: int = 0) -> Tensor:
    """A of one sample, column by column."""
    columns = []
    for j in range(x[0].numel()):
        unit = torch.zeros_like(x).flatten(1)
        unit[:, j] = 1
        columns.append(physics.A(unit.reshape(x.shape))[sample].flatten())
    return torch.stack(columns, 1)


def smoothed_tv(x: Tensor, weight: Tensor, smoothing: Tensor) -> Tensor:
    right, down = torch.zeros_like(x), torch.zeros_like(x)
    right[..., :-1], down[..., :-1, :] = x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]
    return weight * (right.square() + down.square() + smoothing.square()).sqrt().sum()


def true_hypergradient(energy: Callable[[Tensor, Tensor], Tensor], theta: Tensor, x_true: Tensor) -> Tensor:
    """d/dtheta of 1/2 ||x* - x_true||^2 for one image: dense Newton steps, dense implicit differentiation."""
    x = torch.zeros_like(x_true)
    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(lambda z: energy(z, theta), x)
        H = torch.autograd.functional.hessian(lambda z: energy(z, theta), x).reshape(x.numel(), x.numel())
        step = -torch.linalg.solve(H, gradient.flatten()).reshape(x.shape)
        t, value, slope = 1.0, energy(x, theta), (gradient * step).sum()
        while t > 1e-10 and step.norm() > 1e-7 and energy(x + t * step, theta) > value + 1e-4 * t * slope:
            t /= 2
        x = x + t * step
        if float(step.norm()) < 1e-13:
            break
    assert float(step.norm()) < 1e-10
    q = torch.linalg.solve(H, (x - x_true).flatten())

    def pairing(parameters: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(energy(leaf, parameters), leaf, create_graph=True)
        return (g.flatten() * q).sum()

    return -torch.autograd.functional.jacobian(pairing, theta)
