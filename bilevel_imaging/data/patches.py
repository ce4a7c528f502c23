"""Crops of images: seeded ones that cover an image evenly, and the center."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bilevel_imaging.data.reading import check_size
from bilevel_imaging.data.splits import keyed_generator
from bilevel_imaging.errors import DataError

__all__ = ["center_crop", "extract_patches"]


def extract_patches(
    images: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    size: int,
    per_image: int,
    seed: int = 0,
) -> list[tuple[str, Tensor]]:
    """Square crops at random positions, the same number from every image.

    The possible positions are divided into ``per_image`` cells of nearly equal area, and one is drawn from every cell:
    crops are spread evenly and no position comes twice. The crops of an image depend on its name, its size and the
    seed, not on the other images.

    Args:
        images: ``(name, image)`` pairs or a mapping (an ``ImageFolder`` too, read one by one), images ``(C, H, W)`` of
            any sizes.
        size: height and width of a crop, pixels.
        per_image: crops from every image.
        seed: another seed, other positions.

    Returns:
        ``(name, crop)`` pairs in the order of the images, crops ``(C, size, size)`` with memory of their own, named
        after rows and columns: ``"camera[12:76,30:94]"``.

    Raises:
        ValueError: size or number below 1.
        DataError: an image too small for one crop or without ``per_image`` different positions.
    """
    if size < 1 or per_image < 1:
        raise ValueError(f"Expected size >= 1 and per_image >= 1. Got size={size}, per_image={per_image}.")
    patches = []
    for name, image in images.items() if isinstance(images, Mapping) else images:
        check_size(image, size, name)
        rows, columns = image.shape[-2] - size + 1, image.shape[-1] - size + 1
        if per_image > rows * columns:
            raise DataError(
                f"{name}: asked for {per_image} different {size}x{size} patches, but the {image.shape[-2]}x"
                f"{image.shape[-1]} image has only {rows * columns}. Ask for fewer or smaller patches."
            )
        generator = keyed_generator("patches", seed, name, rows, columns)
        for top, left in _positions(rows, columns, per_image, generator):
            crop = image[:, top : top + size, left : left + size]
            patches.append((f"{name}[{top}:{top + size},{left}:{left + size}]", crop.clone()))
    return patches


def _positions(rows: int, columns: int, count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """``count`` different positions on a ``rows x columns`` grid, one drawn from every cell of a partition.

    The grid is cut into bands, and band i into so many columns of cells that the cells add up to ``count``.
    """
    bands = max(1, min(rows, count, round((count * rows / columns) ** 0.5)))
    bands = max(bands, -(-count // columns))  # no band may need more cells than there are columns
    positions = []
    for i in range(bands):
        cells = (i + 1) * count // bands - i * count // bands
        for j in range(cells):
            top = _draw(i * rows // bands, (i + 1) * rows // bands, generator)
            left = _draw(j * columns // cells, (j + 1) * columns // cells, generator)
            positions.append((top, left))
    return positions


def _draw(start: int, stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(start, stop, (), generator=generator))


def center_crop(image: Tensor, size: int | tuple[int, int], name: str = "image") -> Tensor:
    """The middle of a ``(C, H, W)`` image, ``size`` pixels (height, width; one int for both), a view.

    Raises:
        DataError: the image is smaller; the message begins with ``name``.
    """
    check_size(image, size, name)
    height, width = (size, size) if isinstance(size, int) else size
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    return image[:, top : top + height, left : left + width]
