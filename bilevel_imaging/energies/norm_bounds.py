"""True bounds of the spectrum of A^T A from what an operator stores: no power iteration, which only bounds from below.

Entries of one sign: for any v > 0, lambda_max(N^T N) <= max_i (N^T N v)_i / v_i (Collatz and Wielandt) if N >= 0; and
||A|| <= ||N|| if |A_ij| <= N_ij. Convolutions that see no more of an image than its zero extension: the largest value
of the transfer function on a grid on which nothing wraps around.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepinv.physics import Blur, Downsampling, MultiCoilMRI, Tomography
from deepinv.physics.functional import conv2d, conv_transpose2d
from torch import Tensor

from bilevel_imaging.energies.circulant import circular_response
from bilevel_imaging.energies.matrix_physics import MatrixPhysics
from bilevel_imaging.energies.operators import Operator

SWEEPS = 6
# far above the rounding of float64 sums of numbers of one sign
ROUNDING = 1e-9


@dataclass(frozen=True)
class NormBounds:
    """lowest <= lambda_min(A^T A) and ||A||^2 <= highest, each ``(B,)`` float64.

    Attributes:
        lowest: lower bound.
        highest: upper bound, or ``None``.
        reason: why that is ``None``, in words.
    """

    lowest: Tensor
    highest: Tensor | None
    reason: str = ""

    def subset(self, index: Tensor) -> NormBounds:
        """Of the samples ``index`` alone."""
        highest = None if self.highest is None else self.highest[index]
        return NormBounds(self.lowest[index], highest, self.reason)


def norm_bounds(operator: Operator) -> NormBounds:
    """Bounds for a physics of a known kind; a subclass may compute anything and is not one."""
    physics, batch = operator.physics, operator.shape[0]
    zero = torch.zeros(batch, dtype=torch.float64, device=operator.device)
    kind = type(physics)
    if kind is Blur:
        return NormBounds(zero, _convolution(physics.filter, physics.padding, 1, operator.shape))
    if kind is Downsampling:
        if physics.filter is None:
            return NormBounds(zero, torch.ones_like(zero))
        return NormBounds(zero, _convolution(physics.filter, physics.padding, physics.factor, operator.shape))
    if kind is MultiCoilMRI:
        return _coils(physics, batch)
    if kind is Tomography:
        return _projections(operator)
    if kind is MatrixPhysics:
        bound = torch.full_like(zero, matrix_norm_bound(physics))
        return NormBounds(zero, bound)
    reason = f"no upper bound of the norm of {kind.__name__} is known"
    return NormBounds(zero, None, reason)


def collatz_wielandt(normal: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Upper bound of lambda_max(M), ``(B,)``, for v -> M v with M >= 0 entrywise and ``start`` > 0."""
    v, best = start, torch.full_like(start.flatten(1)[:, 0], torch.inf)
    for _ in range(SWEEPS):
        product = normal(v)
        best = torch.minimum(best, (product / v).flatten(1).amax(1))
        largest = product.flatten(1).amax(1).clamp(min=1e-300).reshape(-1, *[1] * (v.dim() - 1))
        v = product / largest + 1e-3  # the floor keeps it positive where nothing is seen
    return best * (1 + ROUNDING)


def _convolution(kernel: Tensor, padding: str, factor: int, shape: torch.Size) -> Tensor:
    """Convolution and decimation, for every image: ``(B,)``."""
    kernel = kernel.detach().double()
    magnitude = kernel.abs()
    # blocks that share a kernel have the same norm
    start = torch.ones((*kernel.shape[:2], *shape[-2:]), dtype=torch.float64, device=kernel.device)

    def normal(v: Tensor) -> Tensor:
        filtered = conv2d(v, magnitude, padding=padding)
        kept = torch.zeros_like(filtered)
        kept[..., ::factor, ::factor] = filtered[..., ::factor, ::factor]
        return conv_transpose2d(kept, magnitude, padding=padding)

    bound = collatz_wielandt(normal, start)
    if padding not in ("reflect", "replicate"):
        size = tuple(shape[-2:])
        if padding == "circular":
            transfer = torch.fft.fft2(circular_response(kernel, size))
        else:
            size = tuple(n + k - 1 for n, k in zip(size, kernel.shape[-2:], strict=True))
            transfer = torch.fft.fft2(kernel, s=size)
        power = transfer.abs().square()
        if padding == "circular" and size[0] % factor == 0 and size[1] % factor == 0:
            # A A^T is a circular convolution too: what is aliased adds up
            rows, columns = size[0] // factor, size[1] // factor
            power = power.reshape(*power.shape[:2], factor, rows, factor, columns).mean((2, 4))
        bound = torch.minimum(bound, power.flatten(1).amax(1) * (1 + ROUNDING))
    return bound.expand(shape[0]).clone()


def _coils(physics: MultiCoilMRI, batch: int) -> NormBounds:
    """A^T A = S^* F^* mask^2 F S with a unitary F and S^* S = diag(sum of |maps|^2)."""
    squares = physics.mask.double().square().flatten(1)
    maps = physics.coil_maps.to(torch.complex128)
    energy = (maps.real.square() + maps.imag.square()).sum(1).flatten(1)
    lowest = squares.amin(1) * energy.amin(1) * (1 - ROUNDING)
    highest = squares.amax(1) * energy.amax(1) * (1 + ROUNDING)
    return NormBounds(lowest.expand(batch).clone(), highest.expand(batch).clone())


def _projections(operator: Operator) -> NormBounds:
    """Sums of bilinear interpolations: entries >= 0, divided by one number if normalized; the same for every image."""
    batch, like = operator.shape[0], operator.like
    zero = torch.zeros(batch, dtype=torch.float64, device=like.device)
    single = Operator(operator.physics, torch.Size((1, 1, *operator.shape[-2:])), like, frozenset())
    exact = single if like.dtype == torch.float64 else single.double()
    if exact is None:
        return NormBounds(zero, None, "the norm of Tomography could not be bounded: it does not run in float64")
    start = torch.ones(exact.shape, dtype=torch.float64, device=like.device)
    # interpolation weights in float32 are not those in float64
    slack = 1 + torch.finfo(like.dtype).eps ** 0.5
    return NormBounds(zero, (collatz_wielandt(exact.normal, start) * slack).expand(batch).clone())


def matrix_norm_bound(physics: MatrixPhysics) -> float:
    """Upper bound of ||A||^2 for a matrix."""
    exact = physics.magnitude().double()
    start = torch.ones((1, 1, *physics.image), dtype=torch.float64, device=physics.values.device)
    return float(collatz_wielandt(lambda v: exact.A_adjoint(exact.A(v)), start))
