"""Sums of convex potentials of filter responses: what Fields of Experts and convex ridge regularizers share."""

from __future__ import annotations

import abc
import copy
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from bilevel_imaging.checks import boolean
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.filter_bank import BOUNDARIES, FilterBank, Part, check_margin
from bilevel_imaging.regularizers.filter_chain import compose, jacobian_bound, normalize
from bilevel_imaging.regularizers.potentials import Profile
from bilevel_imaging.regularizers.ridge_linearization import RidgeLinearization
from bilevel_imaging.tensors import norm


@dataclass(frozen=True)
class _Limits:
    """What holds for every image, float64 scalars: Lipschitz constants of the gradient and of the Hessian, and
    ``slope`` ||x|| + ``offset`` (number of pixels)^(1/2) >= ``gradient_scale(x)``."""

    smoothness: Tensor
    lipschitz: Tensor
    slope: Tensor
    offset: Tensor

    @classmethod
    def of(cls, bank: FilterBank, profile: Profile) -> _Limits:
        curvature, absolute = profile.curvature_limit, bank.absolute
        at_zero = profile.slope(curvature.new_zeros((1, 1, 1, len(curvature)))).flatten().abs()
        sums = absolute.kernels.flatten(1).sum(1)
        return cls(
            smoothness=bank.squared_norm(curvature),
            lipschitz=bank.squared_norm(profile.third_limit * bank.row_norms()),
            # |psi'(t)| <= |psi'(0)| + sup psi'' |t|, and as much again for the rounding of responses
            slope=2.01 * absolute.squared_norm(curvature),
            offset=1.01 * bank.extension * (at_zero * sums).sum(),
        )


class RidgeRegularizer(Regularizer):
    """R(x) = sum over filters k and pixels i of psi_k((w_k * x)_i) with convex psi_k.

    The filters are those of a chain of convolutions, ``filters`` (one layer or more), minus their means and scaled to
    unit norm: constants are not penalized, and the scale of a filter is that of its potential. Both are
    parametrizations: every value of the parameters is admissible. Filters of one channel act on every channel of a
    color or complex image.

    A subclass adds the common weight of its potentials, ``log_weight``, and the parameters of their shape.

    Args:
        filters: the layers, ``(features_l, features_{l-1}, s_l, s_l)`` with the image channels as features_0; s_l odd.
        boundary: how images are continued: "symmetric" or "zero".
        learn_filters: whether the filters are learned.

    Raises:
        ValueError: layers that do not fit each other, filters of even size, or an unknown boundary.
    """

    log_weight: nn.Parameter

    def __init__(self, filters: list[Tensor], boundary: str, learn_filters: bool):
        super().__init__()
        if boundary not in BOUNDARIES:
            raise ValueError(f"Unknown boundary {boundary!r}. Choose from {list(BOUNDARIES)}.")
        for layer, following in zip(filters, filters[1:], strict=False):
            if layer.shape[0] != following.shape[1]:
                raise ValueError(
                    f"Expected a layer with {layer.shape[0]} input features, those of the layer before it. Got "
                    f"{tuple(following.shape)}."
                )
        for layer in filters:
            if layer.dim() != 4 or layer.shape[2] != layer.shape[3] or layer.shape[2] % 2 == 0:
                raise ValueError(f"Expected filters (out, in, s, s) of odd size s. Got shape {tuple(layer.shape)}.")
        self.boundary = boundary
        learn = boolean("learn_filters", learn_filters)
        self.filter_layers = nn.ParameterList(nn.Parameter(layer.double(), requires_grad=learn) for layer in filters)
        self._frozen: dict[tuple[torch.dtype, str, int], tuple[Tensor, FilterBank, Profile]] = {}
        self._known: tuple[Profile, _Limits] | None = None

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.filter_layers[0].shape[1]

    @abc.abstractmethod
    def stretch(self, log_scale: float) -> None:
        """Replace psi_k(t) by psi_k(scale t) / scale, in place."""

    def rescaled(self, weight: float, scale: float) -> Self:
        """weight / scale * R(scale x), a copy; for another noise level or operator.

        Raises:
            ValueError: if one of them is not a positive number.
        """
        changes = [float(positive_parameter(v, n, False).detach()) for v, n in ((weight, "weight"), (scale, "scale"))]
        other = copy.deepcopy(self)
        with torch.no_grad():
            other.log_weight += changes[0]
            other.stretch(changes[1])
        return other

    def start_from(self, other: RidgeRegularizer) -> None:
        """Take over filters and potentials of a regularizer with smaller or more filters, in place.

        Smaller filters are continued by zeros, which changes nothing: learning can start with small filters, where it
        is fast, and go on with large ones. Of more filters, those with the steepest potentials are kept.

        Args:
            other: a ridge regularizer with as many channels.

        Raises:
            ValueError: filters that this regularizer cannot hold, or potentials of another form.
        """
        kernels = other.kernels().detach().to(self.filter_layers[0])
        wanted = self.filter_layers[-1].shape[0]
        margin = (self.filter_layers[0].shape[-1] - kernels.shape[-1]) // 2
        if len(self.filter_layers) > 1:
            raise ValueError("a chain of filters starts only from the same chain")
        if margin < 0 or len(kernels) < wanted or kernels.shape[1] != self.channels:
            raise ValueError(
                f"expected at least {wanted} filters of {self.channels} channels and size at most "
                f"{self.filter_layers[0].shape[-1]}, not {len(kernels)} of {kernels.shape[1]} and {kernels.shape[-1]}"
            )
        level, curvature = other.steepness()
        kept = level.argsort(descending=True, stable=True)[:wanted].sort().values
        with torch.no_grad():
            self._take_potentials(other, kept, level[kept], curvature[kept])
            self.filter_layers[0].copy_(functional.pad(kernels[kept], (margin,) * 4))

    @abc.abstractmethod
    def _take_potentials(self, other: RidgeRegularizer, kept: Tensor, level: Tensor, curvature: Tensor) -> None:
        """Those of the filters ``kept`` of ``other``, whose steepness is given."""

    def steepness(self) -> tuple[Tensor, Tensor]:
        """Half the range of psi_k' and psi_k''(0), each ``(K,)`` float64."""
        with torch.no_grad():
            far = self.potentials(torch.tensor([-1e6, 1e6]))[1]
            at_zero = self.filter_layers[0].new_zeros((1, len(far)))
            return (far[:, 1] - far[:, 0]) / 2, self.profile(at_zero).slope_and_curvature(at_zero)[1][0].cpu()

    @abc.abstractmethod
    def profile(self, like: Tensor) -> Profile:
        """The potentials in the dtype and on the device of ``like``; differentiable when grad mode is on."""

    def kernels(self) -> Tensor:
        """The filters w_k, of mean 0 and norm 1, ``(K, C, s, s)`` float64; differentiable in the parameters."""
        return normalize(compose([layer.double() for layer in self.filter_layers]))

    def filters(self) -> Tensor:
        """The filters w_k, ``(K, C, s, s)`` float64, to look at."""
        with torch.no_grad():
            return self.kernels().cpu()

    def potentials(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi_k(t) and psi_k'(t), each ``(K, T)`` float64, for responses t ``(T,)``."""
        with torch.no_grad():
            z = t.double().to(self.filter_layers[0].device).unsqueeze(1).expand(-1, len(self.filters()))
            profile = self.profile(z)
            return profile.value(z).T.cpu(), profile.slope(z).T.cpu()

    def frozen(self, x: Tensor) -> tuple[FilterBank, Profile]:
        """Filters and potentials at the current parameters, for images like x; kept until a parameter changes."""
        planes = self._planes(x)
        key = (x.dtype, str(x.device), planes)
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable in every mode
            values = torch.cat([p.detach().flatten().double() for p in self.parameters()])
            if key not in self._frozen or not torch.equal(self._frozen[key][0], values):
                bank = FilterBank(self.kernels().to(x), self.boundary, planes)
                self._frozen[key] = (values, bank, self.profile(x))
        return self._frozen[key][1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": {}, "_known": None}

    def _planes(self, x: Tensor) -> int:
        """How often the filters are applied to an image: once, or to every channel if they have one."""
        self._check_channels(x.shape)
        return x.shape[1] // self.channels

    def _check_channels(self, shape: torch.Size) -> None:
        if len(shape) != 4 or (self.channels > 1 and shape[1] != self.channels):
            raise ValueError(
                f"Expected images (B, {self.channels}, H, W) for filters of {self.channels} channels. Got "
                f"{tuple(shape)}."
            )

    def check_shape(self, shape: torch.Size) -> None:
        self._check_channels(shape)
        check_margin(sum(layer.shape[-1] // 2 for layer in self.filter_layers), self.boundary, shape)

    def _bank(self, x: Tensor) -> FilterBank:
        """The filters for images like x, differentiable in the parameters."""
        return FilterBank(self.kernels().to(x), self.boundary, self._planes(x))

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            bank, profile = self._bank(x), self.profile(x)
            return profile.total(bank.apply(x))
        bank, profile = self.frozen(x)
        values = x.new_zeros(len(x) * bank.planes)
        for (images, _), z in bank.responses(x):
            values[images] += profile.total(z)
        return values.view(len(x), -1).sum(1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled():
            bank, profile = self._bank(x), self.profile(x)
            return bank.adjoint(profile.slope(bank.apply(x)))
        bank, profile = self.frozen(x)
        return bank.through(x, lambda z, part: profile.slope(z))

    def linearize(self, x: Tensor) -> Linearization:
        """Derivatives frozen at x, ``(B, C, H, W)``."""
        with torch.no_grad():
            return RidgeLinearization(self, x.detach())

    @property
    def _limits(self) -> _Limits:
        like = self.filter_layers[0].new_empty((1, self.channels, 1, 1), dtype=torch.float64)
        bank, profile = self.frozen(like)
        if self._known is None or self._known[0] is not profile:
            self._known = profile, _Limits.of(bank, profile)
        return self._known[1]

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        batch, limits = (shape[0],), self._limits
        return Constants(
            strong_convexity=torch.zeros_like(limits.smoothness).expand(batch),
            smoothness=limits.smoothness.expand(batch),
            hessian_lipschitz=limits.lipschitz.expand(batch),
            reason="" if not self.trainable() else "the mixed derivative of filters is bounded near a point only",
        )

    def coarse_gradient_scale(self, x: Tensor) -> Tensor:
        limits, pixels = self._limits, math.prod(x.shape[-2:]) * self._planes(x)
        return limits.slope * norm(x.detach()).double() + limits.offset * math.sqrt(pixels)

    def gradient_scale(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            given, x = x, x.detach().float()  # a size needs no more
            bank, profile = self.frozen(x)
            responses = bank.responses(x)

            def terms(size: Tensor, part: Part) -> Tensor:
                _, z = next(responses)
                slope, curvature = profile.slope_and_curvature(z)
                # responses are rounded relative to what they are summed from, and psi' follows them
                return slope.abs_().addcmul_(curvature, size)

            size = 1.001 * bank.absolute.through(x.abs(), terms).double().flatten(1).norm(dim=1)
            # smoothings of more than 1e19 leave that range
            return size if bool(size.isfinite().all()) else self.coarse_gradient_scale(given)

    def kernel_sensitivity(self) -> float:
        """Bound of the norm of the derivative of the filters in the parameters behind them."""
        with torch.no_grad():
            return jacobian_bound([layer.double() for layer in self.filter_layers])

    def pull_back(self, gradient: Tensor) -> dict[str, Tensor]:
        """From d/d filters ``(K, C, s, s)`` to d/d parameters, by name."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = [layer.detach().double().clone().requires_grad_(True) for layer in self.filter_layers]
            # clones, because what was made in inference mode can't be used here
            products = torch.autograd.grad(normalize(compose(leaves)), leaves, gradient.clone().to(leaves[0]))
        return {f"filter_layers.{n}": product for n, product in enumerate(products)}
