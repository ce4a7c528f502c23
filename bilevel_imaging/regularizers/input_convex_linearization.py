"""Derivatives of an input-convex network frozen at one x: tangents forward, then backward."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.nn.grad import conv2d_weight

from bilevel_imaging.derivatives import Constants, Directional, Linearization
from bilevel_imaging.regularizers.input_convex_bounds import NetworkBounds, stored_slope
from bilevel_imaging.tensors import norm

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.input_convex import InputConvex


class InputConvexLinearization(Linearization):
    """Caches of every layer the features z, the slope of the activation, m = dR/dp, and its derivative in p."""

    def __init__(self, regularizer: InputConvex, x: Tensor):
        self.regularizer, self.x = regularizer, x
        self.constants = regularizer.constants(x.shape)
        self.weights = regularizer.weights_like(x).detach()
        sums, self.features = self.weights.forward(x)
        self.of_sums, of_features = self.weights.backward(sums)
        beta = regularizer.beta
        self.slopes = [torch.sigmoid(beta * p) for p in sums]
        self.curvatures = [beta * s * (1 - s) * c for s, c in zip(self.slopes, of_features, strict=True)]
        self.grad = self.weights.image_of(self.of_sums) + regularizer.strong * x

    def _tangents(self, v: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Derivatives along v of the features z_{l+1} and of m_l."""
        weights = self.weights
        sums: list[Tensor] = []
        features: list[Tensor] = []
        for layer, kernel in enumerate(weights.image):
            p = weights.convolve(kernel, v)
            if layer:
                p = p + weights.convolve(weights.hidden[layer - 1], features[-1])
            sums.append(p)
            features.append(self.slopes[layer] * p)
        of_sums: list[Tensor] = []
        for layer in reversed(range(len(sums))):
            m = self.curvatures[layer] * sums[layer]
            if of_sums:
                m = m + self.slopes[layer] * weights.adjoint(weights.hidden[layer], of_sums[-1])
            of_sums.append(m)
        return features, of_sums[::-1]

    def hvp(self, v: Tensor) -> Tensor:
        return self.weights.image_of(self._tangents(v)[1]) + self.regularizer.strong * v

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        """<q, grad R> is the derivative of R along q; the derivative of a kernel is a correlation of m_l with what it
        is applied to, so that of the product has two terms."""
        features, of_sums = self._tangents(q)
        products: dict[str, Tensor] = {}
        for name, parameter in self.regularizer.trainable().items():
            kind, _, number = name.partition(".")
            layer = int(number) if number else 0
            if kind == "output":
                product = features[-1].sum((0, 2, 3)) * torch.sigmoid(parameter.detach().double())
            elif kind == "biases":
                product = of_sums[layer].sum((0, 2, 3))
            elif kind == "input_kernels":
                product = self._correlation(parameter, layer, of_sums, self.x, q)
            else:
                inside = (self.features[layer], features[layer])
                product = self._correlation(parameter, layer + 1, of_sums, *inside)
                product = product * torch.sigmoid(parameter.detach().double())
            products[name] = product.to(parameter.dtype)
        return products

    def _correlation(self, kernel: Tensor, layer: int, of_sums: list[Tensor], z: Tensor, tangent: Tensor) -> Tensor:
        padding = self.weights.padding
        return conv2d_weight(z, kernel.shape, of_sums[layer], padding=padding) + conv2d_weight(
            tangent, kernel.shape, self.of_sums[layer], padding=padding
        )

    @cached_property
    def _bounds(self) -> NetworkBounds:
        return self.regularizer.bounds()

    @property
    def _up(self) -> float:
        """Covers the rounding of a few sums in the dtype of x."""
        return 1 + (1e-4 if self.x.dtype == torch.float32 else 1e-10)

    def constants_on_ball(self, radius: Tensor) -> Constants:
        """The slope of the mixed derivative, from the largest patches of x and of the features on the ball."""
        radius, bounds = radius.double(), self._bounds
        reach = [1.0, *bounds.slope[:-1]]  # of what a patch is taken of, per change of x
        images = (self.x, *self.features[:-1])
        patches = [self._largest_patch(z) + radius * far for z, far in zip(images, reach, strict=True)]
        learned = self.regularizer.trainable()
        each = [bounds.mixed_slope(name, p.detach(), patches) for name, p in learned.items()]
        mixed = torch.stack(each).norm(dim=0) if each else torch.zeros_like(radius)
        return replace(self.constants, mixed_lipschitz=mixed, reason="")

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """D^3 R[q] from the largest entries of Dp_l q, which are far below their Euclidean norms."""
        weights, largest = self.weights, []
        size = torch.zeros_like(q)
        for layer, kernel in enumerate(weights.image):
            own = weights.convolve(kernel, q).abs()
            size = own + weights.convolve(weights.hidden[layer - 1], size) if layer else own  # sigma' <= 1
            largest.append(self._up * size.flatten(1).amax(1).double())
        mixed = self.constants_on_ball(radius).mixed_lipschitz * norm(q).double()
        return Directional(self._bounds.third_along(largest).to(q.dtype), mixed.to(q.dtype))

    def mixed_norm_bound(self) -> Tensor:
        """Upper bound of ||J||, ``(B,)`` float64, block by block, from the slopes and curvatures met at x.

        <Dm_l u, delta * z> + <m_l, delta * Dz u> with ||delta * z|| <= sqrt(taps) ||delta|| ||z|| for z = x or z_l.
        """
        bounds, slopes = self._bounds, [s.flatten(1).amax(1).double() for s in self.slopes]
        moved = [bounds.image[0] * torch.ones_like(slopes[0])]  # of Dp_l
        for layer in range(1, len(slopes)):
            moved.append(bounds.image[layer] + bounds.hidden[layer] * slopes[layer - 1] * moved[-1])
        after = torch.zeros_like(slopes[0])
        first: list[Tensor] = []  # of Dm_l
        for layer in reversed(range(len(slopes))):
            curvature = self.curvatures[layer].flatten(1).amax(1).double()
            after = curvature * moved[layer] + bounds.hidden[layer + 1] * slopes[layer] * after
            first.insert(0, after)
        pixels, taps = math.sqrt(self.x[0, 0].numel()), math.sqrt(bounds.taps)
        sizes = [norm(m).double() for m in self.of_sums]
        blocks = []
        for name, parameter in self.regularizer.trainable().items():
            kind, _, number = name.partition(".")
            layer = int(number) if number else 0
            if kind == "output":
                blocks.append(stored_slope(parameter) * pixels * slopes[-1] * moved[-1])
            elif kind == "biases":
                blocks.append(pixels * first[layer])
            elif kind == "input_kernels":
                blocks.append(taps * (first[layer] * norm(self.x).double() + sizes[layer]))
            else:
                z = norm(self.features[layer]).double()
                along = sizes[layer + 1] * slopes[layer] * moved[layer]
                blocks.append(stored_slope(parameter) * taps * (first[layer + 1] * z + along))
        return self._up * torch.stack([torch.zeros_like(after), *blocks]).norm(dim=0)

    def _largest_patch(self, z: Tensor) -> Tensor:
        """Largest Euclidean norm of what a kernel covers at once, ``(B,)`` float64, rounded up."""
        size = self.regularizer.kernel_size
        squares = z.double().square().sum(1, keepdim=True)
        sums = avg_pool2d(squares, size, stride=1, padding=size // 2, divisor_override=1)
        return sums.flatten(1).amax(1).sqrt() * self._up

    def subset(self, index: Tensor) -> Linearization:
        return InputConvexLinearization(self.regularizer, self.x[index])
