"""The least-squares data term of circular convolutions: exact in the Fourier basis; few taps as separable ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from deepinv.physics.functional import conv2d
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.energies.data_terms import DataTerm
from bilevel_imaging.native import SeparableConvolution
from bilevel_imaging.tensors import squared_norm
from bilevel_imaging.transforms import fourier_filter, inverse_rfft2, rfft2


class CirculantTerm(DataTerm):
    """A = circular convolution, diagonal in the Fourier basis.

    Args:
        y: ``(B, C, H, W)``.
        transfer: rfft2 of the impulse response, complex128, broadcastable to ``(B, C, H, W // 2 + 1)``. It is computed
            in float64 from the numbers that the filter stores, whatever its dtype: those define the operator.
    """

    applications = 2

    def __init__(self, y: Tensor, transfer: Tensor):
        self.y = y
        shape = (*y.shape[:2], *transfer.shape[-2:])
        single = transfer.to(torch.complex128 if y.dtype == torch.float64 else torch.complex64)
        self.distinct, self.transfer = transfer, single.expand(shape)
        self.shape = y.shape
        self._separated: dict[tuple[str, torch.dtype], SeparableConvolution | None] = {}
        # from real parts, as in ``_times``: an absolute value of complex numbers depends on the place
        power = transfer.real.square() + transfer.imag.square()
        self.power64, self.power = power.expand(shape), power.to(y.dtype).expand(shape)
        # rounding of one float64 FFT of the filter, far below what is needed, kept on the safe side
        self.lowest = power.flatten(1).amin(1).expand(len(y)) * (1 - 1e-12)
        self.highest = power.flatten(1).amax(1).expand(len(y)) * (1 + 1e-12)

    @cached_property
    def aty(self) -> Tensor:
        """A^T y."""
        if self._compiled(self._forward, self.y):
            return self._forward.transposed().product(self.y)
        return inverse_rfft2(self._adjoint_spectrum, self.y.shape[-1])

    @cached_property
    def _adjoint_spectrum(self) -> Tensor:
        """F A^T y."""
        return _times(rfft2(self.y), self.transfer.conj())

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(self.apply(x) - self.y)

    def grad(self, x: Tensor) -> Tensor:
        if self._compiled(self._gram, x):
            return self._gram.product(x) - self.aty
        return inverse_rfft2(rfft2(x) * self.power - self._adjoint_spectrum, x.shape[-1])

    def hvp(self, v: Tensor) -> Tensor:
        return self._gram.product(v) if self._compiled(self._gram, v) else fourier_filter(v, self.power)

    def apply(self, x: Tensor) -> Tensor:
        if self._compiled(self._forward, x):
            return self._forward.product(x)
        return inverse_rfft2(_times(rfft2(x), self.transfer), x.shape[-1])

    def _compiled(self, convolution: SeparableConvolution | None, x: Tensor) -> bool:
        return convolution is not None and native.serves(x, self.power)

    def initial(self) -> Tensor:
        return fourier_filter(self.aty, 1 / (self.power + 0.05))  # Wiener filter for about 5 % noise power

    def subset(self, index: Tensor) -> DataTerm:
        _ = self._forward, self._gram  # once for all subsets
        part = CirculantTerm(self.y[index], self.distinct[index] if len(self.distinct) > 1 else self.distinct)
        part._separated = {key: known and known.of(index) for key, known in self._separated.items()}
        for name in ("aty", "_adjoint_spectrum"):
            if name in self.__dict__:
                part.__dict__[name] = self.__dict__[name][index]
        return part

    def double(self) -> DataTerm:
        exact = CirculantTerm(self.y.double(), self.distinct)
        exact._separated = self._separated  # kept here: terms in float64 are made anew for every hypergradient
        return exact

    def gradient_scale(self, x: Tensor) -> Tensor:
        size = self.highest * x.double().flatten(1).norm(dim=1)
        size = size + self.highest.sqrt() * self.y.double().flatten(1).norm(dim=1)
        return size * math.log2(max(4, self.shape[-1] * self.shape[-2]))  # error growth of an FFT

    def spectrum(self) -> Tensor:
        return self.power

    def expanded(self) -> tuple[Tensor, Tensor]:
        return self.aty, 0.5 * squared_norm(self.y)

    def convolution(self) -> SeparableConvolution | None:
        return self._gram

    @property
    def _forward(self) -> SeparableConvolution | None:
        """A for compiled code."""
        return self._separation("forward", lambda: self.distinct.expand(self.transfer.shape))

    @property
    def _gram(self) -> SeparableConvolution | None:
        """A^T A for compiled code."""
        return self._separation("gram", lambda: self.power64)

    def _separation(self, name: str, transfer: Callable[[], Tensor]) -> SeparableConvolution | None:
        key = (name, self.y.dtype)
        if key not in self._separated:
            self._separated[key] = native.separable(transfer(), self.y.shape[-1], self.y.dtype)
        return self._separated[key]


def circular_response(kernel: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """What deepinv's circular convolutions make of a point at the origin, float64 ``(b, c, *size)``.

    A kernel larger than the image is wrapped around it.
    """
    delta = torch.zeros((1, kernel.shape[1], *size), dtype=torch.float64, device=kernel.device)
    delta[..., 0, 0] = 1
    return conv2d(delta.expand(kernel.shape[0], -1, -1, -1), filter=kernel.double(), padding="circular")


def _times(a: Tensor, b: Tensor) -> Tensor:
    """a b from real products: complex ones round differently in the vectorized and in the remaining part of an array,
    and an image is to have the same bits in every batch."""
    return torch.complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)
