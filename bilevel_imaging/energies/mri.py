"""The data term of single-coil magnetic resonance imaging: Fourier coefficients times a mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_imaging.energies.data_terms import DataTerm, FourierModel
from bilevel_imaging.tensors import squared_norm


class MRITerm(DataTerm):
    """A = diag(mask) F with the unitary, centered Fourier transform F of deepinv's ``MRI``.

    Images and measurements hold real and imaginary part in two channels. There F is an orthogonal matrix, so that
    A^T A = F^T diag(mask^2) F has the squares of the mask as eigenvalues, whether or not both parts share one mask.

    Args:
        y: measurements, ``(B, 2, H, W)``.
        mask: real, broadcastable to y. The numbers that it stores define the operator, whatever their dtype.
    """

    applications = 2

    def __init__(self, y: Tensor, mask: Tensor):
        self.y = y
        self.mask64 = mask.double().expand_as(y)
        self.shape = y.shape
        squares = self.mask64.square().flatten(1)
        self.lowest, self.highest = squares.amin(1), squares.amax(1)
        # k-space is held with the zero frequency first, as the FFT gives it: only images are shifted
        self.mask = torch.fft.ifftshift(self.mask64, dim=(-2, -1)).to(y.dtype)
        self.power = self.mask.square()
        self.measured = torch.fft.ifftshift(y, dim=(-2, -1))

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * squared_norm(self.mask * fourier(x) - self.measured)

    def grad(self, x: Tensor) -> Tensor:
        return inverse_fourier(self.mask * (self.mask * fourier(x) - self.measured))

    def hvp(self, v: Tensor) -> Tensor:
        return inverse_fourier(self.power * fourier(v))

    def apply(self, x: Tensor) -> Tensor:
        return torch.fft.fftshift(self.mask * fourier(x), dim=(-2, -1))

    def initial(self) -> Tensor:
        # Wiener filter for about 5 % noise power; what is not measured is 0
        return inverse_fourier(self.mask * self.measured / (self.power + 0.05))

    def subset(self, index: Tensor) -> DataTerm:
        return MRITerm(self.y[index], self.mask64[index])

    def double(self) -> DataTerm:
        return MRITerm(self.y.double(), self.mask64)

    def gradient_scale(self, x: Tensor) -> Tensor:
        # both transforms: that of x, scaled by mask^2, and the one back, of mask^2 F x - mask y
        back = (self.mask * self.measured).double().flatten(1).norm(dim=1)
        size = 2 * self.highest * x.double().flatten(1).norm(dim=1) + back
        return size * math.log2(max(4, self.shape[-1] * self.shape[-2]))  # error growth of an FFT

    def fourier_model(self) -> FourierModel:
        return FourierModel(self.power, filtered, complex=True)

    def whitening(self, shift: float) -> Callable[[Tensor], Tensor]:
        response = (self.power + shift).rsqrt()
        return lambda v: fourier(v) * response


def fourier(x: Tensor) -> Tensor:
    """Unitary transform of images with their origin in the middle, ``(B, 2, H, W)``, the zero frequency first."""
    x = torch.fft.ifftshift(x, dim=(-2, -1))
    spectrum = torch.fft.fft2(torch.complex(x[:, 0], x[:, 1]), norm="ortho")
    return torch.stack([spectrum.real, spectrum.imag], 1)


def inverse_fourier(spectrum: Tensor) -> Tensor:
    """Inverse and transpose of :func:`fourier`."""
    z = torch.fft.ifft2(torch.complex(spectrum[:, 0], spectrum[:, 1]), norm="ortho")
    return torch.fft.fftshift(torch.stack([z.real, z.imag], 1), dim=(-2, -1))


def filtered(v: Tensor, response: Tensor) -> Tensor:
    """F^T (response F v) for a real response, broadcastable to ``(B, 2, H, W)``."""
    return inverse_fourier(fourier(v) * response)
