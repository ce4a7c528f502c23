"""Whole runs of Newton's method for quadratic data terms with smoothed total variation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging.native.convolutions import SeparableConvolution
from bilevel_imaging.native.library import function, integers, pointer, reals, threads

# how a run begins: with the quadratic majorizer, with Newton's own model, or where an earlier run was left
BEGINNINGS = ("cold", "warm", "continued")
_DOUBLES, _INTEGERS = 5, 5  # numbers in the C struct, 8 bytes each


class DescentStates:
    """Where the runs of B images stand: a row per image in the layout of the C struct.

    Attributes:
        size: ||gradient||, ``(B,)`` float64 like the next.
        best_size: the smallest so far.
        status: int64 ``(B,)`` like the others: 0 while it runs, 3 after a line search without success.
        iterations, idle: Newton steps, and the last of them without progress.
    """

    def __init__(self, target: Tensor, offset: Tensor):
        self.table = torch.zeros((len(target), _DOUBLES + _INTEGERS), dtype=torch.float64)
        self.table[:, 1] = torch.nan
        self.table[:, 3], self.table[:, 4] = target, offset
        self.counters = self.table.view(torch.int64)

    size = property(lambda self: self.table[:, 0])
    best_size = property(lambda self: self.table[:, 1])
    status = property(lambda self: self.counters[:, 5])
    iterations = property(lambda self: self.counters[:, 6])
    idle = property(lambda self: self.counters[:, 7])


@dataclass(frozen=True)
class Quadratic:
    """1/2 <x, (diag(d) + K) x> - <b, x> + offset, a data term for compiled code.

    Attributes:
        b: contiguous, ``(B, C, H, W)``, on the CPU.
        constant: d, if it is the same number everywhere.
        convolution: K, symmetric, or ``None``.
        offset: ``(B,)`` float64; the size of the energies tells their rounding.
        count: told how many gradients and how many Hessian products have been made.
        diagonal: d, contiguous, like b, or ``None`` for ``constant``.
    """

    b: Tensor
    constant: float
    convolution: SeparableConvolution | None
    offset: Tensor
    count: Callable[[int, int], None]
    diagonal: Tensor | None = None


@dataclass(frozen=True)
class Descent:
    """Newton's method for a quadratic data term and smoothed isotropic total variation, channel by channel.

    Attributes:
        quadratic: the data term.
        weight: of the total variation.
        smoothing: likewise.
    """

    quadratic: Quadratic
    weight: float
    smoothing: float

    def run(
        self,
        x: Tensor,
        best: Tensor,
        dual: Tensor,
        states: DescentStates,
        *,
        begin: str,
        initial: Tensor | None,
        max_iter: int,
        max_inner: int,
    ) -> None:
        """Newton steps, in place, until every image has reached its target or its limit, or has made no progress for
        some steps, or stops at a gradient that is not finite. An image is computed alone, whatever its batch and the
        number of threads.

        Args:
            x: where they stand, contiguous, ``(B, C, H, W)``.
            best: receives the points of the smallest gradients; read where a run is continued.
            dual: memory of runs that stopped before their goal, ``(B, 2, C, H, W)``.
            states: changed.
            begin: one of ``BEGINNINGS``.
            initial: a cold start, to whose gradient forcing terms relate, or ``None`` to take that of x.
            max_iter: limit of Newton steps.
            max_inner: limit of conjugate gradient iterations in each.
        """
        before, data = states.counters[:, 8:].sum(0), self.quadratic
        filters = None if data.convolution is None else data.convolution.filters
        terms, taps = (0, 0) if filters is None else filters.shape[2:5:2]
        batch, channels, height, width = x.shape
        function("descend", x.dtype)(
            pointer(data.b),
            pointer(data.diagonal),
            *reals(x.dtype, data.constant),
            pointer(filters),
            *integers(terms, taps),
            *reals(x.dtype, self.weight, self.smoothing),
            *(pointer(image) for image in (x, best, dual, initial, states.table)),
            *integers(BEGINNINGS.index(begin), batch, channels * height, height, width, max_iter, max_inner),
            threads(),
        )
        data.count(*(states.counters[:, 8:].sum(0) - before).tolist())
