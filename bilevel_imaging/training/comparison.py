"""The picture of an evaluation: reconstructions side by side with a zoom and their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.training.figures import ERROR_GAIN, peak_signal_to_noise, to_display

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ZOOM = 4  # the zoom shows a square of a quarter of the smaller side


def detail(image: Tensor) -> tuple[int, int, int]:
    """Top, left and size of the square with the most structure, where methods differ most: ``image`` (C, H, W)."""
    size = max(8, min(image.shape[-2:]) // ZOOM)
    gray = image.detach().to("cpu", torch.float32).mean(0, keepdim=True)[None]
    mean = functional.avg_pool2d(gray, size, stride=max(1, size // 4))
    variance = functional.avg_pool2d(gray.square(), size, stride=max(1, size // 4)) - mean.square()
    position = int(variance.flatten().argmax())
    rows, columns = divmod(position, variance.shape[-1])
    return rows * max(1, size // 4), columns * max(1, size // 4), size


def comparison_figure(pictures: Mapping[str, Sequence[Tensor]], names: Sequence[str], max_images: int = 3) -> Figure:
    """Three rows for every image: whole, zoom, error; a column for the truth and for every method.

    Args:
        pictures: ``gt`` and the methods, each a sequence of images ``(C, H, W)``.
        names: of the images.
        max_images: how many images to show.
    """
    from matplotlib.figure import Figure

    methods = list(pictures)
    count = min(max_images, len(names))
    figure = Figure(figsize=(2.8 * len(methods), 8.2 * count), layout="constrained")
    axes = figure.subplots(3 * count, len(methods), squeeze=False)
    for i in range(count):
        truth = pictures["gt"][i]
        shape = (int(truth.shape[-2]), int(truth.shape[-1]))
        shown = {m: to_display(pictures[m][i][None], shape)[0] for m in methods}
        top, left, size = detail(truth)
        for column, method in enumerate(methods):
            panels = [axes[3 * i + row][column] for row in range(3)]
            error = (ERROR_GAIN * (shown[method] - shown["gt"]).abs()).clamp(0, 1)
            for axis, picture in zip(
                panels, (shown[method], shown[method][:, top : top + size, left : left + size], error), strict=True
            ):
                axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
            title = names[i] if method == "gt" else method.replace("_", " ")
            if method != "gt" and pictures[method][i].shape == truth.shape:
                title += f"\n{peak_signal_to_noise(pictures[method][i], truth):.2f} dB"
            panels[0].set_title(title, fontsize=9)
            panels[2].set_title("" if method == "gt" else f"error x{ERROR_GAIN:g}", fontsize=9)
            box = [left, left + size, left + size, left, left], [top, top, top + size, top + size, top]
            panels[0].plot(*box, color="tab:red", linewidth=1)
    return figure
