"""A deepinv physics from a sparse matrix: exact adjoint, fast products, a norm that can be bounded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from bilevel_imaging.transforms import fourier_filter

# A^T A counts as a convolution if it differs from one by less than this part on white noise: tomography by 0.2 to 0.6
CONVOLUTION_MISFIT = 0.7
# of the largest value of the spectrum of a convolution; what is below, or negative by truncation, is raised to it
SMALLEST_POWER = 1e-4


class MatrixPhysics(LinearPhysics):
    """A x for a sparse matrix, channel by channel: ``(B, C, H, W)`` to ``(B, C, *measured)``.

    The transpose is stored too, so that A and its adjoint cost the same. Both are differentiable any number of times.

    Args:
        matrix: sparse COO, coalesced, ``(M, H W)``, float32 or float64.
        image: (H, W).
        measured: shape of the M measurements of one channel.

    Raises:
        ValueError: shapes that do not fit the matrix.
    """

    def __init__(self, matrix: Tensor, image: tuple[int, int], measured: Sequence[int]):
        super().__init__()
        self.image, self.measured = tuple(image), tuple(measured)
        wanted = (math.prod(self.measured), math.prod(self.image))
        if tuple(matrix.shape) != wanted:
            raise ValueError(
                f"Expected a matrix of shape {wanted} for images {self.image} and measurements {self.measured}. Got "
                f"{tuple(matrix.shape)}."
            )
        (rows, columns), values = matrix.indices(), matrix.values()
        by_column = columns.argsort(stable=True)
        # 32-bit indices halve what a product reads
        self.register_buffer("row_starts", _starts(rows, wanted[0]))
        self.register_buffer("columns", columns.int())
        self.register_buffer("values", values)
        self.register_buffer("column_starts", _starts(columns[by_column], wanted[1]))
        self.register_buffer("rows", rows[by_column].int())
        self.register_buffer("transposed_values", values[by_column])

    def A(self, x: Tensor, **kwargs: Any) -> Tensor:
        """A x."""
        return self._images(_Product.apply(x.flatten(2).flatten(0, 1), self, False), x, self.measured)

    def A_adjoint(self, y: Tensor, **kwargs: Any) -> Tensor:
        """A^T y."""
        return self._images(_Product.apply(y.flatten(2).flatten(0, 1), self, True), y, self.image)

    @staticmethod
    def _images(vectors: Tensor, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return vectors.reshape(*like.shape[:2], *shape)

    def magnitude(self) -> MatrixPhysics:
        """The physics of the absolute values of the entries."""
        other = object.__new__(MatrixPhysics)
        LinearPhysics.__init__(other)
        other.image, other.measured = self.image, self.measured
        for name, buffer in self.named_buffers():
            other.register_buffer(name, buffer.abs() if "values" in name else buffer)
        return other

    @cached_property
    @torch.no_grad()
    def convolution(self) -> Tensor | None:
        """Spectrum in the ``rfft2`` basis of the circular convolution with the middle column of A^T A,
        ``(1, 1, H, W // 2 + 1)``; ``None`` where A^T A is far from a convolution. For preconditioners."""
        height, width = self.image
        unit = self.values.new_zeros((1, 1, height, width))
        unit[..., height // 2, width // 2] = 1
        column = self.A_adjoint(self.A(unit)).roll((-(height // 2), -(width // 2)), (-2, -1))
        power = torch.fft.rfft2(column).real
        power = power.clamp(min=SMALLEST_POWER * float(power.abs().amax()))
        probe = torch.randn(unit.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(unit)
        product = self.A_adjoint(self.A(probe))
        misfit = (product - fourier_filter(probe, power)).norm()
        return power if bool(0 < misfit < CONVOLUTION_MISFIT * product.norm()) else None

    def product(self, vectors: Tensor, transposed: bool) -> Tensor:
        """Rows ``(n, H W)`` to ``(n, M)``, or back if transposed; without a graph."""
        size = (math.prod(self.measured), math.prod(self.image))
        parts = (self.row_starts, self.columns, self.values)
        if transposed:
            size, parts = size[::-1], (self.column_starts, self.rows, self.transposed_values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR tensors are new in torch
            matrix = torch.sparse_csr_tensor(*parts, size=size, check_invariants=False)
        if len(vectors) == 1:
            return (matrix @ vectors[0])[None]
        return (matrix @ vectors.T).T.contiguous()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, physics: MatrixPhysics, transposed: bool) -> Tensor:
        ctx.physics, ctx.transposed = physics, transposed
        return physics.product(vectors, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradients[0], ctx.physics, not ctx.transposed), None, None


def _starts(indices: Tensor, count: int) -> Tensor:
    """Where the entries of every row start, ``(count + 1,)``, for sorted row indices."""
    return torch.searchsorted(indices.contiguous(), torch.arange(count + 1, device=indices.device)).int()
