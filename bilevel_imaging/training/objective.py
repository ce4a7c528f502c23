"""The mean upper-level loss over image pairs, as an objective: certified values and hypergradients, warm-started."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.cost import Cost
from bilevel_imaging.data import ImagePairs
from bilevel_imaging.derivatives import Constants
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient, loss_interval
from bilevel_imaging.linear_solvers import LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver
from bilevel_imaging.training.distributed import Processes, batch_loads
from bilevel_imaging.training.mean import Chunk, MeanObjective
from bilevel_imaging.training.warm_starts import NoWarmStarts, WarmStarts
from bilevel_imaging.upper_level import CertifiedValue, SamplingPenalty
from bilevel_imaging.upper_level.quasi_newton import flatten

# the entries of the state that have a tensor for every image
_BY_IMAGE = ("x", "q", "trial_x")


class BilevelObjective(MeanObjective):
    """F(theta) = mean over pairs of loss(x_i*(theta), x_i), with lower-level and adjoint warm starts kept per image.

    Args:
        energy: the lower-level energy; its trainable parameters are theta, changed in place by a method.
        pairs: images and measurements.
        loss: upper-level loss, ``None`` for :class:`SquaredError`.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for conjugate gradients.
        batch_size: most images solved together; changes results within their certificates only.
        minibatch: if given, every ``hypergradient`` takes the next minibatch of this size in a shuffled order.
        generator: order of the minibatches, on the CPU; required with ``minibatch``.
        certificate: passed to :func:`bilevel_imaging.hypergradient`.
        warm: where warm starts are kept; ``None`` for memory, with minibatches that of the CPU.
        penalty: of theta, added to F; ``None`` for none.

    Several processes share the images: see :meth:`spread`. With minibatches an image comes to another process from one
    epoch to the next, so that all of them keep all warm starts; else warm starts stay where they are.

    Raises:
        ValueError: from binding the energy (not strongly convex, wrong data), a minibatch without a generator, or
            one of more images than there are.
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
        warm: WarmStarts | None = None,
        penalty: SamplingPenalty | None = None,
    ):
        if minibatch is not None:
            _check_minibatch(minibatch, len(pairs), generator)
        if warm is None:
            warm = WarmStarts(None if minibatch is None else "cpu")
        options = {"lower": lower, "linear": linear, "batch_size": batch_size, "certificate": certificate}
        super().__init__(energy, loss, warm=warm, penalty=penalty, **options)
        self.pairs, self.minibatch, self.generator = pairs, minibatch, generator
        self._order = pairs.order(self.batch_size)
        # With minibatches all pairs are needed for a value only: stacking them for good would double the memory.
        self._share = list(range(len(self._order)))  # the batches of this process
        self._bound = [self._bind(number) for number in (self._share if minibatch is None else self._share[:1])]
        self._queue: list[list[int]] = []
        # points of the last value, at its theta
        self._trial_x: dict[int, Tensor] = {}
        self._trial_theta: Tensor | None = None

    def spread(self, processes: Processes) -> None:
        super().spread(processes)
        self._share = processes.share(batch_loads(self.pairs, self.batch_size))
        if self.minibatch is None:
            self._bound = [self._bind(number) for number in self._share]
        if processes.size > 1:
            processes.first(self.warm.open)

    @property
    def exchanges(self) -> bool:
        return self.minibatch is not None and not isinstance(self.warm, NoWarmStarts)

    def _bind(self, number: int) -> Chunk:
        return self._chunk(self.pairs.batch(self._order[number]), number)

    def _all_chunks(self) -> Iterator[Chunk]:
        return iter(self._bound) if self.minibatch is None else map(self._bind, self._share)

    def _start(self, chunk: Chunk) -> Tensor | None:
        """Where to start x: from the last value if theta has not moved since, else from the last hypergradient."""
        same = self._trial_theta is not None and torch.equal(self._trial_theta, flatten(self.theta))
        if same and all(i in self._trial_x for i in chunk.indices):
            return torch.stack([self._trial_x[i] for i in chunk.indices])
        return super()._start(chunk)

    def constants(self) -> Constants:
        return self._one_problem().constants()

    @cached_property
    def gauss_newton_pays(self) -> bool:
        problem = self._bound[0].problem if self._bound else self._one_problem()
        return problem.has_whole_runs

    def _one_problem(self) -> LowerLevelProblem:
        """That of one image, which every process has."""
        return self._chunk(self.pairs.batch(self._order[0][:1])).problem

    def value(self, error_tol: float) -> CertifiedValue:
        """Certified interval of F over all pairs at the current theta, lower level solved to ``error_tol``.

        Adjoints of the last hypergradient correct the value (one Hessian product per image), which makes the interval
        second order in the error when theta has moved little.
        """
        gathered = self.processes.gather(lambda: self._sums(error_tol))
        value = lower = upper = 0.0 if self.penalty is None else self.penalty.value()
        total = Cost()
        for _, sums, cost in sorted(itertools.chain.from_iterable(gathered), key=lambda entry: entry[0]):
            weight = 1 / len(self.pairs)
            value += weight * sums[0]
            lower += weight * sums[1]
            upper += weight * sums[2]
            total = total + cost
        return CertifiedValue(value=value, lower=lower, upper=upper, cost=total)

    def _sums(self, error_tol: float) -> list[tuple[int, list[float], Cost]]:
        """Of every chunk of this process its number, the sums of losses and of both ends, and the cost."""
        result = []
        points: dict[int, Tensor] = {}
        for chunk in self._all_chunks():
            started, before = time.perf_counter(), chunk.problem.cost.copy()
            solution = self.lower.solve(chunk.problem, self._start(chunk), error_tol)
            q = self._adjoints(chunk)
            estimates = loss_interval(chunk.problem, self.loss, chunk.x_true, solution.x, q, error_tol=error_tol)
            if self.minibatch is None:
                points.update(zip(chunk.indices, solution.x.unbind(0), strict=True))
            cost = chunk.problem.cost - before + Cost(seconds=time.perf_counter() - started)
            result.append((chunk.number, [float(end.sum()) for end in estimates], cost))
        self._trial_x, self._trial_theta = points, flatten(self.theta)
        return result

    def _pass(self, chunks: list[Chunk], **accuracy: Any) -> tuple[list[Hypergradient], list[int]]:
        result = super()._pass(chunks, **accuracy)
        self._trial_x, self._trial_theta = {}, None
        return result

    def _next_chunks(self) -> list[Chunk]:
        if self.minibatch is None:
            self.shares_goal = len(self._order) > 1
            return self._bound
        if not self._queue:
            self._queue = self.pairs.order(self.minibatch, self.generator)
        positions = self._queue.pop(0)
        parts = [positions[k : k + self.batch_size] for k in range(0, len(positions), self.batch_size)]
        self.shares_goal = len(parts) > 1
        share = self.processes.share([len(part) for part in parts])
        return [self._chunk(self.pairs.batch(parts[number]), number) for number in share]

    def reconstructions(self) -> Iterator[tuple[int, Tensor]]:
        """(index, last lower-level point) of every image that has one."""
        indices = sorted(self.pairs.indices)
        yield from ((i, x) for i, x in zip(indices, self.warm.points(indices), strict=True) if x is not None)

    def state_dict(self) -> dict[str, Any]:
        """Warm starts, queue of minibatches and order generator: all that a bit-for-bit continuation needs.

        With several processes the warm starts are those of this process: see :meth:`whole_state_dict`.
        """
        return {
            **self.warm.state_dict(),
            "trial_x": dict(self._trial_x),
            "trial_theta": self._trial_theta,
            "queue": [list(positions) for positions in self._queue],
            "last_norm": self.last_norm,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def whole_state_dict(self) -> dict[str, Any]:
        """The state with the warm starts of all processes, in the first one; the others help to make it."""
        state = self.state_dict()
        if self.processes.size == 1 or self.exchanges:
            return state
        mine = {name: {i: t.cpu() for i, t in state[name].items()} for name in _BY_IMAGE}
        for theirs in self.processes.collect(mine):
            state = state | {name: state[name] | theirs[name] for name in _BY_IMAGE}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` or :meth:`whole_state_dict` returned, as far as this process needs it.

        Raises:
            ValueError: if keys are missing or the warm starts are of other images.
        """
        missing = {"x", "q", "trial_x", "trial_theta", "queue", "generator"} - set(state)
        if missing:
            raise ValueError(f"Expected a state of the objective with {sorted(missing)}. Got {sorted(state)}.")
        shapes = {i: x.shape for i, x in zip(self.pairs.indices, self.pairs.x, strict=True)}
        for name in _BY_IMAGE:
            for index, tensor in state[name].items():
                if shapes.get(index) != tensor.shape:
                    raise ValueError(
                        f"Expected warm starts of the images of this data set. Got image {index} of shape "
                        f"{tuple(tensor.shape)}: the data have changed since the checkpoint."
                    )
        if not self.exchanges:
            own = {self.pairs.indices[position] for number in self._share for position in self._order[number]}
            state = state | {name: {i: t for i, t in state[name].items() if i in own} for name in _BY_IMAGE}
        device = self.pairs.x[0].device
        self.warm.load_state_dict(state, device)
        self._trial_x = {i: t.to(device) for i, t in state["trial_x"].items()}
        self._trial_theta = state["trial_theta"]
        self._queue = [list(positions) for positions in state["queue"]]
        self.last_norm = state.get("last_norm")  # older states have none
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())


def _check_minibatch(size: int, images: int, generator: torch.Generator | None) -> None:
    if whole("minibatch", size, 1) > images:
        raise ValueError(f"Expected minibatch as at most {images}, the number of images. Got {size}.")
    if generator is None:
        raise ValueError("Expected a torch.Generator for the order of the minibatches. Got None.")
