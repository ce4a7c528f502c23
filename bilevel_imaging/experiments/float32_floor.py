"""How far float32 can certify: accuracy asked for against certified relative bound and true error, three ways.

- float32: solves and evaluation in float32, rounding of every residual included in the bound;
- float32, residuals in float64: what float32 data get by default: solvers run in float32, the evaluation in float64;
- float64: the same stored numbers, everything in float64.

Asked for are fixed tolerances, error_tol = residual_tol, and goals, relative=... With a goal, float32 solutions are
corrected by what their float64 residuals say (iterative refinement), so that only the all-float32 way stops early.
The truth is that of the problem which the float32 numbers define, for all three, in float64: true errors near its own,
which is orders of magnitude below its bound (``truth_bound``), say no more than that.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.energies import LowerLevelProblem, VariationalEnergy, VariationalProblem
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

# name -> degradation, TV weight, ridge; the smoothing is the same
PROBLEMS = {
    "denoising": (Degradation("denoising", sigma=0.1), 0.1, 0.0),
    "deblurring": (Degradation("deblurring", sigma=0.01, blur_size=9, blur_std=1.5), 0.01, 1e-3),
}
SMOOTHING = 0.01
ACCURACIES = tuple(10.0**-k for k in range(9))
WAYS = ("float32", "float32, residuals in float64", "float64")
REQUESTS = {"tolerances": "error_tol = residual_tol", "goal": "relative"}
TRUTH = 1e-10  # relative bound asked of the reference: a goal below what float64 reaches is approached


class Float32Problem(VariationalProblem):
    """Float32 problems that nobody can evaluate in float64."""

    def double(self) -> None:
        return None


def run(*, crops: int = 2, size: int = 48) -> Record:
    """All accuracies, ways and requests; returns the record that is saved as JSON.

    Args:
        crops: in one batch, each from another photograph.
        size: pixels along each side.
    """
    problems = {}
    for name, (degradation, weight, ridge) in PROBLEMS.items():
        ways, x_true = build(degradation, weight, ridge, crops, size)
        truth = hypergradient(ways["float64"], SquaredError(), x_true.double(), relative=TRUTH)
        problems[name] = {
            "truth": flatten(truth.grad).tolist(),
            "truth_bound": truth.relative_bound,
            "requests": {
                request: {way: _curve(problem, x_true, request, truth) for way, problem in ways.items()}
                for request in REQUESTS
            },
        }
    return {"crops": crops, "size": size, "accuracies": list(ACCURACIES), "problems": problems}


def build(
    degradation: Degradation, weight: float, ridge: float, crops: int, size: int
) -> tuple[dict[str, LowerLevelProblem], Tensor]:
    """The same problems for all ``WAYS``, and the ground truth ``(B, 1, size, size)`` float32."""
    pairs = ImagePairs.build(extract_patches(photographs(), size, 1, seed=0)[:crops], degradation, torch.float32)
    x_true = torch.stack(pairs.x)
    energy = VariationalEnergy(TotalVariation(weight, SMOOTHING), ridge=ridge)
    default = energy.bind(torch.stack(pairs.y), pairs.physics(x_true.shape[1:]))
    single = Float32Problem(energy, default.data, default.dtype, default.cost)
    return dict(zip(WAYS, (single, default, default.double()), strict=True)), x_true


def _curve(problem: LowerLevelProblem, x_true: Tensor, request: str, truth: Hypergradient) -> Record:
    """Relative bound and true relative error at every accuracy; a bound that is not finite is ``None``."""
    true, loss = flatten(truth.grad), SquaredError()
    bounds, errors = [], []
    for accuracy in ACCURACIES:
        asked = {"relative": accuracy} if request == "goal" else {"error_tol": accuracy, "residual_tol": accuracy}
        h = hypergradient(problem, loss, x_true.to(problem.dtype), **asked)
        bounds.append(h.relative_bound if math.isfinite(h.relative_bound) else None)
        errors.append(float((flatten(h.grad) - true).norm() / true.norm()))
    return {"bound": bounds, "error": errors}


def floor(curve: Record) -> tuple[float, float] | None:
    """The smallest bound of a curve and the true error there; ``None`` if nothing was certified."""
    pairs = [(bound, error) for bound, error in zip(curve["bound"], curve["error"], strict=True) if bound is not None]
    return min(pairs, default=None)


def table(record: Record) -> str:
    """The smallest certified relative bound of every way, with the true error there, and the accuracies that did it."""
    lines = [
        f"smallest certified relative error, {record['crops']} crops of {record['size']}x{record['size']}, accuracies "
        f"from {record['accuracies'][0]:g} to {record['accuracies'][-1]:g}",
        "",
        f"{'problem':12s} {'asked for':25s} {'way':30s} {'bound':>9s} {'true error':>11s}",
    ]
    for name, problem in record["problems"].items():
        for request, ways in problem["requests"].items():
            for way, curve in ways.items():
                lowest = floor(curve)
                numbers = f"{'none':>9s}" if lowest is None else f"{lowest[0]:9.1e} {lowest[1]:11.1e}"
                lines.append(f"{name:12s} {REQUESTS[request]:25s} {way:30s} {numbers}")
    return "\n".join(lines)


def figure(record: Record) -> Figure:
    """One panel for each problem and request: bounds solid, true errors dashed, the goal dotted."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 8), layout="constrained")
    axes = picture.subplots(len(record["problems"]), len(REQUESTS), squeeze=False, sharey=True)
    for row, (name, problem) in zip(axes, record["problems"].items(), strict=True):
        for axis, (request, ways) in zip(row, problem["requests"].items(), strict=True):
            _panel(axis, record["accuracies"], ways)
            axis.set(title=f"{name}, {REQUESTS[request]}", xlabel=REQUESTS[request])
            if request == "goal":
                axis.plot(record["accuracies"], record["accuracies"], ":", color="0.5", lw=1, label="goal")
        row[0].set_ylabel("relative to the norm of the hypergradient")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return picture


def _panel(axis: Axes, accuracies: list[float], ways: Record) -> None:
    for color, (way, curve) in zip(("tab:red", "tab:blue", "0.2"), ways.items(), strict=True):
        bounds = [math.nan if bound is None else bound for bound in curve["bound"]]
        axis.plot(accuracies, bounds, "o-", color=color, ms=4, label=f"{way}: bound")
        axis.plot(accuracies, curve["error"], "x--", color=color, ms=4, lw=1, label=f"{way}: true error")
    axis.set(xscale="log", yscale="log")
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
