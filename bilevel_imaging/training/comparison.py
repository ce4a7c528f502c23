"""The picture of an evaluation: reconstructions side by side with a zoom and their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.training.evaluation import image_metrics
from bilevel_imaging.training.figures import ERROR_GAIN, to_display

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ZOOM = 4  # the zoom shows a square of a quarter of the smaller side
INSET, SMALLEST_INSET = 0.45, 0.3  # of the smaller side; smaller rather than over the detail
FRAME = "tab:orange"
Square = tuple[int, int, int]


def detail(image: Tensor) -> Square:
    """Top, left and size of the square with the most texture, where methods differ most: ``image`` (C, H, W).

    Texture is the mean absolute difference of neighboring pixels: many small steps count as much as one large edge.
    """
    size = max(8, min(image.shape[-2:]) // ZOOM)
    stride = max(1, size // 4)
    gray = image.detach().to("cpu", torch.float32).mean(0, keepdim=True)[None]
    down, right = gray.diff(dim=-2).abs(), gray.diff(dim=-1).abs()
    steps = functional.pad(down, (0, 0, 0, 1)) + functional.pad(right, (0, 1, 0, 0))
    texture = functional.avg_pool2d(steps, size, stride=stride)
    row, column = divmod(int(texture.flatten().argmax()), texture.shape[-1])
    return row * stride, column * stride, size


def comparison_figure(pictures: Mapping[str, Sequence[Tensor]], names: Sequence[str], max_images: int = 3) -> Figure:
    """Two rows for every image, whole with an enlarged detail and error; a column for the truth and for every method.

    The detail is the same square in every column. PSNR and SSIM of the whole image stand above it.

    Args:
        pictures: ``gt`` and the methods, each a sequence of images ``(C, H, W)``.
        names: of the images.
        max_images: how many images to show.
    """
    from matplotlib.figure import Figure

    methods = list(pictures)
    count = min(max_images, len(names))
    figure = Figure(figsize=(3.4 * len(methods), 7.2 * count), layout="constrained")
    axes = figure.subplots(2 * count, len(methods), squeeze=False)
    for i in range(count):
        truth = pictures["gt"][i]
        shape = (int(truth.shape[-2]), int(truth.shape[-1]))
        shown = {m: to_display(pictures[m][i][None], shape)[0] for m in methods}
        square = detail(truth)
        for column, method in enumerate(methods):
            whole, error = axes[2 * i][column], axes[2 * i + 1][column]
            _show(whole, shown[method])
            _add_zoom(whole, shown[method], square)
            whole.set_title(names[i] if method == "gt" else _title(method, pictures[method][i], truth), fontsize=10)
            if method == "gt":
                error.set_axis_off()
                continue
            _show(error, (ERROR_GAIN * (shown[method] - shown["gt"]).abs()).clamp(0, 1))
            error.set_title(f"error x{ERROR_GAIN:g}", fontsize=9)
    return figure


def _title(method: str, image: Tensor, truth: Tensor) -> str:
    """The method and, where they can be compared, PSNR and SSIM."""
    title = method.replace("_", " ")
    if image.shape != truth.shape:
        return title
    scores = image_metrics(image[None], truth[None])
    return f"{title}\n{scores['psnr'][0]:.2f} dB, SSIM {scores['ssim'][0]:.3f}"


def _show(axis: Axes, picture: Tensor) -> None:
    axis.imshow(picture.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
    axis.set_axis_off()


def _add_zoom(axis: Axes, picture: Tensor, square: Square) -> None:
    """Frame the detail and enlarge it in the corner that is farthest from it."""
    height, width = picture.shape[-2:]
    top, left, size = square
    at_left, at_top = left + size / 2 > width / 2, top + size / 2 > height / 2
    free = max(left if at_left else width - left - size, top if at_top else height - top - size)
    side = min(height, width) * min(INSET, max(free / min(height, width), SMALLEST_INSET))
    x, y = 0.0 if at_left else width - side, 0.0 if at_top else height - side
    inset = axis.inset_axes((x - 0.5, y - 0.5, side, side), transform=axis.transData)
    inset.imshow(
        picture[:, top : top + size, left : left + size].permute(1, 2, 0).squeeze(-1).numpy(),
        cmap="gray",
        vmin=0,
        vmax=1,
        interpolation="nearest",
    )
    inset.set(xticks=[], yticks=[])
    for spine in inset.spines.values():
        spine.set(color=FRAME, linewidth=1.5)
    x0, x1, y0, y1 = left - 0.5, left + size - 0.5, top - 0.5, top + size - 0.5  # the edges of its pixels
    axis.plot([x0, x1, x1, x0, x0], [y0, y0, y1, y1, y0], color=FRAME, linewidth=1.2)
