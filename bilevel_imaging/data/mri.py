"""Undersampled magnetic resonance imaging: which lines of k-space are measured, and pictures of complex images."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cartesian_mask", "magnitude"]


def cartesian_mask(columns: int, acceleration: float, center_fraction: float, generator: torch.Generator) -> Tensor:
    """Which columns of k-space are measured, ``(columns,)`` of 0 and 1, float64, the zero frequency in the middle.

    Of all columns, 1 / acceleration are measured, rounded: the central ones, and others that are drawn with
    probabilities proportional to (1 - |k| / k_max)^2.

    Args:
        columns: width of k-space.
        acceleration: quotient of all columns and those measured, >= 1.
        center_fraction: part of the columns around the zero frequency that is measured for certain; at least one is.
        generator: on the CPU; decides on the others.

    Raises:
        ValueError: fewer columns are to be measured than there are central ones.
    """
    wanted, central = round(columns / acceleration), max(1, round(center_fraction * columns))
    if wanted < central:
        raise ValueError(
            f"Expected an acceleration of at most {columns / central:.3g} for {columns} columns of k-space with "
            f"{central} central ones. Got {acceleration:g}."
        )
    distance = (torch.arange(columns, dtype=torch.float64) - columns // 2).abs()
    mask = torch.zeros(columns, dtype=torch.float64)
    mask[distance.argsort(stable=True)[:central]] = 1
    chances = (1 - distance / (columns // 2 + 1)).square() * (1 - mask)
    if wanted > central:
        mask[torch.multinomial(chances, wanted - central, replacement=False, generator=generator)] = 1
    return mask


def magnitude(x: Tensor) -> Tensor:
    """What is scored and shown, ``(..., C, H, W)``: the modulus ``(..., 1, H, W)`` of two channels, else x itself."""
    return x.square().sum(-3, keepdim=True).sqrt() if x.shape[-3] == 2 else x
