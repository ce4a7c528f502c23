"""The data set of a bilevel problem: pairs (clean image, measurement) in batches of equal shape."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from bilevel_imaging.data.degradations import Degradation
from bilevel_imaging.errors import DataError

__all__ = ["Batch", "ImagePairs"]

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Pairs of one shape and their operator.

    Attributes:
        indices: ``(B,)`` int64 on the CPU; ``ImagePairs.indices`` of the pairs, the key of their warm starts.
        x: clean images, ``(B, C, H, W)``.
        y: measurements, ``(B, *measurement)``.
        physics: the operator, shared by all batches of the shape: do not change it.
        noise_level: standard deviation of the noise of every measurement in the units of :class:`Degradation`, ``(B,)``
            like x; ``None`` if not known.
    """

    indices: Tensor
    x: Tensor
    y: Tensor
    physics: LinearPhysics
    noise_level: Tensor | None = None

    def split(self, size: int) -> list[Batch]:
        """The same pairs in order, at most ``size`` at a time."""
        levels = itertools.repeat(None) if self.noise_level is None else self.noise_level.split(size)
        parts = (tensor.split(size) for tensor in (self.indices, self.x, self.y))
        return [Batch(i, x, y, self.physics, level) for i, x, y, level in zip(*parts, levels, strict=False)]


@dataclass(eq=False)
class ImagePairs:
    """Clean images and their measurements, of one or several shapes, all of one dtype on one device.

    Usually made by :meth:`build`; the constructor takes measurements of any origin (tomography, MRI).

    Attributes:
        names: one per pair, all different.
        x: clean images ``(C, H, W)``.
        y: measurements of one image each, without a batch dimension.
        make_physics: from the shape ``(C, H, W)`` to the operator, in the dtype and on the device of the data; called
            once per shape.
        indices: one per pair, its position in the set first built: :meth:`subset` keeps it.
        noise_levels: standard deviation of the noise in the units of :class:`Degradation`, one per pair; empty if not
            known.

    Raises:
        DataError: no pairs, lists of different lengths, a name twice, or data that is not finite, not floating-point,
            not ``(C, H, W)`` or of several dtypes or devices. The message names the image.
    """

    names: list[str]
    x: list[Tensor]
    y: list[Tensor]
    make_physics: Callable[[Shape], LinearPhysics] = field(repr=False)
    indices: list[int] = field(default_factory=list)
    noise_levels: list[float] = field(default_factory=list)
    _physics: dict[Shape, LinearPhysics] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.indices:
            self.indices = list(range(len(self.names)))
        _check(self)

    @classmethod
    def build(
        cls,
        images: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        degradation: Degradation,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
    ) -> ImagePairs:
        """Measure every image; its index is its position.

        Measurements are computed in float64 on the CPU and then cast, so that every dtype and device gets the same
        numbers up to rounding.

        Args:
            images: ``(name, image)`` pairs or a mapping, images ``(C, H, W)`` in [0, 1] of any sizes.
            degradation: operator and noise.
            dtype: of the stored pairs and of the operators.
            device: of the stored pairs and of the operators.
        """
        names, x, y = [], [], []
        exact: dict[Shape, LinearPhysics] = {}
        for index, (name, image) in enumerate(images.items() if isinstance(images, Mapping) else images):
            if image.dim() != 3:
                raise DataError(f"{name}: expected an image (C, H, W). Got shape {tuple(image.shape)}.")
            clean = degradation.image(image.detach().to("cpu", torch.float64))
            shape = tuple(clean.shape)
            if shape not in exact:
                exact[shape] = degradation.physics(shape, torch.float64)
            names.append(name)
            x.append(clean.to(device, dtype))
            y.append(degradation.measure(clean, index, exact[shape]).to(device, dtype))
        levels = [degradation.noise_level(index) for index in range(len(names))]
        physics = partial(degradation.physics, dtype=dtype, device=device)
        return cls(names, x, y, physics, noise_levels=levels)

    def __len__(self) -> int:
        return len(self.names)

    def physics(self, shape: Sequence[int]) -> LinearPhysics:
        """The operator for images of the shape ``(C, H, W)``, built at the first call and shared by all subsets."""
        key = tuple(shape)
        if key not in self._physics:
            self._physics[key] = self.make_physics(key)
        return self._physics[key]

    def subset(self, positions: Sequence[int] | Tensor) -> ImagePairs:
        """The pairs at ``positions`` (0 to len - 1 of *this* set), in that order, with their ``indices`` and data.

        Raises:
            ValueError: no position, one out of range, or one twice.
        """
        chosen = self._positions(positions)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"Expected at least one position and none twice. Got {chosen}.")
        part = copy.copy(self)  # shares the operators, and skips the checks: the data has passed them already
        part.names = [self.names[i] for i in chosen]
        part.x = [self.x[i] for i in chosen]
        part.y = [self.y[i] for i in chosen]
        part.indices = [self.indices[i] for i in chosen]
        part.noise_levels = [self.noise_levels[i] for i in chosen] if self.noise_levels else []
        return part

    def batch(self, positions: Sequence[int] | Tensor) -> Batch:
        """The pairs at ``positions`` stacked.

        Raises:
            ValueError: no position, one out of range, or shapes that differ.
        """
        chosen = self._positions(positions)
        shapes = {_shapes(self.x[i], self.y[i])[0] for i in chosen}
        if len(shapes) != 1:
            raise ValueError(f"Expected positions of images of one shape. Got shapes {sorted(shapes)}.")
        x = torch.stack([self.x[i] for i in chosen])
        return Batch(
            torch.tensor([self.indices[i] for i in chosen], dtype=torch.int64),
            x,
            torch.stack([self.y[i] for i in chosen]),
            self.physics(shapes.pop()),
            x.new_tensor([self.noise_levels[i] for i in chosen]) if self.noise_levels else None,
        )

    def order(self, batch_size: int | None = None, generator: torch.Generator | None = None) -> list[list[int]]:
        """Positions of every batch of one pass over the set; plain lists, fit for a checkpoint.

        Batches hold images of one shape; every image comes exactly once. Without a generator: shapes by first
        appearance, images in their order. With one: images shuffled within their shape, then batches shuffled. All
        numbers are drawn here, so that the state of the generator changes once per pass.

        Args:
            batch_size: most images in a batch; ``None``: all of a shape together.
            generator: on the CPU; save its ``get_state()`` before the call to repeat the pass.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1 or None. Got {batch_size}.")
        groups: dict[tuple[Shape, Shape], list[int]] = {}
        for position, (x, y) in enumerate(zip(self.x, self.y, strict=True)):
            groups.setdefault(_shapes(x, y), []).append(position)
        result: list[list[int]] = []
        for group in groups.values():
            if generator is not None:
                group = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            step = batch_size or len(group)
            result.extend(group[start : start + step] for start in range(0, len(group), step))
        if generator is not None:
            result = [result[i] for i in torch.randperm(len(result), generator=generator).tolist()]
        return result

    def batches(self, batch_size: int | None = None, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """The batches of one pass in the :meth:`order` of the same arguments, stacked as they are asked for."""
        # The order is fixed now, not at the first batch: a generator function would draw at a time of its own.
        return map(self.batch, self.order(batch_size, generator))

    def _positions(self, positions: Sequence[int] | Tensor) -> list[int]:
        chosen = torch.as_tensor(positions).reshape(-1).tolist()
        for position in chosen:
            if not (isinstance(position, int) and 0 <= position < len(self)):
                raise ValueError(f"Expected integer positions from 0 to {len(self) - 1}. Got {position}.")
        return chosen


def _shapes(x: Tensor, y: Tensor) -> tuple[Shape, Shape]:
    return tuple(x.shape), tuple(y.shape)


def _check(pairs: ImagePairs) -> None:
    counts = [len(values) for values in (pairs.names, pairs.x, pairs.y, pairs.indices, pairs.noise_levels)]
    if not pairs.names:
        raise DataError("Expected at least one image. Got none: the list of images is empty.")
    if len(set(counts[:4])) != 1 or counts[4] not in (0, counts[0]):
        raise DataError(f"Expected as many names, x, y, indices and noise levels as images. Got {counts}.")
    seen: set[str] = set()
    dtype, device = pairs.x[0].dtype, pairs.x[0].device
    for name, x, y in zip(pairs.names, pairs.x, pairs.y, strict=True):
        if name in seen:
            raise DataError(f"{name}: two images have this name. Names tell images apart: rename one.")
        seen.add(name)
        if x.dim() != 3 or not x.is_floating_point():
            raise DataError(f"{name}: expected a float image (C, H, W). Got shape {tuple(x.shape)}, {x.dtype}.")
        if any(t.dtype != dtype or t.device != device for t in (x, y)):
            raise DataError(f"{name}: expected x and y as {dtype} on {device}. Got {x.dtype}, {y.dtype} on {y.device}.")
        if not bool(torch.isfinite(x).all() & torch.isfinite(y).all()):
            raise DataError(f"{name}: the image or its measurement has NaN or infinite values. Repair or remove it.")
