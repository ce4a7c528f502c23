"""Real coordinates of residuals in which a weight is diagonal, frequency by frequency, and what an operator is there.

z = T (Ax - y) with T^T T = I has the shape ``(B, K, rows, columns)``, or ``(B, 2, coils, rows, columns)``: so many
numbers for every frequency of the grid of a weight. A^T T^T = U gains^(1/2) with ||U|| <= 1 says how large A is there.
"""

from __future__ import annotations

import abc

import torch
from deepinv.physics import MultiCoilMRI
from torch import Tensor

from bilevel_imaging.energies.circulant import CirculantTerm
from bilevel_imaging.energies.data_terms import DataTerm, IdentityTerm
from bilevel_imaging.energies.generic import GenericTerm
from bilevel_imaging.energies.mri import MRITerm, filtered, fourier, inverse_fourier
from bilevel_imaging.transforms import (
    fourier_coordinates,
    fourier_filter,
    half_spectrum_scale,
    inverse_rfft2,
    rfft2,
    self_mirrored,
)


class Frequencies(abc.ABC):
    """How a data term looks in its frequencies.

    Attributes:
        grid: (rows, columns).
        gains: squares of what A multiplies by, at most if it is not diagonal; float64, broadcastable to z.
        measured: T y, of the shape of z.
        diagonal: whether A is, so that U is orthogonal.
        lowest: lower bound of lambda_min(U U^T), ``(B,)`` float64.
        typical: mean of the eigenvalues of U U^T, ``(B, 1, 1, 1)`` float64.
    """

    grid: tuple[int, int]
    gains: Tensor
    measured: Tensor
    diagonal = True
    lowest: Tensor | float = 1.0
    typical: Tensor | float = 1.0

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """T A x."""

    @abc.abstractmethod
    def adjoint(self, z: Tensor) -> Tensor:
        """A^T T^T z."""

    @abc.abstractmethod
    def measurements(self, z: Tensor) -> Tensor:
        """T^T z."""

    @abc.abstractmethod
    def from_grid(self, weights: Tensor) -> Tensor:
        """Weights ``(rows, columns)`` in the order of z; those of a frequency and its mirror image are averaged."""

    @abc.abstractmethod
    def to_grid(self, values: Tensor) -> Tensor:
        """Values ``(B, rows, columns)`` in the order of z, on the grid."""

    @abc.abstractmethod
    def filter(self, v: Tensor, response: Tensor) -> Tensor:
        """Multiply the frequencies of images by a real response in the order of z, ``(B, C, rows, columns)``."""

    @abc.abstractmethod
    def coordinates(self, v: Tensor, response: Tensor) -> Tensor:
        """Real numbers w with ||w||^2 = <v, filter(v, response^2)>, linear in v, ``(B, ...)``."""


class CirculantFrequencies(Frequencies):
    """Half of the frequencies of real images, those kept twice counted once, the others twice: K = 2 C."""

    def __init__(self, term: CirculantTerm):
        self.term = term
        rows, self.width = term.shape[-2:]
        self.grid = (rows, self.width // 2 + 1)
        self.single = self_mirrored(self.width, term.y.device)
        self.scale = half_spectrum_scale(rows, self.width, term.y)
        self.length = rows * self.width
        self.gains = torch.cat([term.power64, term.power64], 1)
        self.measured = self._coordinates(rfft2(term.y))

    def _coordinates(self, spectrum: Tensor) -> Tensor:
        return torch.cat([spectrum.real, spectrum.imag], 1) * self.scale

    def _images(self, z: Tensor, real: Tensor | None = None, imaginary: Tensor | None = None) -> Tensor:
        a, b = (z / (self.scale * self.length)).chunk(2, 1)
        if real is not None:
            a, b = a * real + b * imaginary, b * real - a * imaginary
        return inverse_rfft2(torch.complex(a, b), self.width) * self.length

    def forward(self, x: Tensor) -> Tensor:
        spectrum, transfer = rfft2(x), self.term.transfer
        a, b, c, d = spectrum.real, spectrum.imag, transfer.real, transfer.imag
        return torch.cat([a * c - b * d, a * d + b * c], 1) * self.scale

    def adjoint(self, z: Tensor) -> Tensor:
        return self._images(z, self.term.transfer.real, self.term.transfer.imag)

    def measurements(self, z: Tensor) -> Tensor:
        return self._images(z)

    def from_grid(self, weights: Tensor) -> Tensor:
        weights = weights.expand(self.grid)
        return torch.where(self.single, 0.5 * (weights + weights.flip(0).roll(1, 0)), weights)

    def to_grid(self, values: Tensor) -> Tensor:
        return values

    def filter(self, v: Tensor, response: Tensor) -> Tensor:
        return fourier_filter(v, response)

    def coordinates(self, v: Tensor, response: Tensor) -> Tensor:
        return fourier_coordinates(v, response)


class MRIFrequencies(Frequencies):
    """k-space, real and imaginary part: K = 2; z has the zero frequency first, the grid in the middle."""

    def __init__(self, term: MRITerm):
        self.term, self.grid = term, (term.shape[-2], term.shape[-1])
        self.gains = torch.fft.ifftshift(term.mask64, dim=(-2, -1)).square()
        self.measured = term.measured

    def forward(self, x: Tensor) -> Tensor:
        return self.term.mask * fourier(x)

    def adjoint(self, z: Tensor) -> Tensor:
        return inverse_fourier(self.term.mask * z)

    def measurements(self, z: Tensor) -> Tensor:
        return torch.fft.fftshift(z, dim=(-2, -1))

    def from_grid(self, weights: Tensor) -> Tensor:
        return torch.fft.ifftshift(weights.expand(self.grid), dim=(-2, -1))

    def to_grid(self, values: Tensor) -> Tensor:
        return torch.fft.fftshift(values, dim=(-2, -1))

    def filter(self, v: Tensor, response: Tensor) -> Tensor:
        return filtered(v, response)

    def coordinates(self, v: Tensor, response: Tensor) -> Tensor:
        return fourier(v) * response


class CoilFrequencies(MRIFrequencies):
    """k-space of every coil, real and imaginary part, in A = M F S with a mask M and maps S of N coils.

    With s^2 the largest sum of |maps|^2 over the coils, in any pixel, U = S^* F^* / s and the gains are (s M)^2:
    F is unitary, and S^* S is that sum, pixel by pixel. SENSE: Pruessmann et al. (1999).

    Args:
        term: of a :class:`MultiCoilMRI`, y of shape ``(B, 2, N, H, W)``.
    """

    diagonal = False

    def __init__(self, term: GenericTerm):
        physics, y = term.operator.physics, term.y
        size = self.grid = (y.shape[-2], y.shape[-1])
        maps, self.measured = physics.coil_maps.to(torch.complex128), _zero_first(y)
        energy = (maps.real.square() + maps.imag.square()).sum(1).flatten(1)
        highest = energy.amax(1)
        lowest, mean = (e / highest.clamp(min=1e-300) for e in (energy.amin(1), energy.mean(1)))
        self.lowest, self.typical = lowest, mean.reshape(-1, 1, 1, 1)
        mask = _zero_first(physics.mask.double().unsqueeze(2).expand(len(y), 2, 1, *size))
        self.gains = mask.square() * highest.reshape(-1, 1, 1, 1, 1)
        self.mask, self.maps = mask.to(y.dtype), _zero_first(maps.expand(-1, -1, *size)).to(y.dtype.to_complex())

    def forward(self, x: Tensor) -> Tensor:
        image = _zero_first(torch.complex(x[:, 0], x[:, 1])).unsqueeze(1)
        spectra = torch.fft.fft2(self.maps * image, norm="ortho")
        return self.mask * torch.stack([spectra.real, spectra.imag], 1)

    def adjoint(self, z: Tensor) -> Tensor:
        z = self.mask * z
        seen = torch.fft.ifft2(torch.complex(z[:, 0], z[:, 1]), norm="ortho")
        image = torch.fft.fftshift((self.maps.conj() * seen).sum(1), dim=(-2, -1))
        return torch.stack([image.real, image.imag], 1)


def _zero_first(values: Tensor) -> Tensor:
    """From the origin in the middle to the origin in the corner."""
    return torch.fft.ifftshift(values, dim=(-2, -1))


def frequencies_of(term: DataTerm) -> Frequencies | None:
    """The frequencies of a term, or ``None`` where none are known; a subclass may compute anything and has none."""
    if isinstance(term, GenericTerm):
        return CoilFrequencies(term) if type(term.operator.physics) is MultiCoilMRI else None
    if isinstance(term, IdentityTerm):
        one = torch.ones((1, 1, term.shape[-2], term.shape[-1] // 2 + 1), dtype=torch.complex128, device=term.y.device)
        term = CirculantTerm(term.y, one)
    if isinstance(term, CirculantTerm):
        return CirculantFrequencies(term)
    return MRIFrequencies(term) if isinstance(term, MRITerm) else None
