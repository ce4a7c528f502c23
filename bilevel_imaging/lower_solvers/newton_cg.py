"""Newton's method with truncated conjugate gradients: the default lower-level solver."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.derivatives import Linearization, NewtonModel, Preconditioner
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.linear_solvers._systems import PreconditionerChoice
from bilevel_imaging.linear_solvers.conjugate_gradient import ConjugateGradient
from bilevel_imaging.lower_solvers._compiled_newton import descend
from bilevel_imaging.lower_solvers._newton_state import (
    ENERGY_UNITS,
    RUNNING,
    STAGNATED,
    NewtonState,
    settle,
    solution_of,
    within_rounding,
)
from bilevel_imaging.lower_solvers.base import LowerSolution, LowerSolver
from bilevel_imaging.native import Stencil
from bilevel_imaging.tensors import as_per_sample, inner, norm, per_sample

# Residual of the Newton system relative to the gradient: at most this, and less as the gradient falls.
_LARGEST_FORCING = 0.1
# The Newton residual need not be smaller than this fraction of the final gradient norm.
_OVERSOLVE = 0.5
# A trial past the minimum along the line is accepted while the slope is below this fraction of the first one and the
# gradient norm is below that fraction of the smallest one so far, or the energy has not increased ...
_SLOPE_FRACTION, _RECORD_FRACTION = 0.5, 0.9
# ... or, however far past, if the energy has fallen by this fraction of what the slope promised (Armijo's rule).
_SUFFICIENT = 1e-4
_MAX_TRIALS = 12
# A rejected trial step is multiplied by something between these, and by the first of them once half of the trials
# are used up: the last ones reach 1e-6 of the step.
_SHRINK = (0.1, 0.7)


@dataclass
class _State(NewtonState):
    """With what the steps of PyTorch's operations need; the samples still in the working batch, ``(A,)``.

    Attributes:
        x, grad: current point and gradient, ``(A, *image)``.
        first_size: ||grad|| at a cold start, the reference of the forcing term.
        index: position in the caller's batch.
        memory: of the energy's Newton model, first dimension A; ``None`` if it has none.
    """

    x: Tensor
    grad: Tensor
    first_size: Tensor
    index: Tensor
    memory: Tensor | None

    def take(self, index: Tensor) -> _State:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return _State(**{name: None if value is None else value[index] for name, value in values.items()})


class NewtonCG(LowerSolver):
    """Inexact Newton method, globally convergent on smooth strongly convex energies.

    The Newton system is solved by conjugate gradients until its residual is below max(eta ||G||, mu error_tol / 2),
    eta = min(1/10, sqrt(||G|| / ||G_0||)) (forcing terms: Dembo, Eisenstat & Steihaug 1982). The line search looks at
    slopes <G(x + t d), d> rather than energies, which in float32 are below rounding long before the end: a trial with
    a slope <= 0 has decreased a convex energy for certain. Other trials must lower the smallest gradient norm so far
    by a fixed factor, which can happen finitely often only, or not increase the energy, or decrease it enough where
    they are far past the minimum along the line; failing that, the slopes bracket it. Full steps far past it pay with
    the models of total variation and filters, which are majorizers at the start.

    Where the energy has no known strong convexity constant, the stopping rule uses the smallest curvature
    <d, H d> / ||d||^2 along the Newton directions instead. That is an estimate from above: ``converged`` then is a
    heuristic and ``distance_bound`` is inf.

    Args:
        max_iter: default limit of Newton steps per sample.
        max_inner: limit of conjugate gradient iterations per Newton step.
        preconditioner: of the Newton systems; ``None``, ``"auto"`` for that of the linearization, or a callable.
    """

    def __init__(self, *, max_iter: int = 200, max_inner: int = 1000, preconditioner: PreconditionerChoice = "auto"):
        max_iter, max_inner = whole("max_iter", max_iter, 0), whole("max_inner", max_inner, 1)
        self.max_iter = max_iter
        self.inner_solver = ConjugateGradient(max_iter=max_inner, preconditioner=preconditioner)

    @torch.no_grad()
    def solve(
        self,
        problem: LowerLevelProblem,
        x0: Tensor | None,
        error_tol: float | Tensor,
        *,
        max_iter: int | None = None,
    ) -> LowerSolution:
        """See ``LowerSolver.solve``."""
        x = problem.initial() if x0 is None else x0
        if x.shape != problem.shape or x.dtype != problem.dtype:
            raise ValueError(
                f"Expected x0 of shape {tuple(problem.shape)} and {problem.dtype}. Got {tuple(x.shape)}, {x.dtype}."
            )
        limit, cold = self.max_iter if max_iter is None else whole("max_iter", max_iter, 0), x0 is None
        error_tol = as_per_sample(error_tol, x, "error_tol")
        descent = None if callable(self.inner_solver.preconditioner) else problem.descent()
        if descent is not None:
            return descend(problem, descent, x.detach(), error_tol, limit, self.inner_solver.max_iter, cold=cold)
        state, linearization = _start(problem, x.detach(), error_tol, cold)
        known = problem.constants().strong_convexity is not None
        everything, working = state, problem
        settle(working, state, limit)
        if not cold and state.runs:
            # a warm start is near already: forcing terms relative to a cold one
            state.first_size = torch.maximum(state.size, norm(problem.grad(problem.initial())))
        while state.runs:
            kept = (state.status == RUNNING).nonzero().squeeze(1)
            if 2 * kept.shape[0] <= state.index.shape[0]:
                smaller, part = working.subset(kept), linearization.subset(kept)
                if smaller is not None and part is not None:
                    _put(everything, state)
                    working, linearization, state = smaller, part, state.take(kept)
            linearization = self._step(working, linearization, state, known)
            settle(working, state, limit)
        _put(everything, state)
        return solution_of(problem, everything, error_tol)

    def _step(
        self, problem: LowerLevelProblem, linearization: Linearization, state: _State, known: bool
    ) -> Linearization:
        """One Newton step of the running samples; returns the linearization at the new points."""
        running = state.status == RUNNING
        forcing = (state.size / state.first_size).sqrt().clamp(max=_LARGEST_FORCING)
        tol = torch.maximum(forcing * state.size, _OVERSOLVE * state.target)
        tol = torch.where(running, tol, 0.0)  # a finished sample may have 0/0 or NaN here
        rhs = -state.grad
        if not bool(running.all()):
            rhs = torch.where(per_sample(running, rhs), rhs, 0.0)
        model = None if state.memory is None else linearization.newton_model(state.memory)
        operator = linearization if model is None else _Model(linearization, model)
        d = self.inner_solver._solve(operator, rhs, tol, check=False).q
        slope = inner(state.grad, d)
        # without a descent direction (a Hessian that rounding made indefinite) fall back to the gradient
        descends = slope < 0
        d = _replace(descends | ~running, d, rhs)
        slope = torch.where(descends | ~running, slope, -state.size.square())
        if not known:
            # <d, H d> = -<G, d> for the iterates of conjugate gradients
            seen = torch.where(running & descends, -slope / inner(d, d), torch.inf)
            state.curvature = torch.minimum(state.curvature, seen)
        state.iterations += running
        return _line_search(problem, state, d, slope, running, model)


class _Model(Linearization):
    """The Newton system with the energy's own model in place of its Hessian."""

    def __init__(self, linearization: Linearization, model: NewtonModel):
        self.grad, self.constants = linearization.grad, linearization.constants
        self.linearization, self.model = linearization, model

    def hvp(self, v: Tensor) -> Tensor:
        return self.model.hvp(v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return self.linearization.mixed_vjp(q)

    def stencil(self) -> Stencil | None:
        return self.model.stencil()

    def preconditioner(self) -> Preconditioner | None:
        return self.model.preconditioner()


def _start(problem: LowerLevelProblem, x: Tensor, error_tol: Tensor, cold: bool) -> tuple[_State, Linearization]:
    linearization = problem.linearize(x)
    grad = linearization.grad
    size = norm(grad)
    curvature, error_tol = within_rounding(problem, x, error_tol)
    zero = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    index = torch.arange(x.shape[0], device=x.device)
    state = _State(
        x=x.clone(),
        grad=grad,
        size=size,
        best_x=x.clone(),
        best_size=size.clone(),
        first_size=size.clone(),
        curvature=curvature,
        error_tol=error_tol,
        status=zero,
        iterations=zero.clone(),
        idle=zero.clone(),
        index=index,
        memory=linearization.newton_memory(cold=cold),
    )
    return state, linearization


def _line_search(
    problem: LowerLevelProblem, state: _State, d: Tensor, slope: Tensor, running: Tensor, model: NewtonModel | None
) -> Linearization:
    """Move the running samples along d and return the linearization at the new points.

    Slopes of a convex function increase along the line, so a trial with slope > 0 bounds the step from above. Samples
    that no trial satisfies keep their point and are marked stagnated: down to the last trial, the slopes contradict
    the direction of descent, which is rounding.
    """
    x, before = state.x, None
    t = torch.where(running, torch.ones_like(slope), 0.0)
    waiting = running
    for trial in range(_MAX_TRIALS):
        point = torch.addcmul(x, d, per_sample(t, d))
        linearization = problem.linearize(point)
        size = norm(linearization.grad)
        new_slope = inner(linearization.grad, d)
        fits = new_slope <= 0
        past = waiting & (new_slope > 0)  # False where that is NaN
        near = past & (new_slope <= _SLOPE_FRACTION * slope.abs())
        near_record = near & (size <= _RECORD_FRACTION * state.best_size)
        fits = fits | near_record
        if bool((past & ~near_record).any()):
            before = problem.value(x) if before is None else before
            enough = _SUFFICIENT * t * slope.abs() + ENERGY_UNITS * torch.finfo(x.dtype).eps * before.abs()
            fits = fits | (past & (problem.value(point) <= before - torch.where(near, 0.0, enough)))
        waiting = waiting & ~fits
        if not bool(waiting.any()):
            break
        if trial == _MAX_TRIALS - 2:
            # the last evaluation is at the points that the failing samples keep
            state.status = torch.where(waiting, STAGNATED, state.status)
            t = torch.where(waiting, 0.0, t)
            continue
        # where the secant of the slope is 0; an overflown trial falls to the lower end
        most = _SHRINK[1] if 2 * trial < _MAX_TRIALS else _SHRINK[0]
        fraction = (slope / (slope - new_slope)).nan_to_num(0.0).clamp(_SHRINK[0], most)
        t = torch.where(waiting, fraction * t, t)
    _accept(state, point, linearization.grad, size, running)
    if model is not None:
        state.memory = model.advance(d, t)
    return linearization


def _accept(state: _State, x: Tensor, grad: Tensor, size: Tensor, running: Tensor) -> None:
    """Update points and records of the running samples; the others were evaluated where they are."""
    state.x = _replace(running, x, state.x)
    state.grad = _replace(running, grad, state.grad)
    state.size = torch.where(running, size, state.size)
    # near the floor, tiny records come up by chance for a long time: they don't count as progress
    progress = size <= _RECORD_FRACTION * state.best_size
    state.idle = torch.where(progress, 0, state.idle + 1)
    record = running & (size < state.best_size)
    state.best_x = _replace(record, x, state.best_x)
    state.best_size = torch.where(record, size, state.best_size)


def _replace(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where the mask is set; without a pass over the images when it is set everywhere."""
    if mask.device.type == "cpu" and bool(mask.all()):
        return new
    return torch.where(per_sample(mask, new), new, old)


def _put(everything: _State, part: _State) -> None:
    """Write the results of a part of the batch back to the whole."""
    if part is everything:
        return
    for f in fields(part):
        if f.name not in ("index", "memory"):
            getattr(everything, f.name)[part.index] = getattr(part, f.name)
