"""Numbers of a lower-level point and an adjoint, in one pass and in double, without an image being stored."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads

_NUMBERS, _LOCAL_NUMBERS = 10, 21  # of every sample, in the order of measure.h


@dataclass(frozen=True)
class MeasuredEnergies:
    """What the certificate in the norm of the Hessian asks in addition; ``(B,)`` float64 unless said otherwise.

    Attributes:
        adjoint: <q, H q>.
        drift: how far the residual is from the one that was given, from 0 where none was.
        misfit: ||x - b||.
        columns: bounds of ||J_j||_{H^-1} from the total variation alone, ``(B, 2)``.
        split: those from the total variation and from mu, see ``TotalVariationLinearization.split_energy_norms``.
        loss_grad_norm: ||grad f||.
        largest: max |x|.
    """

    adjoint: Tensor
    drift: Tensor
    misfit: Tensor
    columns: Tensor
    split: Tensor
    loss_grad_norm: Tensor
    largest: Tensor


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
        energies: what is in the norm of the Hessian, where that was asked for.
    """

    x_norm: Tensor
    q_norm: Tensor
    grad_norm: Tensor
    residual_norm: Tensor
    q_dot_grad: Tensor
    products: Tensor
    gram: Tensor
    energies: MeasuredEnergies | None = None


def measure(
    x: Tensor,
    q: Tensor,
    b: Tensor,
    loss_grad: Tensor,
    *,
    constant: float,
    weight: float,
    smoothing: float,
    strong_convexity: float | None = None,
    residual: Tensor | None = None,
    difference: bool = False,
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
        strong_convexity: mu of the energy, with which ``energies`` are measured, too.
        residual: a residual grad f - H q for ``energies`` to be compared with, like x.
        difference: with ``strong_convexity`` only: grad f is x - ``loss_grad``.
    """
    batch, channels, height, width = x.shape
    local = strong_convexity is not None
    table = torch.empty((batch, _LOCAL_NUMBERS if local else _NUMBERS), dtype=torch.float64)
    images = tuple(None if image is None else image.contiguous() for image in (x, q, b, loss_grad, residual))
    mu = 0.0 if strong_convexity is None else strong_convexity
    numbers = (ctypes.c_double(number) for number in (constant, weight, smoothing, mu))
    sizes = integers(int(local), int(difference), batch, channels * height, height, width)
    function("tv_measure", x.dtype)(*(pointer(v) for v in images), *numbers, pointer(table), *sizes, threads())
    x_norm, q_norm, grad_norm, residual_norm = table[:, :4].sqrt().unbind(1)
    gram = table[:, [6, 7, 7, 8]].reshape(batch, 2, 2)
    energies = None
    if local:
        drift, misfit, loss_grad_norm = table[:, [11, 12, 19]].sqrt().unbind(1)
        columns, split = table[:, 13:15].sqrt(), (table[:, 15:17] + table[:, 17:19] / mu).sqrt()
        energies = MeasuredEnergies(table[:, 10], drift, misfit, columns, split, loss_grad_norm, table[:, 20])
    return Measured(x_norm, q_norm, grad_norm, residual_norm, table[:, 9], table[:, 4:6], gram, energies)
