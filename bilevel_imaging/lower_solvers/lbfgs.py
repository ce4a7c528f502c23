"""Limited-memory BFGS, batched: every sample has its own memory and its own line search."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import IterativeSolver, Run, State
from bilevel_imaging.lower_solvers._lbfgs_memory import direction, empty_memory, remember
from bilevel_imaging.tensors import inner, per_sample

__all__ = ["LBFGS"]

# accept a trial if the slope has shrunk at least to this fraction (curvature condition of Wolfe)
_SLOPE_FRACTION = 0.9
_MAX_TRIALS = 20


class LBFGS(IterativeSolver):
    """L-BFGS (Liu & Nocedal 1989) with a line search that keeps working when energy differences are below rounding.

    Along a descent direction d the slope phi'(t) = <G(x + t d), d> of a convex energy increases. A trial with
    phi'(t) <= 0 has surely decreased the energy, without looking at it; a trial with phi'(t) > 0 must show an energy
    not above the old one, up to rounding (approximate Wolfe conditions, Hager & Zhang 2005). Accepted if also
    |phi'(t)| <= 0.9 |phi'(0)|; otherwise the step expands or shrinks, by secants on the slope.

    One iteration is one gradient, trial steps included, so that iteration numbers of all solvers compare. The samples
    do not wait for each other: in the same pass one may accept a step while another is in its line search.

    Args:
        memory: curvature pairs kept per sample.
        max_iter: default iteration limit per sample.
    """

    _line_search = True

    def __init__(self, *, memory: int = 10, max_iter: int = 1000):
        super().__init__(max_iter)
        if memory < 1:
            raise ValueError(f"Expected memory >= 1. Got {memory}.")
        self.memory = memory

    def _start(self, run: Run, state: State) -> State:
        x, g = state["x"], state["g"]
        state.update(empty_memory(x, self.memory))
        # a step 1 / L surely decreases the energy; without L a step of at most unit length, which the search corrects
        unit = 1 / run.grad_norm.clamp_min(1)
        state["scale"] = torch.where(run.smoothness.isfinite(), 1 / run.smoothness, unit)
        state["min_curvature"] = 0.1 * run.strong_convexity
        # on a CPU energies are evaluated only where they are needed
        state["energy"] = run.value(x) if x.is_cuda else torch.full_like(unit, math.nan)
        d = -per_sample(state["scale"], g) * g
        state["d"], state["slope"] = d, inner(g, d)
        state.update(_fresh_search(state["slope"]))
        return state

    def _propose(self, run: Run, state: State) -> Tensor:
        return torch.addcmul(state["x"], per_sample(state["t"], state["x"]), state["d"])

    def _update(self, run: Run, state: State, point: Tensor, gradient: Tensor, size: Tensor) -> State:
        # +inf sends the search back from a point where the gradient is not finite
        slope = torch.where(size.isfinite(), inner(gradient, state["d"]), math.inf)
        flat = slope.abs() <= _SLOPE_FRACTION * state["slope"].abs()
        energy = _energy(run, state, point, flat & (slope > 0))
        allowance = 10 * torch.finfo(slope.dtype).eps * state["energy"].abs()
        accepted = flat & ((slope <= 0) | (energy <= state["energy"] + allowance))
        _next_trial(state, slope, accepted)
        hopeless = ~accepted & (state["trials"] >= _MAX_TRIALS)
        if point.is_cuda or bool((accepted | hopeless).any()):
            remember(state, point - state["x"], gradient - state["g"], accepted)
            # forgetting everything makes the next search go along -G
            state["pairs"] = torch.where(hopeless, 0, state["pairs"])
            chosen = per_sample(accepted, point)
            state["x"] = torch.where(chosen, point, state["x"])
            state["g"] = torch.where(chosen, gradient, state["g"])
            state["energy"] = torch.where(accepted, energy, state["energy"])
            _turn(state, accepted | hopeless)
        return state


def _energy(run: Run, state: State, point: Tensor, unsure: Tensor) -> Tensor:
    """Energies at ``point``, NaN if no sample needs them to decide; then those at the current points are known too."""
    if not point.is_cuda:
        unsure = unsure & run.active
        if not bool(unsure.any()):
            return torch.full_like(state["energy"], math.nan)
        if bool((unsure & state["energy"].isnan()).any()):
            state["energy"] = torch.where(state["energy"].isnan(), run.value(state["x"]), state["energy"])
    return run.value(point)


def _fresh_search(slope: Tensor) -> State:
    """A line search that has not tried anything: "lo" is too short a step, "hi" too long, with their slopes."""
    infinite = torch.full_like(slope, math.inf)
    zero = torch.zeros_like(slope)
    return {
        "t": torch.ones_like(slope),
        "lo": zero,
        "slope_lo": slope,
        "hi": infinite,
        "slope_hi": infinite,
        "trials": zero,
    }


def _next_trial(state: State, slope: Tensor, accepted: Tensor) -> None:
    """Narrow the bracket with the slope at the trial and choose the next one; of no effect on accepted samples later.

    The slope increases with t: a trial that is too long lies beyond the minimum along d, one that is too short before.
    """
    t, lo, slope_lo = state["t"], state["lo"], state["slope_lo"]
    long = ~accepted & (slope > 0)
    short = ~accepted & ~long
    state["hi"], state["slope_hi"] = torch.where(long, t, state["hi"]), torch.where(long, slope, state["slope_hi"])
    # expansion: where the secant through the last two short steps vanishes, but at least twice and at most ten times t
    reach = (-slope * (t - lo) / (slope - slope_lo)).nan_to_num(nan=math.inf)
    reach = torch.where(reach > 0, reach, math.inf)
    expanded = t + torch.minimum(torch.maximum(reach, t), 9 * t)
    state["lo"], state["slope_lo"] = torch.where(short, t, lo), torch.where(short, slope, slope_lo)
    width = state["hi"] - state["lo"]
    share = -state["slope_lo"] / (state["slope_hi"] - state["slope_lo"])
    # an infinite slope and a slow secant (which can creep along one side) are cured by bisection
    bisect = state["slope_hi"].isinf() | (state["trials"] % 3 == 2) | share.isnan()
    inside = state["lo"] + torch.where(bisect, 0.5, share.clamp(0.1, 0.9)) * width
    state["t"] = torch.where(state["hi"].isinf(), expanded, inside)
    state["trials"] = state["trials"] + 1


def _turn(state: State, renewed: Tensor) -> None:
    """Start a new line search along a new direction for the samples ``renewed``; -scale G if that is not descent."""
    g = state["g"]
    d = direction(state, g)
    slope = inner(g, d)
    uphill = ~(slope < 0) | slope.isinf()
    if g.is_cuda or bool((uphill & renewed).any()):
        d = torch.where(per_sample(uphill, g), -per_sample(state["scale"], g) * g, d)
        slope = torch.where(uphill, inner(g, d), slope)
        state["pairs"] = torch.where(uphill & renewed, 0, state["pairs"])
    state["d"] = torch.where(per_sample(renewed, g), d, state["d"])
    state["slope"] = torch.where(renewed, slope, state["slope"])
    for name, fresh in _fresh_search(slope).items():
        state[name] = torch.where(renewed, fresh, state[name])
