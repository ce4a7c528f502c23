"""Figures and table of data hypercleaning, from its record."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]


def figures(record: Record) -> dict[str, Figure]:
    """The objective against all iterations of both solvers, and against upper-level iterations; circles: published."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    labels = {"iterations": "lower-level + adjoint iterations", "step": "upper-level iterations"}
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        for i, (name, one) in enumerate(record["runs"].items()):
            _draw(axis, one, key, name, i)
            if one["published"] is not None:
                end = record["budget"] if key == "iterations" else one["published"][1]
                axis.plot(end, one["published"][0], "o", color=line_style(i)["color"], markerfacecolor="none")
        axis.set(xlabel=label, xscale="symlog" if key == "step" else "log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss")
    axes[0].legend(fontsize=7, title="lower/adjoint/error/residual", title_fontsize=7)
    return {"objective": figure}


def _draw(axis: Axes, one: Record, key: str, name: str, number: int) -> None:
    axis.plot([p[key] for p in one["curve"]], [p["objective"] for p in one["curve"]], label=name, **line_style(number))


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
