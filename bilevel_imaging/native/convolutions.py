"""Circular convolutions of images as short sums of products of a column and a row."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, native_kernels, pointer, threads

# an FFT there and back costs about as much as so many multiplications per pixel
MOST_TAPS = 160
EPS = torch.finfo(torch.float64).eps
TRANSFORM_ROUNDING = 16
# decompositions kept, by what they are of: the same blur is bound to one batch after another
MOST_KNOWN = 16
_KNOWN: OrderedDict[tuple[Any, ...], Tensor | None] = OrderedDict()


@dataclass(frozen=True)
class SeparableConvolution:
    """v -> K v, K the circular convolution of every plane with the sum over terms of c_t r_t^T.

    Attributes:
        filters: c_t and r_t, offset 0 in the middle: contiguous, ``(B, C, terms, 2, taps)``, on the CPU.
    """

    filters: Tensor

    def product(self, v: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        v = v.contiguous()
        z = torch.empty_like(v)
        batch, channels, height, width = v.shape
        sizes = integers(*self.filters.shape[2:5:2], batch, channels * height, height, width)
        function("convolution_product", v.dtype)(pointer(v), pointer(self.filters), pointer(z), *sizes, threads())
        return z

    def transposed(self) -> SeparableConvolution:
        """K^T."""
        return SeparableConvolution(self.filters.flip(-1))

    def of(self, index: Tensor) -> SeparableConvolution:
        """That of the samples ``index``."""
        return SeparableConvolution(self.filters[index])


def separable(transfer: Tensor, width: int, dtype: torch.dtype) -> SeparableConvolution | None:
    """The convolution with these eigenvalues, if it is worth having and the kernels are there.

    What is left out is less than the rounding of ``dtype``, or else of the transforms of float64, times the largest
    eigenvalue, in operator norm.

    Args:
        transfer: eigenvalues in the ``rfft2`` basis, complex or real, ``(B, C, H, W // 2 + 1)`` in double precision.
        width: of the images.
        dtype: of the vectors that it will be applied to.
    """
    if transfer.device.type != "cpu" or dtype not in (torch.float32, torch.float64) or native_kernels() != "native":
        return None
    batch, channels = transfer.shape[:2]
    # expanded from one filter for all: decompose it once
    alike = [n if step else 1 for n, step in zip((batch, channels), transfer.stride()[:2], strict=True)]
    transfer = transfer[: alike[0], : alike[1]].contiguous()
    key = (blake2b(transfer.numpy(), digest_size=16).digest(), transfer.shape, transfer.dtype, width, dtype)
    if key not in _KNOWN:
        while len(_KNOWN) >= MOST_KNOWN:
            _KNOWN.popitem(last=False)
        _KNOWN[key] = _decomposed(transfer, width, dtype)
    filters = _KNOWN[key]
    return None if filters is None else SeparableConvolution(filters.expand(batch, channels, -1, -1, -1).contiguous())


def _decomposed(transfer: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    """The filters of the convolution, one of each plane of ``transfer``, or ``None`` if there are too many."""
    height = transfer.shape[2]
    kernel = torch.fft.irfft2(transfer, s=(height, width))
    kernel = torch.where(kernel.abs() > EPS * kernel.abs().amax((-1, -2), keepdim=True), kernel, 0.0)
    allowed = max(0.5 * torch.finfo(dtype).eps, TRANSFORM_ROUNDING * EPS) * transfer.abs().amax((-1, -2))
    reach = _reach(kernel, allowed)
    taps = 2 * reach + 1
    if taps > min(height, width) or 2 * taps > MOST_TAPS:
        return None
    # the kernel's offsets from -reach to reach, backwards: a convolution is a correlation with the flipped kernel
    u, s, v = torch.linalg.svd(kernel.roll((reach, reach), (-2, -1))[..., :taps, :taps].flip((-2, -1)))
    # a term has the operator norm s |c^|_inf |r^|_inf <= s ||c||_1 ||r||_1
    sizes = s * u.abs().sum(-2) * v.abs().sum(-1)
    left = sizes.flip(-1).cumsum(-1).flip(-1)  # by the terms from number t on
    terms = int((left > allowed[..., None]).sum(-1).amax())
    if terms == 0 or 2 * terms * taps > MOST_TAPS:
        return None
    root = s.sqrt()[..., :terms, None]
    return torch.stack([root * u.mT[..., :terms, :], root * v[..., :terms, :]], -2).to(dtype)


def _reach(kernel: Tensor, allowed: Tensor) -> int:
    """The smallest offset beyond which all taps together are at most ``allowed``: ``(B, C, H, W)`` and ``(B, C)``."""
    distances = [torch.minimum(k := torch.arange(n), n - k) for n in kernel.shape[-2:]]
    farthest = torch.maximum(distances[0][:, None], distances[1][None, :]).flatten()
    rings = kernel.new_zeros((*kernel.shape[:2], int(farthest.max()) + 2))
    rings.index_add_(-1, farthest, kernel.abs().flatten(-2))
    beyond = rings.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    return int((beyond > allowed[..., None]).sum(-1).amax())
