"""Least-squares data terms 1/2 ||Ax - y||^2, with exact spectra where the operator has one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging.native import SeparableConvolution
from bilevel_imaging.tensors import norm, squared_norm
from bilevel_imaging.transforms import fourier_coordinates, fourier_filter


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
        other = IdentityTerm(self.y.double())
        other._size = self._size  # of the same numbers
        return other

    def coarse_gradient_scale(self, x: Tensor) -> Tensor:
        return norm(x).double() + self.size_bound

    @property
    def size_bound(self) -> Tensor:
        """A bound of ||y||, ``(B,)`` float64."""
        return self._size * (1 + 1e-6)

    @cached_property
    def _size(self) -> Tensor:
        """||y||, ``(B,)`` float64, evaluated in the dtype of y or a coarser one."""
        return norm(self.y).double()

    def diagonal(self) -> Tensor:
        return self.y.new_ones(())

    def expanded(self) -> tuple[Tensor, Tensor]:
        return self.y, 0.5 * self._size.square()


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

    def expanded(self) -> tuple[Tensor, Tensor]:
        return self.mask * self.y, 0.5 * squared_norm(self.y)
