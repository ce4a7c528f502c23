"""Operators diag(d) + D^T M D + K of images, D the forward differences and K a convolution: products, and whole runs of
conjugate gradients."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.native.convolutions import SeparableConvolution
from bilevel_imaging.native.library import function, integers, pointer, reals, threads
from bilevel_imaging.native.total_variation import model_field

_DOUBLES, _INTEGERS = 7, 2  # numbers in the C struct, 8 bytes each


@dataclass(frozen=True)
class Stencil:
    """v -> d v + D^T M D v + K v with a symmetric 2 x 2 matrix M = [[a, b], [b, c]] at every pixel.

    D are forward differences, 0 at the last row and column, channel by channel; b must be 0 there.

    Attributes:
        field: a, b, c, contiguous, ``(3, B, C, H, W)``, on the CPU.
        diagonal: d, contiguous, ``(B, C, H, W)``, or ``None`` if it is the same number everywhere.
        constant: that number.
        convolution: K, symmetric, or ``None``.
        weight: if given, ``field`` is the unit field n of total variation and 1 / s, as in ``linearize``, and
            M = weight (I - n n^T) / s: a solver makes that of one image at a time, in the cache.
        count: told how many products have been made.
    """

    field: Tensor
    diagonal: Tensor | None = None
    constant: float = 0.0
    convolution: SeparableConvolution | None = None
    weight: float | None = None
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
        if self.weight is not None:
            unit, reciprocal = self.field[:2], self.field[2:]
            return replace(self, field=model_field(unit, unit, reciprocal, self.weight), weight=None).product(v)
        v = v.contiguous()
        z = torch.empty_like(v)
        kernel = function("stencil_product", v.dtype)
        kernel(pointer(v), *self._planes(), *self._rest(), pointer(z), *self._sizes(), threads())
        return z

    def solve(
        self, q: Tensor, r: Tensor, p: Tensor, states: SystemStates, max_iter: int, rhs: Tensor | None = None
    ) -> None:
        """Conjugate gradients, in place, until every system has stopped.

        A sample runs while its status is 0 (running), its residual is above its target and it has made fewer than
        ``max_iter`` iterations. Every sample is computed alone, whatever its batch and the number of threads.

        Args:
            q: iterates, ``(B, C, H, W)``, contiguous.
            r: their residuals, likewise.
            p: their search directions, likewise.
            states: where the runs stand; changed.
            max_iter: limit of iterations.
            rhs: if given, contiguous, of those samples that run r becomes ``rhs`` minus the product with q, which takes
                one product more; ``states`` tell its norm and how far the recursion was from it.
        """
        before, running = states.iterations.sum(), 0 if rhs is None else int((states.status == 0).sum())
        kernel = function("stencil_solve", q.dtype)
        sizes, limit = self._sizes(), ctypes.c_int64(max_iter)
        vectors = (pointer(rhs), pointer(q), pointer(r), pointer(p), pointer(states.table))
        weight = reals(q.dtype, math.nan if self.weight is None else self.weight)
        kernel(*self._planes(), *weight, *self._rest(), *vectors, *sizes, limit, threads())
        self.count(int(states.iterations.sum() - before) + running)

    def _planes(self) -> tuple[ctypes.c_void_p, ...]:
        return tuple(pointer(plane) for plane in self.field)

    def _rest(self) -> tuple:
        """The diagonal and the convolution."""
        filters = None if self.convolution is None else self.convolution.filters
        terms, taps = (0, 0) if filters is None else filters.shape[2:5:2]
        return pointer(self.diagonal), *reals(self.field.dtype, self.constant), pointer(filters), *integers(terms, taps)

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
        self.table = torch.empty((len(residual), _DOUBLES + _INTEGERS), dtype=torch.float64)
        for column, value in enumerate((residual, target, rz, radau, lowest, energy)):
            self.table[:, column] = torch.nan if value is None else value
        self.drift.zero_()
        self.counters = self.table.view(torch.int64)
        self.counters[:, _DOUBLES], self.counters[:, _DOUBLES + 1] = status, iterations

    residual = property(lambda self: self.table[:, 0])
    rz = property(lambda self: self.table[:, 2])
    radau = property(lambda self: self.table[:, 3])
    energy = property(lambda self: self.table[:, 5])
    drift = property(lambda self: self.table[:, 6])
    status = property(lambda self: self.counters[:, _DOUBLES])
    iterations = property(lambda self: self.counters[:, _DOUBLES + 1])
