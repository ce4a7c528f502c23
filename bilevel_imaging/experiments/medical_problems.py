"""The two inverse problems: sparse-view tomography and undersampled single-coil MRI, simulated from slices.

ct: y = A x + noise, parallel-beam projections along equispaced directions, A scaled to norm 1 (see
``parallel_beam``); the noise of a slice is Gaussian with a standard deviation of ``noise`` times the largest value of
its noiseless sinogram.

mri: y = mask F x + noise with the unitary Fourier transform F. Slices are magnitudes: x has them as real part and an
imaginary part of zero, and nothing tells the reconstruction so. One Cartesian mask for all slices: of the columns of
k-space, 1 / acceleration is measured, among them the central 8 percent, and the others are drawn once with
probabilities proportional to (1 - |k| / k_max)^2. The noise is complex Gaussian in the measured entries, each of both
parts with a standard deviation of ``noise`` times the largest magnitude of the image. Scores are those of magnitudes.

Both operators have a null space or nearly one: the energies have a ridge (times ||A||^2, which is 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from deepinv.physics import MRI, LinearPhysics
from deepinv.physics.functional import RampFilter
from torch import Tensor

from bilevel_imaging.data import ImagePairs, cartesian_mask, keyed_generator
from bilevel_imaging.data.tomography import parallel_beam, projector_norm
from bilevel_imaging.experiments.medical_data import Stack

CENTER = 0.08  # part of the columns that is always measured
RIDGE = 1e-4
KINDS = {"ct": "filtered backprojection", "mri": "zero filled"}


@dataclass(frozen=True)
class Problem:
    """What is measured.

    Attributes:
        kind: "ct" or "mri".
        views: directions, for ct.
        acceleration: of mri.
        noise: relative standard deviation, see above.
        ridge: of the energies.
        seed: of mask and noise.
    """

    kind: str
    views: int = 60
    acceleration: float = 4.0
    noise: float = 0.01
    ridge: float = RIDGE
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Unknown problem {self.kind!r}. Choose from {sorted(KINDS)}.")
        if self.views < 1 or not 1 <= self.acceleration < math.inf:
            raise ValueError(f"Expected views >= 1 and acceleration >= 1. Got {self.views} and {self.acceleration}.")
        if not (0 < self.noise < math.inf and 0 < self.ridge < math.inf):
            raise ValueError(f"Expected noise > 0 and ridge > 0. Got {self.noise} and {self.ridge}.")

    @property
    def baseline(self) -> str:
        """The name of the linear reconstruction."""
        return KINDS[self.kind]

    def measure(self, stack: Stack, positions: Sequence[int], device: str = "cpu") -> ImagePairs:
        """float32 slices and measurements, simulated in float64; noise depends on name, shape and seed alone."""
        names = [list(stack.slices)[i] for i in positions]
        x = [self.image(stack.slices[name]) for name in names]
        exact = self.physics(x[0].shape, torch.float64)
        y = [exact.A(image[None])[0] for image in x]
        for name, image, clean in zip(names, x, y, strict=True):
            generator = keyed_generator("medical", self.kind, self.seed, name, tuple(clean.shape))
            noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
            clean += self.noise_level(image, clean) * (noise if self.kind == "ct" else noise * exact.mask[0])
        x, y = ([t.to(device, torch.float32) for t in tensors] for tensors in (x, y))
        return ImagePairs(names, x, y, lambda shape: self.physics(shape, torch.float32, device))

    def noise_level(self, image: Tensor, clean: Tensor) -> float:
        """Standard deviation of the noise of one slice: of an image and its noiseless measurement."""
        return self.noise * float((clean if self.kind == "ct" else image).abs().max())

    def image(self, magnitude: Tensor) -> Tensor:
        """What is reconstructed: ``(1, H, W)`` for ct; real and imaginary part for mri."""
        return magnitude if self.kind == "ct" else torch.cat([magnitude, torch.zeros_like(magnitude)])

    def physics(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> LinearPhysics:
        """The operator for images ``(C, H, W)``."""
        if self.kind == "ct":
            return parallel_beam(shape[-1], self.views, dtype, device)[0]
        mask = line_mask(shape[-1], self.acceleration, self.seed).to(dtype)
        return MRI(mask=mask.expand(1, 1, *shape[-2:]).clone(), img_size=(2, *shape[-2:]), device=device)

    def linear(self, y: Tensor, physics: LinearPhysics) -> Tensor:
        """Filtered backprojection (ramp filter) or the zero-filled image, ``(B, C, H, W)``."""
        if self.kind == "mri":
            return physics.A_adjoint(y)
        scale = projector_norm(physics.image[-1], self.views)
        return physics.A_adjoint(RampFilter(dtype=y.dtype)(y)) * (scale**2 * math.pi / (2 * self.views))


@lru_cache(maxsize=8)
def line_mask(columns: int, acceleration: float, seed: int) -> Tensor:
    """The measured columns of k-space, ``(columns,)``: drawn once for all slices."""
    return cartesian_mask(columns, acceleration, CENTER, keyed_generator("medical mask", seed, columns))
