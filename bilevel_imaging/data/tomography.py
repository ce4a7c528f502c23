"""Parallel-beam tomography as a sparse matrix: deepinv's operator entry by entry, many times as fast."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from bilevel_imaging.energies.matrix_physics import MatrixPhysics
from bilevel_imaging.energies.norm_bounds import matrix_norm_bound

__all__ = ["parallel_beam", "projector_norm"]


def parallel_beam(
    size: int, angles: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[MatrixPhysics, float]:
    """Projections of ``size x size`` images along ``angles`` directions, scaled to norm at most 1 (and almost 1).

    The directions are equispaced in [0, 180) degrees. Before the scaling the operator is deepinv's
    ``Tomography(angles, size, circle=False, normalize=False)``: sums, with steps of one pixel, of the bilinearly
    interpolated image, at detector positions one pixel apart over the diagonal.

    Args:
        size: height and width of the images, >= 2.
        angles: number of directions, >= 1.
        dtype: of images and measurements; the matrix is computed in float64.
        device: of images and measurements.

    Returns:
        the physics, from ``(B, C, size, size)`` to sinograms ``(B, C, detector, angles)``, and the positive number by
        which deepinv's operator is divided: a certified bound of its norm.

    Raises:
        ValueError: a number out of range.
    """
    if size < 2 or angles < 1:
        raise ValueError(f"Expected size >= 2 and angles >= 1. Got {size} and {angles}.")
    matrix, scale = _normalized(size, angles)
    physics = MatrixPhysics(matrix.to(dtype), (size, size), (detector_cells(size), angles))
    return physics.to(device), scale


def projector_norm(size: int, angles: int) -> float:
    """The number by which :func:`parallel_beam` divides deepinv's operator, without making an operator."""
    return _normalized(size, angles)[1]


def detector_cells(size: int) -> int:
    """Number of detector positions: the diagonal of the image, in pixels."""
    return math.ceil(math.sqrt(2) * size)


@lru_cache(maxsize=2)
def _normalized(size: int, angles: int) -> tuple[Tensor, float]:
    matrix = _matrix(size, angles)
    physics = MatrixPhysics(matrix, (size, size), (detector_cells(size), angles))
    scale = math.sqrt(matrix_norm_bound(physics))
    scaled = torch.sparse_coo_tensor(
        matrix.indices(), matrix.values() / scale, matrix.shape, is_coalesced=True, check_invariants=False
    )
    return scaled, scale


def _matrix(size: int, angles: int) -> Tensor:
    """Entries ``(detector * angles, size^2)``, float64, coalesced."""
    indices, values = [], []
    for number in range(angles):
        detector, pixel, weight = _projection(size, math.pi * number / angles)
        indices.append(torch.stack([detector * angles + number, pixel]))
        values.append(weight)
    entries, weights = torch.cat(indices, 1), torch.cat(values)
    order = entries[0].argsort(stable=True)  # rows of one angle are in order already
    shape = (detector_cells(size) * angles, size * size)
    return torch.sparse_coo_tensor(entries[:, order], weights[order], shape, is_coalesced=True, check_invariants=False)


def _projection(size: int, angle: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the projection along one direction, sorted and without repetitions."""
    cells = detector_cells(size)
    # the image lies in a square as wide as the diagonal, and is turned about the middle of that
    margin, middle = (size + (cells - size)) // 2 - size // 2, (cells - 1) / 2
    steps = torch.arange(cells, dtype=torch.float64) - middle
    along, across = steps[:, None], steps[None, :]
    x = math.cos(angle) * across + math.sin(angle) * along + middle - margin
    y = -math.sin(angle) * across + math.cos(angle) * along + middle - margin
    keys, weights = [], []
    detector = torch.arange(cells).expand(cells, cells)
    for column in (x.floor(), x.floor() + 1):
        for row in (y.floor(), y.floor() + 1):
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            inside = (row >= 0) & (row < size) & (column >= 0) & (column < size) & (weight > 0)
            keys.append((detector * size * size + row.long() * size + column.long())[inside])
            weights.append(weight[inside])
    found, place = torch.cat(keys).unique(return_inverse=True)
    values = torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, torch.cat(weights))
    return found // (size * size), found % (size * size), values
