"""Table and figure of the timed training runs, from their record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import line_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


def table(record: Record) -> str:
    """Of every training: seconds until the true loss is within, by library and setting."""
    lines = []
    for name, one in record["trainings"].items():
        lines += [
            f"{name}: {one['title']}, {one['images']} x {one['size']}x{one['size']}, {one['parameters']} parameters",
            f"true loss {one['first_loss']:.4f} at the start, {one['best_loss']:.4f} at best "
            f"(certified to {one['loss_half_width']:.0e})",
            f"{'library':18s} {'CPU s':>7s} {'wall s':>7s} {'steps':>6s} {'later':>7s}  setting",
        ]
        for row in one["rows"]:
            numbers = f"{'not within':>23s}"
            if row["cpu_seconds"] is not None:
                numbers = f"{row['cpu_seconds']:7.2f} {row['wall_seconds']:7.2f} {row['steps']:6d} "
            lines.append(f"{row['library']:18s} {numbers}{_later(row, one['best_loss']):>7s}  {row['setting']}")
        lines += _tuning(one)
        ratio = one["summary"]["ratio"]
        lines += ["" if ratio is None else f"ours / best peer {ratio:.2f}"]
        lines += ["later: largest true loss above the best in half as many steps again, also where only tried", ""]
    lines += [f"{library}: {reason}" for library, reason in record["skipped"].items()]
    return "\n".join(lines).rstrip()


def _later(row: Record, best: float) -> str:
    """The largest excess after the first time within: a run that does not know its errors need not stay there."""
    if row["steps"] is None or len(row["curve"]) <= row["steps"]:
        return ""
    return f"{max(point['loss'] for point in row['curve'][row['steps'] :]) / best - 1:.2%}"


def _tuning(one: Record) -> list[str]:
    """How many settings had to be tried."""
    lines = []
    for library in dict.fromkeys(entry["library"] for entry in one["tried"]):
        tried = [entry for entry in one["tried"] if entry["library"] == library]
        if len(tried) > 1:
            passed = sum(entry["cpu_seconds"] is not None for entry in tried)
            spent = sum(entry["spent_cpu_seconds"] for entry in tried)
            lines.append(f"{library}: {passed} of {len(tried)} settings tried were within in time; {spent:.0f} CPU s")
    return lines


def figure(record: Record) -> Figure:
    """True loss against CPU seconds, the fastest setting of every library."""
    from matplotlib.figure import Figure

    shown = list(record["trainings"].items())
    drawing = Figure(figsize=(4.2 * max(1, len(shown)), 3.6), layout="constrained")
    axes = drawing.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axis, (name, one) in zip(axes, shown, strict=True):
        libraries = list(dict.fromkeys(row["library"] for row in one["rows"]))
        for number, library in enumerate(libraries):
            rows = [row for row in one["rows"] if row["library"] == library and row["cpu_seconds"] is not None]
            if not rows:
                continue
            row = min(rows, key=lambda row: row["cpu_seconds"])
            seconds = [0.0, *(point["cpu_seconds"] for point in row["curve"])]
            losses = [one["first_loss"], *(point["loss"] for point in row["curve"])]
            excess = [max(loss / one["best_loss"] - 1, 1e-6) for loss in losses]
            axis.plot(seconds, excess, label=library, marker=".", **line_style(number))
        axis.axhline(record["within"], color="0.6", linewidth=0.8)
        axis.set(yscale="log", xscale="symlog", xlabel="CPU seconds", title=f"{name}: {one['title']}")
        axis.title.set_fontsize(9)
    axes[0].set_ylabel("true loss above the best, relative")
    axes[0].legend()
    return drawing
