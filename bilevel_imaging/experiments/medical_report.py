"""Table, Markdown and figures of the medical experiments, from their record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import DOTS
from bilevel_imaging.training.comparison import comparison_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]

COLUMNS = {"psnr": ("PSNR", 7, ".2f"), "ssim": ("SSIM", 8, ".4f"), "distance": ("distance", 10, ".1e")}
# Okabe and Ito's colors for all kinds of color vision, with shapes besides
SHOWN = 2  # slices in the figure


def headline(record: Record) -> str:
    """What was measured, in words."""
    settings = record["settings"]
    problem, (rows, columns) = settings["problem"], settings["shape"]
    if problem["kind"] == "ct":
        what, of = f"tomography, {problem['views']} parallel-beam views", "the largest sinogram value"
    else:
        what, of = f"single-coil MRI, {problem['acceleration']:g}-fold undersampled lines", "the largest magnitude"
    return (
        f"{what}, noise {100 * problem['noise']:g} % of {of}; {settings['images']}, {rows} x {columns}, "
        f"ridge {problem['ridge']:g}, seed {problem['seed']}"
    )


def table(record: Record) -> str:
    """Scores by slice and method, and what was learned."""
    methods = record["methods"]
    lines = [headline(record), _slices(record), record["settings"]["split"], ""]
    if not methods:
        return "\n".join([*lines, "Interrupted before the first method was finished."])
    names = list(next(iter(methods.values()))["slices"])
    width = max(len(name) for name in [*names, "slice"])
    sizes = {m: max(len(m), sum(COLUMNS[key][1] for key in _keys(made))) for m, made in methods.items()}
    lines.append(" " * width + "".join(f" | {m:^{sizes[m]}s}" for m in methods))
    heads = {m: "".join(f"{COLUMNS[k][0]:>{COLUMNS[k][1]}s}" for k in _keys(made)) for m, made in methods.items()}
    lines.append(f"{'slice':{width}s}" + "".join(f" | {heads[m]:>{sizes[m]}s}" for m in methods))
    for name in [*names, "mean"]:
        cells = ""
        for m, made in methods.items():
            scores = made["mean"] if name == "mean" else made["slices"][name]
            cells += f" | {_numbers(scores):>{sizes[m]}s}"
        lines.append(f"{name:{width}s}" + cells)
    lines += ["", *(_learning(m, made["learning"]) for m, made in methods.items() if made["learning"]), ""]
    lines.append(
        "distance: certified bound of ||x - x*||, Euclidean; in the row of means the largest one; none: not certified"
    )
    if not record["complete"]:
        lines.append("Interrupted: only the methods that were finished are shown.")
    return "\n".join(lines)


def scores_line(made: Record) -> str:
    """Means of one method in words."""
    return ", ".join(f"{COLUMNS[key][0]} {cell.strip()}" for key, cell in _cells(made["mean"]).items())


def markdown(record: Record) -> str:
    """Means by method as a Markdown table, the best ones in bold.

    Raises:
        ValueError: not a record of these experiments.
    """
    if not isinstance(record, dict) or not {"settings", "methods", "environment"} <= record.keys():
        raise ValueError("Expected the record of a ct or mri experiment. Got something else.")
    means = {m: made["mean"] for m, made in record["methods"].items()}
    best = {key: max((scores[key] for scores in means.values()), default=0) for key in ("psnr", "ssim")}
    lines = ["| method | PSNR (dB) | SSIM | certified distance |", "| --- | --- | --- | --- |"]
    for method, scores in means.items():
        cells = [method.replace("|", "\\|")]
        for key in ("psnr", "ssim"):
            mark = "**" if scores[key] == best[key] else ""
            cells.append(f"{mark}{scores[key]:{COLUMNS[key][2]}}{mark}")
        distance = scores.get("distance")
        cells.append("" if "distance" not in scores else "none" if distance is None else f"{distance:.1e}")
        lines.append("| " + " | ".join(cells) + " |")
    versions, test = record["environment"], record["settings"]["slices"]["test"]
    notes = [headline(record), f"means over {len(test)} held-out slices; {record['settings']['split']}"]
    notes.append("distances are the largest, Euclidean, to the exact minimizers")
    notes.append(f"bilevel_imaging {versions['bilevel_imaging']}, torch {versions['torch']}")
    if not record["complete"]:
        notes.append("an interrupted run")
    text = "; ".join(notes)
    return "\n".join([*lines, "", text[0].upper() + text[1:] + "."])


def figures(record: Any) -> dict[str, Figure]:
    """The scores, and reconstructions with zoom and errors where the record still has its pictures."""
    result = {"scores": figure(record)}
    if getattr(record, "pictures", None):
        result["reconstructions"] = reconstructions(record)
    return result


def reconstructions(record: Any) -> Figure:
    """Truth and all methods for slices spread over the test slices, with zoom and errors."""
    names = record["settings"]["slices"]["test"]
    count = min(SHOWN, len(names))
    chosen = [int((i + 0.5) * len(names) / count) for i in range(count)]
    pictures = {m: [images[i] for i in chosen] for m, images in record.pictures.items()}
    return comparison_figure(pictures, [names[i] for i in chosen], count)


def figure(record: Record) -> Figure:
    """PSNR of every test slice by method; vertical lines are means."""
    from matplotlib.figure import Figure

    methods, names = record["methods"], record["settings"]["slices"]["test"]
    picture = Figure(figsize=(7.0, 1.8 + 0.3 * len(names)), layout="constrained")
    axis = picture.subplots()
    for k, (method, made) in enumerate(methods.items()):
        color, marker = DOTS[k % len(DOTS)]
        values = [made["slices"][name]["psnr"] for name in names]
        axis.plot(values, range(len(names)), marker, color=color, label=method, markersize=5)
        axis.axvline(made["mean"]["psnr"], color=color, linewidth=1, linestyle="--")
    axis.set(xlabel="PSNR (dB), mean dashed", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(headline(record).partition(";")[0], fontsize=9)
    axis.grid(alpha=0.3)
    if methods:
        picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return picture


def _slices(record: Record) -> str:
    slices = record["settings"]["slices"]
    return "; ".join(f"{part}: {', '.join(names)}" for part, names in slices.items())


def _keys(made: Record) -> list[str]:
    return [key for key in COLUMNS if key in made["mean"]]


def _numbers(scores: Record) -> str:
    return "".join(_cells(scores).values())


def _cells(scores: Record) -> dict[str, str]:
    """Numbers by their kind, as wide as their columns."""
    cells = {}
    for key, (_, width, form) in COLUMNS.items():
        if key in scores:
            cells[key] = f"{'none' if scores[key] is None else format(scores[key], form):>{width}s}"
    return cells


def _learning(method: str, made: Record) -> str:
    """What was learned, in one line."""
    seconds = f"{made['seconds']:.0f} s"
    if made["method"] == "Adam":
        losses = made["validation_loss"]
        return (
            f"{method}: {made['parameters']} parameters, {made['steps']} steps, {made['certified_steps']} of them "
            f"certified; validation loss {losses['0']:.4g} -> {losses[str(made['chosen_step'])]:.4g} at step "
            f"{made['chosen_step']}; {seconds}"
        )
    values = ", ".join(f"{name} {value:.4g}" for name, value in made["values"].items())
    if made["method"] == "grid search":
        return f"{method}: {values}; training loss {made['loss']:.5g}, {made['tries']} tries, {seconds}"
    low, high = (("?" if end is None else f"{end:.5g}") for end in made["loss_interval"])
    return (
        f"{method}: {values}; training loss {made['loss']:.5g}, certified in [{low}, {high}]; {made['steps']} steps, "
        f"{made['certified_steps']} of them certified; {seconds} ({made['stop']})"
    )
