"""Curves of finished runs: validation PSNR, certified loss and how accurate the hypergradients were, against time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel_imaging.errors import DataError
from bilevel_imaging.experiments.palette import COLORS
from bilevel_imaging.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

# points of a curve that are kept
POINTS = 300
KEPT = ("step", "seconds", "loss", "loss_lower", "loss_upper", "grad_norm", "relative_bound", "work")


def run(folders: Sequence[Path]) -> Record:
    """Thinned curves of runs by the names of their folders.

    Args:
        folders: run folders with ``metrics.jsonl``.

    Raises:
        DataError: a folder without steps.
    """
    curves = {}
    for folder in map(Path, folders):
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise DataError(f"{folder}: expected a run folder. Got none with metrics.jsonl.")
        lines = read_metrics(path)
        steps = [line for line in lines if line["kind"] == "step"]
        if not steps:
            raise DataError(f"{folder}: the run has no finished step.")
        curves[folder.resolve().name] = {
            "steps": len(steps),
            "certified": sum(bool(step["certified"]) for step in steps),
            "trusted": sum(bool(step["trusted"]) for step in steps),
            "seconds": steps[-1]["seconds"],
            "curve": [{key: _short(step[key]) for key in KEPT} for step in _thinned(steps)],
            "validation": [
                {key: _short(value) for key, value in line.items() if key != "kind"}
                for line in lines
                if line["kind"] == "validation"
            ],
        }
    return {"experiment": "training_curves", "runs": curves}


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most ``POINTS`` of the steps, equally spaced, with the first and the last."""
    count = min(len(steps), POINTS)
    places = {round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)}
    return [steps[i] for i in sorted(places)]


def table(record: Record) -> str:
    """One line for every run."""
    lines = [f"{'run':28s} {'steps':>6s} {'certified':>9s} {'descent':>8s} {'seconds':>8s} {'PSNR first, last':>17s}"]
    for name, curve in record["runs"].items():
        psnr = [v["psnr"] for v in curve["validation"] if v.get("psnr") is not None]
        ends = f"{psnr[0]:8.2f} {psnr[-1]:8.2f}" if psnr else "none"
        lines.append(
            f"{name:28.28s} {curve['steps']:6d} {curve['certified']:9d} {curve['trusted']:8d} {curve['seconds']:8.0f} "
            f"{ends:>17s}"
        )
    return "\n".join([*lines, "descent: steps whose hypergradient was certified to less than 100 %"])


def figure(record: Record) -> Figure:
    """Validation PSNR, loss of the minibatches, relative bound; over minutes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 3.6), layout="constrained")
    quality, loss, bound = drawing.subplots(1, 3)
    for (name, curve), color in zip(record["runs"].items(), COLORS * len(record["runs"]), strict=False):
        minutes = [point["seconds"] / 60 for point in curve["curve"]]
        at = dict(zip((point["step"] for point in curve["curve"]), minutes, strict=True))
        checks = [v for v in curve["validation"] if v.get("psnr") is not None]
        places = [_nearest(at, v["step"]) for v in checks]
        quality.plot(places, [v["psnr"] for v in checks], "o-", color=color, label=name, markersize=4)
        values = [point["loss"] for point in curve["curve"]]
        loss.plot(minutes, values, color=color, alpha=0.25, linewidth=0.8)
        loss.plot(minutes, _smooth(values), color=color)
        bound.semilogy(minutes, [_positive(point["relative_bound"]) for point in curve["curve"]], ".", color=color)
    bound.axhline(1, color="0.5", linewidth=0.8)
    for axes, title in (
        (quality, "validation PSNR (dB)"),
        (loss, "certified loss of the minibatch, running mean"),
        (bound, "certified relative error of the hypergradient"),
    ):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("minutes")
        axes.grid(alpha=0.3)
    quality.legend(fontsize=8)
    return drawing


def _nearest(at: dict[int, float], step: int) -> float:
    return 0.0 if step == 0 else at[min(at, key=lambda other: abs(other - step))]


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else math.nan


def _smooth(values: list[float], window: int = 15) -> list[float]:
    means = []
    for i in range(len(values)):
        part = values[max(0, i - window) : i + window + 1]
        means.append(sum(part) / len(part))
    return means
