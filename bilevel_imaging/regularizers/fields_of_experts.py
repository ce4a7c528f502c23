"""Fields of Experts: learned filters under a parametric convex potential."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import boolean, whole
from bilevel_imaging.regularizers.base import positive_parameter
from bilevel_imaging.regularizers.potentials import FAMILIES, Profile, ScaledFamily
from bilevel_imaging.regularizers.ridge import RidgeRegularizer

POTENTIALS = (*FAMILIES, "softplus")
STARTS = ("dct", "random")


class FieldsOfExperts(RidgeRegularizer):
    """R(x) = weight * sum_k weight_k * sum over pixels of phi(w_k * x; smoothing_k), convex in x.

    Roth & Black (2005), with convex potentials phi as in the bilevel learning of Chen, Ranftl & Pock (2014). Filters
    have mean 0 and norm 1 by parametrization. Potentials, nu = smoothing_k:

    * "smoothed_absolute": sqrt(t^2 + nu^2) - nu,
    * "log_cosh": nu log cosh(t / nu),
    * "softplus": nu / 2 log(1 + exp(2 t / nu)), which penalizes one sign only.

    Args:
        count: number of filters; ``None`` for all s^2 - 1 of mean 0.
        size: height and width s of the filters, odd, pixels.
        channels: of the images; filters see all channels together.
        potential: see above.
        weight: positive; stored as ``log_weight``. The weights of the filters start at 1 and are stored as
            ``log_weights`` ``(K,)``.
        smoothing: positive, in the units of x; start of all smoothings, stored as ``log_smoothings`` ``(K,)``.
        start: "dct" (the discrete cosine basis without the constant, low frequencies first) or "random" (normal).
        boundary: continuation of images: "symmetric" or "zero".
        seed: of random filters.
        learn_weight: whether ``log_weight`` is learned; it scales the same as all ``log_weights`` together.
        learn_weights: whether ``log_weights`` are learned.
        learn_smoothing: whether ``log_smoothings`` are learned.
        learn_filters: whether ``filter_layers.0`` ``(K, channels, s, s)`` is learned.

    Raises:
        ValueError: unknown potential, start or boundary, a weight or smoothing that is not positive, a filter size that
            is not odd, or more filters than the cosine basis has.
    """

    known_parameters = ("log_weight", "log_weights", "log_smoothings", "filter_layers")

    def __init__(
        self,
        count: int | None = None,
        size: int = 7,
        channels: int = 1,
        *,
        potential: str = "smoothed_absolute",
        weight: float = 0.003,
        smoothing: float = 0.02,
        start: str = "dct",
        boundary: str = "symmetric",
        seed: int = 0,
        learn_weight: bool = False,
        learn_weights: bool = True,
        learn_smoothing: bool = True,
        learn_filters: bool = True,
    ):
        if potential not in POTENTIALS:
            raise ValueError(f"Unknown potential {potential!r}. Choose from {list(POTENTIALS)}.")
        filters = start_filters(start, count, size, channels, seed)
        super().__init__([filters], boundary, learn_filters)
        self.potential = potential
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_weights = nn.Parameter(
            torch.zeros(len(filters), dtype=torch.float64), requires_grad=boolean("learn_weights", learn_weights)
        )
        log_smoothing = float(positive_parameter(smoothing, "smoothing", False).detach())
        self.log_smoothings = nn.Parameter(
            torch.full((len(filters),), log_smoothing, dtype=torch.float64),
            requires_grad=boolean("learn_smoothing", learn_smoothing),
        )

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        layer = self.filter_layers[0]
        return {
            "count": layer.shape[0],
            "size": layer.shape[-1],
            "channels": self.channels,
            "potential": self.potential,
            "start": "random",
            "boundary": self.boundary,
            "learn_weight": self.log_weight.requires_grad,
            "learn_weights": self.log_weights.requires_grad,
            "learn_smoothing": self.log_smoothings.requires_grad,
            "learn_filters": layer.requires_grad,
        }

    def stretch(self, log_scale: float) -> None:
        """See ``RidgeRegularizer``: phi(scale t; nu) = scale phi(t; nu / scale)."""
        self.log_smoothings -= log_scale

    def _take_potentials(self, other: RidgeRegularizer, kept: Tensor, level: Tensor, curvature: Tensor) -> None:
        """Potentials with the same slope far from 0 and the same curvature at 0."""
        if (self.potential == "softplus") != (getattr(other, "potential", "") == "softplus"):
            raise ValueError("expected potentials that penalize both signs, or one, like those of this regularizer")
        scale = 2 if self.potential == "softplus" else 1
        self.log_weights.copy_((scale * level).log() - self.log_weight)
        self.log_smoothings.copy_((level / curvature).log())

    def profile(self, like: Tensor) -> Profile:
        weight = (self.log_weight.double() + self.log_weights.double()).exp()
        nu = self.log_smoothings.double().exp()
        learned = tuple(n for n in ("log_weight", "log_weights", "log_smoothings") if getattr(self, n).requires_grad)
        if self.potential != "softplus":
            return ScaledFamily(self.potential, weight.to(like), nu.to(like), None, learned)
        half = (0.5 * weight).to(like)
        return ScaledFamily("log_cosh", half, nu.to(like), half, learned)


def start_filters(start: str, count: int | None, size: int, channels: int, seed: int) -> Tensor:
    """Filters of mean 0 and norm 1, ``(K, C, s, s)`` float64.

    Raises:
        ValueError: unknown start, a size that is not odd, or more filters than the cosine basis has.
    """
    if start not in STARTS:
        raise ValueError(f"Unknown start {start!r}. Choose from {list(STARTS)}.")
    size, channels = whole("filter size", size, 3), whole("channels", channels, 1)
    if size % 2 == 0:
        raise ValueError(f"Expected an odd filter size >= 3. Got {size}.")
    most = channels * (size**2 - 1)
    count = most if count is None else whole("count of filters", count, 1)
    if start == "dct" and count > most:
        raise ValueError(
            f"Expected 1 to {most} filters of the cosine basis of size {size} and {channels} channels. Got {count}; "
            "choose start='random' for more."
        )
    if start == "random":
        generator = torch.Generator().manual_seed(whole("seed", seed, 0))
        filters = torch.randn((count, channels, size, size), generator=generator, dtype=torch.float64)
    else:
        basis = _cosines(size)
        order = sorted(
            ((u, v) for u in range(size) for v in range(size) if (u, v) != (0, 0)), key=lambda f: f[0] ** 2 + f[1] ** 2
        )
        colors = _cosines(channels)
        planes = [torch.outer(basis[u], basis[v]) for u, v in order]
        filters = torch.stack([color[:, None, None] * plane for plane in planes for color in colors])[:count]
    filters = filters - filters.mean((2, 3), keepdim=True)
    return filters / filters.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)


def _cosines(count: int) -> Tensor:
    """The orthonormal discrete cosine basis, one row per frequency, ``(n, n)`` float64."""
    places = torch.arange(count, dtype=torch.float64) + 0.5
    rows = torch.cos(math.pi / count * places * torch.arange(count, dtype=torch.float64).unsqueeze(1))
    return rows / rows.norm(dim=1, keepdim=True)
