"""Banks of small filters of one channel: W x, W^T z, and W^T diag(c) W x without storing the responses."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads

# filters, and rows of a filter, that the C code works on together
_GROUP, _ROWS = 12, 7


class Bank:
    """Correlations with K filters, of images that have been continued by s - 1 pixels in both directions.

    Args:
        kernels: ``(K, s, s)``, float32 or float64, on the CPU.
    """

    def __init__(self, kernels: Tensor):
        self.kernels = kernels.detach()
        self.count, self.size = kernels.shape[0], kernels.shape[-1]

    @cached_property
    def _forward(self) -> Tensor:
        taps = self.kernels.flatten(1)
        taps = torch.nn.functional.pad(taps, (0, 0, 0, -self.count % _GROUP))
        return taps.reshape(-1, _GROUP, taps.shape[1]).transpose(1, 2).contiguous()

    @cached_property
    def _backward(self) -> Tensor:
        rows = torch.nn.functional.pad(self.kernels, (0, 0, 0, -self.size % _ROWS))
        return rows.reshape(self.count, -1, _ROWS, self.size).permute(1, 0, 3, 2).contiguous()

    def apply(self, extended: Tensor) -> Tensor:
        """W x, ``(N, H + s - 1, W + s - 1)`` to ``(N, H, W, K)``."""
        extended = extended.contiguous()
        count, height, width = self._sizes(extended)
        out = extended.new_empty((count, height, width, self.count))
        kernel = function("bank_forward", extended.dtype)
        sizes = integers(count, height, width, self.count, self.size)
        kernel(pointer(extended), pointer(self._forward), pointer(out), *sizes, threads())
        return out

    def adjoint(self, z: Tensor) -> Tensor:
        """W^T z, ``(N, H, W, K)`` to ``(N, H + s - 1, W + s - 1)``."""
        return self._back(z.contiguous(), None, None, z.shape[:3])

    def planes(self, field: Tensor) -> Tensor:
        """c ``(N, H, W, K)`` in the order that :meth:`product` wants; opaque."""
        field = field.contiguous()
        rows, width = field.shape[0] * field.shape[1], field.shape[2]
        lanes = 128 // field.element_size()
        out = field.new_empty((rows, self.count, -(-width // lanes) * lanes))
        kernel = function("bank_planes", field.dtype)
        kernel(pointer(field), pointer(out), *integers(rows, width, self.count), threads())
        return out

    def product(self, extended: Tensor, planes: Tensor) -> Tensor:
        """W^T diag(c) W x, ``(N, H + s - 1, W + s - 1)`` to the same, c as given by :meth:`planes`."""
        return self._back(None, extended.contiguous(), planes, self._sizes(extended))

    def _sizes(self, extended: Tensor) -> tuple[int, int, int]:
        count, height, width = extended.shape
        return count, height - self.size + 1, width - self.size + 1

    def _back(self, z: Tensor | None, extended: Tensor | None, planes: Tensor | None, sizes: tuple) -> Tensor:
        count, height, width = sizes
        like = extended if z is None else z
        out = like.new_empty((count, height + self.size - 1, width + self.size - 1))
        kernel = function("bank_backward", like.dtype)
        weights = (pointer(self._forward), pointer(self._backward))
        given = (pointer(z), pointer(extended), pointer(planes))
        kernel(*given, *weights, pointer(out), *integers(count, height, width, self.count, self.size), threads())
        return out
