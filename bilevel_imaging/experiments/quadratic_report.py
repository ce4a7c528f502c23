"""Figures and table of the quadratic experiment, from its record."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EXACT = "exact"
KINDS = {"a_priori": "A priori", "a_posteriori": "A posteriori"}
DISTANCE_LIMITS, GRADIENT_LIMITS = (1e-16, 1e2), (1e-13, 1e7)

Record = dict[str, Any]


def figures(record: Record) -> dict[str, Figure]:
    """Errors (solid) and their bounds (dashed), a priori on the left, a posteriori on the right.

    "lower_level", "adjoint_exact" (x = x*), "adjoint_inexact" (x after N steps of heavy ball), and "total_work", the
    same with N steps and adjoint iterations sharing one budget.
    """
    return {
        "lower_level": _lower_figure(record),
        "adjoint_exact": _exact_figure(record),
        "adjoint_inexact": _inexact_figure(record, list(record["adjoint"]), shared_budget=False),
        "total_work": _inexact_figure(record, ["heavy ball", "CG"], shared_budget=True),
    }


def curves(record: Record) -> dict[str, Record]:
    """All curves by name, each {"error", "a_priori", "a_posteriori", "rounding"}; both bounds include the rounding."""
    found = {}
    for name, one in record["lower"].items():
        found[f"lower level, {name}"] = one, record["rounding"]["distance"]
    for name, by_lower in record["adjoint"].items():
        for label, one in by_lower.items():
            lower = "x exact" if label == EXACT else f"x after {label}"
            found[f"adjoint {name}, {lower}"] = one, record["rounding"]["hypergradient"]
    return {
        name: {"error": one["error"], "rounding": rounding, **{kind: _bound(one, kind, rounding) for kind in KINDS}}
        for name, (one, rounding) in found.items()
    }


def table(record: Record) -> str:
    """Constants, then for every curve the largest error/bound (at most 1) and the typical bound/error."""
    c, rounding = record["constants"], record["rounding"]
    lines = [
        f"L = {c['smoothness']:.6f}, mu = {c['strong_convexity']:.6f}, L / mu = {c['condition']:.4f}, "
        f"F = {c['loss']:.8f}, ||grad F|| = {c['hypergradient_norm']:.8f}",
        f"rounding of a distance {rounding['distance']:.1e}, of a hypergradient {rounding['hypergradient']:.1e}",
        "",
        f"{'':38s}{'a priori':>26s}{'a posteriori':>26s}",
        f"{'':38s}" + 2 * f"{'max error/bound':>16s}{'typical':>10s}",
    ]
    for name, one in curves(record).items():
        cells = [_tightness(one, kind) for kind in KINDS]
        lines.append(f"{name:38s}" + "".join(f"{worst:16.3f}{typical:10.3g}" for worst, typical in cells))
    lines.append("typical: geometric mean of bound/error over the iterations with an error above the rounding,")
    lines.append("which is part of both bounds")
    return "\n".join(lines)


def _tightness(one: Record, kind: str) -> tuple[float, float]:
    pairs = list(zip(one["error"], one[kind], strict=True))
    logarithms = [math.log(bound / error) for error, bound in pairs if error > one["rounding"]]
    return max(error / bound for error, bound in pairs), math.exp(sum(logarithms) / len(logarithms))


def _bound(one: Record, kind: str, rounding: float) -> list[float]:
    """The bound to compare with errors found in float64; an a posteriori bound contains its rounding already."""
    allowance = rounding if kind == "a_priori" else 0.0
    return [value + allowance for value in one[kind]]


def _lower_figure(record: Record) -> Figure:
    figure, axes = _panels(1, DISTANCE_LIMITS)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        for i, (name, one) in enumerate(record["lower"].items()):
            _draw(axis, one, kind, record["rounding"]["distance"], f"C{i}", name)
        axis.set(title=KINDS[kind], xlabel="iterations")
    return _finish(figure, axes, "distance to the minimizer")


def _exact_figure(record: Record) -> Figure:
    figure, axes = _panels(1, GRADIENT_LIMITS)
    for axis, kind in zip(axes[0], KINDS, strict=True):
        for i, (name, by_lower) in enumerate(record["adjoint"].items()):
            _draw(axis, by_lower[EXACT], kind, record["rounding"]["hypergradient"], f"C{i}", name)
        axis.set(title=f"{KINDS[kind]}, exact x", xlabel="adjoint iterations")
    return _finish(figure, axes, "error of the hypergradient")


def _inexact_figure(record: Record, solvers: list[str], *, shared_budget: bool) -> Figure:
    """A row for every adjoint solver, a color for every lower-level point."""
    figure, axes = _panels(len(solvers), GRADIENT_LIMITS)
    for row, name in zip(axes, solvers, strict=True):
        for axis, kind in zip(row, KINDS, strict=True):
            for i, count in enumerate(record["counts"]):
                one, start = record["adjoint"][name][str(count)], count if shared_budget else 0
                _draw(axis, one, kind, record["rounding"]["hypergradient"], f"C{i}", f"N = {count}", start)
            work = "N + adjoint iterations" if shared_budget else "adjoint iterations"
            axis.set(title=f"{KINDS[kind]}, {name}", xlabel=work)
    return _finish(figure, axes, "error of the hypergradient")


def _panels(rows: int, limits: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharey=True)
    for axis in axes.flat:
        axis.set(yscale="log", ylim=limits)
        axis.grid(alpha=0.3)
    return figure, axes


def _draw(axis: Axes, one: Record, kind: str, rounding: float, color: str, name: str, start: int = 0) -> None:
    """Error and bound; with a start, over start + iterations and no further than the curves are long without it."""
    length = len(one["error"]) - start
    work = range(start, start + length)
    axis.plot(work, one["error"][:length], color=color, label=name)
    axis.plot(work, _bound(one, kind, rounding)[:length], color=color, linestyle="--")


def _finish(figure: Figure, axes: np.ndarray, label: str) -> Figure:
    """One legend for all panels."""
    for axis in axes[:, 0]:
        axis.set_ylabel(label)
    first = axes[0, 0]
    first.plot([], [], color="black", label="error")
    first.plot([], [], color="black", linestyle="--", label="bound")
    figure.legend(*first.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
