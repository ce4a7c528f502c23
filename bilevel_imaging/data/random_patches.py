"""Minibatches of fresh random crops: an endless data set from whole images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from bilevel_imaging.data.degradations import Degradation
from bilevel_imaging.data.pairs import Batch
from bilevel_imaging.data.reading import check_size
from bilevel_imaging.data.splits import keyed_generator
from bilevel_imaging.errors import DataError

__all__ = ["RandomPatches"]


class RandomPatches:
    """Whole images, once in memory as float32, from which every minibatch is cut anew.

    A minibatch is a pure function of seed and step: crops at random positions of random images (each image equally
    likely), turned by a random multiple of 90 degrees and flipped or not, with noise of their own. The operator is that
    of the degradation for the patch size, the same for all (one mask in inpainting).

    Args:
        images: ``(name, image)`` pairs or a mapping, images ``(C, H, W)`` in [0, 1] of any sizes and one number of
            channels; read one by one.
        degradation: operator and noise.
        size: height and width of a crop, pixels.
        count: crops in a minibatch.
        dtype: of the minibatches and the operator.
        device: of the minibatches and the operator.
        seed: another seed, other crops.

    Attributes:
        names: of the images.
        x: the images, ``(C, H, W)`` float32 on the CPU.

    Raises:
        ValueError: size or count below 1.
        DataError: no images, one smaller than a crop, or images of gray and color.
    """

    def __init__(
        self,
        images: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
        degradation: Degradation,
        size: int,
        count: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> None:
        if size < 1 or count < 1:
            raise ValueError(f"Expected size >= 1 and count >= 1. Got size={size}, count={count}.")
        self.names: list[str] = []
        self.x: list[Tensor] = []
        for name, image in images.items() if isinstance(images, Mapping) else images:
            check_size(image, size, name)
            if self.x and image.shape[0] != self.x[0].shape[0]:
                raise DataError(f"{name}: expected {self.x[0].shape[0]} channels as before. Got {image.shape[0]}.")
            self.names.append(name)
            self.x.append(image.detach().to("cpu", torch.float32))
        if not self.x:
            raise DataError("Expected at least one image. Got none: the list of images is empty.")
        self.degradation, self.size, self.count, self.seed = degradation, size, count, seed
        self.dtype, self.device = dtype, torch.device(device)
        shape = degradation.image(self.x[0][:, :size, :size]).shape
        self._exact = degradation.physics(shape, torch.float64)
        self.physics: LinearPhysics = degradation.physics(shape, dtype, device)

    def batch(self, step: int) -> Batch:
        """The minibatch of a step, 0 for the first; ``indices`` are different for all crops of all steps."""
        generator = keyed_generator("random patches", self.seed, int(step))
        clean = self.degradation.image(torch.stack([self._crop(generator) for _ in range(self.count)]).double())
        indices = int(step) * self.count + torch.arange(self.count)
        # Measured in float64 on the CPU, as everywhere: every dtype and device gets the same numbers up to rounding.
        y = self.degradation.measure(clean, indices, self._exact)
        levels = [self.degradation.noise_level(index) for index in indices.tolist()]
        return Batch(
            indices,
            clean.to(self.device, self.dtype),
            y.to(self.device, self.dtype),
            self.physics,
            torch.tensor(levels, dtype=self.dtype, device=self.device),
        )

    def _crop(self, generator: torch.Generator) -> Tensor:
        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        image = self.x[draw(len(self.x))]
        top, left = draw(image.shape[-2] - self.size + 1), draw(image.shape[-1] - self.size + 1)
        crop = image[:, top : top + self.size, left : left + self.size]
        crop = crop.rot90(draw(4), (-2, -1))
        return crop.flip(-1) if draw(2) else crop
