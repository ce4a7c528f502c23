"""Operators diag(d) + D^T M D + K of images, D the forward differences and K a convolution: products, and whole runs of
conjugate gradients."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.native.convolutions import SeparableConvolution
from bilevel_imaging.native.library import function, integers, pointer, reals, threads

_PROGRESS = 8  # numbers in the C struct: six doubles and two integers, 8 bytes each


@dataclass(frozen=True)
class Stencil:
    """v -> d v + D^T M D v + K v with a symmetric 2 x 2 matrix M = [[a, b], [b, c]] at every pixel.

    D are forward differences, 0 at the last row and column, channel by channel; b must be 0 there.

    Attributes:
        field: a, b, c, contiguous, ``(3, B, C, H, W)``, on the CPU.
        diagonal: d, contiguous, ``(B, C, H, W)``, or ``None`` if it is the same number everywhere.
        constant: that number.
        convolution: K, symmetric, or ``None``.
        count: told how many products have been made.
    """

    field: Tensor
    diagonal: Tensor | None = None
    constant: float = 0.0
    convolution: SeparableConvolution | None = None
    count: Callable[[int], None] = lambda products: None

    def plus(self, diagonal: Tensor) -> Stencil:
        """With ``diagonal``, of one number or ``(B, C, H, W)``, in place of this one's zero."""
        if diagonal.numel() == 1:
            return replace(self, constant=float(diagonal))
        return replace(self, diagonal=diagonal.to(self.field.dtype).expand(self.field.shape[1:]).contiguous())

    def convolved(self, convolution: SeparableConvolution) -> Stencil:
        """With ``convolution`` in place of none."""
        return replace(self, convolution=convolution)

    def counted(self, count: Callable[[int], None]) -> Stencil:
        """The same, reporting to ``count``, too."""
        before = self.count

        def both(products: int) -> None:
            before(products)
            count(products)

        return replace(self, count=both)

    def product(self, v: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        v = v.contiguous()
        z = torch.empty_like(v)
        kernel = function("stencil_product", v.dtype)
        kernel(pointer(v), *self._operator(), pointer(z), *self._sizes(), threads())
        return z

    def solve(self, q: Tensor, r: Tensor, p: Tensor, states: SystemStates, max_iter: int) -> None:
        """Conjugate gradients, in place, until every system has stopped.

        A sample runs while its status is 0 (running), its residual is above its target and it has made fewer than
        ``max_iter`` iterations. Every sample is computed alone, whatever its batch and the number of threads.

        Args:
            q: iterates, ``(B, C, H, W)``, contiguous.
            r: their residuals, likewise.
            p: their search directions, likewise.
            states: where the runs stand; changed.
            max_iter: limit of iterations.
        """
        before = states.iterations.sum()
        kernel = function("stencil_solve", q.dtype)
        sizes, limit = self._sizes(), ctypes.c_int64(max_iter)
        vectors = (pointer(q), pointer(r), pointer(p), pointer(states.table))
        kernel(*self._operator(), *vectors, *sizes, limit, threads())
        self.count(int(states.iterations.sum() - before))

    def _operator(self) -> tuple:
        a, b, c = (pointer(plane) for plane in self.field)
        filters = None if self.convolution is None else self.convolution.filters
        terms, taps = (0, 0) if filters is None else filters.shape[2:5:2]
        local = (a, b, c, pointer(self.diagonal), *reals(self.field.dtype, self.constant))
        return *local, pointer(filters), *integers(terms, taps)

    def _sizes(self) -> tuple[ctypes.c_int64, ...]:
        _, batch, channels, height, width = self.field.shape
        return integers(batch, channels * height, height, width)


class SystemStates:
    """Where the runs of B systems stand: a row per system in the layout of the C struct.

    Args:
        residual, target, rz, radau, lowest, energy: ``(B,)``; see ``linear_solvers.ConjugateGradient``. ``radau`` and
            ``lowest`` may be ``None``: no bound of the energy norm.
        status, iterations: int64 ``(B,)``.
    """

    def __init__(
        self,
        residual: Tensor,
        target: Tensor,
        rz: Tensor,
        radau: Tensor | None,
        lowest: Tensor | None,
        energy: Tensor,
        status: Tensor,
        iterations: Tensor,
    ):
        self.table = torch.empty((len(residual), _PROGRESS), dtype=torch.float64)
        for column, value in enumerate((residual, target, rz, radau, lowest, energy)):
            self.table[:, column] = torch.nan if value is None else value
        self.counters = self.table.view(torch.int64)
        self.counters[:, 6], self.counters[:, 7] = status, iterations

    residual = property(lambda self: self.table[:, 0])
    rz = property(lambda self: self.table[:, 2])
    radau = property(lambda self: self.table[:, 3])
    energy = property(lambda self: self.table[:, 5])
    status = property(lambda self: self.counters[:, 6])
    iterations = property(lambda self: self.counters[:, 7])
