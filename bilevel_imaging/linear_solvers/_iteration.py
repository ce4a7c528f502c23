"""What the iterative linear solvers share: freezing, compaction, restarts, and the check of the residual.

A solver is a ``Recurrence``: its vectors and one ``step``. Everything about batches is done here.
"""

from __future__ import annotations

import abc
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.linear_solvers._systems import (
    DONE,
    MAX_ITER,
    NOT_FINITE,
    REASONS,
    RUNNING,
    STAGNATED,
    Operator,
    PreconditionerChoice,
    Systems,
    divided,
    multiplied,
    resumed,
    start,
    validate,
)
from bilevel_imaging.linear_solvers.base import LinearSolution, LinearSolver
from bilevel_imaging.tensors import as_per_sample, norm, per_sample, squared_norm, units

# On a GPU the question "has every sample stopped?" waits for the device, so it is asked only every few steps.
_STEPS_BETWEEN_CHECKS = 4
# A restart from the true residual must at least halve it; otherwise rounding has won.
_RESTART_GAIN = 0.5


class Recurrence(abc.ABC):
    """The vectors of one method; every tensor attribute has the samples of the working batch in front.

    ``step`` advances ``systems.q``, ``.r`` and ``.residual`` of the ``running`` samples with one product and leaves
    the bits of the other iterates alone. ``memory`` names the attributes from which a run can be resumed.
    ``everyone`` says that all samples run (known on the CPU only, where it is free to ask): masks can be left out then.
    ``drift`` is how far the recursed residuals were from the true ones, ``(A,)``, if ``finish`` has replaced those.
    """

    everyone = False
    drift: Tensor | None = None
    memory: tuple[str, ...] = ()

    def __init__(self, operator: Operator, systems: Systems):
        self.systems = systems

    @abc.abstractmethod
    def step(self, operator: Operator, running: Tensor) -> None: ...

    def finish(self, operator: Operator, max_iter: int, *, check: bool) -> bool:
        """Advance ``systems`` until every sample has stopped, in compiled code; False if that can't be done here.
        With ``check``, the samples that ran are left with their true residuals, and ``drift`` is set."""
        return False

    def take(self, index: Tensor, systems: Systems) -> None:
        """Keep the samples ``index`` alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[index])
        self.systems = systems

    def save(self, index: Tensor | None, saved: dict[str, Tensor]) -> None:
        """Write what ``memory`` names into ``saved``, at the samples ``index`` of the whole batch."""
        for name in self.memory:
            value = getattr(self, name)
            if value is not None and index is None:
                saved[name] = value
            elif value is not None:
                saved[name][index] = value

    def restore(self, saved: dict[str, Tensor]) -> None:
        """The opposite of ``save``."""
        for name, value in saved.items():
            setattr(self, name, value.clone())


class IterativeSolver(LinearSolver):
    """Base of the solvers that are a recurrence.

    Args:
        max_iter: default iteration limit per sample.
        preconditioner: ``None``, ``"auto"`` for the one of the linearization, or a callable acting on the whole batch
            (finished samples then can't be dropped from it: they are masked).
    """

    recurrence: type[Recurrence]
    # whether the recurrence computes r as b - H q, in which case there is nothing to check at the end
    residual_is_true: bool

    def __init__(self, *, max_iter: int, preconditioner: PreconditionerChoice = None):
        max_iter = whole("max_iter", max_iter, 0)
        if not (preconditioner is None or preconditioner == "auto" or callable(preconditioner)):
            raise ValueError(f'Expected preconditioner None, "auto" or a callable. Got {preconditioner!r}.')
        self.max_iter = max_iter
        self.preconditioner = preconditioner

    def solve(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
        max_iter: int | None = None,
    ) -> LinearSolution:
        return self._solve(linearization, rhs, residual_tol, q0=q0, max_iter=max_iter)

    @torch.no_grad()
    def _solve(
        self,
        linearization: Linearization,
        rhs: Tensor,
        residual_tol: float | Tensor,
        *,
        q0: Tensor | None = None,
        max_iter: int | None = None,
        check: bool = True,
    ) -> LinearSolution:
        """``solve``; with ``check=False`` the recursed residual is believed, which saves the last product."""
        validate(linearization, rhs, q0)
        tol = as_per_sample(residual_tol, rhs, "residual_tol")
        limit = self.max_iter if max_iter is None else whole("max_iter", max_iter, 0)
        operator = Operator(linearization, self.preconditioner)
        size = norm(rhs)
        scale = units(size, rhs)
        systems = start(operator, rhs.detach(), q0, tol, scale, size)
        zero = systems.b.new_zeros(()).expand_as(systems.b)  # nobody writes to the right-hand side
        origin = (zero, systems.b) if q0 is None else None
        memory = self._run(operator, systems, limit, None, check=check, origin=origin)
        solution = _solution(systems, scale, tol, q0, memory)
        return solution if check or self.residual_is_true else replace(solution, verified=False)

    @torch.no_grad()
    def resume(
        self, linearization: Linearization, rhs: Tensor, previous: LinearSolution, residual_tol: float | Tensor
    ) -> LinearSolution:
        if previous.memory is None or previous.residual is None:
            return super().resume(linearization, rhs, previous, residual_tol)
        validate(linearization, rhs, previous.q)
        tol = as_per_sample(residual_tol, rhs, "residual_tol")
        operator = Operator(linearization, self.preconditioner)
        scale = units(norm(rhs), rhs)
        images = divided(previous.q, scale), divided(previous.residual, scale)
        systems = resumed(rhs.detach(), previous, images, tol, scale)
        memory = self._run(operator, systems, self.max_iter, previous.memory, check=True, origin=images)
        solution = _solution(systems, scale, tol, previous.q, memory)
        verified = previous.verified or bool((solution.iterations > 0).all())
        return replace(solution, iterations=solution.iterations + previous.iterations, verified=verified)

    def _run(
        self,
        operator: Operator,
        systems: Systems,
        limit: int,
        memory: dict[str, Tensor] | None,
        *,
        check: bool,
        origin: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor] | None:
        """Iterate, check, and restart the samples whose recursion had drifted; returns what a resumed run needs.
        ``origin``: q and r at the start, where others hold them."""
        # a recursed residual goes on falling below the rounding errors of q; there a restart takes over
        floor = 0.0 if self.residual_is_true else torch.finfo(systems.b.dtype).eps / 8
        while True:
            systems.target = torch.maximum(systems.tol, floor * systems.residual)
            systems.settle(limit)
            entered = systems.status == RUNNING
            if not bool(entered.any()):
                break
            images = (systems.q.clone(), systems.r.clone()) if origin is None else origin
            before = (*images, systems.residual.clone())
            origin = None
            checked = check and not self.residual_is_true
            memory, drift = iterate(self.recurrence, operator, systems, limit, memory, check=checked)
            if checked:
                _verify(operator, systems, entered, before, drift)
                if bool((systems.status == RUNNING).any()):
                    memory = None
            else:
                _restore(systems, systems.status == NOT_FINITE, before)
                break
        return memory


def iterate(
    recurrence: type[Recurrence],
    operator: Operator,
    systems: Systems,
    max_iter: int,
    memory: dict[str, Tensor] | None = None,
    *,
    check: bool = False,
) -> tuple[dict[str, Tensor] | None, Tensor | None]:
    """Advance the running samples of ``systems`` until each has stopped; the batch shrinks when half of it has.

    Starts from ``memory`` if given; returns the memory of the whole batch. With ``check`` compiled code leaves true
    residuals and how far the recursed ones were from them; elsewhere that is ``None``: check them.
    """
    work, index = systems, None
    saved: dict[str, Tensor] = {}
    state = _begin(recurrence, operator, work, memory)
    if state.finish(operator, max_iter, check=check):
        state.save(index, saved)
        return saved or None, state.drift
    on_cpu = systems.q.device.type == "cpu"
    can_shrink, unchanged = True, False
    for step in itertools.count():
        if not unchanged:
            running = work.status == RUNNING
        if not unchanged and (on_cpu or step % _STEPS_BETWEEN_CHECKS == 0):
            count = int(running.sum())
            if count == 0:
                break
            if can_shrink and 2 * count <= running.shape[0]:
                kept = running.nonzero().squeeze(1)
                smaller = operator.subset(kept)
                can_shrink = smaller is not None
                if smaller is not None:
                    if index is not None:
                        systems.put(index, work)
                    state.save(index, saved)
                    operator, work = smaller, work.take(kept)
                    index, running = kept if index is None else index[kept], running[kept]
                    state.take(kept, work)
        state.everyone = on_cpu and count == running.shape[0]
        state.step(operator, running)
        work.iterations += running
        # where it costs no wait for a device: nothing to mark as long as every sample goes on
        unchanged = state.everyone and work.goes_on(max_iter)
        if not unchanged:
            work.settle(max_iter)
    if index is not None:
        systems.put(index, work)
    state.save(index, saved)
    return saved or None, None


def _begin(
    recurrence: type[Recurrence], operator: Operator, systems: Systems, memory: dict[str, Tensor] | None
) -> Recurrence:
    state = recurrence(operator, systems)
    if memory is not None:
        state.restore(memory)
    return state


def _verify(
    operator: Operator,
    systems: Systems,
    entered: Tensor,
    before: tuple[Tensor, Tensor, Tensor],
    drift: Tensor | None,
) -> None:
    """Replace recursed residuals by true ones, unless that is done (``drift``); samples whose recursion had drifted are
    set running again."""
    if drift is None:
        true_r = systems.b - operator.hvp_where(entered, systems.q)
        if not bool(entered.all()):
            true_r = torch.where(per_sample(entered, true_r), true_r, systems.r)
        drift = norm(true_r - systems.r)
        systems.r = true_r
        systems.residual = torch.where(entered, squared_norm(true_r).sqrt(), systems.residual)
    mu = operator.linearization.constants.strong_convexity
    if mu is not None:  # the recurrence has bounded the norm of its own residual
        systems.energy = systems.energy + drift / mu.to(systems.energy).sqrt()
    good = entered & (systems.residual <= systems.tol)
    again = entered & ~good & (systems.status == DONE)
    gained = systems.residual <= _RESTART_GAIN * before[2]
    systems.status = torch.where(again, torch.where(gained, RUNNING, STAGNATED), systems.status)
    systems.status = torch.where(good, DONE, systems.status)
    worse = entered & ~(systems.residual <= before[2]) & (systems.status != MAX_ITER)
    _restore(systems, worse | (entered & (systems.status == NOT_FINITE)), before)


def _restore(systems: Systems, mask: Tensor, before: tuple[Tensor, Tensor, Tensor]) -> None:
    """Go back to (q, r, ||r||) where the mask is set."""
    if not bool(mask.any()):
        return
    q, r, residual = before
    systems.q = torch.where(per_sample(mask, q), q, systems.q)
    systems.r = torch.where(per_sample(mask, r), r, systems.r)
    systems.energy = torch.where(mask, torch.inf, systems.energy)
    systems.residual = torch.where(mask, residual, systems.residual)


def _solution(
    systems: Systems, scale: Tensor | None, tol: Tensor, q0: Tensor | None, memory: dict[str, Tensor] | None
) -> LinearSolution:
    q = multiplied(systems.q, scale)
    if q0 is not None:
        # returned as given, not through the units
        idle = systems.iterations == 0
        if bool(idle.any()):
            untouched = idle & (systems.q != 0).flatten(1).any(1)
            q = torch.where(per_sample(untouched, q), q0.detach(), q)
    residual = multiplied(systems.residual, scale)
    converged = (residual <= tol) & (systems.status != NOT_FINITE)
    # DONE and not converged: the recursion went to its floor, or the tolerance is below the smallest number
    missed = torch.where(systems.status == DONE, STAGNATED, systems.status)
    status = torch.where(converged, DONE, missed).tolist()
    return LinearSolution(
        q=q,
        residual_norm=residual,
        iterations=systems.iterations,
        converged=converged,
        reason=tuple(REASONS[code] for code in status),
        residual=multiplied(systems.r, scale),
        energy_norm=multiplied(systems.energy, scale),
        memory=memory,
    )
