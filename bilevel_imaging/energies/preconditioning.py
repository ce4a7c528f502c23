"""Models of the Hessian that fast transforms invert: a convolution, between two diagonal scalings where that pays."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging import native
from bilevel_imaging.derivatives import Preconditioner
from bilevel_imaging.energies.data_terms import DataTerm, FourierModel
from bilevel_imaging.transforms import cosine_filter, fourier_filter, periodic_laplacian

# E^2 = c + FLOOR * (mean of the data term); the data term enters the convolution with these factors. Chosen by the
# number of conjugate gradient iterations on photographs (denoising, inpainting, deblurring); it is flat around them.
FLOOR = 0.75
DIAGONAL_FACTOR, SPECTRAL_FACTOR = 3.0, 2.0
# below this ratio of regularizer to data term, plain conjugate gradients converge in a few iterations
WORTHWHILE = 10.0


def pays(data: DataTerm) -> bool:
    """Whether a scaled convolution exists for this data term, and is worth its transforms."""
    diagonal = data.diagonal()
    if diagonal is None:
        # compiled code makes ten products in the time of two transforms
        return data.fourier_model() is not None and data.convolution() is None
    # half of the iterations, which costs more on a CPU than the other half where compiled code makes them
    return diagonal.device.type != "cpu" or (diagonal.dim() > 0 and not native.serves(diagonal))


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
    diagonal = data.diagonal()
    model = data.fourier_model() if diagonal is None else None
    base = diagonal if model is None else model.power.mean((-1, -2), keepdim=True)
    base = base + ridge
    least = base if model is None else model.power + ridge
    if bool((coefficient.amax() <= WORTHWHILE * least.amin() / 4).all()):
        return None
    squared = coefficient + FLOOR * base
    inverse = squared.rsqrt()
    laplacian = periodic_laplacian(coefficient)
    if model is None:
        symbol = DIAGONAL_FACTOR * (base / squared).mean((-1, -2), keepdim=True)
    else:
        axes = (-1, -2, -3) if model.complex else (-1, -2)
        symbol = SPECTRAL_FACTOR * (model.power + ridge) * (1 / squared).mean(axes, keepdim=True)
        laplacian = _mirrored(laplacian, symbol.shape[-1], coefficient.shape[-1])
    apply, response = fourier_filter if model is None else model.filter, 1 / (symbol + laplacian)
    return Preconditioner(lambda v: inverse * apply(inverse * v, response))


def cosine_convolution(
    spectrum: Tensor, data: DataTerm, ridge: float, strong_convexity: Tensor | None
) -> Preconditioner | None:
    """v -> C^T (1 / S) C v with C the cosine transform and S = (data term) + ridge + spectrum.

    Args:
        spectrum: of the regularizer's Hessian with its second derivatives replaced by their means, ``(B, C, H, W)``.
        data: the data term.
        ridge: of the energy.
        strong_convexity: mu, ``(B,)``, or ``None``.

    Returns:
        ``None`` where nothing is known of the data term's spectrum, or no preconditioner is needed.
    """
    base = _cosine_spectrum(data)
    if base is None:
        return None
    whole = base + ridge + spectrum
    largest = whole.flatten(1).amax(1)
    if bool((largest <= WORTHWHILE * whole.flatten(1).amin(1)).all()):
        return None
    response = 1 / whole
    return Preconditioner(lambda v: cosine_filter(v, response), _lowest(strong_convexity, largest))


def local_convolution(
    spectrum: Tensor, local: Tensor | None, data: DataTerm, ridge: float, strong_convexity: Tensor | None
) -> Preconditioner | None:
    """v -> E^{-1} F^* (1 / S) F E^{-1} v with S = (data term + ridge) / E^2 + spectrum / (mean of E^2).

    As ``scaled_convolution``, for regularizers that are no diffusions: E^2 is the diagonal of their Hessian, raised by
    a multiple of the data term's mean.

    Args:
        spectrum: of the regularizer's Hessian with its second derivatives replaced by their means, in the cosine basis,
            ``(B, C, H, W)``.
        local: diagonal of the regularizer's Hessian, likewise; ``None`` for E = 1.
        data: one that is close to a filter of the Fourier basis, or nothing is done.
        ridge: of the energy.
        strong_convexity: mu, ``(B,)``, or ``None``.

    Returns:
        ``None`` where nothing is known of the data term's spectrum, or no preconditioner is needed.
    """
    model = data.fourier_model()
    if model is None:
        return None
    base = model.power + ridge
    spectrum = _on_fourier_grid(spectrum, model)
    if bool((spectrum.amax() <= WORTHWHILE * base.amin()).all()):
        return None
    if local is None:
        squared = torch.ones_like(spectrum[..., :1, :1])
    else:
        squared = local + 4 * FLOOR * base.mean((-1, -2), keepdim=True)
    axes = (-1, -2, -3) if model.complex else (-1, -2)
    symbol = base * (1 / squared).mean(axes, keepdim=True) + spectrum / squared.mean(axes, keepdim=True)
    inverse, response = squared.rsqrt(), 1 / symbol
    largest = symbol.flatten(1).amax(1) * squared.flatten(1).amax(1)
    return Preconditioner(lambda v: inverse * model.filter(inverse * v, response), _lowest(strong_convexity, largest))


def _lowest(strong_convexity: Tensor | None, largest: Tensor) -> Tensor | None:
    """Lower bound of lambda_min(P^{-1} H), since H >= mu and P <= largest, up to rounding."""
    return None if strong_convexity is None else strong_convexity.double() / (largest.double() * (1 + 1e-5))


def _on_fourier_grid(spectrum: Tensor, model: FourierModel) -> Tensor:
    """From the frequencies pi u / N of the cosines to those of the Fourier basis, 2 pi k / N; the mean over parts."""
    height, width = spectrum.shape[-2:]
    rows, columns = (
        (2 * _mirrored(torch.arange(n, device=spectrum.device), count, n)).clamp(max=n - 1)
        for n, count in ((height, height), (width, model.power.shape[-1]))
    )
    spectrum = spectrum.index_select(-2, rows).index_select(-1, columns)
    return spectrum.mean(1, keepdim=True) if model.complex else spectrum


def _mirrored(half: Tensor, count: int, length: int) -> Tensor:
    """The first ``count`` of ``length`` frequencies from (at least) the first half: those above are mirror images."""
    k = torch.arange(count, device=half.device)
    return half.index_select(-1, torch.minimum(k, length - k))


def _cosine_spectrum(data: DataTerm) -> Tensor | None:
    """About the spectrum of A^T A in the cosine basis: of a convolution at the nearest frequencies, else the mean."""
    diagonal, spectrum = data.diagonal(), data.spectrum()
    if diagonal is not None:
        return diagonal if diagonal.dim() == 0 else diagonal.mean((-1, -2), keepdim=True)
    if spectrum is None:
        return None
    height, width = data.shape[-2:]
    # frequency pi u / N of the cosines lies at u / 2 on the Fourier grid
    rows, columns = (torch.arange(n, device=spectrum.device) / 2 for n in (height, width))
    low, high = (spectrum.index_select(-2, r.long()) for r in (rows, (rows + 0.5).clamp(max=height - 1)))
    halfway = 0.5 * (low + high)
    low, high = (halfway.index_select(-1, c.long().clamp(max=spectrum.shape[-1] - 1)) for c in (columns, columns + 0.5))
    return 0.5 * (low + high)
