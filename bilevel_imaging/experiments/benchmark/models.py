"""Energies of a whole batch in array code that PyTorch and JAX both run: what other libraries are given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Model:
    """Lower-level energy, summed over the batch: 1/2 ||x - y||^2 + R(x; theta), ``(B, 1, H, W)``.

    ``data`` holds whatever the energy is made of besides x and theta, as arrays of one library.

    Attributes:
        shapes: the parts of the flat theta, by name and in order.
        gradients: how often :meth:`gradient` was called.
    """

    shapes: Shapes
    gradients: int = field(default=0, init=False)

    @property
    def recorded(self) -> bool:
        """Whether the gradient comes from autograd; else it is written out."""
        return type(self).gradient is Model.gradient

    def data(self, y: Tensor) -> dict[str, Tensor]:
        """What belongs to a measurement."""
        return {"y": y}

    def split(self, theta: Any) -> dict[str, Any]:
        """The flat theta by names."""
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            parts[name] = theta[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return parts

    def fit(self, xp: Any, x: Any, data: dict[str, Any]) -> Any:
        """The data term."""
        return 0.5 * ((x - data["y"]) ** 2).sum()

    def prior(self, xp: Any, x: Any, theta: Any) -> Any:
        """R by image, ``(B,)``."""
        raise NotImplementedError

    def value(self, xp: Any, x: Any, theta: Any, data: dict[str, Any]) -> Any:
        """The energy, with ``xp`` either ``torch`` or ``jax.numpy``."""
        return self.fit(xp, x, data) + self.prior(xp, x, theta).sum()

    def gradient(self, x: Tensor, theta: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Gradient in x, differentiable in x and theta where a graph is recorded."""
        self.gradients += 1
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            recorded = x.requires_grad or theta.requires_grad
            value = self.value(torch, leaf, theta, data)
            return torch.autograd.grad(value, leaf, create_graph=recorded)[0]


class TotalVariationModel(Model):
    """Smoothed isotropic total variation, forward differences that are zero at the last row and column."""

    def prior(self, xp: Any, x: Any, theta: Any) -> Any:
        dx = xp.concatenate((x[..., 1:] - x[..., :-1], xp.zeros_like(x[..., :1])), -1)
        dy = xp.concatenate((x[..., 1:, :] - x[..., :-1, :], xp.zeros_like(x[..., :1, :])), -2)
        return xp.exp(theta[0]) * xp.sqrt(dx**2 + dy**2 + xp.exp(2 * theta[1])).sum((1, 2, 3))

    def gradient(self, x: Tensor, theta: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Written out by hand, which is faster than recording the energy."""
        self.gradients += 1
        return self._fit_gradient(x, data) + theta[0].exp() * self._written(x, theta)

    def _fit_gradient(self, x: Tensor, data: dict[str, Tensor]) -> Tensor:
        return x - data["y"]

    @staticmethod
    def _written(x: Tensor, theta: Tensor) -> Tensor:
        dx = functional.pad(x[..., 1:] - x[..., :-1], (0, 1))
        dy = functional.pad(x[..., 1:, :] - x[..., :-1, :], (0, 0, 0, 1))
        reciprocal = (dx * dx + dy * dy + (2 * theta[1]).exp()).rsqrt()
        px, py = dx * reciprocal, dy * reciprocal
        transposed = functional.pad(px[..., :-1], (1, 0)) - px
        return transposed + functional.pad(py[..., :-1, :], (0, 0, 1, 0)) - py


@dataclass
class DeblurringModel(TotalVariationModel):
    """1/2 ||A x - y||^2 + ridge/2 ||x||^2 + total variation for a circular A that is real in frequency.

    The data term is summed over the half spectrum (Parseval), so that value and gradient need one transform each.

    Attributes:
        transfer: A on the half spectrum, ``(H, W // 2 + 1)`` float64.
        ridge: see above.
    """

    transfer: Tensor
    ridge: float

    def data(self, y: Tensor) -> dict[str, Tensor]:
        share = torch.full((y.shape[-1] // 2 + 1,), 2.0 / (y.shape[-1] * y.shape[-2]), dtype=y.dtype, device=y.device)
        share[0] /= 2
        if y.shape[-1] % 2 == 0:
            share[-1] /= 2
        return {"spectrum": torch.fft.rfft2(y), "transfer": self.transfer.to(y), "share": share}

    def fit(self, xp: Any, x: Any, data: dict[str, Any]) -> Any:
        residual = data["transfer"] * xp.fft.rfft2(x) - data["spectrum"]
        squares = residual.real**2 + residual.imag**2
        return 0.5 * (data["share"] * squares).sum() + 0.5 * self.ridge * (x**2).sum()

    def _fit_gradient(self, x: Tensor, data: dict[str, Tensor]) -> Tensor:
        residual = data["transfer"] * torch.fft.rfft2(x) - data["spectrum"]
        return torch.fft.irfft2(data["transfer"] * residual, s=x.shape[-2:]) + self.ridge * x


@dataclass
class RidgeModel(Model):
    """Potentials of filter responses; filters have mean 0 and norm 1, images are continued by reflection."""

    def responses(self, xp: Any, x: Any, filters: Any) -> Any:
        """``(B, K, H, W)``."""
        centered = filters - filters.mean((2, 3))[..., None, None]
        kernels = centered / xp.sqrt((centered**2).sum((1, 2, 3)))[:, None, None, None]
        return correlate(xp, reflect(xp, x, filters.shape[-1] // 2), kernels)

    def prior(self, xp: Any, x: Any, theta: Any) -> Any:
        parts = self.split(theta)
        return self.potentials(xp, self.responses(xp, x, parts["filter_layers.0"]), parts).sum((1, 2, 3))

    def potentials(self, xp: Any, z: Any, parts: dict[str, Any]) -> Any:
        """psi_k of responses ``(B, K, H, W)``."""
        raise NotImplementedError


@dataclass
class ExpertsModel(RidgeModel):
    """weight * weight_k * (sqrt(t^2 + nu_k^2) - nu_k).

    Attributes:
        log_weight: logarithm of the common weight.
    """

    log_weight: float

    def potentials(self, xp: Any, z: Any, parts: dict[str, Any]) -> Any:
        weight = xp.exp(parts["log_weights"] + self.log_weight)[:, None, None]
        nu = xp.exp(parts["log_smoothings"])[:, None, None]
        return weight * (xp.sqrt(z**2 + nu**2) - nu)


@dataclass
class SplineModel(RidgeModel):
    """Convex splines: psi_k'' interpolates exp(log_curvatures_k) at the knots reach (j / n)^2 and 0 at the last one.

    Attributes:
        reach: the last knot.
    """

    reach: float

    def potentials(self, xp: Any, z: Any, parts: dict[str, Any]) -> Any:
        curvatures = xp.exp(parts["log_curvatures"])
        count = curvatures.shape[1]
        knots = [self.reach * (j / count) ** 2 for j in range(count + 1)]
        columns = [curvatures[:, j] for j in range(count)] + [xp.zeros_like(curvatures[:, 0])]
        slopes = [(columns[j + 1] - columns[j]) / (knots[j + 1] - knots[j]) for j in range(count)]
        slopes.append(xp.zeros_like(slopes[0]))
        # psi of |t| as a sum of cubes that begin at the knots
        t = xp.abs(z)
        total = 0.5 * columns[0][:, None, None] * t**2
        previous = xp.zeros_like(slopes[0])
        for knot, slope in zip(knots, slopes, strict=True):
            beyond = xp.clip(t - knot, 0, None)
            total = total + ((slope - previous) / 6)[:, None, None] * beyond * beyond * beyond
            previous = slope
        return total


def reflect(xp: Any, x: Any, margin: int) -> Any:
    """Images continued by reflection about the edge of the last pixel."""
    x = xp.concatenate((xp.flip(x[..., :margin], (3,)), x, xp.flip(x[..., -margin:], (3,))), -1)
    return xp.concatenate((xp.flip(x[..., :margin, :], (2,)), x, xp.flip(x[..., -margin:, :], (2,))), -2)


def correlate(xp: Any, x: Any, kernels: Any) -> Any:
    """``(B, C, H + s - 1, W + s - 1)`` with ``(K, C, s, s)`` to ``(B, K, H, W)``."""
    if xp is torch:
        return functional.conv2d(x, kernels)
    from jax import lax

    return lax.conv(x, kernels, (1, 1), "VALID")
