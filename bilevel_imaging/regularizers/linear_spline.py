"""Differences under a learned convex potential whose derivative is a linear spline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import boolean
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import positive_parameter
from bilevel_imaging.regularizers.differences import forward_differences, squared_operator_norm
from bilevel_imaging.regularizers.kinks import DifferenceRegularizer, KinkedLinearization


class LinearSpline(DifferenceRegularizer):
    """R(x) = weight * sum of psi(dx) + psi(dy), with psi' an odd linear spline of slopes > 0, constant in the end.

    psi' rises with slope s_k between the knots k * spacing and (k + 1) * spacing, k = 0 ... n - 1, and stays constant
    beyond the last: psi is convex for all parameters and grows linearly. One slope 1 / spacing gives anisotropic Huber
    total variation. Forward differences, zero at the last row and column, channel by channel.

    Convex ridge regularizers with learned splines: Goujon et al. (2023), there with learned filters. The second
    derivative jumps at the knots: its Lipschitz constant exists only on balls that no difference leaves its interval
    on.

    Args:
        weight: positive; stored as ``log_weight``.
        spacing: positive distance of the knots, in the units of x; fixed.
        slopes: positive s_0, ..., s_{n-1}, stored as ``log_slopes`` (a vector); by default 8, so that psi' is
            t / sqrt(t^2 + spacing^2) at the knots: that of total variation with smoothing = spacing.
        learn_weight: whether ``log_weight`` is learned. It scales the same as all slopes together.
        learn_slopes: whether ``log_slopes`` are learned.

    Raises:
        ValueError: if weight, spacing or a slope is not positive, or there are no slopes.
    """

    known_parameters = ("log_weight", "log_slopes")
    row_norm = math.sqrt(2)

    def __init__(
        self,
        weight: float = 0.1,
        spacing: float = 0.05,
        slopes: Sequence[float] | None = None,
        *,
        learn_weight: bool = False,
        learn_slopes: bool = True,
    ):
        super().__init__()
        self.log_weight = positive_parameter(weight, "weight", learn_weight)
        positive_parameter(spacing, "spacing", False)  # refuses what is not a positive number
        self.spacing = float(spacing)
        if slopes is None:
            knots = torch.arange(9, dtype=torch.float64)
            values = (knots / (knots**2 + 1).sqrt()).diff() / self.spacing
        else:
            values = torch.as_tensor(slopes, dtype=torch.float64)
        if values.dim() != 1 or not len(values) or not bool((values.isfinite() & (values > 0)).all()):
            raise ValueError(f"Expected slopes as a non-empty sequence of positive finite numbers. Got {slopes!r}.")
        self.log_slopes = nn.Parameter(values.log(), requires_grad=boolean("learn_slopes", learn_slopes))

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "spacing": self.spacing,
            "slopes": self.log_slopes.detach().double().exp().tolist(),
            "learn_weight": self.log_weight.requires_grad,
            "learn_slopes": self.log_slopes.requires_grad,
        }

    def _kinks(self, like: Tensor) -> Tensor:
        """The knots but 0, where both sides have the same slope, ``(n,)``."""
        knots = torch.arange(1, len(self.log_slopes) + 1, dtype=torch.float64, device=like.device)
        return (self.spacing * knots).to(like.dtype)

    def _interval(self, z: Tensor) -> Tensor:
        """Number k of the interval of |z|, n beyond the last knot (and for NaN)."""
        return torch.bucketize(z.detach().abs(), self._kinks(z), right=True)

    def _pieces(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """psi = slope / 2 t^2 + offset |t| + constant, by interval, ``(n + 1,)`` each."""
        slopes = self.log_slopes.double().exp()
        slopes = torch.cat([slopes, slopes.new_zeros(1)])
        knots = self.spacing * torch.arange(len(slopes), dtype=slopes.dtype, device=slopes.device)
        values = torch.cat([slopes.new_zeros(1), self.spacing * slopes[:-1].cumsum(0)])  # of psi' at the knots
        areas = torch.cat([slopes.new_zeros(1), self.spacing * (values[:-1] + values[1:]).cumsum(0) / 2])
        offsets = values - slopes * knots
        constants = areas - slopes / 2 * knots**2 - offsets * knots
        return slopes.to(like.dtype), offsets.to(like.dtype), constants.to(like.dtype)

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        z = forward_differences(x)
        slope, offset, constant = (piece[self._interval(z)] for piece in self._pieces(x))
        psi = slope / 2 * z.square() + offset * z.abs() + constant
        return self._weight(x) * psi.transpose(0, 1).flatten(1).sum(1)

    def _slope(self, z: Tensor) -> Tensor:
        slopes, offsets, _ = self._pieces(z)
        interval = self._interval(z)
        return slopes[interval] * z + offsets[interval] * z.sign()

    def _linearization(self, x: Tensor) -> Linearization:
        return _LinearSplineLinearization(self, x)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        weight, slopes = float(self.log_weight.detach().double().exp()), self.log_slopes.detach().double().exp()
        norm2 = squared_operator_norm(shape[-2], shape[-1])
        lipschitz = weight * norm2 * float(slopes.max())
        largest = weight * self.spacing * float(slopes.sum()) * math.sqrt(2 * math.prod(shape[1:]) * norm2)
        # in every difference the columns of the slopes have one sign and add up to the weight's: together they are
        # no larger and change no faster than that one
        groups = math.sqrt(int(self.log_weight.requires_grad) + int(self.log_slopes.requires_grad))
        bounds = (0.0, lipschitz, None, largest * groups, lipschitz * groups)
        device = self.log_weight.device
        return Constants(
            *(None if b is None else torch.full((shape[0],), b, dtype=torch.float64, device=device) for b in bounds),
            reason="the second derivative of a linear spline's integral jumps at the knots",
        )

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = forward_differences(x.detach().double())
            # slope * z and the offset cancel, and rounding can take z to the neighboring interval
            steepest = self._pieces(z)[0]
            steepest = nn.functional.max_pool1d(steepest[None], 3, stride=1, padding=1)[0]
            size = self._slope(z).abs() + 2 * steepest[self._interval(z)] * z.abs()
            return self.log_weight.double().exp() * math.sqrt(8) * size.transpose(0, 1).flatten(1).norm(dim=1)


class _LinearSplineLinearization(KinkedLinearization):
    """H = weight D^T diag(slope of the interval) D."""

    shape_parameter = "log_slopes"

    def __init__(self, regularizer: LinearSpline, x: Tensor):
        self.z = forward_differences(x)
        super().__init__(regularizer, x, regularizer._slope(self.z).detach())
        self.interval = regularizer._interval(self.z)
        self.curvature = regularizer._pieces(x)[0].detach()[self.interval]
        self.margin = self._distance_to_knots()

    def _distance_to_knots(self) -> Tensor:
        spacing, length = self.regularizer.spacing, self.z.double().abs()
        nearest = spacing * (length / spacing).round().clamp(1, len(self.regularizer.log_slopes))
        # a difference is rounded relative to itself, never to the pixels that it is taken of
        distance = (length - nearest).abs() - 8 * torch.finfo(self.x.dtype).eps * (length + nearest)
        return distance.transpose(0, 1).flatten(1).amin(1)

    def _fields(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.regularizer.log_slopes.requires_grad:
            return
        slopes = self.regularizer._pieces(self.z)[0].detach()
        for k, slope in enumerate(slopes[:-1]):
            part = (self.z.abs() - k * self.regularizer.spacing).clamp(0, self.regularizer.spacing)
            yield slope * part * self.z.sign(), torch.where(self.interval == k, slope, 0.0)

    def _mixed_slopes(self) -> list[Tensor]:
        # all slopes together, as in the constants
        return [self.curvature] if self.regularizer.log_slopes.requires_grad else []
