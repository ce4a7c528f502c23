"""Folders of images, searched with all their subfolders, loaded at once or one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from bilevel_imaging.data.reading import EXTENSIONS, read_image
from bilevel_imaging.errors import DataError

__all__ = ["ImageFolder", "list_images", "load_folder"]


def list_images(path: str | os.PathLike[str]) -> list[str]:
    """Names of all images below a folder, sorted: paths relative to it, with "/" on every system.

    Subfolders are searched, linked ones too. Files and folders whose name begins with a dot are skipped (macOS leaves
    "._photo.jpg" files that are no images).

    Raises:
        DataError: folder missing, not a folder, not readable, or without images; a name that is not UTF-8, which
            nothing could be recorded by.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such folder. Check the spelling, or leave it out to use the bundled photographs.")
    if not root.is_dir():
        raise DataError(f"{root}: is a file, but a folder of images is needed. Give the folder {root.parent}.")
    names = sorted(file.relative_to(root).as_posix() for file in _walk(root))
    if not names:
        raise DataError(
            f"{root}: no images found in it or its subfolders. Searched for {', '.join(EXTENSIONS)} (any case)."
        )
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise DataError(f"{root}: the file name '{shown}' is not UTF-8. Rename it.") from None
    return names


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        # os.walk would skip an unreadable subfolder silently, and the training set would shrink without a word.
        raise DataError(f"{error.filename}: cannot be searched ({error.strerror}). Check its permissions.") from error

    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:  # a link back to a folder visited before: do not loop, do not load images twice
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in files:
            if not file.startswith(".") and file.lower().endswith(EXTENSIONS):
                yield Path(folder, file)


class ImageFolder(Dataset[tuple[str, Tensor]]):
    """The images below a folder, read when asked for: only their names are kept in memory.

    ``folder[i]`` is ``(name, image)`` with the image as :func:`bilevel_imaging.data.read_image` returns it:
    ``(C, H, W)``, float64 in [0, 1], C = 3 with ``color``, else 1. The order is that of :func:`list_images`.

    Args:
        path: the folder; ``~`` is expanded.
        color: RGB instead of luma.
        min_size: smallest height and width accepted, in pixels (the patch size); checked as an image is read.

    Attributes:
        root: the folder.
        names: path of every image relative to the folder.

    Raises:
        DataError: at construction if the folder cannot be used; on access if a file cannot.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        color: bool = False,
        min_size: int | tuple[int, int] | None = None,
    ) -> None:
        self.root = Path(path).expanduser()
        self.color = color
        self.min_size = min_size
        self.names = list_images(self.root)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        name = self.names[index]
        return name, read_image(self.root / name, self.color, self.min_size)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return (self[index] for index in range(len(self)))


def load_folder(
    path: str | os.PathLike[str],
    color: bool = False,
    min_size: int | tuple[int, int] | None = None,
) -> list[tuple[str, Tensor]]:
    """Read all images below a folder into memory: ``list(ImageFolder(path, color, min_size))``.

    Returns:
        ``(name, image)`` pairs sorted by name, images ``(C, H, W)``, float64 in [0, 1].

    Raises:
        DataError: as :class:`ImageFolder`.
    """
    return list(ImageFolder(path, color, min_size))
