"""Tables and figure of the comparisons of the MAID paper, from their record."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments import method_comparison_report as comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def table(record: Record) -> str:
    """Of every problem: all methods, then MAID from many starts, and what the two together say."""
    blocks = []
    for one in record["problems"].values():
        if "methods" in one:
            blocks += [f"{one['title']}, budget {one['methods']['budget']}", comparison.table(one["methods"])]
        if one.get("starts", {}).get("runs"):
            blocks += ["", f"{one['title']}, budget {one['starts']['budget']}", starts_table(one), "", *verdict(one)]
        blocks.append("")
    return "\n".join(blocks).rstrip()


def _best(one: Record) -> float:
    """The best loss of a problem found in any run."""
    return comparison.best_losses(*(one[part] for part in ("methods", "starts") if part in one)).get(0, math.nan)


def starts_table(one: Record) -> str:
    """A line for every start: how far above the best loss, and the work until that was within the limit."""
    best, runs = _best(one), one["starts"]["runs"]
    labels = list(dict.fromkeys(run["label"] for run in runs))
    heads = "".join(f"{label:>26s}" for label in labels)
    lines = [f"{'first accuracy, step':>20s}{heads}   (above best, work to {100 * comparison.WITHIN:g} %)"]
    for accuracy, step in dict.fromkeys(_start(run) for run in runs):
        cells = ""
        for label in labels:
            found = [run for run in runs if run["label"] == label and _start(run) == (accuracy, step)]
            cells += f"{_cell(found[0], best) if found else '':>26s}"
        lines.append(f"{accuracy:10.0e}{step:10.0e}{cells}")
    return "\n".join(lines)


def _start(run: Record) -> tuple[float, float]:
    return run["settings"]["error_tol"], run["settings"]["lr"]


def _cell(run: Record, best: float) -> str:
    above, work = comparison.excess(run["final"], best), comparison.work_to_reach(run, best)
    end = f"{100 * above:.2g} %" if math.isfinite(above) else "not finite"
    return f"{end:>12s}" + (f"{work:10.0f}" if math.isfinite(work) else "         -")


def verdict(one: Record) -> list[str]:
    """In words: how every method with many starts ended, and the mean work compared with the best fixed accuracy."""
    best, lines = _best(one), []
    fixed = [run for run in one.get("methods", {"runs": []})["runs"] if run["label"].startswith("fixed")]
    needed = min((comparison.work_to_reach(run, best) for run in fixed), default=math.inf)
    for label in dict.fromkeys(run["label"] for run in one["starts"]["runs"]):
        runs = [run for run in one["starts"]["runs"] if run["label"] == label]
        work = [comparison.work_to_reach(run, best) for run in runs]
        reached = [w for w in work if math.isfinite(w)]
        mean = f", with a work of {fmean(reached):.0f} on average, {max(reached):.0f} at most" if reached else ""
        lines.append(f"{label}: {len(reached)} of {len(runs)} starts came within {100 * comparison.WITHIN:g} %{mean}")
    reached_by = f"a work of {needed:.0f}" if math.isfinite(needed) else "more than the budget"
    return [*lines, f"best fixed accuracy and learning rate: {reached_by}"]


def figure(record: Record) -> Figure:
    """A row for every problem, see :func:`bilevel_imaging.experiments.method_comparison_report.draw`."""
    from matplotlib.figure import Figure

    shown = [one for one in record["problems"].values() if "methods" in one]
    drawing = Figure(figsize=(12, 4.4 * max(1, len(shown))), layout="constrained")
    axes = drawing.subplots(max(1, len(shown)), 2, squeeze=False)
    for row, one in zip(axes, shown, strict=False):
        comparison.draw(list(row), one["methods"])
        for axis in row:
            axis.set_title(one["title"], fontsize=10)
        row[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return drawing
