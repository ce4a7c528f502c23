"""Scores of training images, and how often to learn from each so that the mean of their PSNR is what is learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_imaging.errors import DataError

__all__ = ["psnr_shares"]


def psnr_shares(path: str | Path) -> dict[str, float]:
    """1 / mean squared error of every image, by its name: 10^(PSNR / 10).

    The mean PSNR of a set changes with theta like the mean of -log(error of an image), whose gradient is that of the
    squared error divided by what it is now. Crops drawn this often, each with its squared error, give that on average.

    Args:
        path: ``record.json`` of ``scripts/reproduce.py denoising`` on the training images; the first method and noise
            level in it count.

    Raises:
        DataError: no such file, or not such a record.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from None
    except ValueError:
        raise DataError(f"{path}: not a JSON file. Give the record.json of scripts/reproduce.py denoising.") from None
    try:
        images = record["levels"][0]["images"]
        shares = {name: 10 ** (_first_psnr(methods) / 10) for name, methods in images.items()}
    except (KeyError, IndexError, TypeError, AttributeError, StopIteration):
        shares = {}
    if not shares:
        raise DataError(f"{path}: no PSNR by image. Give the record.json of scripts/reproduce.py denoising.")
    return shares


def _first_psnr(methods: Mapping[str, Any]) -> float:
    return float(next(scores["psnr"] for method, scores in methods.items() if method != "noisy"))
