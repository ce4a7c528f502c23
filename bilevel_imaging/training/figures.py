"""Pictures of a run: reconstructions and training curves as PNG, without touching pyplot's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.data import magnitude
from bilevel_imaging.training.checkpoints import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ERROR_GAIN = 5.0  # errors are shown 5 times as bright, the same in every picture, so that pictures compare


def to_display(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Anything measured as pictures in [0, 1] of the wanted size.

    Args:
        image: ``(B, C, H, W)``; two channels are real and imaginary part (shown as magnitude), more than three are
            reduced to the first, and data of another size (sinograms, k-space) is stretched to [0, 1] and resized.
        shape: (H, W) to show.

    Returns:
        ``(B, 1 or 3, *shape)`` float32 on the CPU.
    """
    picture = image.detach().abs() if image.is_complex() else image.detach()
    picture = picture.to("cpu", torch.float32)
    if picture.dim() != 4:
        picture = picture.reshape(picture.shape[0], 1, 1, -1)
    if picture.shape[1] == 2:
        picture = picture.square().sum(1, keepdim=True).sqrt()
    elif picture.shape[1] != 3:
        picture = picture[:, :1]
    if tuple(picture.shape[-2:]) != shape:
        low, high = picture.amin((1, 2, 3), keepdim=True), picture.amax((1, 2, 3), keepdim=True)
        picture = (picture - low) / (high - low).clamp_min(1e-12)
        picture = functional.interpolate(picture, size=shape, mode="nearest")
    return picture.nan_to_num().clamp(0, 1)


def columns(images: Mapping[str, Tensor], max_images: int) -> dict[str, Tensor]:
    """Ground truth, measurement, reconstruction and error as pictures of one size, each ``(B, 1 or 3, H, W)``.

    Args:
        images: ``gt`` and ``reconstruction`` and, where there is one, ``measurement``, each ``(B, C, H, W)``.
        max_images: how many of the B to show.

    Raises:
        ValueError: ``gt`` or ``reconstruction`` is missing, or they differ in shape.
    """
    missing = [name for name in ("gt", "reconstruction") if name not in images]
    if missing or images["gt"].shape != images["reconstruction"].shape:
        raise ValueError(
            "Expected pictures gt and reconstruction of one shape (B, C, H, W). Got "
            f"{ {name: tuple(image.shape) for name, image in images.items()} }."
        )
    names = [name for name in ("gt", "measurement", "reconstruction") if name in images]
    shape = (int(images["gt"].shape[-2]), int(images["gt"].shape[-1]))
    result = {name: to_display(images[name][:max_images], shape) for name in names}
    # For complex images (two channels) this is the difference of what is shown.
    result["error"] = (ERROR_GAIN * (result["reconstruction"] - result["gt"]).abs()).clamp(0, 1)
    return result


def image_grid(images: Mapping[str, Tensor], max_images: int = 4, gap: int = 2) -> Tensor:
    """One picture ``(3, H, W)``: a row for every image, columns as in ``columns``, white gaps."""
    shown = {name: p.expand(-1, 3, -1, -1) for name, p in columns(images, max_images).items()}
    rows = []
    for i in range(next(iter(shown.values())).shape[0]):
        rows.append(torch.cat([functional.pad(p[i], (0, gap), value=1.0) for p in shown.values()], dim=2))
    return torch.cat([functional.pad(row, (0, 0, 0, gap), value=1.0) for row in rows], dim=1)


def peak_signal_to_noise(image: Tensor, truth: Tensor) -> float:
    """PSNR in dB of one image against its truth, both in [0, 1], any equal shapes; inf if they are equal."""
    error = float((image.detach().double() - truth.detach().double()).square().mean())
    return -10 * math.log10(error) if error > 0 else math.inf


def reconstruction_figure(images: Mapping[str, Tensor], max_images: int = 4) -> Figure:
    """Ground truth | measurement | reconstruction | error, one row for every image, PSNR in the titles.

    Args:
        images: see ``columns``.
        max_images: rows at most.
    """
    from matplotlib.figure import Figure

    shown = columns(images, max_images)
    rows = next(iter(shown.values())).shape[0]
    figure = Figure(figsize=(2.6 * len(shown), 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, len(shown), squeeze=False)
    titles = {"gt": "ground truth", "error": f"error x{ERROR_GAIN:g}"}
    for i in range(rows):
        for axis, (name, pictures) in zip(axes[i], shown.items(), strict=True):
            axis.imshow(pictures[i].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            title = titles.get(name, name)
            if name in ("measurement", "reconstruction") and images[name].shape == images["gt"].shape:
                pair = magnitude(images[name][i]), magnitude(images["gt"][i])
                title += f"\n{peak_signal_to_noise(*pair):.2f} dB"
            axis.set_title(title, fontsize=9)
    return figure


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss with its certified interval, accuracies and relative bound, all over work; validation PSNR if there is one.

    Args:
        records: the records of ``metrics.jsonl`` (``None`` stands for a value that is not finite).
    """
    from matplotlib.figure import Figure

    steps = [record for record in records if record.get("kind") == "step"]
    work = [record["work"] for record in steps]
    at_step = {0: 0, **{record["step"]: record["work"] for record in steps}}
    checks = [
        r for r in records if r.get("kind") == "validation" and r.get("psnr") is not None and r["step"] in at_step
    ]
    figure = Figure(figsize=(4.4 * (3 if checks else 2), 3.4), layout="constrained")
    axes = figure.subplots(1, 3 if checks else 2)
    _plot_loss(axes[0], work, steps)
    for name, label in (("eps", "lower accuracy eps"), ("delta", "linear accuracy delta")):
        axes[1].plot(work, _numbers(steps, name), label=label)
    axes[1].plot(work, _numbers(steps, "relative_bound"), marker=".", label="relative bound of the hypergradient")
    _finish(axes[1], "accuracy", log=True)
    if checks:
        axes[2].plot([at_step[r["step"]] for r in checks], [r["psnr"] for r in checks], marker=".", label="validation")
        _finish(axes[2], "PSNR [dB]", log=False)
    return figure


def _plot_loss(axis: Axes, work: list[int], steps: Sequence[Mapping[str, Any]]) -> None:
    """The loss and, where it is certified, its interval."""
    axis.plot(work, _numbers(steps, "loss"), label="loss")
    lower, upper = _numbers(steps, "loss_lower"), _numbers(steps, "loss_upper")
    certified = [math.isfinite(a) and math.isfinite(b) for a, b in zip(lower, upper, strict=True)]
    if any(certified):
        axis.fill_between(work, lower, upper, where=certified, alpha=0.3, linewidth=0, label="certified interval")
    _finish(axis, "upper-level loss", log=False)


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A column of the records; what is not a finite number becomes NaN, which is not drawn."""
    values = [record.get(name) for record in records]
    return [float(v) if v is not None and math.isfinite(v) else math.nan for v in values]


def _finish(axis: Axes, label: str, *, log: bool) -> None:
    """Labels, scale, grid and legend of one panel."""
    axis.set_xlabel("work (gradients + Hessian + mixed products)")
    axis.set_ylabel(label)
    drawn = [float(y) for line in axis.get_lines() for y in np.asarray(line.get_ydata())]
    if log and any(y > 0 for y in drawn):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def rendered(figure: Figure, dpi: int = 100) -> Tensor:
    """A figure as a picture ``(3, H, W)``, float32 in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a PNG in one piece.

    Raises:
        OSError: cannot be written; an older picture of that name is kept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, buffer.getbuffer())
    return path
