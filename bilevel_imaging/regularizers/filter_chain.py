"""Filters as a chain of convolutions, of mean 0 and norm 1."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def compose(layers: list[Tensor]) -> Tensor:
    """The filters that a chain of correlations amounts to: ``(f_l, f_{l-1}, s_l, s_l)`` to ``(f_L, C, s, s)``."""
    kernels = layers[0]
    for layer in layers[1:]:
        # correlations in a row are one correlation with the full convolution of their filters
        images = kernels.transpose(0, 1)
        kernels = functional.conv2d(images, layer.flip(2, 3), padding=layer.shape[-1] - 1).transpose(0, 1)
    return kernels


def normalize(kernels: Tensor) -> Tensor:
    """Minus the mean of every channel, divided by the norm of the filter."""
    centered = kernels - kernels.mean((2, 3), keepdim=True)
    size = centered.square().sum((1, 2, 3), keepdim=True).sqrt()
    return centered / size.clamp(min=torch.finfo(kernels.dtype).tiny)


def jacobian_bound(layers: list[Tensor]) -> float:
    """Bound of the norm of the derivative of ``normalize(compose(layers))`` in all layers together.

    The composition is linear in every layer, with the convolution by what is before and behind it; normalization adds a
    projection divided by the norm of the filter.
    """
    kernels = compose(layers)
    centered = kernels - kernels.mean((2, 3), keepdim=True)
    smallest = float(centered.flatten(1).norm(dim=1).min())
    total = 0.0
    for n in range(len(layers)):
        factor = 1.0
        for other in layers[:n] + layers[n + 1 :]:
            factor *= _convolution_norm(other)
        total += factor**2
    return math.sqrt(total) / smallest if smallest > 0 else math.inf


def _convolution_norm(layer: Tensor) -> float:
    """sup over frequencies of the Frobenius norm of the matrix of transfer functions."""
    return float(transfer_power(layer).sum((0, 1)).amax().sqrt())


def transfer_power(kernels: Tensor) -> Tensor:
    """|w^|^2 on a fine grid of frequencies, ``(..., s, s)`` to ``(..., n)`` float64, times what the grid may miss.

    A trigonometric polynomial of degree d is at most 1 / cos(pi d / n) times its largest value on n equispaced points
    (Ehlich & Zeller 1964), in each of the two directions. So the largest entry of a sum of these bounds the sum.
    """
    size = kernels.shape[-1]
    points = 2 ** math.ceil(math.log2(16 * size))
    spectrum = torch.fft.rfft2(kernels.double(), s=(points, points)).abs().square()
    return spectrum.flatten(-2) / math.cos(math.pi * (size - 1) / points) ** 2
