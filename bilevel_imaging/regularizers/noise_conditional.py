"""One regularizer for all noise levels: a weight and a scale that depend on the noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_imaging.checks import boolean
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.regularizers.base import Regularizer, positive_parameter
from bilevel_imaging.regularizers.noise_conditional_linearization import NoiseConditionalLinearization
from bilevel_imaging.regularizers.sums import Part, build_part, describe_part
from bilevel_imaging.tensors import norm, per_sample


class NoiseConditional(Regularizer):
    """R_sigma(x) = w(sigma) / s(sigma) * R(s(sigma) x), with the noise level sigma of every image.

    log w and log s are piecewise linear in log sigma between nodes, and learned there: ``log_weights`` and
    ``log_scales``. Beyond the first and the last node w grows like sigma and s like 1 / sigma. That is also how they
    start, w = sigma / sigma_0 and s = sigma_0 / sigma: then R_sigma(x) = (sigma / sigma_0)^2 R(sigma_0 x / sigma), for
    which images and noise that are scaled together are denoised to scaled images, and R_sigma = R at sigma_0, the level
    that R was learned for. Potentials with a scale and a weight for every noise level are those of Goujon, Neumayer &
    Unser (2024).

    ``fn`` and everything else need the noise level: ``regularizer.at_noise_level(sigma)`` is a regularizer that has it
    and shares the parameters. Where a batch knows its noise levels, training and validation do that themselves. A
    weight of R that is learned too scales the same as all ``log_weights`` together.

    Args:
        regularizer: R, or a dict of its kind (a name in ``REGULARIZERS``) and arguments.
        nodes: increasing noise levels, in the units of x.
        reference: sigma_0.
        learn_weights: whether ``log_weights`` ``(nodes,)`` are learned.
        learn_scales: whether ``log_scales`` ``(nodes,)`` are learned.

    Attributes:
        levels: noise levels ``(B,)`` float64, one for all ``()``, or ``None``.

    Raises:
        ValueError: something that is no regularizer, nodes that are not positive, finite and increasing, or a reference
            that is not positive.
    """

    known_parameters = ("log_weights", "log_scales", "regularizer")

    def __init__(
        self,
        regularizer: Part,
        nodes: Sequence[float] = (5 / 255, 15 / 255, 25 / 255, 50 / 255),
        *,
        reference: float = 25 / 255,
        learn_weights: bool = True,
        learn_scales: bool = True,
    ):
        super().__init__()
        self.nodes = tuple(float(node) for node in nodes)
        increasing = all(a < b for a, b in zip(self.nodes, self.nodes[1:], strict=False))
        if not (self.nodes and increasing and self.nodes[0] > 0 and math.isfinite(self.nodes[-1])):
            raise ValueError(f"Expected nodes as increasing positive finite noise levels. Got {self.nodes}.")
        relative = self._log_nodes() - positive_parameter(reference, "reference", False).detach()
        self.log_weights = nn.Parameter(relative, requires_grad=boolean("learn_weights", learn_weights))
        self.log_scales = nn.Parameter(-relative, requires_grad=boolean("learn_scales", learn_scales))
        self.regularizer = build_part(regularizer)
        self.levels: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this regularizer (parameters are stored separately)."""
        return {
            "regularizer": describe_part(self.regularizer),
            "nodes": list(self.nodes),
            "learn_weights": self.log_weights.requires_grad,
            "learn_scales": self.log_scales.requires_grad,
        }

    def at_noise_level(self, sigma: float | Tensor) -> NoiseConditional:
        """This regularizer for images with noise of standard deviation sigma; the parameters are the same tensors.

        Args:
            sigma: one for all images, or one per image ``(B,)``; positive, in the units of x.

        Raises:
            ValueError: anything else; without noise w = 0, and there is nothing to minimize.
        """
        levels = torch.as_tensor(sigma, dtype=torch.float64).detach()
        if levels.dim() > 1 or not bool(((levels > 0) & levels.isfinite()).all()):
            raise ValueError(
                f"Expected noise levels as one positive number or (B,) of them. Got {levels.tolist()}; measurements "
                "without noise need a small level."
            )
        return self._with(levels)

    def check_shape(self, shape: torch.Size) -> None:
        self.regularizer.check_shape(shape)

    def subset(self, index: Tensor) -> NoiseConditional:
        """The regularizer for the images ``index`` (int64) of the batch."""
        if self.levels is None or self.levels.dim() == 0:
            return self
        return self._with(self.levels[index.to(self.levels.device)])

    def _with(self, levels: Tensor) -> NoiseConditional:
        other = copy.copy(self)  # a copy of the attributes: parameters and R are shared
        other.levels = levels
        return other

    def _log_nodes(self) -> Tensor:
        return torch.tensor(self.nodes, dtype=torch.float64).log()

    def factors(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """w and s ``(B,)``, and the hat functions ``(B, nodes)`` with which log w = sum_j hats_j log_weights_j + ...;
        float64, w and s differentiable in the parameters.

        Raises:
            ValueError: no noise levels, or those of another number of images.
        """
        if self.levels is None:
            raise ValueError(
                "Expected a noise level. Got none; use regularizer.at_noise_level(sigma), or noise_level=sigma in "
                "reconstruct."
            )
        if self.levels.dim() == 1 and len(self.levels) != batch:
            raise ValueError(f"Expected one noise level per image, {batch}. Got {len(self.levels)}.")
        device = self.log_weights.device
        nodes, position = self._log_nodes().to(device), self.levels.to(device).log().expand(batch)
        hats = hat_functions(nodes, position)
        beyond = position - position.clamp(nodes[0], nodes[-1])
        weight = (hats * self.log_weights.double()).sum(1) + beyond
        scale = (hats * self.log_scales.double()).sum(1) - beyond
        return weight.exp(), scale.exp(), hats

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, scale, _ = self.factors(len(x))
        return (weight / scale).to(x) * self.regularizer.value(per_sample(scale.to(x), x) * x)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, scale, _ = self.factors(len(x))
        return per_sample(weight.to(x), x) * self.regularizer.grad(per_sample(scale.to(x), x) * x)

    def linearize(self, x: Tensor) -> Linearization:
        """Derivatives frozen at x, ``(B, C, H, W)``."""
        with torch.no_grad():
            x = x.detach()
            scale = self.factors(len(x))[1]
            return NoiseConditionalLinearization(self, self.regularizer.linearize(per_sample(scale.to(x), x) * x), x)

    def constants(self, shape: torch.Size | tuple[int, ...]) -> Constants:
        return self.multiple(self.regularizer.constants(shape), shape[0])

    def multiple(self, inside: Constants, batch: int, far: Tensor | None = None) -> Constants:
        """Constants of R_sigma from those of R: grad R_sigma = w grad R(s x), and every derivative brings a factor s.

        Args:
            inside: those of R.
            batch: B.
            far: bound of ||x|| where they hold, ``(B,)``; ``None`` if they hold for all x.
        """
        with torch.no_grad():
            weight, scale, hats = self.factors(batch)

        def times(factor: Tensor, value: Tensor | None) -> Tensor | None:
            return None if value is None else factor * value

        smoothness = times(weight * scale, inside.smoothness)
        lipschitz = times(weight * scale**2, inside.hessian_lipschitz)
        mixed = [times(weight * scale, inside.mixed_lipschitz)] if self.regularizer.trainable() else []
        spread = hats.norm(dim=1)
        if self.log_weights.requires_grad:  # the columns are the gradient times hats
            mixed.append(times(spread, smoothness))
        if self.log_scales.requires_grad:  # H x times hats: H(x) x - H(x') x' = H(x) (x - x') + (H(x) - H(x')) x'
            known = far is not None and smoothness is not None and lipschitz is not None
            mixed.append(spread * (smoothness + lipschitz * far) if known else None)
        bounded = not (self.log_weights.requires_grad or self.log_scales.requires_grad)
        unknown = "the mixed derivative of scales is bounded near a point only"
        return Constants(
            times(weight * scale, inside.strong_convexity),
            smoothness,
            lipschitz,
            times(weight, inside.mixed_norm) if bounded else None,
            None if any(m is None for m in mixed) else torch.stack([torch.zeros_like(spread), *mixed]).norm(dim=0),
            "; ".join(filter(None, [inside.reason, unknown if self.log_scales.requires_grad and far is None else ""])),
        )

    def coarse_gradient_scale(self, x: Tensor) -> Tensor | None:
        return self._gradient_scale(x, self.regularizer.coarse_gradient_scale)

    def gradient_scale(self, x: Tensor) -> Tensor:
        return self._gradient_scale(x, self.regularizer.gradient_scale)

    def _gradient_scale(self, x: Tensor, inside: Callable[[Tensor], Tensor | None]) -> Any:
        with torch.no_grad():
            x = x.detach()
            weight, scale, _ = self.factors(len(x))
            size = inside(per_sample(scale.to(x), x) * x)
            if size is None:
                return None
            smoothness = self.constants(x.shape).smoothness
            # s x is rounded by two halves of the last place, where R takes its argument for exact
            return weight * size if smoothness is None else weight * size + 0.25 * smoothness * norm(x).double()


def hat_functions(nodes: Tensor, points: Tensor) -> Tensor:
    """Piecewise linear interpolation from increasing nodes ``(n,)`` to points ``(B,)`` as weights ``(B, n)``, constant
    beyond the ends. They are nonnegative and add up to 1, so that their Euclidean norm is at most 1."""
    passed = ((points.unsqueeze(1) - nodes[:-1]) / nodes.diff()).clamp(0, 1)
    first = torch.ones_like(points).unsqueeze(1)
    return torch.cat([first, passed], 1) - torch.cat([passed, torch.zeros_like(first)], 1)
