"""Algebra of k vectors per sample, ``(A, k, *image)``, and of small matrices ``(A, k, k)`` float64 that act on them.

Vector by vector rather than by batched matrix products, whose last bits depend on the size of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.tensors import norm, per_sample

# a vector that orthogonalization has left with fewer units of rounding than this has vanished
_VANISHED = 10.0


def combine(vectors: Tensor, matrix: Tensor) -> Tensor:
    """The vectors sum_i v_i M_ij, ``(A, k, *image)``."""
    matrix = matrix.to(vectors.dtype)
    result = torch.zeros_like(vectors)
    for j in range(matrix.shape[2]):
        for i in range(matrix.shape[1]):
            result[:, j].addcmul_(vectors[:, i], per_sample(matrix[:, i, j], vectors[:, i]))
    return result


def gram(a: Tensor, b: Tensor) -> Tensor:
    """Symmetric part of the matrix of inner products <a_i, b_j>, ``(A, k, k)``."""
    rows = [torch.stack([_inner(a[:, i], b[:, j]) for j in range(b.shape[1])], 1) for i in range(a.shape[1])]
    matrix = torch.stack(rows, 1)
    return (matrix + matrix.transpose(1, 2)) / 2


def product(a: Tensor, b: Tensor) -> Tensor:
    """Products of small matrices."""
    return (a.unsqueeze(3) * b.unsqueeze(1)).sum(2)


def orthonormalize(vectors: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal w and an upper triangular matrix with vectors = w M, by Gram-Schmidt, twice.

    A vector that vanishes next to its ``size`` ``(A, k)``, what it was computed from, gives w_j = 0 and a zero row.
    """
    threshold = _VANISHED * torch.finfo(vectors.dtype).eps
    basis = torch.empty_like(vectors)
    upper = vectors.new_zeros((*vectors.shape[:2], vectors.shape[1]), dtype=torch.float64)
    for j in range(vectors.shape[1]):
        v = vectors[:, j].clone()
        for _ in range(2):
            for i in range(j):
                along = _inner(basis[:, i], v)
                v.addcmul_(basis[:, i], per_sample(along.to(v.dtype), v), value=-1)
                upper[:, i, j] += along
        left = norm(v).double()
        kept = ~(left <= threshold * size[:, j])  # NaN is passed on
        upper[:, j, j] = torch.where(kept, left, 0.0)
        basis[:, j] = v * per_sample(torch.where(kept, 1 / left, 0.0).to(v.dtype), v)
    return basis, upper


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1, dtype=torch.float64)
