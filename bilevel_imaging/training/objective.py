"""The mean upper-level loss over image pairs, as an objective: certified values and hypergradients, warm-started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient, average, hypergradient, loss_interval
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.upper_level import CertifiedValue, SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

# images solved together at most, so that memory does not grow with the data set
DEFAULT_BATCH = 64
# passes over the batches until the bound of the mean meets the relative accuracy asked for
MAX_PASSES = 4


@dataclass(frozen=True)
class _Chunk:
    indices: tuple[int, ...]
    problem: LowerLevelProblem
    x_true: Tensor


class BilevelObjective:
    """F(theta) = mean over pairs of loss(x_i*(theta), x_i), with lower-level and adjoint warm starts kept per image.

    Args:
        energy: the lower-level energy; its trainable parameters are theta, changed in place by a method.
        pairs: images and measurements.
        loss: upper-level loss, ``None`` for :class:`SquaredError`.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for conjugate gradients.
        batch_size: most images solved together; never changes a result by more than rounding.
        minibatch: if given, every ``hypergradient`` takes the next minibatch of this size in a shuffled order.
        generator: order of the minibatches, on the CPU; required with ``minibatch``.
        certificate: passed to :func:`bilevel_imaging.hypergradient`.

    Raises:
        ValueError: from binding the energy (not strongly convex, wrong data), or a minibatch without a generator.
    """

    def __init__(
        self,
        energy: VariationalEnergy,
        pairs: ImagePairs,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        lower: LowerSolver | None = None,
        linear: LinearSolver | None = None,
        batch_size: int | None = None,
        minibatch: int | None = None,
        generator: torch.Generator | None = None,
        certificate: str = "auto",
    ):
        if minibatch is not None and generator is None:
            raise ValueError("Expected a torch.Generator for the order of the minibatches. Got None.")
        self.energy, self.pairs = energy, pairs
        self.theta: dict[str, Tensor] = energy.theta
        self.loss = SquaredError() if loss is None else loss
        self.lower, self.linear = lower or NewtonCG(), linear or ConjugateGradient()
        self.batch_size = DEFAULT_BATCH if batch_size is None else batch_size
        self.minibatch, self.generator = minibatch, generator
        self.certificate = certificate
        self._chunks = [self._bind(positions) for positions in pairs.order(self.batch_size)]
        self._queue: list[list[int]] = []
        # per image: lower-level point and adjoint of the last hypergradient; points of the last value, at its theta
        self._x: dict[int, Tensor] = {}
        self._q: dict[int, Tensor] = {}
        self._trial_x: dict[int, Tensor] = {}
        self._trial_theta: Tensor | None = None

    def _bind(self, positions: list[int]) -> _Chunk:
        batch = self.pairs.batch(positions)
        return _Chunk(tuple(batch.indices.tolist()), self.energy.bind(batch.y, batch.physics), batch.x)

    def _start(self, chunk: _Chunk) -> Tensor | None:
        """Where to start x: from the last value if theta has not moved since, else from the last hypergradient."""
        same = self._trial_theta is not None and torch.equal(self._trial_theta, flatten(self.theta))
        for store in (self._trial_x, self._x) if same else (self._x,):
            if all(i in store for i in chunk.indices):
                return torch.stack([store[i] for i in chunk.indices])
        if not any(i in self._x for i in chunk.indices):
            return None
        cold = chunk.problem.initial()
        return torch.stack([self._x.get(i, c) for i, c in zip(chunk.indices, cold, strict=True)])

    def _adjoints(self, chunk: _Chunk) -> Tensor | None:
        if not all(i in self._q for i in chunk.indices):
            return None
        return torch.stack([self._q[i] for i in chunk.indices])

    def value(self, error_tol: float) -> CertifiedValue:
        """Certified interval of F over all pairs at the current theta, lower level solved to ``error_tol``.

        Adjoints of the last hypergradient correct the value (one Hessian product per image), which makes the interval
        second order in the error when theta has moved little.
        """
        started, total = time.perf_counter(), Cost()
        value = lower = upper = 0.0
        points: dict[int, Tensor] = {}
        for chunk in self._chunks:
            before = chunk.problem.cost.copy()
            solution = self.lower.solve(chunk.problem, self._start(chunk), error_tol)
            q = self._adjoints(chunk)
            estimates = loss_interval(chunk.problem, self.loss, chunk.x_true, solution.x, q, error_tol=error_tol)
            weight = 1 / len(self.pairs)
            value += weight * float(estimates[0].sum())
            lower += weight * float(estimates[1].sum())
            upper += weight * float(estimates[2].sum())
            points.update(zip(chunk.indices, solution.x.unbind(0), strict=True))
            total = total + (chunk.problem.cost - before)
        self._trial_x, self._trial_theta = points, flatten(self.theta)
        total = total + Cost(seconds=time.perf_counter() - started)
        return CertifiedValue(value=value, lower=lower, upper=upper, cost=total)

    def hypergradient(
        self,
        *,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        relative: float | None = None,
        bound_tol: float | None = None,
    ) -> Hypergradient:
        """Certified hypergradient of F at the current theta: of all pairs, or of the next minibatch.

        With ``relative`` the bound of the *mean* is driven below relative * ||mean||, not only that of every batch.
        """
        chunks = self._next_chunks()
        if relative is None:
            return average(*self._pass(chunks, error_tol=error_tol, residual_tol=residual_tol, bound_tol=bound_tol))
        result = average(*self._pass(chunks, relative=relative))
        for _ in range(MAX_PASSES - 1 if len(chunks) > 1 else 0):
            if not result.certified or result.bound <= relative * result.norm:
                break
            cost = result.cost
            result = average(*self._pass(chunks, bound_tol=0.9 * relative * result.norm), earlier=cost)
        if result.certified and result.bound <= relative * result.norm:
            return replace(result, reason="")  # what single batches fell short of does not matter
        return result

    def _pass(self, chunks: list[_Chunk], **accuracy: Any) -> tuple[list[Hypergradient], list[int]]:
        parts = []
        for chunk in chunks:
            part = hypergradient(
                chunk.problem,
                self.loss,
                chunk.x_true,
                lower=self.lower,
                linear=self.linear,
                x0=self._start(chunk),
                q0=self._adjoints(chunk),
                certificate=self.certificate,
                **accuracy,
            )
            self._x.update(zip(chunk.indices, part.x.unbind(0), strict=True))
            self._q.update(zip(chunk.indices, part.q.unbind(0), strict=True))
            parts.append(part)
        self._trial_x, self._trial_theta = {}, None
        return parts, [len(chunk.indices) for chunk in chunks]

    def _next_chunks(self) -> list[_Chunk]:
        if self.minibatch is None:
            return self._chunks
        if not self._queue:
            self._queue = self.pairs.order(self.minibatch, self.generator)
        return [self._bind(self._queue.pop(0))]

    def reconstructions(self) -> Iterator[tuple[int, Tensor]]:
        """(index, last lower-level point) of every image that has one."""
        yield from sorted(self._x.items())

    def state_dict(self) -> dict[str, Any]:
        """Warm starts, queue of minibatches and order generator: all that a bit-for-bit continuation needs."""
        return {
            "x": dict(self._x),
            "q": dict(self._q),
            "trial_x": dict(self._trial_x),
            "trial_theta": self._trial_theta,
            "queue": [list(positions) for positions in self._queue],
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            ValueError: if keys are missing or the warm starts are of other images.
        """
        missing = {"x", "q", "trial_x", "trial_theta", "queue", "generator"} - set(state)
        if missing:
            raise ValueError(f"Expected a state of the objective with {sorted(missing)}. Got {sorted(state)}.")
        shapes = {i: x.shape for chunk in self._chunks for i, x in zip(chunk.indices, chunk.x_true, strict=True)}
        for name in ("x", "q", "trial_x"):
            for index, tensor in state[name].items():
                if shapes.get(index) != tensor.shape:
                    raise ValueError(
                        f"Expected warm starts of the images of this data set. Got image {index} of shape "
                        f"{tuple(tensor.shape)}: the data have changed since the checkpoint."
                    )
        device = self.pairs.x[0].device
        self._x, self._q, self._trial_x = (
            {i: t.to(device) for i, t in state[name].items()} for name in ("x", "q", "trial_x")
        )
        self._trial_theta = state["trial_theta"]
        self._queue = [list(positions) for positions in state["queue"]]
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
