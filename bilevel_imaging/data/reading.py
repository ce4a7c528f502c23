"""One image file to one tensor: every format quirk (bit depth, palette, alpha, orientation) is settled here."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bilevel_imaging.errors import DataError

__all__ = ["EXTENSIONS", "check_size", "luminance", "read_image"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""File name extensions that count as images, compared without regard to case."""

LUMA_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of R, G, B, the convention of the denoising literature (rgb2gray of MATLAB)."""

_TIFF_EXTENSIONS = (".tif", ".tiff")


def luminance(image: Tensor) -> Tensor:
    """ITU-R BT.601 luma 0.299 R + 0.587 G + 0.114 B of a ``(3, H, W)`` image in [0, 1], as ``(1, H, W)``."""
    red, green, blue = image.split(1)
    # The same as the weighted sum, as the weights sum to 1; but a gray pixel stored as RGB keeps its value exactly.
    return (green + LUMA_WEIGHTS[0] * (red - green) + LUMA_WEIGHTS[2] * (blue - green)).clamp(0, 1)


def check_size(image: Tensor, min_size: int | tuple[int, int], name: str) -> None:
    """Check that a ``(C, H, W)`` image has at least ``min_size`` pixels (height, width; one int for both).

    Raises:
        DataError: with the name, the size and the size needed.
    """
    height, width = (min_size, min_size) if isinstance(min_size, int) else min_size
    if image.shape[-2] < height or image.shape[-1] < width:
        raise DataError(
            f"{name}: the image is too small, {image.shape[-2]}x{image.shape[-1]} pixels (height x width), "
            f"but {height}x{width} are needed. Remove it or ask for a smaller patch size."
        )


def read_image(
    path: str | os.PathLike[str], color: bool = False, min_size: int | tuple[int, int] | None = None
) -> Tensor:
    """Read a PNG, JPEG, TIFF or BMP file.

    Integers are divided by the maximum of their type (255, 65535), floats must lie in [0, 1] already. Palettes are
    resolved, alpha is dropped (not blended), EXIF orientation is applied.

    Args:
        path: the file.
        color: ``False`` gives the BT.601 luma of color files; ``True`` repeats gray files three times.
        min_size: smallest height and width accepted, in pixels.

    Returns:
        ``(1, H, W)`` or, with ``color``, ``(3, H, W)``; float64 in [0, 1], on the CPU.

    Raises:
        DataError: file missing or not readable as an image, NaN or infinite pixels, floats outside [0, 1], several
            pages, too small. One line, beginning with the path.
    """
    path = Path(path).expanduser()
    try:
        array = _decode(path)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, RuntimeError, struct.error, ...
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{path}: cannot be read as an image ({cause}). Replace the file or remove it from the folder."
        ) from error
    image = torch.from_numpy(_to_unit_range(array, path)).permute(2, 0, 1)
    image = image[:3] if image.shape[0] >= 3 else image[:1]  # alpha and further samples come last
    if color:
        image = image.expand(3, -1, -1)
    elif image.shape[0] == 3:
        image = luminance(image)
    if min_size is not None:
        check_size(image, min_size, str(path))
    return image.contiguous()


def _decode(path: Path) -> np.ndarray:
    """Pixels as stored, ``(H, W, channels)``, alpha last where there is one."""
    if path.suffix.lower() in _TIFF_EXTENSIONS:
        deep = _decode_deep_tiff(path)
        if deep is not None:
            return deep
    if _is_deep_png(path):
        return _decode_deep_png(path)
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode in ("1", "L", "LA"):
            picture = picture.convert("L")
        elif picture.mode in ("I", "F"):  # converting these would clip to 8 bits
            raise ValueError(f"Pillow mode {picture.mode}")
        elif not picture.mode.startswith("I;16"):  # RGB, RGBA, palette, CMYK, YCbCr, LAB, ...
            picture = picture.convert("RGB")
        array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array


def _is_deep_png(path: Path) -> bool:
    """Whether the file is a PNG with 16 bits a sample: signature, then IHDR with the bit depth at byte 24."""
    with open(path, "rb") as file:
        head = file.read(25)
    return len(head) == 25 and head.startswith(b"\x89PNG\r\n\x1a\n") and head[24] == 16


def _decode_deep_png(path: Path) -> np.ndarray:
    """Pixels of a 16-bit PNG, uint16.

    Pillow reads 16-bit gray in full but silently keeps only the first byte of every 16-bit color sample. Told that the
    samples are little-endian (PNG is big-endian), it keeps the second byte: reading twice gives both.
    """
    with Image.open(path) as opened:
        layout = str(opened.tile[0][3])
        if layout.startswith("LA"):
            raise ValueError("16-bit gray with alpha is not supported: save it without alpha")
        first = np.asarray(opened).astype(np.uint16)
    if first.ndim == 2:
        return first[..., None]
    with Image.open(path) as opened:
        little = layout.replace("16B", "16L")
        opened.tile = [(*tile[:3], little) for tile in opened.tile]  # type: ignore[misc]  # named tuples of late only
        second = np.asarray(opened).astype(np.uint16)
    return 256 * first + second


def _decode_deep_tiff(path: Path) -> np.ndarray | None:
    """Pixels of a TIFF with more than 8 bits a sample; ``None`` for the others, which Pillow reads well.

    Pillow reduces 16-bit color to 8 bits and refuses float color; tifffile (which scikit-image requires) reads both
    but resolves neither palettes nor, without imagecodecs, the compressions common among 8-bit files.
    """
    import tifffile

    photometric = tifffile.PHOTOMETRIC
    with tifffile.TiffFile(path) as file:
        full = [page for page in file.pages if isinstance(page, tifffile.TiffPage)]
        pages = [page for page in full if not page.is_reduced]  # without thumbnails
        if len(pages) > 1:
            raise DataError(f"{path}: holds {len(pages)} pages. Save every page as a file of its own.")
        page = pages[0]
        if page.bitspersample <= 8 or page.photometric == photometric.PALETTE:
            return None
        if page.photometric not in (photometric.MINISBLACK, photometric.MINISWHITE, photometric.RGB):
            raise DataError(f"{path}: expected gray or RGB. Got {page.photometric!r}. Convert it to RGB.")
        axes = page.axes
        try:
            array = page.asarray()
        except ValueError:
            # Most often a compression that needs imagecodecs. Pillow loses nothing on 16-bit gray alone.
            if page.dtype == np.uint16 and page.photometric == photometric.MINISBLACK and axes == "YX":
                return None
            raise
        if page.photometric == photometric.MINISWHITE and array.dtype.kind == "u":
            array = np.iinfo(array.dtype).max - array
    if axes == "YX":
        return array[..., None]
    if axes in ("YXS", "SYX"):
        return array if axes == "YXS" else np.moveaxis(array, 0, -1)
    raise DataError(f"{path}: expected a two-dimensional gray or color image. Got axes {axes}. Convert it.")


def _to_unit_range(array: np.ndarray, path: Path) -> np.ndarray:
    """Float64 values in [0, 1], by the range of the stored type."""
    if array.dtype == np.bool_:
        return array.astype(np.float64)
    if array.dtype.kind == "u":
        return array.astype(np.float64) / np.iinfo(array.dtype).max
    if array.dtype.kind != "f":
        raise DataError(
            f"{path}: stores {array.dtype} pixels, which have no agreed range. Save it as uint8, uint16 or float."
        )
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        count = int(np.size(values) - np.isfinite(values).sum())
        raise DataError(f"{path}: {count} values are NaN or infinite. Repair the image or remove it from the folder.")
    low, high = (float(values.min()), float(values.max())) if values.size else (math.nan, math.nan)
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"{path}: expected float pixels in [0, 1]. Got {low:.6g} to {high:.6g}. Rescale it before loading."
        )
    return values
