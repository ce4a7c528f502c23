"""Table, Markdown and figure of the denoising benchmark, from its record."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bilevel_imaging.experiments.palette import DOTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]

NOISY = "noisy"
COLUMNS = {"psnr": ("PSNR", 7, ".2f"), "ssim": ("SSIM", 8, ".4f"), "distance": ("distance", 10, ".1e")}
COLUMNS["seconds"] = ("seconds", 9, ".2f")
# Okabe and Ito's colors for all kinds of color vision, with shapes besides
MANY = 40  # images: their names have no room in a figure


def table(record: Record) -> str:
    """All scores by image, one table for each noise level, and what was tuned."""
    settings = record["settings"]
    lines = []
    for level in record["levels"]:
        lines += [_headline(record, level), ""]
        if not level["images"]:
            lines += ["interrupted before the first image was finished", ""]
            continue
        width = max(len("image"), *map(len, level["images"]))
        methods = level["mean"]
        heads = [(method, sum(COLUMNS[key][1] for key in scores)) for method, scores in methods.items()]
        lines.append(" " * width + "".join(f" | {_short(method, size):^{size}s}" for method, size in heads))
        lines.append(f"{'image':{width}s}" + _cells(methods, lambda key, _: COLUMNS[key][0]))
        lines += [f"{name:{width}s}" + _numbers(row) for name, row in level["images"].items()]
        lines += [f"{'mean':{width}s}" + _numbers(level["mean"]), ""]
        lines += [_tuned(name, values, settings["tuning_images"]) for name, values in level["tuned"].items()]
        lines += _warnings(record, level)
        lines += [""] if lines[-1] else []
    lines.append(
        "distance: certified bound of ||x - x*||, Euclidean; in the last row the largest one; none: not certified"
    )
    if not record["complete"]:
        lines.append("Interrupted: only what was finished is shown.")
    return "\n".join(lines)


def markdown(record: Record) -> str:
    """Means by method and noise level as a Markdown table, the best PSNR of a column in bold.

    Raises:
        ValueError: not a record of this benchmark.
    """
    if not isinstance(record, dict) or not {"settings", "methods", "levels", "environment"} <= record.keys():
        raise ValueError("Expected the record of a denoising benchmark. Got another JSON file; give its record.json.")
    levels = [level for level in record["levels"] if level["mean"]]
    methods = list(dict.fromkeys(method for level in levels for method in level["mean"]))
    label = record["settings"]["images"]
    lines = [
        f"| {label}, PSNR (dB) / SSIM |" + "".join(f" sigma = {level['sigma']:g} |" for level in levels),
        "| --- |" + " --- |" * len(levels),
    ]
    for method in methods:
        cells = []
        for level in levels:
            scores = level["mean"].get(method)
            if scores is None:
                cells.append("")
                continue
            best = max(other["psnr"] for other in level["mean"].values())
            mark = "**" if scores["psnr"] == best else ""
            cells.append(f"{mark}{scores['psnr']:.2f}{mark} / {scores['ssim']:.4f}")
        lines.append("| " + " | ".join([method.replace("|", "\\|"), *cells]) + " |")
    return "\n".join([*lines, "", _footnote(record, levels)])


def figure(record: Record) -> Figure:
    """PSNR of every image, one panel for each noise level; vertical lines are means."""
    from matplotlib.figure import Figure

    levels = [level for level in record["levels"] if level["images"]]
    rows = max((len(level["images"]) for level in levels), default=1)
    panels = max(1, len(levels))
    height = 1.8 + 0.26 * min(rows, MANY)
    picture = Figure(figsize=(2.2 + 3.8 * panels, height), layout="constrained")
    axes = picture.subplots(1, panels, squeeze=False)[0]
    for axis, level in zip(axes, levels, strict=False):
        _panel(axis, level, labels=axis is axes[0])
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    if handles:
        picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    picture.suptitle(f"denoising of {record['settings']['images']}", fontsize=11)
    return picture


def _panel(axis: Axes, level: Record, *, labels: bool) -> None:
    names = list(level["images"])
    methods = [method for method in level["mean"] if method != NOISY]
    for k, method in enumerate(methods):
        color, marker = DOTS[k % len(DOTS)]
        values = [level["images"][name][method]["psnr"] for name in names]
        axis.plot(values, range(len(names)), marker, color=color, label=method, markersize=5, alpha=0.9)
        axis.axvline(level["mean"][method]["psnr"], color=color, linewidth=1, linestyle="--")
    axis.set(xlabel="PSNR (dB), mean dashed", ylim=(len(names) - 0.5, -0.5))
    axis.set_yticks(range(len(names)), names if len(names) <= MANY else [""] * len(names), fontsize=8)
    axis.tick_params(labelleft=labels)
    axis.set_title(f"sigma = {level['sigma']:g}", fontsize=10)
    axis.grid(alpha=0.3)


def _headline(record: Record, level: Record) -> str:
    settings = record["settings"]
    done, count = len(level["images"]), len(settings["shapes"])
    which = (f"{count}" if done == count else f"{done} of {count}") + (" image" if count == 1 else " images")
    return f"{settings['images']}, {which}: noise of standard deviation {level['sigma']:g}/255, seed {settings['seed']}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _cells(row: Record, text: Any) -> str:
    """One row: for every method its columns, each as ``text(key, value)``."""
    return "".join(
        " | " + "".join(f"{text(key, value):>{COLUMNS[key][1]}s}" for key, value in scores.items())
        for scores in row.values()
    )


def _numbers(row: Record) -> str:
    return _cells(row, lambda key, value: "none" if value is None else f"{value:{COLUMNS[key][2]}}")


def _tuned(name: str, values: Record, images: str) -> str:
    chosen = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key not in ("psnr", "tries"))
    return f"{name}: {chosen}; mean PSNR {values['psnr']:.2f} dB on {images}, best of {values['tries']} tries"


def _warnings(record: Record, level: Record) -> list[str]:
    """Methods that are used at a noise level they were not learned for."""
    found = []
    for name, made in record["methods"].items():
        learned = made["learned_for_sigma"]
        if name not in level["tuned"] and learned is not None and abs(learned - level["sigma"]) > 0.01 * learned:
            found.append(f"{name}: learned for sigma {learned:.4g} and used as it is (adapt it with --tune)")
    return found


def _footnote(record: Record, levels: list[Record]) -> str:
    """What the numbers of the Markdown table are."""
    settings = record["settings"]
    distances = [s["distance"] for level in levels for s in level["mean"].values() if "distance" in s]
    parts = [
        f"Mean over {len(settings['shapes'])} images, noise of standard deviation sigma/255, seed {settings['seed']}"
    ]
    if settings["tuning_images"] is not None:
        parts.append(f"tuned on {settings['tuning_images']}")
    if distances and None not in distances:
        parts.append(f"every reconstruction within {max(distances):.1e} (Euclidean) of the exact minimizer")
    versions = record["environment"]
    parts.append(f"bilevel_imaging {versions['bilevel_imaging']}, torch {versions['torch']}")
    if not record["complete"]:
        parts.append("the last noise level is that of an interrupted run, with fewer images")
    return "; ".join(parts) + "."
