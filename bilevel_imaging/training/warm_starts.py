"""Where the lower-level points and adjoints of the last steps are kept, image by image, to start from the next time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Shapes = Mapping[int, Sequence[int]]


class WarmStarts:
    """Points x and adjoints q by image, in memory.

    Args:
        device: where they are kept, as copies of their own; ``None`` for wherever they are, in whatever tensor they
            are part of (right where all images are solved anew every time).
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = device
        self.x: dict[int, Tensor] = {}
        self.q: dict[int, Tensor] = {}

    def open(self) -> None:
        """Make what they are kept in, before others use it too."""

    def points(self, indices: Sequence[int]) -> list[Tensor | None]:
        """The last lower-level points of the images, ``None`` where there is none."""
        return [self.x.get(i) for i in indices]

    def adjoints(self, indices: Sequence[int]) -> list[Tensor | None]:
        """The last adjoints of the images, ``None`` where there is none."""
        return [self.q.get(i) for i in indices]

    def put(self, indices: Sequence[int], x: Tensor, q: Tensor) -> None:
        """Keep the points and adjoints ``(B, *image)`` of a batch."""
        for store, batch in ((self.x, x), (self.q, q)):
            for index, tensor in zip(indices, batch.detach().unbind(0), strict=True):
                # an entry that was part of a minibatch would keep all of it in memory
                store[index] = tensor if self.device is None else tensor.to(self.device, copy=True)

    def step_done(self) -> None:
        """The hypergradient of a step is computed: forget what later steps are not to see."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        return {"x": dict(self.x), "q": dict(self.q)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned; ``device`` is that of the data."""
        where = device if self.device is None else self.device
        self.x, self.q = ({i: t.to(where) for i, t in state[name].items()} for name in ("x", "q"))


class DiskWarmStarts(WarmStarts):
    """Points x and adjoints q by image in memory-mapped files: neither memory nor checkpoints grow with the images.

    A run that ended by itself or by Ctrl-C continues bit for bit. After a kill the files may be ahead of the
    checkpoint, a crash of the machine may lose or mix entries, and files may be missing: any finite start leads to the
    same accuracy, so this costs iterations only, but the continuation then agrees with the uninterrupted run to the
    accuracy of its solves, not bit for bit. Entries that are not finite are not used.

    Args:
        folder: of the files, made if needed; files of other sizes are replaced.
        shapes: shape of every image, by index.
        dtype: of the entries, float32 or float64.

    Raises:
        OSError: at the first use, if the disk is full or not writable.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes = {i: tuple(shape) for i, shape in sorted(shapes.items())}
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        starts = [0, *np.cumsum(sizes).tolist()]
        self._range = {i: (start, start + n) for i, start, n in zip(self.shapes, starts, sizes, strict=False)}
        self._number = {i: number for number, i in enumerate(self.shapes)}
        kind = np.dtype(str(dtype).removeprefix("torch."))
        self._layout = {"known": (len(sizes), np.dtype(np.uint8)), "x": (starts[-1], kind), "q": (starts[-1], kind)}
        self.folder = folder

    @cached_property
    def _files(self) -> dict[str, np.memmap]:
        # opened at the first use: a mistake found before the first step leaves no files behind
        self.folder.mkdir(parents=True, exist_ok=True)
        return {name: _map(self.folder / f"{name}.bin", *layout) for name, layout in self._layout.items()}

    def open(self) -> None:
        self._files  # noqa: B018 (made when they are asked for)

    def points(self, indices: Sequence[int]) -> list[Tensor | None]:
        return [self._read("x", i) for i in indices]

    def adjoints(self, indices: Sequence[int]) -> list[Tensor | None]:
        return [self._read("q", i) for i in indices]

    def _read(self, name: str, index: int) -> Tensor | None:
        if not self._files["known"][self._number[index]]:
            return None
        start, stop = self._range[index]
        values = np.array(self._files[name][start:stop])
        return torch.from_numpy(values).reshape(self.shapes[index]) if np.isfinite(values).all() else None

    def put(self, indices: Sequence[int], x: Tensor, q: Tensor) -> None:
        for name, batch in (("x", x), ("q", q)):
            for index, values in zip(indices, batch.detach().cpu().flatten(1).numpy(), strict=True):
                start, stop = self._range[index]
                self._files[name][start:stop] = values
        for index in indices:
            self._files["known"][self._number[index]] = 1


class NoWarmStarts(WarmStarts):
    """Nothing outlives a step: memory and checkpoints do not grow, every step starts afresh."""

    def step_done(self) -> None:
        self.x, self.q = {}, {}


def _map(path: Path, entries: int, dtype: np.dtype) -> np.memmap:
    size = entries * dtype.itemsize
    if not path.is_file() or path.stat().st_size != size:
        with path.open("wb") as file:
            # All of it now: a full disk is then an error here, and not a crash at a later write into the mapping.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    return np.memmap(path, dtype=dtype, mode="r+", shape=(entries,))
