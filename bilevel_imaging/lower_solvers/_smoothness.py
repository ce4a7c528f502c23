"""The smoothness constant L where the energy does not know it: an estimate that grows when it proves too small."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.lower_solvers._iteration import Run, State
from bilevel_imaging.tensors import norm, per_sample

_POWER_ITERATIONS = 10
_SAFETY = 1.2


def start_smoothness(run: Run, state: State) -> None:
    """Put "L" and the mask "estimated", both ``(b,)``, into the state; an estimate never enters a certificate."""
    state["L"], state["estimated"] = run.smoothness, run.smoothness.isinf()
    if not run.knows_smoothness:
        state["L"] = torch.where(state["estimated"], _local_smoothness(run, state["x"]), run.smoothness)


def measure_smoothness(run: Run, state: State, chosen: Tensor) -> None:
    """Raise the estimated L of the samples ``chosen`` ``(b,)`` to the curvature at their current points."""
    larger = torch.maximum(state["L"], _local_smoothness(run, state["x"]))
    state["L"] = torch.where(chosen & state["estimated"], larger, state["L"])


def _local_smoothness(run: Run, x: Tensor) -> Tensor:
    """Largest curvature at x, ``(b,)``, by power iteration: approached from below, hence the safety factor."""
    linearization = run.problem.linearize(x)
    generator = torch.Generator().manual_seed(0)
    # one start vector for all samples, so that a sample's result does not depend on its batch
    v = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64).to(x).expand_as(x)
    curvature = x.new_zeros(x.shape[0])
    for _ in range(_POWER_ITERATIONS):
        v = linearization.hvp(v / per_sample(norm(v).clamp_min(torch.finfo(v.dtype).tiny), v))
        curvature = norm(v)
    # zero curvature (or none that is finite) says nothing: any positive number will do, it can grow
    return torch.where((curvature > 0) & curvature.isfinite(), _SAFETY * curvature, 1.0)


def grow_smoothness(state: State, dx: Tensor, dg: Tensor) -> Tensor:
    """Raise the estimated L of samples with ||dg|| > L ||dx|| between two measured points; returns those, ``(b,)``.

    Where ||dg|| <= L ||dx|| holds, a gradient step 1/L decreases a convex energy by at least ||G_new||^2 / (2 L). L
    grows by a factor, so it fails only finitely often.
    """
    length, change = norm(dx), norm(dg)
    grew = state["estimated"] & (change > state["L"] * length) & change.isfinite()
    ratio = change / length.clamp_min(torch.finfo(length.dtype).tiny)
    state["L"] = torch.where(grew, _SAFETY * ratio, state["L"])
    return grew
