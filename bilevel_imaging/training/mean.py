"""The mean upper-level loss over batches of lower-level problems, and its certified hypergradient."""

from __future__ import annotations

import abc
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.data import Batch
from bilevel_imaging.derivatives import Constants
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient, average, check_certificate, check_solvers, hypergradient
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver, Recycled
from bilevel_imaging.lower_solvers import GradientDescent, LowerSolver, NewtonCG
from bilevel_imaging.training.distributed import ALONE, Processes
from bilevel_imaging.training.warm_starts import NoWarmStarts, WarmStarts
from bilevel_imaging.upper_level import Samples, SamplingPenalty, SquaredError
from bilevel_imaging.upper_level.sensitivities import Sensitivity, derivative, loss_curvature

# images solved together at most, so that memory does not grow with the data set
DEFAULT_BATCH = 64
# passes over the batches until the bound of the mean meets the relative accuracy asked for; in the first one, every
# batch of several has a goal relative to this part of the norm of the last hypergradient
MAX_PASSES, EXPECTED_NORM = 4, 0.5


def bind_batch(energy: VariationalEnergy, batch: Batch) -> LowerLevelProblem:
    """The lower-level problems of a batch, at its noise levels where the regularizer depends on them.

    Such a regularizer has a method ``at_noise_level(sigma)``, which takes ``(B,)`` standard deviations and returns a
    regularizer for these B images with the same parameters under the same names.

    Raises:
        ValueError: as :meth:`VariationalEnergy.bind`.
    """
    at_noise_level = getattr(energy.regularizer, "at_noise_level", None)
    if at_noise_level is not None and batch.noise_level is not None:
        regularizer = at_noise_level(batch.noise_level)
        energy = VariationalEnergy(
            regularizer, ridge=energy.ridge, data_fidelity=energy.data_fidelity, data_weight=energy.data_weight
        )
    return energy.bind(batch.y, batch.physics)


@dataclass(frozen=True)
class Chunk:
    """Images solved together: their indices, lower-level problems and ``(B, C, H, W)`` true images.

    ``number`` is the position among the chunks of which a mean is taken, in the order of all processes.
    """

    indices: tuple[int, ...]
    problem: LowerLevelProblem
    x_true: Tensor
    number: int = 0


class MeanObjective(abc.ABC):
    """F(theta) = mean over images of loss(x_i*(theta), x_i): hypergradients of the chunks that a subclass chooses.

    Several processes can share the chunks: see :meth:`spread`.

    Args:
        energy: the lower-level energy; its trainable parameters are theta, changed in place by a method.
        loss: upper-level loss, ``None`` for :class:`SquaredError`.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for conjugate gradients.
        batch_size: most images solved together, ``None`` for 64; changes results within their certificates only.
        certificate: passed to :func:`bilevel_imaging.hypergradient`.
        warm: where the starts of the solvers are kept.
        penalty: of theta, added to F; ``None`` for none.
    """

    def __init__(
        self,
        energy: VariationalEnergy,
        loss: Callable[[Tensor, Tensor], Tensor] | None,
        *,
        lower: LowerSolver | None,
        linear: LinearSolver | None,
        batch_size: int | None,
        certificate: str,
        warm: WarmStarts,
        penalty: SamplingPenalty | None = None,
    ):
        check_solvers(lower, linear)
        check_certificate(certificate)
        self.energy = energy
        self.theta: dict[str, Tensor] = energy.theta
        self.loss = SquaredError() if loss is None else loss
        self.lower, self.linear = lower or NewtonCG(), linear or ConjugateGradient()
        self.batch_size = DEFAULT_BATCH if batch_size is None else batch_size
        self.certificate = certificate
        self.warm = warm
        self.penalty = penalty
        self.processes: Processes = ALONE
        self.last_norm: float | None = None  # of the last hypergradient
        self.shares_goal = False  # whether the next one is of several batches, those of all processes counted

    def spread(self, processes: Processes) -> None:
        """Solve a share of the chunks only, before the first step: values and hypergradients stay those of all images.

        All processes then see the same numbers, and their costs add up. They ask for the same things in the same
        order; every one has all images. Points and adjoints stay where they were computed: in a hypergradient those of
        other processes are left out.

        Args:
            processes: of the run.
        """
        self.processes = processes

    @property
    def exchanges(self) -> bool:
        """Whether an image comes to another process the next time, so that all of them keep all warm starts."""
        return False

    @property
    def gauss_newton_pays(self) -> bool:
        """See :class:`CurvedObjective`: where solves are compiled, all else takes most of the time of a step."""
        return False

    @abc.abstractmethod
    def _next_chunks(self) -> list[Chunk]:
        """What the next hypergradient is the mean of: the share of this process."""

    @abc.abstractmethod
    def _all_chunks(self) -> Iterable[Chunk]:
        """All images: the share of this process.

        Raises:
            ValueError: there are endlessly many.
        """

    @abc.abstractmethod
    def constants(self) -> Constants:
        """Constants of the lower-level problem of one image at the current theta."""

    def _chunk(self, batch: Batch, number: int = 0) -> Chunk:
        return Chunk(tuple(batch.indices.tolist()), bind_batch(self.energy, batch), batch.x, number)

    def _start(self, chunk: Chunk) -> Tensor | None:
        """Where to start x: where it was, or at the start of the problem for images that were never solved."""
        known = self.warm.points(chunk.indices)
        if all(x is None for x in known):
            return None
        if any(x is None for x in known):
            cold = chunk.problem.initial()
            known = [c if x is None else x.to(c) for x, c in zip(known, cold, strict=True)]
        return _stacked(known, chunk.x_true)

    def _adjoints(self, chunk: Chunk) -> Tensor | None:
        known = self.warm.adjoints(chunk.indices)
        return None if any(q is None for q in known) else _stacked(known, chunk.x_true)

    def hypergradient(
        self,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        *,
        relative: float | None = None,
        bound_tol: float | None = None,
    ) -> Hypergradient:
        """Certified hypergradient of F at the current theta: of all images, or of the next minibatch.

        With ``relative`` the bound of the *mean* is driven below relative * ||mean||, not only that of every batch.
        """
        chunks = self._next_chunks()
        if relative is None:
            parts = self._pass(chunks, error_tol=error_tol, residual_tol=residual_tol, bound_tol=bound_tol)
            result = self._penalized(average(*parts))
        else:
            result = self._relative(chunks, relative)
        self.last_norm = result.norm
        self.warm.step_done()
        return result

    def _relative(self, chunks: list[Chunk], relative: float) -> Hypergradient:
        expected = EXPECTED_NORM * (self.last_norm or 0.0)
        # the gradient of one batch may be small while that of the mean is not
        if self.shares_goal and 0 < expected < math.inf:
            parts, sizes = self._pass(chunks, bound_tol=relative * expected)
        else:
            parts, sizes = self._pass(chunks, relative=relative)
        result = self._penalized(average(parts, sizes))
        for _ in range(MAX_PASSES - 1 if len(parts) > 1 or self.penalty is not None else 0):
            if not result.certified or result.bound <= relative * result.norm:
                break
            cost = result.cost
            parts, sizes = self._pass(chunks, bound_tol=0.9 * relative * result.norm)
            result = self._penalized(average(parts, sizes, earlier=cost))
        if result.certified and result.bound <= relative * result.norm:
            return replace(result, reason="")  # what single batches fell short of does not matter
        return result

    def gauss_newton(self, relative: float) -> tuple[Tensor, Cost] | None:
        """See :class:`CurvedObjective`; all processes take part."""
        if self.penalty is not None or isinstance(self.warm, NoWarmStarts):
            return None
        gathered = self.processes.gather(lambda: [self._curvature(chunk, relative) for chunk in self._all_chunks()])
        matrices, total, images = [], Cost(), 0
        for _, matrix, cost, size in sorted(itertools.chain.from_iterable(gathered), key=lambda entry: entry[0]):
            matrices.append(matrix)
            total, images = total + cost, images + size
        return torch.stack(matrices).sum(0) / images, total

    def _curvature(self, chunk: Chunk, relative: float) -> tuple[int, Tensor, Cost, int]:
        """Number of a chunk, the sum over its images of W^T f'' W, the work and the number of images."""
        start, before, samples = time.perf_counter(), chunk.problem.cost.copy(), self._samples(chunk)
        matrix = loss_curvature(Sensitivity(samples, derivative(samples, relative)))
        cost = chunk.problem.cost - before + Cost(seconds=time.perf_counter() - start)
        return chunk.number, matrix, cost, len(chunk.indices)

    def draw(self, *, everything: bool = False) -> list[Samples]:
        """See :class:`SampledObjective`; takes the minibatches in the same order as ``hypergradient``."""
        if self.processes.size > 1:
            raise ValueError(
                "Expected one process for a method that makes the steps of the lower level itself. Got "
                f"{self.processes.size}: choose another method, or start it without torchrun."
            )
        if isinstance(self.warm, NoWarmStarts):
            raise ValueError(
                "Expected an objective that keeps the points of its images between steps. Got one without warm starts: "
                "use fixed patches, with warm starts in memory or on the disk."
            )
        chunks = self._all_chunks() if everything else self._next_chunks()
        return [self._samples(chunk) for chunk in chunks]

    def _samples(self, chunk: Chunk) -> Samples:
        return Samples(
            indices=chunk.indices,
            problem=chunk.problem,
            loss=LossOracle(self.loss, chunk.x_true, chunk.problem.shape),
            x=MeanObjective._start(self, chunk),
            q=self._adjoints(chunk),
        )

    def keep(self, samples: Samples, x: Tensor, q: Tensor) -> None:
        """See :class:`SampledObjective`."""
        self.warm.put(samples.indices, x, q)

    def solve(self, samples: Samples, relative: float) -> Hypergradient:
        """See :class:`SampledObjective`."""
        return self._hypergradient(samples, samples.x, samples.q, self.lower, self.linear, relative=relative)

    def certify(self, parts: Sequence[tuple[Samples, Tensor, Tensor]]) -> Hypergradient:
        """See :class:`SampledObjective`; costs what the certificate costs, and the residuals of both solvers."""
        lower, linear = GradientDescent(max_iter=0), Recycled()  # they return what they start from, and measure it
        anything = {"error_tol": math.inf, "residual_tol": math.inf}
        estimates = [self._hypergradient(s, x, q, lower, linear, **anything) for s, x, q in parts]
        return self._penalized(average(estimates, [len(s.indices) for s, _, _ in parts]))

    def exact_term(self) -> tuple[float, dict[str, Tensor]]:
        """See :class:`SampledObjective`."""
        return (0.0, {}) if self.penalty is None else (self.penalty.value(), {self.penalty.NAME: self.penalty.grad()})

    def _hypergradient(
        self,
        samples: Samples,
        x: Tensor | None,
        q: Tensor | None,
        lower: LowerSolver,
        linear: LinearSolver,
        **accuracy: float,
    ) -> Hypergradient:
        return hypergradient(
            samples.problem,
            self.loss,
            samples.loss.x_true,
            lower=lower,
            linear=linear,
            x0=x,
            q0=q,
            certificate=self.certificate,
            **accuracy,
        )

    def _penalized(self, h: Hypergradient) -> Hypergradient:
        return h if self.penalty is None else self.penalty.added_to(h)

    def _pass(self, chunks: list[Chunk], **accuracy: Any) -> tuple[list[Hypergradient], list[int]]:
        """Hypergradients of the chunks of all processes, in their order, and numbers of images."""
        gathered = self.processes.gather(lambda: [self._solved(chunk, accuracy) for chunk in chunks])
        solved = sorted(itertools.chain.from_iterable(gathered), key=lambda entry: entry[0])
        if self.exchanges:
            for _, indices, part in solved:
                self.warm.put(indices, part.x, part.q)
        return [part for _, _, part in solved], [len(indices) for _, indices, _ in solved]

    def _solved(self, chunk: Chunk, accuracy: dict[str, Any]) -> tuple[int, tuple[int, ...], Hypergradient]:
        """Number, indices and hypergradient of a chunk, without what other processes have no use for."""
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
        if not self.exchanges:
            self.warm.put(chunk.indices, part.x, part.q)
        if self.processes.size > 1:
            part = _without_images(part, keep_points=self.exchanges)
        return chunk.number, chunk.indices, part


def _without_images(h: Hypergradient, *, keep_points: bool) -> Hypergradient:
    """The same with batches of no image in place of those of points and adjoints; ``keep_points`` keeps one of each."""
    empty = h.x.new_empty(0, *h.x.shape[1:])
    points = {} if keep_points else {"x": empty, "q": empty}
    solves: dict[str, Any] = {"lower": {"x": empty}, "linear": {"q": empty, "residual": None, "memory": None}}
    return replace(h, **points, **{name: replace(getattr(h, name), **values) for name, values in solves.items()})


def _stacked(tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.stack([t for t in tensors if t is not None]).to(like.device)
