"""Table and figure of a comparison of upper-level methods, from its record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import COLORS, line_style
from bilevel_imaging.training.progress import format_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

# a loss counts as reached within this fraction of the best one
WITHIN = 0.005
MANY_COLORS = (*COLORS, "#000000", "#999999")
# smallest excess over the best loss that is drawn
FLOOR = 1e-6
AXES = {"work": "gradients + Hessian + mixed products", "seconds": "seconds"}


def best_losses(*records: Record) -> dict[int, float]:
    """By seed, the smallest certified lower bound of a loss that any method found (an estimate if not certified)."""
    best: dict[int, float] = {}
    for one in (one for record in records for one in record["runs"]):
        for loss in (point["measured"] for point in one["curve"]):
            if loss is not None and loss["loss"] is not None:
                best[one["seed"]] = min(best.get(one["seed"], math.inf), end(loss, "lower"))
    return best


def end(loss: Record, name: str) -> float:
    """The "lower" or "upper" end of the interval of a loss, or the estimate if it is not certified."""
    return loss["loss"] if loss[name] is None else loss[name]


def excess(loss: Record | None, best: float) -> float:
    """By which fraction of the best loss a measured loss may be above it; inf if it was not finite."""
    if loss is None or loss["loss"] is None:
        return math.inf
    return max(end(loss, "upper") - best, 0.0) / abs(best) if best else math.inf


def work_to_reach(one: Record, best: float, key: str = "work") -> float:
    """Work (or "seconds") after which a run was first certified to be within ``WITHIN`` of the best loss, or inf."""
    return next((point[key] for point in one["curve"] if excess(point["measured"], best) <= WITHIN), math.inf)


def chosen(runs: Sequence[Record], best: float) -> Record:
    """Of runs of one method tuned by hand: the one with the least work, or the one that ended lowest."""
    return min(runs, key=lambda one: (work_to_reach(one, best), excess(one["final"], best)))


def summary(record: Record) -> list[Record]:
    """A row for every method, means over the seeds; "excess" is the largest, "reached" in how many seeds.

    "tried" is how many settings of a method there were; of every seed the best one counts.
    """
    best, rows = best_losses(record), []
    for label in dict.fromkeys(one["label"] for one in record["runs"]):
        runs = [one for one in record["runs"] if one["label"] == label and one["seed"] in best]
        seeds = list(dict.fromkeys(one["seed"] for one in runs))
        picked = [chosen([one for one in runs if one["seed"] == seed], best[seed]) for seed in seeds]
        if not picked:
            continue
        needed = [work_to_reach(one, best[one["seed"]]) for one in picked]
        ends = [one["final"] or {"loss": None, "lower": None, "upper": None} for one in picked]
        rows.append(
            {
                "label": label,
                "settings": picked[0]["settings"],
                "tried": len(runs) // len(seeds),
                "loss": _mean([loss["loss"] for loss in ends], math.nan),
                "lower": _mean([loss["lower"] for loss in ends], -math.inf),
                "upper": _mean([loss["upper"] for loss in ends], math.inf),
                "excess": max(excess(one["final"], best[one["seed"]]) for one in picked),
                "steps": fmean(one["steps"] for one in picked),
                "work": fmean(one["work"] for one in picked),
                "seconds": fmean(one["seconds"] for one in picked),
                "needed": fmean(needed),
                "reached": sum(map(math.isfinite, needed)),
                "seeds": len(seeds),
                "ended": picked[0]["ended"],
            }
        )
    return rows


def _mean(values: Sequence[float | None], missing: float) -> float:
    return missing if None in values else fmean(values)


def table(record: Record) -> str:
    """One line for every method."""
    rows = summary(record)
    if not rows:
        return "no method is finished"
    width = max(12, *(len(_name(row)) for row in rows))
    lines = [
        f"{'method':{width}s} {'loss':>28s} {'above best':>11s} {'steps':>6s} {'work':>8s} {'seconds':>8s} "
        f"{'work to ' + _percent(WITHIN):>15s}  ended by"
    ]
    for row in rows:
        loss = "not finite" if math.isnan(row["loss"]) else format_interval(row["loss"], row["lower"], row["upper"])
        few = "" if row["seeds"] == 1 else f" ({row['reached']}/{row['seeds']})"
        needed = (f"{row['needed']:.0f}" if math.isfinite(row["needed"]) else "not reached") + few
        lines.append(
            f"{_name(row):{width}s} {loss:>28s} {_percent(row['excess']):>11s} {row['steps']:6.0f} {row['work']:8.0f} "
            f"{row['seconds']:8.1f} {needed:>15s}  {row['ended']}"
        )
    best = ", ".join(f"{value:.6g}" for value in best_losses(record).values())
    several = len(record["seeds"]) > 1
    lines.append(
        f"above best: how far the certified loss can be above the lower bound of the best one found, {best}"
        + ("; the largest over the seeds, everything else are means" if several else "")
    )
    return "\n".join(lines)


def _name(row: Record) -> str:
    """The label and, if it was tuned by hand, what with."""
    if row["tried"] == 1:
        return row["label"]
    step = f"lr {row['settings']['lr']:g}, " if "lr" in row["settings"] else ""
    return f"{row['label']} ({step}best of {row['tried']})"


def _percent(part: float) -> str:
    return f"{100 * part:.2g} %" if math.isfinite(part) else "-"


def figure(record: Record) -> Figure:
    """Two panels, see :func:`draw`."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 4.6), layout="constrained")
    axes = drawing.subplots(1, 2, sharey=True)
    draw(list(axes), record)
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return drawing


def draw(axes: Sequence[Axes], record: Record) -> None:
    """The loss above the best lower bound against work and against seconds, the certified interval as a band.

    Lines are the measured losses, bands the intervals that the methods themselves knew, of the first seed.

    Args:
        axes: two panels.
        record: of :func:`bilevel_imaging.experiments.method_comparison.run`.
    """
    best = best_losses(record)
    seed = next(iter(best), None)
    runs = [one for one in record["runs"] if one["seed"] == seed]
    for number, label in enumerate(dict.fromkeys(one["label"] for one in runs)):
        one = chosen([one for one in runs if one["label"] == label], best[seed])
        for axis, key in zip(axes, AXES, strict=True):
            _draw(axis, one, key, best[seed], number)
    for axis, (key, name) in zip(axes, AXES.items(), strict=True):
        axis.axhline(WITHIN, color="0.5", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=name, ylim=(FLOOR, None))
        axis.grid(alpha=0.3)
        if key == "work":
            axis.set_ylabel("certified loss / best lower bound - 1")


def _draw(axis: Axes, one: Record, key: str, best: float, number: int) -> None:
    style = line_style(number, MANY_COLORS)
    points = [point for point in one["curve"] if point["step"] > 0]
    place = [point[key] for point in points]
    height = [_above(point["measured"] and point["measured"]["loss"], best) for point in points]
    axis.plot(place, height, label=one["label"], **style)
    low, high = ([_above(point[name], best) for point in points] for name in ("lower", "upper"))
    axis.fill_between(place, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _above(loss: float | None, best: float) -> float:
    """Relative to the best loss, at least what is drawn; NaN, which is not drawn, if there is none."""
    return math.nan if loss is None or not best else max((loss - best) / abs(best), FLOOR)
