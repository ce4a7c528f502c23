"""Slices of one volume in the order of their position: reading, resizing, a built-in phantom, a split by position."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.data import load_folder
from bilevel_imaging.errors import DataError

# slices between the block of test slices and all others, and between training and validation slices
GAP = 2
PHANTOM_SLICES = 48
# Kak and Slaney (1988), Table 3.1: center (x, y, z), half axes (a, b, c), rotation in the plane in degrees, value; the
# values are those of the usual phantom of high contrast (Toft 1996)
ELLIPSOIDS = (
    ((0.0, 0.0, 0.0), (0.69, 0.92, 0.9), 0.0, 1.0),
    ((0.0, 0.0, 0.0), (0.6624, 0.874, 0.88), 0.0, -0.8),
    ((-0.22, 0.0, -0.25), (0.41, 0.16, 0.21), 108.0, -0.2),
    ((0.22, 0.0, -0.25), (0.31, 0.11, 0.22), 72.0, -0.2),
    ((0.0, 0.35, -0.25), (0.21, 0.25, 0.5), 0.0, 0.1),
    ((0.0, 0.1, -0.25), (0.046, 0.046, 0.046), 0.0, 0.1),
    ((-0.08, -0.65, -0.25), (0.046, 0.023, 0.02), 0.0, 0.1),
    ((0.06, -0.65, -0.25), (0.046, 0.023, 0.02), 90.0, 0.1),
    ((0.06, -0.105, 0.625), (0.056, 0.04, 0.1), 90.0, 0.2),
    ((0.0, 0.1, 0.625), (0.056, 0.056, 0.1), 0.0, -0.2),
)


@dataclass(frozen=True)
class Stack:
    """Slices of one volume, neighbors next to each other.

    Attributes:
        label: what the record calls them.
        slices: ``(1, H, W)`` float64 in [0, 1] by name, all of one shape.
    """

    label: str
    slices: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Parts:
    """Positions of the slices of every part, in order.

    Attributes:
        train: to learn from.
        validation: to choose among the steps of a long training.
        test: to score.
        block: first and last position of the block that the test slices are taken from.
    """

    train: list[int]
    validation: list[int]
    test: list[int]
    block: tuple[int, int]

    @property
    def rule(self) -> str:
        """The split in words."""
        return (
            f"test slices spread over the contiguous block of positions {self.block[0]} to {self.block[1]}, the middle "
            f"third; training and validation slices spread over the rest, at least {GAP} positions away from the block "
            "and from each other"
        )


def load_stack(folder: str | Path | None, size: int, *, square: bool) -> Stack:
    """The slices below a folder, in the order of their names, or a phantom.

    Args:
        folder: ``None`` for slices of the three-dimensional Shepp-Logan phantom.
        size: of the longer side, pixels; slices are never enlarged, but padded with zeros if ``square``.
        square: pad to ``size x size``.

    Raises:
        DataError: folder or files that cannot be used, or slices of different shapes.
        ValueError: a size below 16.
    """
    if size < 16:
        raise ValueError(f"Expected size >= 16 pixels. Got {size}.")
    if folder is None:
        return Stack("Shepp-Logan phantom, 3-D", phantom(size))
    images = load_folder(folder)
    shapes = {tuple(image.shape[-2:]) for _, image in images}
    if len(shapes) > 1:
        raise DataError(f"{folder}: expected slices of one volume, of one shape. Got {sorted(shapes)}.")
    slices = {name: resized(image, size, square=square) for name, image in images}
    return Stack(Path(folder).expanduser().resolve().name, slices)


def resized(image: Tensor, size: int, *, square: bool) -> Tensor:
    """``(1, H, W)`` with the longer side at most ``size``, averaged (not sampled), and padded around if ``square``."""
    longer = max(image.shape[-2:])
    if longer > size:
        shape = [max(1, round(n * size / longer)) for n in image.shape[-2:]]
        image = functional.interpolate(image[None], size=shape, mode="bilinear", antialias=True)[0].clamp(0, 1)
    if square:
        rows, columns = (size - n for n in image.shape[-2:])
        image = functional.pad(image, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return image


def phantom(size: int, count: int = PHANTOM_SLICES) -> dict[str, Tensor]:
    """Slices of the three-dimensional Shepp-Logan phantom, ``(1, size, size)`` in [0, 1], a pixel a mean of 3 x 3."""
    fine = (torch.arange(3 * size, dtype=torch.float64) + 0.5) / (3 * size) * 2 - 1
    x, y = fine[None, :], -fine[:, None]
    slices = {}
    for number, z in enumerate(torch.linspace(-0.75, 0.75, count, dtype=torch.float64).tolist()):
        image = torch.zeros((3 * size, 3 * size), dtype=torch.float64)
        for (x0, y0, z0), (a, b, c), degrees, value in ELLIPSOIDS:
            turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
            along = (x - x0) * turn.cos() + (y - y0) * turn.sin()
            across = (y - y0) * turn.cos() - (x - x0) * turn.sin()
            image += value * ((along / a) ** 2 + (across / b) ** 2 + ((z - z0) / c) ** 2 <= 1)
        slices[f"slice {number:02d}"] = functional.avg_pool2d(image[None], 3).clamp(0, 1)
    return slices


def split_positions(count: int, train: int, validation: int, test: int) -> Parts:
    """Divide the positions 0 to count - 1: neighboring slices are nearly equal, so parts must not be neighbors.

    Raises:
        ValueError: too few slices for the numbers asked for.
    """
    first = count // 3
    last = count - first - 1
    rest = [*range(first - GAP + 1), *range(last + GAP, count)]
    others = _spread(rest, train + validation)
    inside = _spread(list(range(first, last + 1)), test)
    close = any(b - a < GAP for a, b in zip(others, others[1:], strict=False))
    if min(train, validation, test) < 1 or close or len(others) < train + validation or len(inside) < test:
        raise ValueError(
            f"Expected enough slices for {train} training, {validation} validation and {test} test slices, each part "
            f"at least one, {GAP} positions apart. Got {count} slices; ask for fewer, or give a longer stack."
        )
    chosen = {others[i] for i in _spread(list(range(train + validation)), validation)}
    return Parts([i for i in others if i not in chosen], [i for i in others if i in chosen], inside, (first, last))


def _spread(values: list[int], count: int) -> list[int]:
    """``count`` of the values, evenly spaced, in the middles of equal parts."""
    return [values[int((i + 0.5) * len(values) / count)] for i in range(count)] if count <= len(values) else values
