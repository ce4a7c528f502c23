"""Data terms with learnable weights, 1/2 ||W^(1/2) (Ax - y)||^2, and their derivatives in the parameters of W.

The weights are read afresh at every evaluation. All these terms are quadratic in x and W acts on blocks k of
coordinates, one for each parameter p_k, so that with r = Ax - y, the residual of block k alone r_k = P_k r, and
W'_k = dW_k / dp_k everything about J_k = W'_k A^T P_k r is in closed form. Write A^T = U G, ||U|| <= 1, with a diagonal
G = gains^(1/2) in the coordinates of ``frequencies``, or U = I and G = A^T where there is one block only. Blocks are
orthogonal before U, so that

    ||J||                  <= max_k W'_k ||G r_k||
    |(J_k - J_eps,k)^T q|  <= W'_k ||G P_k A q|| ||e||          together <= their maximum times ||e||
    ||J - J_eps||          <= max_k W'_k ||G P_k||^2 ||e||
    ||J_k||_{H^-1}         <= (W'_k / W_k) ||W_k^(1/2) r_k||    since A^T W A <= H
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bilevel_imaging.energies.data_terms import DataTerm, FourierModel
from bilevel_imaging.energies.data_weights import DataWeight, SamplingMask
from bilevel_imaging.energies.frequencies import MRIFrequencies, frequencies_of
from bilevel_imaging.tensors import inner, norm, squared_norm

# more parameters than this have no columns: every one of them is an image
MAX_COLUMNS = 32


class DataMixed(abc.ABC):
    """The mixed derivative J of a weighted term at one x; n parameters, flattened."""

    @abc.abstractmethod
    def vjp(self, q: Tensor) -> Tensor:
        """J^T q summed over the batch, of the shape of the parameter."""

    @abc.abstractmethod
    def columns(self) -> Tensor | None:
        """``(B, n, *image)``; ``None`` if there are more than ``MAX_COLUMNS``."""

    @abc.abstractmethod
    def norm(self) -> Tensor:
        """Upper bound of ||J||, ``(B,)`` float64."""

    @abc.abstractmethod
    def change(self, q: Tensor) -> Tensor:
        """c_k with |(J_k(x + e) - J_k(x))^T q| <= c_k ||e||, together <= (max_k c_k) ||e||; ``(B, n)``."""

    @abc.abstractmethod
    def energy_norms(self) -> Tensor:
        """Upper bounds of ||J_k||_{H^-1}, ``(B, n)`` float64."""

    @abc.abstractmethod
    def energy(self, q: Tensor) -> Tensor:
        """<q, A^T W A q>, ``(B,)`` float64."""


class WeightedTerm(DataTerm):
    """A data term times weights.

    Args:
        inside: the term without weights.
        weight: W.

    Attributes:
        mixed_lipschitz: L_J of J alone, ``(B,)`` float64, or ``None`` if not known.
    """

    def __init__(self, inside: DataTerm, weight: DataWeight):
        self.inside, self.weight = inside, weight
        self.shape = inside.shape

    def initial(self) -> Tensor:
        return self.inside.initial()

    def subset(self, index: Tensor) -> DataTerm | None:
        inside = self.inside.subset(index)
        return None if inside is None else type(self)(inside, self.weight)

    def double(self) -> DataTerm | None:
        inside = self.inside.double()
        return None if inside is None else type(self)(inside, self.weight)

    @abc.abstractmethod
    def mixed(self, x: Tensor) -> DataMixed:
        """J at x."""

    @property
    @abc.abstractmethod
    def mixed_lipschitz(self) -> Tensor | None: ...


class ScaledTerm(WeightedTerm):
    """One weight for any data term."""

    def __init__(self, inside: DataTerm, weight: DataWeight):
        super().__init__(inside, weight)
        self.applications, self.reason = inside.applications, inside.reason

    @property
    def number(self) -> Tensor:
        """W, float64."""
        return self.weight.weights().detach().double()

    @property
    def lowest(self) -> Tensor:  # type: ignore[override]
        return self.number * self.inside.lowest * (1 - 1e-12)

    @property
    def highest(self) -> Tensor | None:  # type: ignore[override]
        return None if self.inside.highest is None else self.number * self.inside.highest * (1 + 1e-12)

    def _scale(self, values: Tensor) -> Tensor:
        return self.weight.weights().to(values.dtype) * values

    def value(self, x: Tensor) -> Tensor:
        return self._scale(self.inside.value(x))

    def grad(self, x: Tensor) -> Tensor:
        return self._scale(self.inside.grad(x))

    def hvp(self, v: Tensor) -> Tensor:
        return self._scale(self.inside.hvp(v))

    def apply(self, x: Tensor) -> Tensor:
        return self._scale(self.inside.apply(x))

    def gradient_scale(self, x: Tensor) -> Tensor:
        return self.number * self.inside.gradient_scale(x)

    def diagonal(self) -> Tensor | None:
        diagonal = self.inside.diagonal()
        return None if diagonal is None else self._scale(diagonal).detach()

    def expanded(self) -> tuple[Tensor, Tensor] | None:
        parts = self.inside.expanded()
        return None if parts is None else (self._scale(parts[0]).detach(), self._scale(parts[1]).detach())

    def spectrum(self) -> Tensor | None:
        spectrum = self.inside.spectrum()
        return None if spectrum is None else self._scale(spectrum).detach()

    def fourier_model(self) -> FourierModel | None:
        model = self.inside.fourier_model()
        return None if model is None else replace(model, power=self._scale(model.power).detach())

    def whitening(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        number = float(self.number)
        inside = self.inside.whitening(shift / number)
        return None if inside is None else lambda v: inside(v) / number**0.5

    def mixed(self, x: Tensor) -> DataMixed:
        return _ScaledMixed(self, x)

    @property
    def mixed_lipschitz(self) -> Tensor | None:
        return None if self.highest is None else self.weight.slopes().detach().double() * self.highest


class _ScaledMixed(DataMixed):
    def __init__(self, term: ScaledTerm, x: Tensor):
        self.term, self.value = term, term.inside.value(x)
        self.slope = term.weight.slopes().detach().double()
        self.column = (self.slope * term.number).to(x.dtype) * term.inside.grad(x)

    def vjp(self, q: Tensor) -> Tensor:
        return inner(self.column, q).double().sum().to(self.term.weight.parameter.dtype)

    def columns(self) -> Tensor:
        return self.column.unsqueeze(1)

    def norm(self) -> Tensor:
        return norm(self.column).double() * _up(self.column)

    def change(self, q: Tensor) -> Tensor:
        size = self.slope * self.term.number * norm(self.term.inside.hvp(q)).double()
        return size.unsqueeze(1) * _up(q)

    def energy_norms(self) -> Tensor:
        size = self.slope * (2 * self.term.number * self.value.double()).sqrt()
        return size.unsqueeze(1) * _up(self.column)

    def energy(self, q: Tensor) -> Tensor:
        return inner(q, self.term.hvp(q)).double().clamp(min=0) * _up(q)


class SpectralTerm(WeightedTerm):
    """A weight for every frequency of the measurements."""

    def __init__(self, inside: DataTerm, weight: DataWeight):
        super().__init__(inside, weight)
        self.frequencies = frequencies_of(inside)
        self.dtype = self.frequencies.measured.dtype
        self.applications = 2

    def _weights(self) -> Tensor:
        """W in the order and dtype of z."""
        return self.frequencies.from_grid(self.weight.weights()).to(self.dtype)

    def _spectrum(self, weights: Tensor) -> Tensor:
        """Weights on the grid times the gains, float64, of the shape of these: eigenvalues of A^T W A or bounds."""
        return self.frequencies.from_grid(weights.detach().double()) * self.frequencies.gains

    @property
    def lowest(self) -> Tensor:  # type: ignore[override]
        return self._spectrum(self.weight.weights()).flatten(1).amin(1) * self.frequencies.lowest * (1 - 1e-12)

    @property
    def highest(self) -> Tensor:  # type: ignore[override]
        return self._spectrum(self.weight.weights()).flatten(1).amax(1) * (1 + 1e-12)

    def residual(self, x: Tensor) -> Tensor:
        """z = T (Ax - y)."""
        return self.frequencies.forward(x) - self.frequencies.measured

    def value(self, x: Tensor) -> Tensor:
        z = self.residual(x)
        return 0.5 * inner(self._weights() * z, z)

    def grad(self, x: Tensor) -> Tensor:
        return self.frequencies.adjoint(self._weights() * self.residual(x))

    def hvp(self, v: Tensor) -> Tensor:
        return self.frequencies.adjoint(self._weights() * self.frequencies.forward(v))

    def apply(self, x: Tensor) -> Tensor:
        return self.frequencies.measurements(self._weights() * self.frequencies.forward(x))

    def gradient_scale(self, x: Tensor) -> Tensor:
        """Sizes of both terms at the largest weight, times the growth of errors in the transforms."""
        largest, gain = self.weight.weights().detach().double().amax(), self.frequencies.gains.flatten(1).amax(1)
        size = 2 * gain * norm(x).double() + gain.sqrt() * norm(self.frequencies.measured).double()
        return largest * size * math.log2(max(4, self.shape[-1] * self.shape[-2]))

    def spectrum(self) -> Tensor | None:
        if isinstance(self.frequencies, MRIFrequencies):
            return None  # not a convolution of real images
        return self._power()

    def _power(self) -> Tensor:
        """Eigenvalues of A^T W A by channel of the image, or what is closest to them."""
        spectrum = self._spectrum(self.weight.weights()).flatten(1, -3)[:, : self.shape[1]]
        return (spectrum * self.frequencies.typical).to(self.dtype)

    def fourier_model(self) -> FourierModel:
        return FourierModel(self._power(), self.frequencies.filter, isinstance(self.frequencies, MRIFrequencies))

    def whitening(self, shift: float) -> Callable[[Tensor], Tensor] | None:
        if not self.frequencies.diagonal:
            return None
        response = (self._power() + shift).rsqrt()
        return lambda v: self.frequencies.coordinates(v, response)

    def mixed(self, x: Tensor) -> DataMixed:
        return _SpectralMixed(self, x)

    @property
    def mixed_lipschitz(self) -> Tensor:
        steepness = self.weight.weights() * self.weight.slopes()
        return self._spectrum(steepness).flatten(1).amax(1) * (1 + 1e-12)


class _SpectralMixed(DataMixed):
    def __init__(self, term: SpectralTerm, x: Tensor):
        self.term, self.frequencies = term, term.frequencies
        self.z = term.residual(x)
        self.weights, self.slopes = (w.detach().double() for w in (term.weight.weights(), term.weight.slopes()))
        self.gains = self.frequencies.gains.to(x.dtype)

    def _blocks(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of every parameter, from the shape of z to ``(B, *parameter)`` float64."""
        total = self.frequencies.to_grid(values.double().flatten(1, -3).sum(1))
        axes = [axis + 1 for axis, n in enumerate(self.weights.shape) if n == 1]
        return total.sum(axes, keepdim=True) if axes else total

    def vjp(self, q: Tensor) -> Tensor:
        pairing = self._blocks(self.frequencies.forward(q) * self.z).sum(0)
        return (self.weights * self.slopes * pairing).to(self.term.weight.parameter.dtype)

    def columns(self) -> Tensor | None:
        count = self.weights.numel()
        if count > MAX_COLUMNS:
            return None
        units = torch.eye(count, dtype=torch.float64, device=self.z.device).reshape(count, *self.weights.shape)
        steepness = self.weights * self.slopes
        columns = [
            self.frequencies.adjoint(self.frequencies.from_grid(steepness * unit).to(self.z.dtype) * self.z)
            for unit in units
        ]
        return torch.stack(columns, 1)

    def norm(self) -> Tensor:
        sizes = self.weights * self.slopes * self._blocks(self.gains * self.z.square()).sqrt()
        return sizes.flatten(1).amax(1) * _up(self.z)

    def change(self, q: Tensor) -> Tensor:
        sizes = self._blocks(self.gains * self.frequencies.forward(q).square()).sqrt()
        return (self.weights * self.slopes * sizes).flatten(1) * _up(q)

    def energy_norms(self) -> Tensor:
        sizes = self.slopes * (self.weights * self._blocks(self.z.square())).sqrt()
        return sizes.flatten(1) * _up(self.z)

    def energy(self, q: Tensor) -> Tensor:
        return squared_norm(self.term._weights().sqrt() * self.frequencies.forward(q)).double() * _up(q)


def _up(like: Tensor) -> float:
    """Covers the rounding of sums of squares."""
    return 1 + (1e-4 if like.dtype == torch.float32 else 1e-10)


def weighted(term: DataTerm, weight: DataWeight | None, name: str) -> DataTerm:
    """The term times the weight; ``name`` is that of the physics.

    Raises:
        ValueError: if the weight does not fit the operator.
    """
    if weight is None:
        return term
    if not weight.spectral:
        return ScaledTerm(term, weight)
    frequencies = frequencies_of(term)
    only_mri = isinstance(weight, SamplingMask)
    if frequencies is None or (only_mri and not isinstance(frequencies, MRIFrequencies)):
        fitting = "MRI or MultiCoilMRI"
        if not only_mri:
            fitting = "MRI, MultiCoilMRI, Denoising, BlurFFT or Blur(padding='circular')"
        raise ValueError(f"Expected {type(weight).__name__} with {fitting}. Got {name}; NoiseWeight fits any physics.")
    grid, shape = frequencies.grid, tuple(weight.parameter.shape)
    if any(n not in (1, m) for n, m in zip(shape, grid, strict=True)):
        raise ValueError(
            f"Expected {weight.name} of {type(weight).__name__} of shape {grid}, or 1 where it is shared. Got {shape}."
        )
    return SpectralTerm(term, weight)
