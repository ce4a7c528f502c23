"""A model of A^T A + ridge I + D^T diag(c) D that an FFT inverts: a convolution between two diagonal scalings."""

from __future__ import annotations

from torch import Tensor

from bilevel_imaging.derivatives import Preconditioner
from bilevel_imaging.energies.data_terms import DataTerm
from bilevel_imaging.transforms import fourier_filter, periodic_laplacian

# E^2 = c + FLOOR * (mean of the data term); the data term enters the convolution with these factors. Chosen by the
# number of conjugate gradient iterations on photographs (denoising, inpainting, deblurring); it is flat around them.
FLOOR = 0.75
DIAGONAL_FACTOR, SPECTRAL_FACTOR = 3.0, 2.0
# below this ratio of regularizer to data term, plain conjugate gradients converge in a few iterations
WORTHWHILE = 10.0


def pays(data: DataTerm) -> bool:
    """Whether a scaled convolution exists for this data term, and is worth its transforms."""
    diagonal, spectrum = data.diagonal(), data.spectrum()
    if diagonal is None:
        return spectrum is not None
    # denoising: half the iterations, but on a CPU a product is so cheap that the transforms cost as much
    return diagonal.dim() > 0 or diagonal.device.type != "cpu"


def scaled_convolution(coefficient: Tensor, data: DataTerm, ridge: float) -> Preconditioner | None:
    """v -> E^{-1} F^* (1 / S) F E^{-1} v with E^2 close to c and S = (data term) / E^2 + (periodic Laplacian).

    -div(c grad) is close to sqrt(c) (-Laplacian) sqrt(c) where c varies slowly, and small where c is small; dividing
    by E on both sides leaves a Laplacian, and the data term divided by E^2, which is replaced by its mean.

    Args:
        coefficient: c > 0, a value per pixel, ``(B, C, H, W)``; for example a quarter of the diagonal of D^T diag(c) D.
        data: one for which it ``pays``.
        ridge: of the energy.

    Returns:
        ``None`` where no preconditioner is needed.
    """
    diagonal, spectrum = data.diagonal(), data.spectrum()
    base = spectrum.mean((-1, -2), keepdim=True) if diagonal is None else diagonal
    base = base + ridge
    if bool((coefficient.amax() <= WORTHWHILE * base.amin() / 4).all()):
        return None
    squared = coefficient + FLOOR * base
    inverse = squared.rsqrt()
    if diagonal is None:
        symbol = SPECTRAL_FACTOR * (spectrum + ridge) * (1 / squared).mean((-1, -2), keepdim=True)
    else:
        symbol = DIAGONAL_FACTOR * (base / squared).mean((-1, -2), keepdim=True)
    response = 1 / (symbol + periodic_laplacian(coefficient))
    return Preconditioner(lambda v: inverse * fourier_filter(inverse * v, response))
