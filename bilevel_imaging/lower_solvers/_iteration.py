"""The loop shared by the lower-level solvers: freezing, compaction, stopping, stagnation, assembling the result.

Shapes: B samples asked for, b <= B samples still in work (finished samples leave the work when that pays).
"""

from __future__ import annotations

import abc
import math

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.lower_solvers.base import CERTIFIED_SLACK, LowerSolution, LowerSolver
from bilevel_imaging.tensors import as_per_sample, norm, per_sample

State = dict[str, Tensor]

# iterations between two tests for stagnation, and between two host synchronizations on a GPU
_CHECK_EVERY = 8
# a sample below the rounding bound is idle if ||G|| has not lost 10 % in about 20 + sqrt(kappa) iterations
_IDLE_FACTOR = 0.9


class Run:
    """Bookkeeping of one batched solve.

    Where the strong convexity mu of a sample is not known (or not positive), its stop test is ||G|| <= error_tol, the
    gradient norm itself as if mu were 1, and nothing is certified: its distance bound is inf.

    Attributes:
        problem: the problems in work.
        index: their positions in the batch asked for, int64 ``(b,)``.
        x: best point measured so far (smallest gradient norm), ``(b, *image)``.
        grad_norm: gradient norm there, ``(b,)``.
        iterations: iterations done, int64 ``(b,)``.
        active: samples that still iterate; the others are frozen, bool ``(b,)``.
        tol: gradient norm to reach, ``(b,)``.
        strong_convexity: mu, 0 where not known, ``(b,)``.
        smoothness: L, inf where not known, ``(b,)``.
        knows_strong_convexity, knows_smoothness: whether they are known for every sample.
        count: iterations done by the active samples.
    """

    _RESULTS = ("x", "grad_norm", "iterations", "active", "stagnated")
    _IN_WORK = (*_RESULTS, "index", "tol", "strong_convexity", "smoothness", "mark", "mark_at", "last", "last_at")

    def __init__(self, problem: LowerLevelProblem, x0: Tensor | None, error_tol: float | Tensor):
        self.problem = self._full_problem = problem
        self.x = _start_point(problem, x0)
        constants = problem.constants()
        mu = _known(constants.strong_convexity, self.x, unknown=0.0)
        self.strong_convexity = mu
        self.smoothness = _known(constants.smoothness, self.x, unknown=math.inf)
        self.knows_strong_convexity = bool((mu > 0).all())
        self.knows_smoothness = bool(self.smoothness.isfinite().all())
        self._asked = as_per_sample(error_tol, self.x, "error_tol")
        self.tol = self._asked * torch.where(mu > 0, mu, torch.ones_like(mu))
        # what is certified is the measured gradient plus its rounding errors
        rounding = problem.gradient_rounding_beside(self.x, self.tol).to(self.tol)
        self.tol = self.tol - torch.minimum(torch.where(mu > 0, rounding, 0.0), 0.5 * self.tol)
        self.index = torch.arange(mu.shape[0], device=mu.device)
        self.count = 0
        self._full_tol, self._full_mu = self.tol, mu
        self._num_active = mu.shape[0]
        self._can_compact = True

    def begin(self, gradient: Tensor) -> None:
        """Record the gradient at the start; samples that satisfy the tolerance there finish with 0 iterations."""
        self.grad_norm = norm(gradient)
        self.active = (self.grad_norm > self.tol) & (self.grad_norm < math.inf)
        self.iterations = torch.zeros_like(self.index)
        self.stagnated = torch.zeros_like(self.active)
        self.mark = self.last = self.grad_norm
        self.mark_at, self.last_at = self.iterations.clone(), self.iterations.clone()
        # clones: the start belongs to the caller
        self._results = {name: getattr(self, name).clone() for name in self._RESULTS}

    def grad(self, x: Tensor) -> Tensor:
        """Gradients at x ``(b, *image)``; frozen samples still in work are not counted as cost."""
        self.problem.cost.gradients -= x.shape[0] - self._num_active
        return self.problem.grad(x)

    def value(self, x: Tensor) -> Tensor:
        """Energies at x, ``(b,)``; frozen samples still in work are not counted as cost."""
        self.problem.cost.values -= x.shape[0] - self._num_active
        return self.problem.value(x)

    def observe(self, x: Tensor, gradient: Tensor, *, trial: bool) -> Tensor:
        """Record one measured point per sample, freeze those that finish, and return the gradient norms ``(b,)``.

        A gradient that is not finite ends its sample, unless the point was only the trial of a line search.
        """
        self.count += 1
        size = norm(gradient)
        better = self.active & (size < self.grad_norm)
        self.grad_norm = torch.where(better, size, self.grad_norm)
        self.x = torch.where(per_sample(better, x), x, self.x)
        self.iterations += self.active
        self.active = self.active & (~(size <= self.tol) if trial else (size > self.tol) & (size < math.inf))
        return size

    def proceed(self) -> bool:
        """Whether any sample goes on; on a GPU asked only every few iterations, to spare synchronizations."""
        if self.count % _CHECK_EVERY == 0 and self.count > 0:
            self._find_stagnation()
        elif self.x.is_cuda and self.count > 0:
            return True
        self._num_active = int(self.active.sum())
        return self._num_active > 0

    def _find_stagnation(self) -> None:
        """Freeze samples at their rounding floor: no progress for long, below what rounding allows or for very long."""
        k = self.count
        lost = self.grad_norm < _IDLE_FACTOR * self.mark
        self.mark = torch.where(lost, self.grad_norm, self.mark)
        self.mark_at = torch.where(lost, k, self.mark_at)
        self.last_at = torch.where(self.grad_norm < self.last, k, self.last_at)
        self.last = self.grad_norm
        root = (self.smoothness / self.strong_convexity).sqrt().nan_to_num(posinf=100.0)
        idle = self.active & (k - self.mark_at >= (20 + root).clamp(max=500))
        # no decrease at all over many times sqrt(kappa) iterations is a floor too, whatever the rounding bound says
        stuck = self.active & (k - self.last_at >= (200 + 10 * root).clamp(max=2000))
        if self.x.is_cuda or bool(idle.any()):
            stuck = stuck | (idle & (self.grad_norm <= self.problem.gradient_rounding(self.x)))
        self.stagnated = self.stagnated | stuck
        self.active = self.active & ~stuck

    def compact(self, state: State) -> State:
        """Drop the finished samples once they are at least half of the work; without ``subset`` masks must do."""
        if not self._can_compact or 2 * self._num_active > self.active.shape[0]:
            return state
        keep = self.active.nonzero().squeeze(1)
        smaller = self.problem.subset(keep)
        if smaller is None:
            self._can_compact = False
            return state
        self._store()
        self.problem = smaller
        for name in self._IN_WORK:
            setattr(self, name, getattr(self, name)[keep])
        self._num_active = keep.shape[0]
        return {name: value[keep] for name, value in state.items()}

    def _store(self) -> None:
        for name, full in self._results.items():
            full[self.index] = getattr(self, name)

    def solution(self) -> LowerSolution:
        """The evidence for the whole batch, at the best point measured of every sample."""
        self._store()
        size, mu = self._results["grad_norm"], self._full_mu
        certified = (mu > 0) & size.isfinite()
        rounding = self._full_problem.gradient_rounding_beside(self._results["x"], size).to(size)
        bound = torch.where(certified, (size + rounding) / mu, math.inf)
        reached = size <= self._full_tol
        rounded = reached & certified & (bound > (1 + CERTIFIED_SLACK) * self._asked)
        converged, stagnated = reached & ~rounded, self._results["stagnated"] | rounded
        rows = zip(converged.tolist(), self._results["active"].tolist(), stagnated.tolist(), strict=True)
        return LowerSolution(
            x=self._results["x"],
            grad_norm=size,
            distance_bound=bound,
            iterations=self._results["iterations"],
            converged=converged,
            reason=tuple(_reason(*row) for row in rows),
            grad_rounding=rounding,
        )


class IterativeSolver(LowerSolver):
    """A method that measures one gradient per iteration: it proposes a point and is told the gradient there.

    Args:
        max_iter: default iteration limit per sample.
    """

    # a non-finite gradient at a line search's trial point is a reason to try a shorter step, not a failure
    _line_search = False

    def __init__(self, max_iter: int):
        self.max_iter = whole("max_iter", max_iter, 0)

    def solve(
        self,
        problem: LowerLevelProblem,
        x0: Tensor | None,
        error_tol: float | Tensor,
        *,
        max_iter: int | None = None,
    ) -> LowerSolution:
        """See :meth:`LowerSolver.solve`; without a known mu the stop test is ||G|| <= error_tol, nothing certified."""
        limit = self.max_iter if max_iter is None else whole("max_iter", max_iter, 0)
        with torch.no_grad():
            run = Run(problem, x0, error_tol)
            gradient = problem.grad(run.x)
            run.begin(gradient)
            if limit > 0 and run.proceed():
                self._iterate(run, run.compact({"x": run.x, "g": gradient}), limit)
            return run.solution()

    def _iterate(self, run: Run, state: State, limit: int) -> None:
        state = self._start(run, state)
        for _ in range(limit):
            point = self._propose(run, state)
            gradient = run.grad(point)
            size = run.observe(point, gradient, trial=self._line_search)
            if not run.proceed():
                return
            state = run.compact(self._update(run, state, point, gradient, size))

    @abc.abstractmethod
    def _start(self, run: Run, state: State) -> State:
        """Complete the state, which holds the start "x" and its gradient "g"; all entries ``(b, ...)``."""

    @abc.abstractmethod
    def _propose(self, run: Run, state: State) -> Tensor:
        """The next point at which to measure, ``(b, *image)``."""

    @abc.abstractmethod
    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        """Learn the gradient ``(b, *image)`` and its norm ``(b,)`` at the point proposed."""


def _start_point(problem: LowerLevelProblem, x0: Tensor | None) -> Tensor:
    x = problem.initial() if x0 is None else x0
    if x.shape != problem.shape or x.dtype != problem.dtype:
        raise ValueError(
            f"Expected x0 with the problem's shape {tuple(problem.shape)} and dtype {problem.dtype}. "
            f"Got {tuple(x.shape)}, {x.dtype}."
        )
    return x.detach()


def _known(value: Tensor | None, x: Tensor, *, unknown: float) -> Tensor:
    if value is None:
        return x.new_full((x.shape[0],), unknown)
    value = value.detach().to(x)
    return torch.where((value > 0) & value.isfinite(), value, unknown)


def _reason(converged: bool, active: bool, stagnated: bool) -> str:
    if converged:
        return "converged"
    if active:
        return "max_iter"
    return "stagnated" if stagnated else "not finite"
