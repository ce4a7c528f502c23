"""The curvature pairs of batched L-BFGS, with a memory of its own for every sample.

Shapes: b samples, m pairs, n numbers per sample. The pairs sit in a ring of m + 1 slots, one of them to spare, so that
a pair can be written before it is known whether it counts; the products s_i^T y_j and y_i^T y_j
are kept, so that one direction costs two passes over the pairs and algebra of size m (compact representation,
Byrd, Nocedal & Schnabel 1994, eq. 3.1), not a recursion of 4 m vector operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import State
from bilevel_imaging.tensors import norm, per_sample


def empty_memory(x: Tensor, memory: int) -> State:
    """Memory for that many pairs, still without any, of samples like ``x`` ``(b, *image)``."""
    b, n, slots = x.shape[0], x[0].numel(), memory + 1
    zero = torch.zeros(b, dtype=torch.int64, device=x.device)
    return {
        "S": x.new_zeros(b, slots, n),
        "Y": x.new_zeros(b, slots, n),
        "SY": x.new_zeros(b, slots, slots),
        "YY": x.new_zeros(b, slots, slots),
        "slot": zero,
        "pairs": zero.clone(),
    }


def remember(state: State, step: Tensor, change: Tensor, chosen: Tensor) -> None:
    """Store the pairs s = ``step``, y = ``change`` ``(b, *image)`` of the samples ``chosen`` ``(b,)``.

    A pair is skipped unless s'y > 0 and s'y >= state["min_curvature"] s's, which rounding alone can violate on a
    strongly convex energy. Both are stored divided by ||s||, which leaves the method unchanged and keeps all products
    between mu and L^2, far from underflow.
    """
    slots, slot = state["S"].shape[1], state["slot"]
    rows = torch.arange(chosen.shape[0], device=step.device)
    length = norm(step)
    unit = per_sample(length.clamp_min(torch.finfo(length.dtype).tiny), step)
    s, y = (step / unit).flatten(1), (change / unit).flatten(1)
    curvature = (s * y).sum(1)
    chosen = chosen & (curvature > 0) & (curvature >= state["min_curvature"]) & curvature.isfinite()
    # what does not count must be finite all the same, because it is multiplied by zero later
    s, y = (torch.where(chosen.unsqueeze(1), v, 0.0) for v in (s, y))
    state["S"][rows, slot], state["Y"][rows, slot] = s, y
    sy, yy = _products(state["S"], y), _products(state["Y"], y)
    state["SY"][rows, slot] = _products(state["Y"], s)
    state["SY"][rows, :, slot] = sy
    state["YY"][rows, slot] = yy
    state["YY"][rows, :, slot] = yy
    state["slot"] = torch.where(chosen, (slot + 1) % slots, slot)
    state["pairs"] = torch.where(chosen, (state["pairs"] + 1).clamp(max=slots - 1), state["pairs"])


def direction(state: State, gradient: Tensor) -> Tensor:
    """-H G with the inverse Hessian approximation H of every sample, ``(b, *image)``; -scale G without pairs."""
    slots = state["S"].shape[1]
    rows = torch.arange(gradient.shape[0], device=gradient.device)[:, None, None]
    place = torch.arange(slots, device=gradient.device)
    # the spare slot, then slots without a pair, then the pairs, the oldest first
    order = (state["slot"].unsqueeze(1) + place) % slots
    used = place >= slots - state["pairs"].unsqueeze(1)
    both = used.unsqueeze(2) & used.unsqueeze(1)
    sy, yy = (
        torch.where(both, state[name][rows, order.unsqueeze(2), order.unsqueeze(1)], 0.0) for name in ("SY", "YY")
    )
    g = gradient.flatten(1)
    sg, yg = (torch.where(used, _products(state[name], g).gather(1, order), 0.0) for name in ("S", "Y"))
    diagonal = sy.diagonal(dim1=1, dim2=2)
    newest_yy = yy[:, -1, -1]
    gamma = torch.where(newest_yy > 0, diagonal[:, -1] / newest_yy, state["scale"])
    upper = sy.triu() + torch.diag_embed((~used).to(sy))
    p = _solve_upper(upper, sg)
    for_s = _solve_transposed(upper, diagonal * p + gamma.unsqueeze(1) * (_products(yy, p) - yg))
    for_y = -gamma.unsqueeze(1) * p
    # back from age to slots
    for_s, for_y = (torch.zeros_like(c).scatter(1, order, c) for c in (for_s, for_y))
    h = gamma.unsqueeze(1) * g
    for slot in range(slots):
        h = h + for_s[:, slot, None] * state["S"][:, slot] + for_y[:, slot, None] * state["Y"][:, slot]
    return -h.reshape(gradient.shape)


def _products(rows: Tensor, v: Tensor) -> Tensor:
    """<rows_ij, v_i>, ``(b, m, n)`` and ``(b, n)`` to ``(b, m)``.

    Not a batched matrix product: the order of its sums, and so the last bits of a sample, depend on the batch.
    """
    return torch.stack([(rows[:, slot] * v).sum(1) for slot in range(rows.shape[1])], 1)


def _solve_upper(upper: Tensor, rhs: Tensor) -> Tensor:
    """U^{-1} rhs by back substitution, ``(b, m, m)`` and ``(b, m)``; written out for the same reason."""
    solution = torch.zeros_like(rhs)
    for i in reversed(range(rhs.shape[1])):
        known = (upper[:, i, i + 1 :] * solution[:, i + 1 :]).sum(1)
        solution[:, i] = (rhs[:, i] - known) / upper[:, i, i]
    return solution


def _solve_transposed(upper: Tensor, rhs: Tensor) -> Tensor:
    """U^{-T} rhs by forward substitution."""
    solution = torch.zeros_like(rhs)
    for i in range(rhs.shape[1]):
        known = (upper[:, :i, i] * solution[:, :i]).sum(1)
        solution[:, i] = (rhs[:, i] - known) / upper[:, i, i]
    return solution
