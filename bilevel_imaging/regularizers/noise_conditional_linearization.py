"""Derivatives of a noise-conditional regularizer frozen at one x, from the linearization of R at s x.

R_sigma(x) = w / s R(s x) has the gradient w grad R(s x) and the Hessian w s R''(s x), and its derivatives in log w and
log s are, with the gradient and the Hessian H of R_sigma, grad R_sigma(x) and H x.

Let g be an energy with R_sigma in it. In the variable z = s x, s / w g(z / s) is one with R in it: its Hessian is that
of g divided by w s, so is mu, and ||s v||^2 in its norm is s / w ||v||^2 in that of g. Bounds of R for this energy turn
into bounds of R_sigma for g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, NewtonModel
from bilevel_imaging.regularizers.sums_linearization import DIAGONAL, directional_of
from bilevel_imaging.tensors import inner, norm, per_sample

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.noise_conditional import NoiseConditional


def _times(factor: Tensor, v: Tensor) -> Tensor:
    """A factor per sample, ``(B,)`` float64, in the dtype of v."""
    return per_sample(factor.to(v.dtype), v) * v


class NoiseConditionalLinearization(Linearization):
    """Factors per sample; the columns of J of the weights and the scales are two images times the hat functions."""

    def __init__(
        self, regularizer: NoiseConditional, inside: Linearization, x: Tensor, constants: Constants | None = None
    ):
        self.regularizer, self.inside, self.x = regularizer, inside, x
        self.weight, self.scale, self.hats = (t.detach() for t in regularizer.factors(len(x)))
        self.curvature = self.weight * self.scale  # of the Hessian
        self.constants = regularizer.constants(x.shape) if constants is None else constants
        self.grad = _times(self.weight, inside.grad)

    @property
    def _learns_weights(self) -> bool:
        return self.regularizer.log_weights.requires_grad

    @property
    def _learns_scales(self) -> bool:
        return self.regularizer.log_scales.requires_grad

    @cached_property
    def _learns_inside(self) -> bool:
        return bool(self.regularizer.regularizer.trainable())

    # ------------------------------------------------------------------------------------------------------ products

    def hvp(self, v: Tensor) -> Tensor:
        return _times(self.curvature, self.inside.hvp(v))

    @cached_property
    def _scale_field(self) -> Tensor:
        """H x, the derivative of the gradient in log s."""
        return self.hvp(self.x)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        products = {}
        fields = [("log_weights", self.grad)] if self._learns_weights else []
        fields += [("log_scales", self._scale_field)] if self._learns_scales else []
        for name, field in fields:
            stored = getattr(self.regularizer, name)
            products[name] = (inner(q, field).double() @ self.hats).to(stored.dtype)
        for name, product in self.inside.mixed_vjp(_times(self.weight, q)).items():
            products[f"regularizer.{name}"] = product
        return products

    @cached_property
    def _inside_columns(self) -> Tensor | None:
        if self._learns_inside:
            return self.inside.mixed_columns()
        return self.grad.unsqueeze(1)[:, :0]

    def mixed_columns(self) -> Tensor | None:
        inside = self._inside_columns
        if inside is None:
            return None
        fields = [self.grad] * self._learns_weights + ([self._scale_field] if self._learns_scales else [])
        hats = self.hats.to(self.x.dtype)
        own = [hats.reshape(*hats.shape, 1, 1, 1) * field.unsqueeze(1) for field in fields]
        return torch.cat([*own, _times(self.weight, inside)], 1)

    def _own(self, weights: Tensor, scales: Tensor | None, *, columns: bool) -> Tensor:
        """What holds for grad R_sigma and for H x, each ``(B,)``, for the columns that are hats times them, or for the
        two blocks of these columns: a combination of them with coefficients c is <hats, c> times the field."""
        spread = self.hats if columns else self.hats.norm(dim=1, keepdim=True)
        kept = [weights] * self._learns_weights + [scales] * self._learns_scales
        # a hat function that is 0 has a column that is 0, whatever is known of the field
        parts = [torch.where(spread > 0, spread * v.double().unsqueeze(1), 0.0) for v in kept]
        return torch.cat([spread[:, :0], *parts], 1)

    # -------------------------------------------------------------------------------------------------- bounds of J

    @cached_property
    def _scale_energy(self) -> Tensor:
        """<x, H x>^(1/2) >= ||H x||_{H^-1}, also for the Hessian of an energy that R_sigma is a part of, ``(B,)``."""
        energy = inner(self.x, self._scale_field).double().clamp(min=0) * (1 + 1e-4)
        if self.constants.smoothness is not None:  # rounding of H x, far larger than <x, H x> on flat images
            unit = 8 * torch.finfo(self.x.dtype).eps
            energy = energy + unit * self.constants.smoothness * norm(self.x).double().square()
        return energy.sqrt()

    def mixed_norm_bound(self) -> Tensor | None:
        inside = self.inside.mixed_norm_bound() if self._learns_inside else torch.zeros_like(self.weight)
        if inside is None:
            return None
        scales = norm(self._scale_field) if self._learns_scales else None
        own = self._own(norm(self.grad), scales, columns=False).norm(dim=1)
        return torch.hypot(own, self.weight * inside)

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor | None:
        """Of R: ||w J||_{H^-1} = w (w s)^(-1/2) ||J|| in the norm of H / (w s). Of the weights: ||.|| / mu^(1/2)."""
        mu = strong_convexity.double()
        inside = self.inside.mixed_block_norms(mu / self.curvature) if self._learns_inside else self.hats[:, :0]
        if inside is None:
            return None
        scales = self._scale_energy if self._learns_scales else None
        own = self._own(norm(self.grad).double() / mu.sqrt(), scales, columns=False)
        return torch.cat([own, (self.weight / self.scale).sqrt().unsqueeze(1) * inside], 1)

    def mixed_energy_norms(self) -> Tensor | None:
        """Those of R as above; for the weights, that of a column of R that is its gradient, or inf."""
        columns = self._inside_columns
        if columns is None:
            return None
        norms, same = self.inside.mixed_energy_norms() if self._learns_inside else None, None
        if norms is None:
            norms = torch.full(columns.shape[:2], torch.inf, dtype=torch.float64, device=columns.device)
        else:
            same = self.inside.weight_column
        norms = (self.weight / self.scale).sqrt().unsqueeze(1) * norms
        weights = torch.full_like(self.weight, torch.inf) if same is None else norms[:, same]
        scales = self._scale_energy if self._learns_scales else None
        return torch.cat([self._own(weights, scales, columns=True), norms], 1)

    # --------------------------------------------------------------------------------------------- Euclidean changes

    def constants_on_ball(self, radius: Tensor) -> Constants:
        """The ball around x is one of s times the radius around s x."""
        inside = self.inside.constants_on_ball((self.scale * radius).to(radius.dtype))
        if inside is None:
            inside = self.regularizer.regularizer.constants(self.x.shape)
        return self.regularizer.multiple(inside, len(self.x), norm(self.x).double() + radius.double())

    def directional(self, q: Tensor, radius: Tensor) -> Directional | None:
        """For log s, <q, H(x') x' - H(x) x> = <H(x) q, x' - x> + <(H(x') - H(x)) q, x'>."""
        regularizer = self.regularizer.regularizer
        inside_radius = (self.scale * radius).to(radius.dtype)
        constants = regularizer.constants(self.x.shape)
        along = directional_of(self.inside, constants, self._learns_inside, q, inside_radius)
        if along is None:
            return None
        hessian = self.curvature * self.scale * along.hessian
        slope = norm(self.hvp(q)).double()
        far = norm(self.x).double() + radius
        changes = (slope + 0.5 * hessian * radius, slope + hessian * far)
        own = self._own(*changes, columns=False).norm(dim=1)
        components = None
        if along.mixed_components is not None and self._inside_columns is not None:
            inside = self.curvature.unsqueeze(1) * along.mixed_components
            components = torch.cat([self._own(*changes, columns=True), inside], 1).to(q.dtype)
        mixed = torch.hypot(own, self.curvature * along.mixed)
        return Directional(hessian.to(q.dtype), mixed.to(q.dtype), components)

    # ------------------------------------------------------------------------------- changes in the norm of the Hessian

    @property
    def length_scale(self) -> float:
        return self.inside.length_scale / float(self.scale.amax())

    def _stretch(self) -> Tensor:
        """Length of s v in the norm of H / (w s), relative to that of v in the norm of H."""
        return (self.scale / self.weight).sqrt()

    def _inside(self, radius: Tensor, strong_convexity: Tensor) -> tuple[Tensor, Tensor]:
        """Radius and mu for R."""
        return (self._stretch() * radius).to(radius.dtype), (strong_convexity / self.curvature).to(radius.dtype)

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        """D^3 g [e, v, v] scales like <v, H v>: what is left is the length of s e."""
        curvature = self.inside.relative_curvature(*self._inside(radius, strong_convexity))
        return None if curvature is None else self._stretch() * curvature

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange | None:
        """D^3 g[e, q, u] scales like ||e||_H ||u||_H when q becomes s q. So does D J[e] of a parameter of R against
        ||e||_H ||u||_R. The derivative in log w, grad R_sigma, has the slope 1.

        That in log s changes by (H x)'[e] = H e + D^3 R_sigma(x_t)[e, x_t, .], and x_t is x plus at most e. With K of
        ``relative_curvature``, |D^3 R_sigma[e, x_t - x, u]| <= K radius ||e|| ||u||. All this holds for every energy
        that R_sigma is a part of, so also in the norm of R_sigma'' + mu I, which is the part of the Hessian that
        ``energy`` refers to.
        """
        inside = self._inside(radius, strong_convexity)
        change = self.inside.local_change(q, *inside)
        scales = self._scale_slope(*inside) if self._learns_scales else None
        if change is None or (self._learns_scales and scales is None):
            return None
        own = self._own(torch.ones_like(self.weight), scales, columns=self._inside_columns is not None)
        slopes = change.slopes.double().expand(len(q), -1) if self._learns_inside else own[:, :0]
        energy = self.curvature.sqrt() * change.energy
        if self._learns_scales:
            energy = torch.hypot(energy, strong_convexity.double().sqrt() * norm(q).double())
        return LocalChange(self.scale * change.hessian, torch.cat([own, slopes], 1), energy)

    def _scale_slope(self, radius: Tensor, strong_convexity: Tensor) -> Tensor | None:
        """Slope of H x ``(B,)``, from what R knows for its own radius and mu."""
        along = self.inside.local_change(self.x, radius, strong_convexity)
        curvature = self.inside.relative_curvature(radius, strong_convexity)
        if along is None or curvature is None:
            return None
        return 1 + self.scale * along.hessian + curvature * radius

    # ------------------------------------------------------------------------------------------ for Newton's method

    @property
    def hessian_diagonal(self) -> Callable[[], Tensor]:
        """Diagonal of the Hessian, ``(B, C, H, W)``; no such attribute where R has none."""
        diagonal = getattr(self.inside, DIAGONAL)
        return lambda: _times(self.curvature, diagonal())

    def diffusion(self) -> Tensor | None:
        coefficient = self.inside.diffusion()
        return None if coefficient is None else _times(self.curvature, coefficient)

    def cosine_spectrum(self) -> Tensor | None:
        spectrum = self.inside.cosine_spectrum()
        return None if spectrum is None else _times(self.curvature, spectrum)

    def newton_memory(self, *, cold: bool) -> Tensor | None:
        return self.inside.newton_memory(cold=cold)

    def newton_model(self, memory: Tensor) -> NewtonModel | None:
        model = self.inside.newton_model(memory)
        return None if model is None else _RescaledModel(self.curvature, self.scale, model)

    def subset(self, index: Tensor) -> Linearization | None:
        inside = self.inside.subset(index)
        if inside is None:
            return None
        regularizer, constants = self.regularizer.subset(index), self.constants.subset(index)
        return NoiseConditionalLinearization(regularizer, inside, self.x[index], constants)


class _RescaledModel(NewtonModel):
    """A model of R at s x as one of R_sigma at x."""

    def __init__(self, curvature: Tensor, scale: Tensor, model: NewtonModel):
        self.curvature, self.scale, self.model = curvature, scale, model

    def hvp(self, v: Tensor) -> Tensor:
        return _times(self.curvature, self.model.hvp(v))

    def diffusion(self) -> Tensor | None:
        coefficient = self.model.diffusion()
        return None if coefficient is None else _times(self.curvature, coefficient)

    def cosine_spectrum(self) -> Tensor | None:
        spectrum = self.model.cosine_spectrum()
        return None if spectrum is None else _times(self.curvature, spectrum)

    def advance(self, d: Tensor, step: Tensor) -> Tensor:
        return self.model.advance(_times(self.scale, d), step)
