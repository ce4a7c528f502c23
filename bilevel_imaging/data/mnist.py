"""MNIST digits as tensors, read or downloaded by torchvision, and labels corrupted as in data hypercleaning."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from bilevel_imaging.errors import DataError

CLASSES = 10


def load_mnist(folder: str | os.PathLike[str] | None = None, *, train: bool = True) -> tuple[Tensor, Tensor]:
    """All training or test digits, in their order.

    Args:
        folder: holds ``MNIST/raw/train-images-idx3-ubyte`` and so on, as torchvision leaves them; ``None`` for
            torchvision's download into the cache of torch.hub (once).
        train: the 60,000 training digits, or the 10,000 test digits.

    Returns:
        images ``(N, 28, 28)``, float32 in [0, 1], and labels ``(N,)``, int64.

    Raises:
        DataError: no or damaged files in the folder, or no download.
    """
    from torchvision.datasets import MNIST

    root = Path(torch.hub.get_dir(), "mnist") if folder is None else Path(folder)
    try:
        digits = MNIST(root, train=train, download=folder is None)
    except (RuntimeError, OSError, ValueError, TypeError, AssertionError) as error:
        if folder is None:
            raise DataError(
                "MNIST could not be downloaded. Connect to the internet, or give a folder that holds "
                "MNIST/raw/train-images-idx3-ubyte and the other three files."
            ) from error
        raise DataError(
            f"{root}: expected MNIST in torchvision's layout, MNIST/raw/train-images-idx3-ubyte and so on. "
            f"Got none that can be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
        ) from error
    return digits.data.float() / 255, digits.targets.long()


def corrupt_labels(labels: Tensor, count: int, *, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Replace ``count`` labels at random places by other labels, all others equally likely.

    With seed 0 and 2,000 of the first 20,000 training digits of MNIST, these are the labels of Ehrhardt & Roberts
    (2023), Section 4.2; the two numbers drawn first are those that the data loaders of their code draw.

    Args:
        labels: ``(N,)`` int64 in [0, classes).
        count: 0 <= count <= N.
        classes: number of classes, at least 2.
        seed: of the draws.

    Returns:
        the new labels ``(N,)``, and which were changed, bool ``(N,)``.

    Raises:
        ValueError: count or classes out of range.
    """
    if not 0 <= count <= len(labels) or classes < 2:
        raise ValueError(
            f"Expected 0 <= count <= {len(labels)} and classes >= 2. Got count={count} and classes={classes}."
        )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    shifts = torch.randint(1, classes, (count,), generator=generator)
    places = torch.randperm(len(labels), generator=generator)[:count]
    changed, corrupted = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    changed[places] = (labels[places] + shifts) % classes
    corrupted[places] = True
    return changed, corrupted
