"""Gradient descent on 1/2 <q, H q> - <b, q>: what unrolling gradient descent with frozen derivatives computes."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.linear_solvers._iteration import IterativeSolver
from bilevel_imaging.linear_solvers._stationary import StationaryRecurrence
from bilevel_imaging.linear_solvers._systems import Operator
from bilevel_imaging.tensors import per_sample


class _Descent(StationaryRecurrence):
    def window_length(self) -> Tensor:
        mu = 0.0 if self.strong_convexity is None else self.strong_convexity
        return 1 / (self._step_size() * mu)

    def _step_size(self) -> Tensor:
        if self.strong_convexity is None:
            return 1 / self.smoothness
        return 2 / (self.smoothness + self.strong_convexity)

    def step(self, operator: Operator, running: Tensor) -> None:
        systems, before = self.systems, self.systems.residual
        size = torch.where(running, self._step_size(), 0.0)
        systems.q.addcmul_(systems.r, per_sample(size, systems.q))
        self.measure(operator, running)
        if self.estimated:
            # a step of at most 2/L never increases the residual
            self.back_off(running & ~(systems.residual <= before))


class GradientDescent(IterativeSolver):
    """q+ = q + alpha (b - H q) with alpha = 2 / (L + mu), one product per iteration.

    residual_k <= ((L - mu) / (L + mu))^k residual_0. From q = 0, K iterations followed by -J^T q are reverse-mode
    differentiation of K steps of gradient descent with derivatives frozen at the last iterate (Ehrhardt & Roberts
    2023). Where L is not known it is estimated by power iteration and doubled whenever the residual grows; where mu is
    not known, alpha = 1/L.

    Args:
        max_iter: default iteration limit per sample.
    """

    recurrence = _Descent
    residual_is_true = True

    def __init__(self, *, max_iter: int = 10000):
        super().__init__(max_iter=max_iter)
