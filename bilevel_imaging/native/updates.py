"""Inner products, largest entries, and the vector updates of conjugate gradients, for any operator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads


def inner(u: Tensor, v: Tensor) -> Tensor:
    """<u_i, v_i> for contiguous u and v ``(B, *image)``, float64 ``(B,)``."""
    products = torch.empty(len(u), dtype=torch.float64)
    kernel = function("inner", u.dtype)
    kernel(pointer(u), pointer(v), pointer(products), *_sizes(u), threads())
    return products


def products(a: Tensor, b: Tensor) -> Tensor:
    """<a_ij, b_ik> for contiguous a ``(B, n, *image)`` and b ``(B, m, *image)``, float64 ``(B, n, m)``."""
    batch, n, m = len(a), a.shape[1], b.shape[1]
    out = torch.empty((batch, n, m), dtype=torch.float64)
    sizes = integers(batch, n, m, a[0, 0].numel())
    function("products", a.dtype)(pointer(a), pointer(b), pointer(out), *sizes, threads())
    return out


def largest(v: Tensor) -> Tensor:
    """max |v_i| for contiguous v ``(B, *image)``, ``(B,)``; NaN where there is one."""
    sizes = v.new_empty(len(v))
    function("largest", v.dtype)(pointer(v), pointer(sizes), *_sizes(v), threads())
    return sizes


def advance(q: Tensor, r: Tensor, p: Tensor, product: Tensor, step: Tensor, rz: Tensor) -> Tensor:
    """q += step p, r -= step H p, p = r + (||r||^2 / rz) p, in place; returns ||r||^2, float64 ``(B,)``.

    A sample whose step is NaN is left alone, and its ||r||^2 is undefined.

    Args:
        q: iterates, ``(B, *image)``, contiguous.
        r: their residuals, likewise.
        p: their search directions, likewise.
        product: H p, likewise.
        step: float64 ``(B,)``.
        rz: ||r||^2 before, float64 ``(B,)``.
    """
    squares = torch.empty_like(rz)
    kernel = function("advance", q.dtype)
    vectors = tuple(pointer(v) for v in (q, r, p, product, step, rz, squares))
    kernel(*vectors, *_sizes(q), threads())
    return squares


def _sizes(v: Tensor) -> tuple[ctypes.c_int64, ...]:
    """Samples, and numbers in each of them."""
    return integers(len(v), v.numel() // max(len(v), 1))
