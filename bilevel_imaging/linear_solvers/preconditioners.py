"""Models of the Hessian that are cheap to invert: diagonal in the pixel, the Fourier or the cosine basis."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Preconditioner
from bilevel_imaging.transforms import cosine_filter, fourier_filter


def jacobi(diagonal: Tensor) -> Preconditioner:
    """v -> v / diagonal.

    Args:
        diagonal: positive, broadcastable to the images; for example the diagonal of the Hessian.

    Raises:
        ValueError: if an entry is not positive and finite.
    """
    inverse = _reciprocal(diagonal, "diagonal")
    return Preconditioner(lambda v: inverse * v)


def fourier(symbol: Tensor) -> Preconditioner:
    """Inverse of a periodic convolution.

    Args:
        symbol: its eigenvalues in the basis of ``transforms.rfft2``, positive, broadcastable to
            ``(B, C, H, W // 2 + 1)``; for example ``|transfer|^2 + curvature * periodic_laplacian(x)``.

    Raises:
        ValueError: if an eigenvalue is not positive and finite.
    """
    response = _reciprocal(symbol, "symbol")
    return Preconditioner(lambda v: fourier_filter(v, response))


def cosine(symbol: Tensor) -> Preconditioner:
    """Inverse of an operator that the DCT-II diagonalizes: convolutions of images reflected at their boundary.

    Args:
        symbol: its eigenvalues in the basis of ``transforms.dct2``, positive, broadcastable to ``(B, C, H, W)``; for
            example ``1 + curvature * neumann_laplacian(x)``, a model of total variation denoising.

    Raises:
        ValueError: if an eigenvalue is not positive and finite.
    """
    response = _reciprocal(symbol, "symbol")
    return Preconditioner(lambda v: cosine_filter(v, response))


def _reciprocal(values: Tensor, name: str) -> Tensor:
    values = values.detach()
    if not bool(((values > 0) & (values < torch.inf)).all()):
        raise ValueError(
            f"Expected a positive and finite {name}, so that the preconditioner is positive definite. Got values from "
            f"{float(values.min())} to {float(values.max())}; add a ridge."
        )
    return 1 / values
