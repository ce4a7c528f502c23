"""The workloads: photographs, an energy of ours, and the same energy for other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from deepinv.physics import LinearPhysics
from torch import Tensor

from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.data.degradations import gaussian_kernel
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.experiments.benchmark.models import (
    DeblurringModel,
    ExpertsModel,
    Model,
    SplineModel,
    TotalVariationModel,
)
from bilevel_imaging.regularizers import ConvexRidge, FieldsOfExperts, TotalVariation
from bilevel_imaging.upper_level.quasi_newton import assign, flatten


@dataclass(frozen=True)
class Task:
    """min over theta of mean_i 1/2 ||x_i* - x_true_i||^2: the hypergradient of this batch is wanted.

    Attributes:
        energy: ours.
        degradation: operator and noise.
        x_true: ground truth, ``(B, 1, H, W)``.
        y: measurements, ``(B, 1, H, W)``.
        model: the energy for other libraries.
        x0: where every solve starts, ``(B, 1, H, W)``, as an array of whatever library solves.
    """

    energy: VariationalEnergy
    degradation: Degradation
    x_true: Tensor
    y: Tensor
    model: Model
    x0: Any

    def physics(self, dtype: torch.dtype | None = None) -> LinearPhysics:
        """The deepinv operator, by default in the dtype of the data; made once, as others make theirs."""
        dtype = dtype or self.y.dtype
        if dtype not in self._physics:
            self._physics[dtype] = self.degradation.physics(self.y.shape[1:], dtype, self.y.device)
        return self._physics[dtype]

    @cached_property
    def _physics(self) -> dict[torch.dtype, LinearPhysics]:
        return {}

    def problem(self, dtype: torch.dtype | None = None) -> LowerLevelProblem:
        """The batch of lower-level problems, by default in the dtype of the data."""
        return self.energy.bind(self.y.to(dtype or self.y.dtype), self.physics(dtype))

    def pairs(self, dtype: torch.dtype | None = None) -> ImagePairs:
        """The data as a training set, by default in its own dtype."""
        x, y = (list(stack.to(dtype or stack.dtype)) for stack in (self.x_true, self.y))
        physics = partial(self.degradation.physics, dtype=y[0].dtype, device=self.y.device)
        return ImagePairs([str(i) for i in range(len(y))], x, y, physics)

    @cached_property
    def theta(self) -> Tensor:
        """The parameters in one vector, ``(P,)``, dtype and device of the data."""
        return flatten(self.energy.theta).detach().to(self.y)

    @cached_property
    def data(self) -> dict[str, Tensor]:
        """What the energy for other libraries is made of."""
        return self.model.data(self.y)

    @cached_property
    def constants(self) -> tuple[float, float]:
        """Strong convexity and Lipschitz constant of the gradient, as proved by us."""
        found = self.problem().constants()
        return float(found.strong_convexity.min()), float(found.smoothness.max())

    def at(self, theta: Tensor, x0: Any) -> Task:
        """The same data at other parameters ``(P,)``, with solves that start elsewhere."""
        energy = copy.deepcopy(self.energy)
        assign(energy.theta, theta)
        return replace(self, energy=energy, x0=x0)

    def leaf(self) -> Tensor:
        """A copy of theta that records gradients."""
        return self.theta.clone().requires_grad_(True)

    def loss(self, x: Tensor) -> Tensor:
        """The upper-level loss."""
        return 0.5 * ((x - self.x_true) ** 2).sum() / len(x)


@dataclass(frozen=True)
class Workload:
    """A task by its numbers.

    Attributes:
        title: in words.
        degradation: operator and noise.
        energy: makes ours.
        images: number of images, one batch.
        size: pixels along each side.
        photograph: a whole photograph instead of crops, by name.
        tiled: one image put together from crops.
        tile: pixels along each side of these.
    """

    title: str
    degradation: Degradation
    energy: Callable[[], VariationalEnergy]
    images: int
    size: int
    photograph: str = ""
    tiled: bool = False
    tile: int = 256

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
        """The task; the same images and noise every time."""
        pairs = ImagePairs.build(self._images(), self.degradation, dtype, device)
        energy = self.energy().to(device)
        x_true, y = torch.stack(pairs.x), torch.stack(pairs.y)
        return Task(energy, self.degradation, x_true, y, model(energy, self.degradation, y), y)

    def _images(self) -> list[tuple[str, Tensor]]:
        pictures = photographs()
        if self.photograph:
            return [(self.photograph, pictures[self.photograph][:, : self.size, : self.size])]
        if self.tiled:
            side = self.size // self.tile
            tiles = crops(pictures, self.tile, side**2)
            rows = [torch.cat([tile for _, tile in tiles[i * side : (i + 1) * side]], -1) for i in range(side)]
            return [("tiles", torch.cat(rows, -2))]
        return crops(pictures, self.size, self.images)


def crops(pictures: dict[str, Tensor], size: int, count: int) -> list[tuple[str, Tensor]]:
    """The first ``count`` of equally many crops from all photographs."""
    return extract_patches(pictures, size, -(-count // len(pictures)), seed=0)[:count]


def model(energy: VariationalEnergy, degradation: Degradation, y: Tensor) -> Model:
    """The energy for other libraries.

    Raises:
        TypeError: no array code is written for it.
    """
    regularizer = energy.regularizer
    shapes = {name.removeprefix("regularizer."): tuple(p.shape) for name, p in energy.theta.items()}
    if isinstance(regularizer, TotalVariation) and degradation.kind == "deblurring":
        return DeblurringModel(shapes, _transfer(degradation, y), float(energy.ridge))
    if isinstance(regularizer, TotalVariation):
        return TotalVariationModel(shapes)
    if isinstance(regularizer, FieldsOfExperts):
        return ExpertsModel(shapes, float(regularizer.log_weight))
    if isinstance(regularizer, ConvexRidge):
        return SplineModel(shapes, regularizer.reach)
    raise TypeError(f"Expected TotalVariation, FieldsOfExperts or ConvexRidge. Got {type(regularizer).__name__}.")


def _transfer(degradation: Degradation, y: Tensor) -> Tensor:
    """The Gaussian blur on the half spectrum, real because the kernel is even."""
    width = degradation.blur_size
    kernel = torch.zeros(y.shape[-2:], dtype=torch.float64)
    kernel[:width, :width] = gaussian_kernel(width, degradation.blur_std)[0, 0]
    return torch.fft.rfft2(kernel.roll((-(width // 2), -(width // 2)), (0, 1))).real.to(y.device)


def _total_variation() -> VariationalEnergy:
    return VariationalEnergy(TotalVariation(0.1, 0.01))


NOISE = Degradation("denoising", sigma=0.1)
WORKLOADS = {
    "W1": Workload("total variation denoising", NOISE, _total_variation, 16, 128),
    "W2": Workload(
        "Fields of Experts denoising, 48 filters 7x7",
        Degradation("denoising", sigma=25 / 255),
        lambda: VariationalEnergy(FieldsOfExperts(48, 7)),
        16,
        96,
    ),
    "W3": Workload(
        "total variation deblurring, ridge 1e-3",
        Degradation("deblurring", sigma=0.01, blur_size=9, blur_std=1.5),
        lambda: VariationalEnergy(TotalVariation(0.01, 0.01), ridge=1e-3),
        8,
        128,
    ),
    "W4a": Workload("total variation denoising, the photograph camera", NOISE, _total_variation, 1, 512, "camera"),
    "W4b": Workload(
        "total variation denoising, 64 photograph crops tiled", NOISE, _total_variation, 1, 2048, tiled=True
    ),
    "W5": Workload(
        "convex ridge regularizer, denoising, start of its training",
        Degradation("denoising", sigma=25 / 255),
        lambda: VariationalEnergy(ConvexRidge((48,), 7)),
        32,
        64,
    ),
}
"""By name; deblurring as in the experiment on certainty."""
