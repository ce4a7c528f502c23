"""Convex ridge regularizer: learned filters under learned convex spline potentials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import boolean, whole, whole_numbers
from bilevel_imaging.regularizers.base import positive_parameter
from bilevel_imaging.regularizers.fields_of_experts import start_filters
from bilevel_imaging.regularizers.potentials import Profile
from bilevel_imaging.regularizers.ridge import RidgeRegularizer
from bilevel_imaging.regularizers.spline_profile import SplineProfile, knots


class ConvexRidge(RidgeRegularizer):
    """R(x) = weight / scale * sum_k sum over pixels of psi_k(scale (w_k * x)), with learned convex psi_k.

    Goujon, Neumayer, Bohra, Ducotterd & Unser (2023), with activations psi_k' one degree smoother: nondecreasing and
    C^1 for all parameters, because psi_k'' interpolates positive values (see ``SplineProfile``). The filters are those
    of a chain of convolutions, minus their means and scaled to norm 1.

    ``weight`` and ``scale`` adapt a trained regularizer to another noise level or operator with two numbers.

    Args:
        features: filters of every layer of the chain, e.g. (48,) for one layer or (4, 8, 32) for three.
        size: height and width of the filters of every layer, odd; with L layers the whole filters have
            L (size - 1) + 1.
        channels: of the images.
        knots: number of intervals of the splines.
        reach: last knot, in units of x: beyond it psi_k grows linearly.
        shared: one potential for all filters.
        weight: positive; stored as ``log_weight``.
        scale: positive; stored as ``log_scale``.
        curvature: psi'' at 0 at the start, where psi'(t) = level t / sqrt(t^2 + (level / curvature)^2).
        level: psi' far from 0 at the start.
        start: filters of a chain with one layer: "dct" or "random"; longer ones are random.
        boundary: continuation of images: "symmetric" or "zero".
        seed: of random filters.
        learn_weight: whether ``log_weight`` is learned; it scales the same as all curvatures together.
        learn_scale: whether ``log_scale`` is learned.
        learn_potentials: whether ``log_curvatures`` ``(K, knots)`` are learned; ``(1, knots)`` if shared.
        learn_filters: whether ``filter_layers`` are learned.

    Raises:
        ValueError: a number out of range, an unknown start or boundary.
    """

    known_parameters = ("log_weight", "log_scale", "log_curvatures", "filter_layers")

    def __init__(
        self,
        features: Sequence[int] = (48,),
        size: int = 7,
        channels: int = 1,
        *,
        knots: int = 12,
        reach: float = 0.5,
        shared: bool = False,
        weight: float = 1.0,
        scale: float = 1.0,
        curvature: float = 0.15,
        level: float = 0.003,
        start: str = "dct",
        boundary: str = "symmetric",
        seed: int = 0,
        learn_weight: bool = False,
        learn_scale: bool = False,
        learn_potentials: bool = True,
        learn_filters: bool = True,
    ):
        features, knots = whole_numbers("features", features), whole("knots", knots, 2)
        for name, value in (("reach", reach), ("curvature", curvature), ("level", level)):
            positive_parameter(value, name, False)  # refuses what is not a positive number
        super().__init__(_start_layers(features, size, channels, start, seed), boundary, learn_filters)
        self.reach, self.shared = float(reach), boolean("shared", shared)
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        self.log_scale = positive_parameter(scale, "scale", learn_scale)
        values = _start_curvatures(knots, self.reach, curvature, level)
        values = values.log().expand(1 if shared else features[-1], knots).clone()
        self.log_curvatures = nn.Parameter(values, requires_grad=boolean("learn_potentials", learn_potentials))

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "features": [layer.shape[0] for layer in self.filter_layers],
            "size": self.filter_layers[0].shape[-1],
            "channels": self.channels,
            "knots": self.log_curvatures.shape[1],
            "reach": self.reach,
            "shared": self.shared,
            "start": "random",
            "boundary": self.boundary,
            "learn_weight": self.log_weight.requires_grad,
            "learn_scale": self.log_scale.requires_grad,
            "learn_potentials": self.log_curvatures.requires_grad,
            "learn_filters": self.filter_layers[0].requires_grad,
        }

    def stretch(self, log_scale: float) -> None:
        """See ``RidgeRegularizer``."""
        self.log_scale += log_scale

    def _take_potentials(self, other: RidgeRegularizer, kept: Tensor, level: Tensor, curvature: Tensor) -> None:
        form = (self.log_curvatures.shape[1], self.reach, self.shared)
        if not isinstance(other, ConvexRidge) or (other.log_curvatures.shape[1], other.reach, other.shared) != form:
            raise ValueError("expected a ConvexRidge with the same knots, reach and shared")
        self.log_weight.copy_(other.log_weight)
        self.log_scale.copy_(other.log_scale)
        self.log_curvatures.copy_(other.log_curvatures if self.shared else other.log_curvatures[kept])

    def profile(self, like: Tensor) -> Profile:
        count = self.filter_layers[-1].shape[0]
        scale = self.log_scale.double().exp()
        curvatures = (self.log_weight.double() + self.log_scale.double() + self.log_curvatures.double()).exp()
        learned = tuple(n for n in ("log_weight", "log_scale", "log_curvatures") if getattr(self, n).requires_grad)
        return SplineProfile(curvatures.expand(count, -1), self.reach / scale, like, learned, self.shared)


def _start_layers(features: list[int], size: int, channels: int, start: str, seed: int) -> list[Tensor]:
    if len(features) == 1:
        return [start_filters(start, features[0], size, channels, seed)]
    layers, previous = [], channels
    for n, count in enumerate(features):
        layers.append(start_filters("random", count, size, previous, seed + n))
        previous = count
    return layers


def _start_curvatures(count: int, reach: float, curvature: float, level: float) -> Tensor:
    """Second derivative of level sqrt(t^2 + nu^2), nu = level / curvature, at all knots but the last."""
    t, nu = knots(count, torch.tensor(reach, dtype=torch.float64))[:-1], level / curvature
    return level * nu**2 / (t**2 + nu**2) ** 1.5
