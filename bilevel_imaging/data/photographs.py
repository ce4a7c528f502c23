"""Natural photographs that scikit-image installs with itself: a training set without any download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from torch import Tensor

from bilevel_imaging.data.reading import read_image
from bilevel_imaging.data.splits import Split
from bilevel_imaging.errors import DataError

__all__ = ["COLOR_PHOTOGRAPHS", "PHOTOGRAPH_SPLIT", "photographs"]

# The files lie in the wheel of scikit-image. They are opened by path, never through skimage.data, whose functions fall
# back to a download. Left out: motorcycle_right (the same scene as motorcycle_left), clock_motion (blurred by motion),
# and what is not a natural photograph (text, logos, phantoms, microscopy, astronomy).
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg",
}

COLOR_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "motorcycle", "rocket")
"""The photographs that are in color; the others are gray."""

PHOTOGRAPH_SPLIT = Split(
    train=("astronaut", "brick", "coffee", "coins", "gravel", "motorcycle"),
    validation=("chelsea", "moon"),
    test=("camera", "grass", "rocket"),
)
"""The split used everywhere, by whole images; every part has color and texture in it. Listed in data/README.md."""


def photographs(color: bool = False, part: Literal["train", "validation", "test"] | None = None) -> dict[str, Tensor]:
    """The bundled photographs by name, sorted; never touches the network.

    Args:
        color: ``False``: all eleven, color ones as ITU-R BT.601 luma (0.299 R + 0.587 G + 0.114 B), which is not
            what ``skimage.color.rgb2gray`` computes. ``True``: the five of ``COLOR_PHOTOGRAPHS`` alone, in RGB.
        part: only the photographs of this part of ``PHOTOGRAPH_SPLIT``.

    Returns:
        images ``(1, H, W)`` or ``(3, H, W)`` of several sizes, float64 in [0, 1], on the CPU.

    Raises:
        ValueError: unknown part.
        DataError: the installed scikit-image lacks a file.
    """
    if part not in (None, "train", "validation", "test"):
        raise ValueError(f'Expected part as "train", "validation", "test" or None. Got {part!r}.')
    names = sorted(_FILES) if part is None else sorted(getattr(PHOTOGRAPH_SPLIT, part))
    return {name: read_image(_path(name), color) for name in names if not color or name in COLOR_PHOTOGRAPHS}


def _path(name: str) -> Path:
    spec = find_spec("skimage")  # finds the package without importing it, which would take a while
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise DataError('scikit-image: the bundled photographs need it. Run "pip install scikit-image".')
    path = Path(folders[0]) / "data" / _FILES[name]
    if not path.is_file():
        raise DataError(f'{path}: missing from scikit-image. Run "pip install --force-reinstall scikit-image".')
    return path
