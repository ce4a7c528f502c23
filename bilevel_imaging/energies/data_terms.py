"""Least-squares data terms 1/2 ||Ax - y||^2, with exact spectra where the operator has one."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.native import SeparableConvolution
from bilevel_imaging.tensors import norm, squared_norm
from bilevel_imaging.transforms import fourier_coordinates, fourier_filter, inverse_rfft2, rfft2


@dataclass(frozen=True)
class FourierModel:
    """A^T A as a filter, exactly or nearly: v -> F^-1 (power F v).

    Attributes:
        power: >= 0, at all frequencies of ``fft2`` or at those of ``rfft2``, which are the first columns of them;
            ``(B, C, H, W)`` or ``(B, C, H, W // 2 + 1)``, or 1 in place of B and C.
        filter: (v, response) -> F^-1 (response F v), for responses like ``power``.
        complex: whether the two channels are real and imaginary part of one coefficient.
    """

    power: Tensor
    filter: Callable[[Tensor, Tensor], Tensor]
    complex: bool = False


class DataTerm(abc.ABC):
    """1/2 ||A_i x_i - y_i||^2 for B images.

    Attributes:
        lowest: lambda_min(A^T A), ``(B,)`` float64; a lower bound.
        highest: ||A||^2, ``(B,)`` float64; an upper bound, or ``None`` if not known.
        reason: why ``highest`` is ``None``, in words.
        applications: applications of A or A^T in one gradient or Hessian product.
    """

    lowest: Tensor
    highest: Tensor | None
    reason = ""
    shape: torch.Size
    applications = 0

    @abc.abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """``(B,)``."""

    @abc.abstractmethod
    def grad(self, x: Tensor) -> Tensor:
        """A^T (A x - y)."""

    @abc.abstractmethod
    def hvp(self, v: Tensor) -> Tensor:
        """A^T A v."""

    @abc.abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x, or W A x with a weight W: the transpose of y -> -grad, which a layer needs to differentiate in y."""

    @abc.abstractmethod
    def initial(self) -> Tensor:
        """A rough reconstruction, ``(B, C, H, W)``."""

    @abc.abstractmethod
    def subset(self, index: Tensor) -> DataTerm | None:
        """The samples ``index`` alone; ``None`` if the operator can't be restricted to them."""

    def double(self) -> DataTerm | None:
        """The same term in float64, or ``None`` if the operator can't be evaluated in float64."""
        return None

    def gradient_scale(self, x: Tensor) -> Tensor:
        """Size of the terms added up in ``grad(x)``, ``(B,)`` float64."""
        return norm(self.grad(x)).double()

    def coarse_gradient_scale(self, x: Tensor) -> Tensor:
        """A bound of that, which may cost less."""
        return self.gradient_scale(x)

    def diagonal(self) -> Tensor | None:
        """Diagonal of A^T A, broadcastable to the image, if A^T A is diagonal."""
        return None

    def spectrum(self) -> Tensor | None:
        """Eigenvalues of A^T A in the rfft2 basis, if it is a circular convolution."""
        return None

    def expanded(self) -> tuple[Tensor, Tensor] | None:
        """b = A^T W y ``(B, C, H, W)`` and c = ||W^(1/2) y||^2 / 2 ``(B,)``, where they are at hand: this term is
        1/2 <x, A^T W A x> - <b, x> + c."""
        return None

    def convolution(self) -> SeparableConvolution | None:
        """A^T A as a sum of separable convolutions for compiled code, if it is one of few taps."""
        return None

    def fourier_model(self) -> FourierModel | None:
        """What preconditioners take A^T A for, if it is close to a filter; only their speed depends on it."""
        spectrum = self.spectrum()
        return None if spectrum is None else FourierModel(spectrum, fourier_filter)

    def whitening(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        """v -> w, linear, with ||w||^2 = <v, (A^T A + shift I)^{-1} v>, where that is cheap: the metric of certificate
        (M)."""
        diagonal, spectrum = self.diagonal(), self.spectrum()
        if diagonal is not None:
            root = (diagonal + shift).rsqrt()
            return lambda v: v * root
        if spectrum is not None:
            response = (spectrum + shift).rsqrt()
            return lambda v: fourier_coordinates(v, response)
        return None


class IdentityTerm(DataTerm):
    """A = I (denoising)."""

    def __init__(self, y: Tensor):
        self.y = y
        self.shape = y.shape
        one = torch.ones(y.shape[0], dtype=torch.float64, device=y.device)
        self.lowest, self.highest = one, one

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(x - self.y)

    def grad(self, x: Tensor) -> Tensor:
        return x - self.y

    def hvp(self, v: Tensor) -> Tensor:
        return v

    def apply(self, x: Tensor) -> Tensor:
        return x

    def initial(self) -> Tensor:
        return self.y.clone()

    def subset(self, index: Tensor) -> DataTerm:
        return IdentityTerm(self.y[index])

    def double(self) -> DataTerm:
        return IdentityTerm(self.y.double())

    def coarse_gradient_scale(self, x: Tensor) -> Tensor:
        return norm(x).double() + self._size

    @cached_property
    def _size(self) -> Tensor:
        return norm(self.y).double() * (1 + 1e-6)

    def diagonal(self) -> Tensor:
        return self.y.new_ones(())

    def expanded(self) -> tuple[Tensor, Tensor]:
        return self.y, 0.5 * squared_norm(self.y)


class MaskTerm(DataTerm):
    """A = diag(mask) (inpainting); mask broadcastable to y."""

    def __init__(self, y: Tensor, mask: Tensor):
        self.y = y
        self.mask = mask.to(y.dtype).expand_as(y)
        self.shape = y.shape
        squares = (self.mask.double() ** 2).flatten(1)
        self.lowest, self.highest = squares.amin(1), squares.amax(1)

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(self.mask * x - self.y)

    def grad(self, x: Tensor) -> Tensor:
        return self.mask * (self.mask * x - self.y)

    def hvp(self, v: Tensor) -> Tensor:
        return self.mask * (self.mask * v)

    def apply(self, x: Tensor) -> Tensor:
        return self.mask * x

    def initial(self) -> Tensor:
        observed = (self.mask != 0).to(self.y.dtype)
        axes = tuple(range(1, self.y.dim()))
        mean = (self.y * observed).sum(axes, keepdim=True) / observed.sum(axes, keepdim=True).clamp(min=1)
        return torch.where(self.mask != 0, self.y, mean)

    def subset(self, index: Tensor) -> DataTerm:
        return MaskTerm(self.y[index], self.mask[index])

    def double(self) -> DataTerm:
        return MaskTerm(self.y.double(), self.mask.double())

    def gradient_scale(self, x: Tensor) -> Tensor:
        product = self.mask * x
        # products with 0 and 1 are exact; others are rounded before the difference cancels
        rounded = torch.where((self.mask == 0) | (self.mask == 1), 0, product.abs())
        terms = self.mask.abs() * ((product - self.y).abs() + rounded)
        return terms.double().flatten(1).norm(dim=1)

    def diagonal(self) -> Tensor:
        return self.mask**2


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
        # from real parts, as in ``_filter``: an absolute value of complex numbers depends on the place
        power = transfer.real.square() + transfer.imag.square()
        self.power64, self.power = power.expand(shape), power.to(y.dtype).expand(shape)
        # rounding of one float64 FFT of the filter, far below what is needed, kept on the safe side
        self.lowest = power.flatten(1).amin(1).expand(len(y)) * (1 - 1e-12)
        self.highest = power.flatten(1).amax(1).expand(len(y)) * (1 + 1e-12)

    @cached_property
    def aty(self) -> Tensor:
        """A^T y."""
        forward = self._forward
        return self._product(forward and forward.transposed(), self.transfer.conj(), self.y)

    def _filter(self, transfer: Tensor, x: Tensor) -> Tensor:
        if not transfer.is_complex():
            return fourier_filter(x, transfer)
        spectrum = rfft2(x)
        # complex products round differently in the vectorized and in the remaining part of an array: same bits for an
        # image in every batch come from real ones
        a, b, c, d = spectrum.real, spectrum.imag, transfer.real, transfer.imag
        return inverse_rfft2(torch.complex(a * c - b * d, a * d + b * c), x.shape[-1])

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(self.apply(x) - self.y)

    def grad(self, x: Tensor) -> Tensor:
        return self.hvp(x) - self.aty

    def hvp(self, v: Tensor) -> Tensor:
        return self._product(self._gram, self.power, v)

    def apply(self, x: Tensor) -> Tensor:
        return self._product(self._forward, self.transfer, x)

    def _product(self, convolution: SeparableConvolution | None, transfer: Tensor, x: Tensor) -> Tensor:
        if convolution is not None and native.serves(x, self.power):
            return convolution.product(x)
        return self._filter(transfer, x)

    def initial(self) -> Tensor:
        return self._filter(1 / (self.power + 0.05), self.aty)  # Wiener filter for about 5 % noise power

    def subset(self, index: Tensor) -> DataTerm:
        _ = self._forward, self._gram  # once for all subsets
        part = CirculantTerm(self.y[index], self.distinct[index] if len(self.distinct) > 1 else self.distinct)
        part._separated = {key: known and known.of(index) for key, known in self._separated.items()}
        part.aty = self.aty[index]
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
