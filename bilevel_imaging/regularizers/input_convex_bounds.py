"""True upper bounds of the derivatives of an input-convex network, layer by layer, from the norms of its kernels.

sigma(t) = log(1 + exp(beta t)) / beta has sup sigma' = 1, sup sigma'' = beta / 4, sup |sigma'''| = beta^2 / (6 sqrt 3).
With p_l = U_l z_l + W_l x + b_l, z_{l+1} = sigma(p_l), c_{l+1} = dR/dz_{l+1} and m_l = dR/dp_l = sigma'(p_l) c_{l+1},

    D^2 R[u, v]    = sum_l <c_{l+1}, sigma''(p_l) Dp_l u Dp_l v>,
    D^3 R[u, v, t] = sum_l <c_{l+1}, sigma'''(p_l) Dp_l u Dp_l v Dp_l t + sigma''(p_l) (Dp_l u D^2 p_l[v, t] + ...)>

with products entry by entry and the three orders of u, v, t in the last term: the chain rule, weighted by cotangents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bilevel_imaging.regularizers.input_convex import Weights

UP = 1 + 1e-10  # covers rounding in float64
# sampled per degree of the trigonometric polynomials: the bound exceeds the true maximum by at most 4 %
SAMPLES = 16


@dataclass(frozen=True)
class NetworkBounds:
    """Bounds for all images, by layer; norms of operators between Euclidean norms unless said otherwise.

    Attributes:
        beta: of the activation.
        image: of W_l.
        hidden: of U_l, 0 for l = 0, where there is none; and again 0 after the last layer.
        columns: of U_l between sums of absolute values, likewise.
        slope: of Dp_l, and of Dz_{l+1}.
        rows: of Dp_l, to the largest absolute value.
        flat: of D^2 z_l as a bilinear map, 0 for l = 0; one more than there are layers.
        bend: the same to the sum of absolute values.
        cotangent: of c_{l+1}, channel by channel, ``(F_l,)``.
        first: of Dm_l.
        second: of D^2 m_l as a bilinear map to the sum of absolute values.
        taps: number of entries of one kernel.
    """

    beta: float
    image: list[float]
    hidden: list[float]
    columns: list[float]
    slope: list[float]
    rows: list[float]
    flat: list[float]
    bend: list[float]
    cotangent: list[Tensor]
    first: list[float]
    second: list[float]
    taps: int

    @classmethod
    def of(cls, weights: Weights) -> NetworkBounds:
        """From the kernels in float64."""
        m2, m3 = _curvature(weights.beta)
        sums = [kernel.sum((-2, -1)) for kernel in weights.hidden]
        image = [UP * kernel_norm(kernel) for kernel in weights.image]
        hidden = [0.0, *(UP * positive_norm(kernel) for kernel in weights.hidden), 0.0]
        columns = [0.0, *(UP * float(matrix.sum(0).max()) for matrix in sums), 0.0]
        row_sums = [0.0, *(UP * float(matrix.sum(1).max()) for matrix in sums), 0.0]
        slope, rows, flat, bend = _forward(weights, image, hidden, columns)
        cotangent = _cotangents(weights)
        first, second = [0.0] * (len(slope) + 1), [0.0] * (len(slope) + 1)  # nothing comes after the last layer
        for i in reversed(range(len(slope))):
            top = float(cotangent[i].max())
            back = hidden[i + 1] * first[i + 1]  # of Dc_{l+1} = U_{l+1}^T Dm_{l+1}
            first[i] = m2 * top * slope[i] + back
            own = m3 * top * slope[i] ** 2 + m2 * top * columns[i] * bend[i]
            second[i] = own + 2 * m2 * slope[i] * back + row_sums[i + 1] * second[i + 1]
        taps = weights.image[0][0, 0].numel()
        return cls(
            weights.beta, image, hidden, columns, slope, rows, flat, bend, cotangent, first[:-1], second[:-1], taps
        )

    @property
    def smoothness(self) -> float:
        """Of D^2 R, without the strong convexity that is added to R."""
        m2, _ = _curvature(self.beta)
        return UP * m2 * sum(float(c.max()) * a**2 for c, a in zip(self.cotangent, self.slope, strict=True))

    @property
    def hessian_lipschitz(self) -> float:
        """Of D^3 R."""
        m2, m3 = _curvature(self.beta)
        total = 0.0
        for i, (c, a) in enumerate(zip(self.cotangent, self.slope, strict=True)):
            total += float(c.max()) * (m3 * self.rows[i] * a**2 + 3 * m2 * a * self.hidden[i] * self.flat[i])
        return UP * total

    def third_along(self, largest: list[Tensor]) -> Tensor:
        """Of D^3 R[q], ``(B,)``, where |Dp_l q| <= ``largest[l]`` ``(B,)`` at every pixel and for all images.

        ||Dp_l q * D^2 p_l[u, v]||_1 needs the sum of absolute values of D^2 p_l; D^2 z_l[q] is bounded like D^2 z_l.
        """
        m2, m3 = _curvature(self.beta)
        total, along = torch.zeros_like(largest[0]), torch.zeros_like(largest[0])
        for i, (c, a, t) in enumerate(zip(self.cotangent, self.slope, largest, strict=True)):
            bent = self.hidden[i] * along  # D^2 p_l[q]
            total = total + float(c.max()) * (
                m3 * t * a**2 + m2 * t * self.columns[i] * self.bend[i] + 2 * m2 * a * bent
            )
            along = m2 * t * a + bent
        return UP * total

    def mixed_slope(self, name: str, parameter: Tensor, patches: list[Tensor]) -> Tensor:
        """Lipschitz constant of the derivative of grad R in one parameter, ``(B,)``, where the Euclidean norms of the
        patches of x and of the features z_1, z_2, ... are at most ``patches``.

        It is the norm of D^2 of dR/dtheta[delta] = <m_l, delta * z> over ||delta|| = 1 with z = x or z_l:
        <D^2 m_l[u, v], delta * z> + <Dm_l u, delta * Dz v> + <Dm_l v, delta * Dz u> + <m_l, delta * D^2 z[u, v]>,
        where |delta * z| <= ||delta|| patch at every pixel and ||delta * .|| <= sqrt(taps) ||delta||.
        """
        kind, _, number = name.partition(".")
        layer = int(number) if number else 0
        root = math.sqrt(self.taps)
        if kind == "output":
            return stored_slope(parameter) * self.bend[-1] * torch.ones_like(patches[0])
        if kind == "biases":
            return self.second[layer] * torch.ones_like(patches[0])
        if kind == "input_kernels":
            return self.second[layer] * patches[0] + 2 * self.first[layer] * root
        layer += 1
        bent = root * float(self.cotangent[layer].norm()) * self.bend[layer]
        moved = 2 * self.first[layer] * root * self.slope[layer - 1]
        return stored_slope(parameter) * (self.second[layer] * patches[layer] + moved + bent)


def _curvature(beta: float) -> tuple[float, float]:
    """(sup sigma'', sup |sigma'''|)."""
    return beta / 4, beta**2 / (6 * math.sqrt(3))


def _forward(
    weights: Weights, image: list[float], hidden: list[float], columns: list[float]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Of Dp_l: norm and largest norm of a row. Of D^2 z_l: to Euclidean norms, and to sums of absolute values."""
    m2, _ = _curvature(weights.beta)
    slope: list[float] = []
    rows: list[float] = []
    flat, bend = [0.0], [0.0]
    row = weights.output.new_zeros(0)
    for layer, kernel in enumerate(weights.image):
        a, own = image[layer], kernel.flatten(1).norm(dim=1)
        if layer:
            a, own = a + hidden[layer] * slope[-1], own + weights.hidden[layer - 1].sum((-2, -1)) @ row
        row = own.clamp(max=a)
        slope.append(a)
        rows.append(UP * float(row.max()))
        flat.append(m2 * rows[-1] * a + hidden[layer] * flat[-1])
        bend.append(m2 * a**2 + columns[layer] * bend[-1])
    return slope, rows, flat, bend


def _cotangents(weights: Weights) -> list[Tensor]:
    """c_{l+1} <= U_{l+1}^T c_{l+2}: everything is positive and sigma' <= 1."""
    cotangents = [UP * weights.output]
    for kernel in reversed(weights.hidden):
        cotangents.append(UP * kernel.sum((-2, -1)).T @ cotangents[-1])
    return cotangents[::-1]


def stored_slope(parameter: Tensor) -> float:
    """Largest derivative of what a softplus makes of a stored parameter."""
    return UP * float(torch.sigmoid(parameter.detach().double()).max())


def positive_norm(kernel: Tensor) -> float:
    """Norm of a convolution with a kernel >= 0 ``(F, C, k, k)``, zeros outside of the image: at most that for constant
    images of infinite size, ||sum over pixels of the kernel||, which large images come close to."""
    return float(torch.linalg.matrix_norm(kernel.sum((-2, -1)), 2))


def kernel_norm(kernel: Tensor) -> float:
    """Upper bound of the norm of a convolution with any kernel ``(F, C, k, k)``, zeros outside of the image.

    Images with zeros around them are a subspace of those on the whole plane, where the norm is the largest singular
    value of the transfer matrix k(w) over all frequencies. <u, k(w) v> is a trigonometric polynomial of degree
    n = (k - 1) / 2 in each of the two frequencies, up to a phase, and such a one is at least cos(n pi / N) times its
    maximum at one of N equidistant points next to it (M. Riesz).
    """
    coarse = positive_norm(kernel.abs())
    degree = kernel.shape[-1] // 2
    if degree == 0:
        return coarse
    count = SAMPLES * degree
    transfer = torch.fft.rfft2(kernel, s=(count, count)).permute(2, 3, 0, 1)
    if transfer.shape[-1] > transfer.shape[-2]:
        transfer = transfer.mT
    gram = transfer.mH @ transfer
    largest = float(torch.linalg.eigvalsh(gram)[..., -1].max()) ** 0.5
    return min(coarse, largest * (1 + 1e-12) / math.cos(math.pi / SAMPLES) ** 2)
