"""Upper bounds of ||J||: from its columns, or from products with J and J^T alone.

A power iteration approaches ||J|| from below and is no bound. One random start turns the same products into a bound
that fails with a probability known in advance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.tensors import binary_scale, gram, per_sample, units

# a parameter-side vector: one tensor, or tensors by name
Parameters = Tensor | dict[str, Tensor]

# relative error of a Gram matrix in float64 and of its eigenvalues, on the generous side
GRAM_SLACK = 1e-10
# logarithms of larger bounds are those of inf
LARGEST_LOGARITHM = 709.0


@dataclass(frozen=True)
class RandomizedNorm:
    """A bound of ||J|| that holds except with a small probability.

    Attributes:
        bound: ||J|| <= bound; inf if a product was not finite.
        failure_probability: of the event that it is less than ||J||, over the draw of the probes.
        products: number of products with J and J^T.
    """

    bound: float
    failure_probability: float
    products: int


def from_columns(columns: Tensor) -> Tensor:
    """||J_i|| of every sample from the Gram matrix of the columns, rounded up.

    Args:
        columns: ``(B, n, *image)``, of any scale; n = 0 gives 0.

    Returns:
        ``(B,)`` float64.
    """
    if columns.shape[1] == 0:
        return torch.zeros(columns.shape[0], dtype=torch.float64, device=columns.device)
    products = gram(columns)
    scale = units(products.diagonal(dim1=1, dim2=2).sum(1).sqrt(), products)
    if scale is not None:  # squares of tiny columns must not underflow
        flat = columns.double()
        scale = binary_scale(flat)
        products = gram(flat / per_sample(scale, flat))
    size = from_gram(products)
    return size if scale is None else scale * size


def from_gram(products: Tensor) -> Tensor:
    """||J_i|| from J^T J ``(B, n, n)`` float64, rounded up, ``(B,)``."""
    if products.shape[1] == 1:
        size = products[:, 0, 0].sqrt()
    else:
        size = torch.linalg.eigvalsh(products)[:, -1].clamp(min=0).sqrt()
    return size * (1 + GRAM_SLACK)


def probe_count(failure_probability: float, factor: float) -> int:
    """The least N with factor^-N <= failure_probability."""
    count = max(1, math.ceil(-math.log(failure_probability) / math.log(factor)))
    return count if factor**-count <= failure_probability else count + 1


def randomized_norm(
    apply: Callable[[Parameters], Tensor],
    apply_adjoint: Callable[[Tensor], Parameters],
    like: Tensor,
    *,
    generator: torch.Generator,
    power: int = 3,
    factor: float = 4.0,
    failure_probability: float = 1e-6,
    unit: float | None = None,
) -> RandomizedNorm:
    """||J|| <= (a sqrt(2/pi) max_i ||B w_i||)^{1/(2p)} with B = (J J^T)^p and N Gaussian w_i, but for a^{-N}.

    Proof: with u the top left singular vector, ||B w_i|| >= ||B|| |<u, w_i>|, and a standard normal number is less
    than t in size with probability <= t sqrt(2/pi). (The argument of Halko, Martinsson & Tropp 2011, Lemma 4.1, for a
    power of J J^T.) The bound is typically 2.5 times ||J|| for p = 1 and 1.35 times for p = 3.

    Args:
        apply: c -> J c, linear, for whatever ``apply_adjoint`` returns.
        apply_adjoint: v -> J^T v for v like ``like``.
        like: shape, dtype and device of the probes.
        generator: source of the probes, on the device of ``like``; it must not depend on J.
        power: p >= 1.
        factor: a > 1.
        failure_probability: in (0, 1); N = ceil(log_a(1 / failure_probability)) probes.
        unit: unit of rounding of the products; ``None`` for that of ``like``.

    Returns:
        the bound, a^{-N}, and the 2 p N products made (fewer if J = 0).

    Raises:
        ValueError: power, factor or failure_probability out of range.
    """
    if power < 1 or not factor > 1 or not 0 < failure_probability < 1:
        raise ValueError(
            "Expected power >= 1, factor > 1 and failure_probability in (0, 1). Got "
            f"{power!r}, {factor!r}, {failure_probability!r}."
        )
    count = probe_count(failure_probability, factor)
    largest, products = -math.inf, 0
    for _ in range(count):
        probe = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        logarithm, made = _logarithm(apply, apply_adjoint, probe, power)
        largest, products = max(largest, logarithm), products + made
    root = (largest + math.log(factor * math.sqrt(2 / math.pi))) / (2 * power)
    # rounding of B w is relative to ||B|| ||w||, of which <u, w> may be as little as a part in sqrt(d)
    slack = 1 + 64 * (torch.finfo(like.dtype).eps if unit is None else unit) * like.numel() ** 0.5
    bound = math.exp(root) * slack if root < LARGEST_LOGARITHM else math.inf
    return RandomizedNorm(bound, factor**-count, products)


def _logarithm(
    apply: Callable[[Parameters], Tensor], apply_adjoint: Callable[[Tensor], Parameters], probe: Tensor, power: int
) -> tuple[float, int]:
    """(log ||(J J^T)^power probe||, number of products); inf if a product is not finite."""
    vector: Parameters = probe
    logarithm, products = 0.0, 0
    for product in (apply_adjoint, apply) * power:
        vector, change = _normalized(product(vector))  # type: ignore[arg-type]
        logarithm, products = logarithm + change, products + 1
        if math.isinf(change):
            return change, products
    return logarithm, products


def _normalized(v: Parameters) -> tuple[Parameters, float]:
    """(v / ||v||, log ||v||) without overflow or underflow; (v, -inf) if v = 0, (v, inf) if it is not finite."""
    pieces = list(v.values()) if isinstance(v, dict) else [v]
    sizes = [p.detach().abs().amax() for p in pieces if p.numel()]
    largest = float(torch.stack([size.double() for size in sizes]).amax()) if sizes else 0.0
    if largest == 0:
        return v, -math.inf
    if not math.isfinite(largest):
        return v, math.inf
    scaled = [p / largest for p in pieces]
    root = math.sqrt(sum(float(p.detach().double().square().sum()) for p in scaled))
    scaled = [p / root for p in scaled]
    return dict(zip(v, scaled, strict=True)) if isinstance(v, dict) else scaled[0], math.log(largest) + math.log(root)
