"""Fourier and cosine transforms of images, and the systems that they diagonalize.

The bits of an image do not depend on the batch it is in. On the CPU that needs transforms image by image, because their
last bits depend on how many rows there are, and real products in place of complex ones, which round differently in the
vectorized and in the remaining part of an array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def rfft2(x: Tensor) -> Tensor:
    """``torch.fft.rfft2``, ``(B, ..., H, W)`` to ``(B, ..., H, W // 2 + 1)``."""
    return _image_by_image(torch.fft.rfft2, x)


def inverse_rfft2(spectrum: Tensor, width: int) -> Tensor:
    """Inverse of :func:`rfft2` for images of that width."""
    return _image_by_image(lambda image: torch.fft.irfft2(image, s=(image.shape[-2], width)), spectrum)


def dct2(x: Tensor) -> Tensor:
    """Orthonormal DCT-II in two dimensions, ``(B, ..., H, W)`` to the same.

    One real FFT of the same length per row and column (Makhoul 1980, "A fast cosine transform in one and two
    dimensions").
    """
    return _dct(_dct(x).transpose(-1, -2)).transpose(-1, -2)


def inverse_dct2(spectrum: Tensor) -> Tensor:
    """Inverse (and transpose) of :func:`dct2`, the orthonormal DCT-III, ``(B, ..., H, W)`` to the same."""
    return _inverse_dct(_inverse_dct(spectrum.transpose(-1, -2)).transpose(-1, -2))


def periodic_laplacian(like: Tensor) -> Tensor:
    """Eigenvalues of D^T D in the :func:`rfft2` basis, D the periodic differences: ``(H, W // 2 + 1)``."""
    rows = torch.fft.fftfreq(like.shape[-2], dtype=like.dtype, device=like.device)
    columns = torch.fft.rfftfreq(like.shape[-1], dtype=like.dtype, device=like.device)
    return 4 * ((torch.pi * rows).sin() ** 2)[:, None] + 4 * ((torch.pi * columns).sin() ** 2)[None, :]


def neumann_laplacian(like: Tensor) -> Tensor:
    """Eigenvalues of D^T D in the :func:`dct2` basis, D the differences with 0 at the last row and column: ``(H, W)``.

    4 sin^2(pi i / 2H) + 4 sin^2(pi j / 2W).
    """
    rows, columns = (
        4 * torch.sin(torch.arange(n, dtype=like.dtype, device=like.device) * (torch.pi / (2 * n))) ** 2
        for n in like.shape[-2:]
    )
    return rows[:, None] + columns[None, :]


def fourier_filter(v: Tensor, response: Tensor) -> Tensor:
    """F^-1 (response F v), F the real Fourier transform; real response, broadcastable to ``(..., H, W // 2 + 1)``."""
    return inverse_rfft2(rfft2(v) * response, v.shape[-1])


def self_mirrored(width: int, device: torch.device) -> Tensor:
    """Which columns of :func:`rfft2` hold the mirror images of their own frequencies, ``(W // 2 + 1,)``; those of the
    others are left out there."""
    columns = torch.arange(width // 2 + 1, device=device)
    return (columns == 0) | (2 * columns == width)


def half_spectrum_scale(height: int, width: int, like: Tensor) -> Tensor:
    """What makes :func:`rfft2` of real images an isometry, ``(W // 2 + 1,)``."""
    return (torch.where(self_mirrored(width, like.device), 1.0, 2.0).to(like.dtype) / (height * width)).sqrt()


def fourier_coordinates(v: Tensor, response: Tensor) -> Tensor:
    """Real numbers w with ||w||^2 = <v, F^-1 (response^2 F v)> for a real response as in :func:`fourier_filter`,
    ``(..., H, W // 2 + 1, 2)``; linear in v."""
    scale = half_spectrum_scale(v.shape[-2], v.shape[-1], response) * response
    return torch.view_as_real(rfft2(v)) * scale[..., None]


def cosine_filter(v: Tensor, response: Tensor) -> Tensor:
    """C^T (response C v), C the orthonormal cosine transform; response broadcastable to ``(..., H, W)``."""
    return inverse_dct2(dct2(v) * response)


def _image_by_image(transform: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    if batch.is_cuda:
        return transform(batch)
    return torch.stack([transform(image) for image in batch])


def _dct(x: Tensor) -> Tensor:
    """Along the last dimension: the FFT of (x_0, x_2, ..., x_3, x_1), turned by a quarter of a sample."""
    n = x.shape[-1]
    shuffled = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    half = _image_by_image(torch.fft.rfft, shuffled)
    cosine, sine = _turns(n, x.dtype, x.device)
    # the real part is coefficient k, minus the imaginary part coefficient n - k
    low = half.real * cosine + half.imag * sine
    high = half.real * sine - half.imag * cosine
    return torch.cat([low, high[..., 1 : (n + 1) // 2].flip(-1)], dim=-1)


def _inverse_dct(spectrum: Tensor) -> Tensor:
    n = spectrum.shape[-1]
    size = n // 2 + 1
    low = spectrum[..., :size]
    high = torch.zeros_like(low)
    high[..., 1:] = spectrum[..., n - size + 1 :].flip(-1)
    cosine, sine = _turns(n, spectrum.dtype, spectrum.device)
    # [cosine, sine; sine, -cosine] is its own inverse up to this factor
    scale = cosine.square() + sine.square()
    cosine, sine = cosine / scale, sine / scale
    half = torch.complex(low * cosine + high * sine, low * sine - high * cosine)
    shuffled = _image_by_image(lambda image: torch.fft.irfft(image, n=n), half)
    x = torch.empty_like(shuffled)
    x[..., ::2] = shuffled[..., : (n + 1) // 2]
    x[..., 1::2] = shuffled[..., (n + 1) // 2 :].flip(-1)
    return x


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept must be usable in every mode
def _turns(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of pi k / 2n for k = 0 ... n // 2, times the factors that make the transform orthonormal."""
    angle = torch.arange(n // 2 + 1, dtype=torch.float64) * (math.pi / (2 * n))
    factor = torch.full_like(angle, math.sqrt(2 / n))
    factor[0] = math.sqrt(1 / n)
    return (factor * angle.cos()).to(dtype).to(device), (factor * angle.sin()).to(dtype).to(device)
