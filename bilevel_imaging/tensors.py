"""Per-sample algebra: everything that turns ``(B, *image)`` into ``(B,)`` and back lives here.

Shape legend used in the whole package: B independent problems solved together, ``image`` = (C, H, W) (or any
trailing shape), n scalar parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel_imaging import native

# samples with norms between this and its reciprocal are used as they are: squares stay far from the limits
SAFE = 1e-6
# up to so many columns their inner products are formed one by one
FEW = 8


def _in_one_pass(a: Tensor, b: Tensor) -> bool:
    """Whether compiled code can form the inner products of such samples."""
    return a.shape == b.shape and a.is_contiguous() and b.is_contiguous() and a.numel() > 0 and native.serves(a, b)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean inner product of every sample: two ``(B, *image)`` tensors to ``(B,)``."""
    if _in_one_pass(a, b):
        return native.inner(a, b).to(a.dtype)
    return (a * b).flatten(1).sum(1)


def squared_norm(a: Tensor) -> Tensor:
    """Squared Euclidean norm of every sample, ``(B, *image)`` to ``(B,)``; twice differentiable at 0."""
    return inner(a, a)


def norm(a: Tensor) -> Tensor:
    """Euclidean norm of every sample, ``(B, *image)`` to ``(B,)``.

    Squares are summed in float64, so that float32 images of size 1e-30 keep their norm instead of underflowing.
    """
    if _in_one_pass(a, a):
        return native.inner(a, a).sqrt_().to(a.dtype)
    return torch.linalg.vector_norm(a.flatten(1), dim=1, dtype=torch.float64).to(a.dtype)


def products(columns: Tensor, q: Tensor) -> Tensor:
    """<c_ij, q_i> for columns c ``(B, n, *image)`` and q ``(B, *image)``, float64 ``(B, n)``."""
    if columns.numel() > 0 and columns.is_contiguous() and q.is_contiguous() and native.serves(columns, q):
        return native.products(columns, q.unsqueeze(1)).squeeze(2)
    columns, q = columns.flatten(2).double(), q.flatten(1).double()
    if q.device.type == "cpu" and len(q):  # the batched product is several times slower there
        return torch.stack([c @ v for c, v in zip(columns, q, strict=True)])
    return torch.bmm(columns, q.unsqueeze(2)).squeeze(2)


def column_norms(columns: Tensor) -> Tensor:
    """||c_ij|| for columns c ``(B, n, *image)``, float64 ``(B, n)``."""
    return norm(columns.flatten(0, 1)).double().reshape(columns.shape[:2])


def gram(columns: Tensor) -> Tensor:
    """<c_ij, c_ik> for columns c ``(B, n, *image)``, float64 ``(B, n, n)``."""
    few = 0 < columns.shape[1] <= FEW and columns.numel() > 0
    if few and columns.is_contiguous() and native.serves(columns):
        return native.products(columns, columns)
    flat = columns.flatten(2).double()
    return flat @ flat.transpose(1, 2)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``(B,)`` values so that they broadcast against the ``(B, *image)`` tensor ``like``."""
    return values.reshape(values.shape[0], *([1] * (like.dim() - 1)))


def as_per_sample(value: float | Tensor, reference: Tensor, name: str) -> Tensor:
    """A float or ``(B,)`` tensor as a ``(B,)`` tensor with the dtype and device of ``reference`` ``(B, *image)``.

    Raises:
        ValueError: if a tensor of another length is given, or a value is NaN or negative.
    """
    batch = reference.shape[0]
    try:
        result = torch.as_tensor(value, dtype=reference.dtype, device=reference.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"Expected {name} as one float or one value per sample. Got {value!r}.") from None
    if result.dim() == 0:
        result = result.expand(batch)
    if result.shape != (batch,):
        raise ValueError(
            f"Expected {name} as one float or one value per sample, shape ({batch},). Got shape {tuple(result.shape)}."
        )
    if not bool((result >= 0).all()):
        raise ValueError(f"Expected {name} >= 0 for every sample. Got {result.tolist()}.")
    return result.clone()


def largest_entries(a: Tensor) -> Tensor:
    """max |a_i|, ``(B, *image)`` to ``(B,)``; NaN where there is one."""
    if _in_one_pass(a, a):
        return native.largest(a)
    return a.flatten(1).abs().amax(1)


@torch.no_grad()
def all_finite(a: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a mask of the size of ``a``."""
    if a.dim() > 0 and _in_one_pass(a, a):
        return bool(native.largest(a).isfinite().all())
    return bool((a * 0).sum() == 0)


def binary_scale(b: Tensor) -> Tensor:
    """A power of two near the largest entry of every sample, ``(B,)``; 1 where that is 0 or not finite."""
    largest = largest_entries(b.detach())
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.frexp(torch.where(usable, largest, 1.0)).exponent
    # away from the ends of the range, so that the reciprocal is a normal number too
    reach = 120 if b.dtype == torch.float32 else 1000
    return torch.exp2(exponent.clamp(-reach, reach).to(b.dtype))


def units(size: Tensor, b: Tensor) -> Tensor | None:
    """The power of two by which every sample of b, of these norms, is divided before squares are formed, ``(B,)``;
    ``None`` if none needs it."""
    return None if bool(((size > SAFE) & (size < 1 / SAFE)).all()) else binary_scale(b)


def length(v: Tensor) -> float:
    """||v||_2 of a vector whose squares may be too small or too large to be represented."""
    largest = float(v.abs().max()) if v.numel() else 0.0
    return largest * float((v / largest).norm()) if 0 < largest < float("inf") else largest


def entries(values: Mapping[str, Tensor]) -> Tensor:
    """All entries of named tensors in one float64 vector, in their order, on their device."""
    return torch.cat([v.detach().double().reshape(-1) for v in values.values()])
