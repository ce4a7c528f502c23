"""Figures and table of data hypercleaning, from its record."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Record = dict[str, Any]


# of curves: by adjoint solver, by lower-level solver, and by both accuracies, the loosest ones thickest
_COLORS = dict(zip(("cg", "hb", "gd"), COLORS, strict=False))
_LINES = {"hb": "-", "fista": "--", "gd": ":"}
_WIDTHS = {("0.1", "0.1"): 2.2, ("0.1", "0.01"): 1.6, ("0.01", "0.1"): 1.1, ("0.01", "0.01"): 0.7}


def figures(record: Record) -> dict[str, Figure]:
    """The objective against all iterations of both solvers, and against upper-level iterations; circles: published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    labels = {"iterations": "lower-level + adjoint iterations", "step": "upper-level iterations"}
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for name, one in record["runs"].items():
            curve, style = one["curve"], _style(name)
            axis.plot([p[key] for p in curve], [p["objective"] for p in curve], **style)
            if one["published"] is not None:
                end = record["budget"] if key == "iterations" else one["published"][1]
                axis.plot(end, one["published"][0], "o", color=style["color"], markerfacecolor="none", markersize=5)
        axis.set(xlabel=label, xscale="symlog" if key == "step" else "log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[1].legend(handles=_legend(list(record["runs"])), fontsize=7, loc="lower right")
    return {"objective": figure}


def _style(name: str) -> dict[str, Any]:
    if name.count("/") != 3:
        return {"color": COLORS[4], "linewidth": 2.2}
    lower, adjoint, error, residual = name.split("/")
    return {"color": _COLORS[adjoint], "linestyle": _LINES[lower], "linewidth": _WIDTHS[error, residual]}


def _legend(names: list[str]) -> list[Line2D]:
    """What color, line and width mean, as far as there are such runs."""
    from matplotlib.lines import Line2D

    parts = [name.split("/") for name in names if name.count("/") == 3]
    lines = [Line2D([], [], label=name, **_style(name)) for name in names if name.count("/") != 3]
    lines += [
        Line2D([], [], color=color, label=f"adjoint: {name}")
        for name, color in _COLORS.items()
        if any(p[1] == name for p in parts)
    ]
    lines += [
        Line2D([], [], color="0.3", linestyle=line, label=f"lower level: {name}")
        for name, line in _LINES.items()
        if any(p[0] == name for p in parts)
    ]
    return lines + [
        Line2D([], [], color="0.3", linewidth=width, label=f"error {error}, residual {residual}")
        for (error, residual), width in _WIDTHS.items()
        if any((p[2], p[3]) == (error, residual) for p in parts)
    ]


def table(record: Record) -> str:
    """A line for every setting: what it reached, beside the published run and beside its objective where that ended."""
    c = record["constants"]
    lines = [
        f"{record['examples']} examples, {record['corrupted']} wrongly labeled; {record['validation']} for validation",
        f"L = {c['smoothness']:.4f}, of the published settings {c['published_smoothness']:.4f}, "
        f"mu = {c['strong_convexity']:.4g}",
        "",
        f"{'setting':20s}{'objective':>10s}{'steps':>7s}{'iterations':>11s}{'seconds':>9s}{'AUC':>8s}"
        f"{'weights':>14s}{'published':>18s}{'ratio':>8s}{'here, there':>13s}  stopped by",
    ]
    for name, one in record["runs"].items():
        published, ratio, matched = "", "", ""
        if one["published"] is not None:
            value, steps = one["published"]
            ratio = f"{one['ratio']:.4f}"
            published, there = f"{value:.5f} ({steps})", at_step(one["curve"], steps)
            matched = "not reached" if there is None else f"{there:.5f}"
        weights = f"{one['weight_corrupted']:.3f} {one['weight_clean']:.3f}"
        lines.append(
            f"{name:20s}{one['objective']:10.5f}{one['steps']:7d}{one['iterations']:11d}{one['seconds']:9.0f}"
            f"{one['auc']:8.4f}{weights:>14s}{published:>18s}{ratio:>8s}{matched:>13s}  {one['stopped']}"
        )
    lines.append(
        "weights: means of the wrongly and of the correctly labeled examples; in parentheses: published steps;"
    )
    lines.append("ratio: objective here to published objective; here, there: the objective here after as many steps")
    return "\n".join(lines)


def at_step(curve: list[Record], step: int) -> float | None:
    """The objective after so many steps, between kept points on a line; ``None`` if the run was shorter."""
    position = bisect_left([point["step"] for point in curve], step)
    if position == len(curve):
        return None
    after, before = curve[position], curve[max(0, position - 1)]
    gap = after["step"] - before["step"]
    share = (step - before["step"]) / gap if gap else 1.0
    return before["objective"] + share * (after["objective"] - before["objective"])
