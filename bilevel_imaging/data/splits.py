"""Seeded randomness by key, and splits of a set by whole images."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bilevel_imaging.errors import DataError

__all__ = ["Split", "keyed_generator", "split_names"]


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator whose numbers depend on the key alone (its ``str``), e.g. ``("noise", seed, index, shape)``.

    One generator per purpose and image makes every draw independent of batch size, order and device.
    """
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True)
class Split:
    """Names of the images of every part; no name is in two parts."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        _refuse_repeated([*self.train, *self.validation, *self.test])


def split_names(
    names: Iterable[str],
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> Split:
    """Divide images into train, validation and test, at random but reproducibly.

    Split images, not patches: two patches of one image in two parts would make the test score too good. The result
    depends on the set of names and the seed, not on the order of the names.

    Args:
        names: one name per image, all different.
        fractions: parts of the whole for train, validation and test; they sum to 1, and 0 gives an empty part.
            A part with a positive fraction gets at least one image.
        seed: another seed, another split.

    Returns:
        the names of every part, sorted.

    Raises:
        ValueError: fractions negative or not summing to 1.
        DataError: a name given twice, or fewer images than parts.
    """
    if len(fractions) != 3 or not all(f >= 0 for f in fractions) or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"Expected fractions as three numbers >= 0 that sum to 1. Got {tuple(fractions)}.")
    ordered = sorted(names)
    _refuse_repeated(ordered)
    counts = _counts(len(ordered), fractions)
    shuffled = [ordered[i] for i in torch.randperm(len(ordered), generator=keyed_generator("split", seed)).tolist()]
    a, b = counts[0], counts[0] + counts[1]
    return Split(tuple(sorted(shuffled[:a])), tuple(sorted(shuffled[a:b])), tuple(sorted(shuffled[b:])))


def _refuse_repeated(names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"{name}: the image is named {count} times in a split. Name every image once.")


def _counts(total: int, fractions: tuple[float, float, float]) -> list[int]:
    """Numbers of images summing to ``total``: largest remainders, and no part with a positive fraction empty."""
    parts = sum(f > 0 for f in fractions)
    if total < parts:
        raise DataError(
            f"Expected at least {parts} images for a split into {parts} parts. Got {total}. "
            f"Add images or set a fraction to 0."
        )
    counts = [math.floor(total * f) for f in fractions]
    by_remainder = sorted(range(3), key=lambda i: counts[i] - total * fractions[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    for i, fraction in enumerate(fractions):
        if fraction > 0 and counts[i] == 0:
            counts[i] += 1
            counts[counts.index(max(counts))] -= 1
    return counts
