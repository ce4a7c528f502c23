"""Numbers of a lower-level point and an adjoint, in one pass and in double, without an image being stored."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads

_NUMBERS = 10  # of every sample, in the order of measure.h


@dataclass(frozen=True)
class Measured:
    """What the classical certificate asks of x and q; ``(B,)`` float64 unless said otherwise.

    Attributes:
        x_norm, q_norm: of the two.
        grad_norm: ||G||, G the gradient of the energy.
        residual_norm: ||grad f - H q||.
        q_dot_grad: <q, G>.
        products: J^T q, ``(B, n)``.
        gram: J^T J, ``(B, n, n)``.
    """

    x_norm: Tensor
    q_norm: Tensor
    grad_norm: Tensor
    residual_norm: Tensor
    q_dot_grad: Tensor
    products: Tensor
    gram: Tensor


def measure(
    x: Tensor, q: Tensor, b: Tensor, loss_grad: Tensor, *, constant: float, weight: float, smoothing: float
) -> Measured:
    """For the energy constant / 2 ||x||^2 - <b, x> + smoothed isotropic total variation, the parameters being the
    logarithms of its weight and its smoothing.

    Args:
        x: point, ``(B, C, H, W)`` on the CPU.
        q: adjoint, like x; all of them are taken as the numbers that they are.
        b: of the data term, like x.
        loss_grad: grad f, like x.
        constant: of the data term.
        weight: of the total variation.
        smoothing: likewise.
    """
    batch, channels, height, width = x.shape
    table = torch.empty((batch, _NUMBERS), dtype=torch.float64)
    images = tuple(image.contiguous() for image in (x, q, b, loss_grad))
    numbers = (ctypes.c_double(number) for number in (constant, weight, smoothing))
    sizes = integers(batch, channels * height, height, width)
    function("tv_measure", x.dtype)(*(pointer(v) for v in images), *numbers, pointer(table), *sizes, threads())
    x_norm, q_norm, grad_norm, residual_norm = table[:, :4].sqrt().unbind(1)
    gram = table[:, [6, 7, 7, 8]].reshape(batch, 2, 2)
    return Measured(x_norm, q_norm, grad_norm, residual_norm, table[:, 9], table[:, 4:6], gram)
