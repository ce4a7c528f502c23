"""Pictures of learned ridge regularizers R(x) = sum over k and pixels of psi_k((w_k * x)): filters and potentials.

A regularizer is drawn if it offers

- ``filters()``: the filters w_k as they act, with C = 1 or 3 channels;
- ``potentials(t)``: psi_k(t) and psi_k'(t).

Others have no pictures here. Color tells importance: the largest force ||w_k|| * (max psi_k' - min psi_k') / 2 of a
filter on an image, relative to the most important one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from bilevel_imaging.training.figures import rendered

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = "viridis"  # readable without color vision, and in gray; the bright end is cut off on white
SPECTRUM_SIZE = 64  # frequencies along each side
TILE, CELL_HEIGHT = 0.88, 1.14  # in widths of a cell; a number fits above every tile
BENT = 0.95  # part of the bends of all psi' that the range of responses covers
HALF_SAMPLES = 250  # responses on each side of 0


class RidgeLike(Protocol):
    """What is drawn here."""

    def filters(self) -> Tensor:
        """w_k, ``(K, C, s, s)``."""

    def potentials(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi_k(t) and psi_k'(t), each ``(K, T)``, for responses ``(T,)``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of any module."""


@dataclass(frozen=True)
class Ridges:
    """Filters and potentials, the most important first.

    Attributes:
        filters: ``(K, C, s, s)`` float64 on the CPU.
        responses: where the potentials are sampled, ``(T,)``, symmetric about 0.
        potentials: psi_k - psi_k(0), ``(K, T)``.
        slopes: psi_k', ``(K, T)``.
        importance: largest force of every filter, ``(K,)``, falling.
    """

    filters: Tensor
    responses: Tensor
    potentials: Tensor
    slopes: Tensor
    importance: Tensor

    @property
    def relative_importance(self) -> Tensor:
        """In [0, 1], that of the first filter is 1; all 0 for a regularizer without any force."""
        return self.importance / self.importance[0].clamp_min(torch.finfo(torch.float64).tiny)


def has_filters(regularizer: nn.Module) -> TypeGuard[RidgeLike]:
    """Whether the regularizer can be drawn here."""
    return hasattr(regularizer, "filters") and hasattr(regularizer, "potentials")


def read_ridges(regularizer: nn.Module) -> Ridges:
    """Filters, and potentials over the range of responses on which they bend.

    Raises:
        ValueError: the regularizer has no filters, or filters and potentials of other shapes than expected.
    """
    if not has_filters(regularizer):
        raise ValueError(
            f"Expected a regularizer with filters() and potentials(t). Got {type(regularizer).__name__}, which has "
            "none to draw."
        )
    with torch.no_grad():
        filters = regularizer.filters().detach().to("cpu", torch.float64)
        if filters.dim() != 4 or filters.shape[1] not in (1, 3):
            raise ValueError(f"Expected filters (K, C, s, s) with C = 1 or 3. Got {tuple(filters.shape)}.")
        # an image in [0, 1] has no larger responses than this
        limit = max(float(filters.abs().flatten(1).sum(1).max()), 1e-12)
        wide = _symmetric(limit * torch.logspace(-5, 0, HALF_SAMPLES, dtype=torch.float64))
        slopes = _sample(regularizer, wide, filters.shape[0])[1]
        line = torch.arange(1, HALF_SAMPLES + 1, dtype=torch.float64) / HALF_SAMPLES
        responses = bend_radius(wide, slopes) * _symmetric(line)
        potentials, shown_slopes = _sample(regularizer, responses, filters.shape[0])
    force = filters.flatten(1).norm(dim=1) * (slopes.amax(1) - slopes.amin(1)) / 2
    order = force.argsort(descending=True, stable=True)
    center = potentials[:, HALF_SAMPLES, None]
    return Ridges(filters[order], responses, (potentials - center)[order], shown_slopes[order], force[order])


def bend_radius(t: Tensor, slopes: Tensor) -> float:
    """Radius about 0 that is worth drawing: half as much again as where ``BENT`` of the variation of psi' is over.

    Args:
        t: responses, ``(T,)``, rising and symmetric about 0.
        slopes: psi_k'(t), ``(K, T)``; the variations of all k are added, so that strong filters decide.

    Returns:
        at most the largest response; that one if nothing varies.
    """
    variation = slopes.diff(dim=1).abs().sum(0)
    outer = torch.maximum(t[1:].abs(), t[:-1].abs())  # of every interval
    order = outer.argsort()
    inside = variation[order].cumsum(0)
    if float(inside[-1]) <= 0:
        return float(t[-1])
    first = int((inside >= BENT * inside[-1]).nonzero()[0])
    return min(1.5 * float(outer[order][first]), float(t[-1]))


def filters_figure(regularizer: nn.Module) -> Figure:
    """All filters, the most important first, beside their power spectra in the same order.

    Every filter is scaled symmetrically about 0, which is middle gray; the number above it is its importance. Spectra
    are scaled to their largest value; frequency 0 is in the middle, half a cycle per pixel at the edges.

    Raises:
        ValueError: see :func:`read_ridges`.
    """
    from matplotlib.figure import Figure

    ridges = read_ridges(regularizer)
    count = len(ridges.filters)
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    figure = Figure(figsize=(12, 0.6 + 6 * CELL_HEIGHT * down / across), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{value:.2g}" for value in ridges.importance.tolist()]
    _mosaic(left, [_as_picture(w) for w in ridges.filters], labels, across, "gray")
    _mosaic(right, [_spectrum(w) for w in ridges.filters], [""] * count, across, COLORS)
    left.set_title(f"{count} filters, with their largest force on an image", fontsize=11)
    right.set_title("power spectra (frequency 0 in the middle)", fontsize=11)
    return figure


def potentials_figure(regularizer: nn.Module) -> Figure:
    """Activations psi' and potentials psi over the responses where they bend, colored by importance.

    Raises:
        ValueError: see :func:`read_ridges`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    ridges = read_ridges(regularizer)
    # dark is important: the palest colors would not be seen on white
    colors = ListedColormap(colormaps[COLORS](np.linspace(0.92, 0.0, 256)))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = (("activation", "psi'(t)", ridges.slopes), ("potential", "psi(t) - psi(0)", ridges.potentials))
    importance = ridges.relative_importance.tolist()
    for axis, (title, label, values) in zip(axes, curves, strict=True):
        for k in reversed(range(len(importance))):  # the most important one on top
            axis.plot(ridges.responses.numpy(), values[k].numpy(), color=colors(importance[k]), linewidth=1.4)
        axis.set(title=title, xlabel="response t of a filter", ylabel=label)
        axis.set_xlim(float(ridges.responses[0]), float(ridges.responses[-1]))
        axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.3)
    figure.colorbar(ScalarMappable(cmap=colors), ax=axes, label="importance of the filter", pad=0.01)
    return figure


def regularizer_pictures(regularizer: nn.Module) -> dict[str, Tensor]:
    """Both figures as pictures ``(3, H, W)`` in [0, 1] by TensorBoard tag; none for a regularizer without filters."""
    figures = regularizer_figures(regularizer)
    return {f"filters/{name}": rendered(figure) for name, figure in figures.items()}


def regularizer_figures(regularizer: nn.Module) -> dict[str, Figure]:
    """Both figures by name, "filters" and "potentials"; none for a regularizer without filters."""
    if not has_filters(regularizer):
        return {}
    return {"filters": filters_figure(regularizer), "potentials": potentials_figure(regularizer)}


def _symmetric(positive: Tensor) -> Tensor:
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def _sample(regularizer: RidgeLike, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Potentials and their derivatives on the CPU, on the device of the parameters where they are computed."""
    device = next((p.device for p in regularizer.parameters()), t.device)
    values, slopes = (part.detach().to("cpu", torch.float64) for part in regularizer.potentials(t.to(device)))
    if values.shape != (count, len(t)) or slopes.shape != values.shape:
        raise ValueError(
            f"Expected psi(t) and psi'(t), each {(count, len(t))} for {count} filters. Got {tuple(values.shape)} and "
            f"{tuple(slopes.shape)}."
        )
    return values, slopes


def _as_picture(kernel: Tensor) -> np.ndarray:
    """One filter ``(C, s, s)`` in [0, 1], 0 at one half; ``(s, s)`` or ``(s, s, 3)``."""
    largest = float(kernel.abs().max())
    scaled = 0.5 + 0.5 * kernel / (largest if largest > 0 else 1)
    return scaled.permute(1, 2, 0).squeeze(-1).numpy()


def _spectrum(kernel: Tensor) -> np.ndarray:
    """|FFT|^2 of one filter, summed over its channels, the largest value 1."""
    power = torch.fft.fft2(kernel, s=(SPECTRUM_SIZE, SPECTRUM_SIZE)).abs().square().sum(0)
    largest = float(power.max())
    return torch.fft.fftshift(power / (largest if largest > 0 else 1)).numpy()


def _mosaic(axis: Axes, pictures: list[np.ndarray], labels: list[str], across: int, colors: str) -> None:
    """Tiles in rows on one panel; one panel each would take seconds to draw."""
    from matplotlib.patches import Rectangle

    for k, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        x, y = k % across, k // across * CELL_HEIGHT
        place = (x, x + TILE, y + TILE, y)
        axis.imshow(picture, cmap=colors, vmin=0, vmax=1, extent=place, interpolation="nearest")
        axis.add_patch(Rectangle((x, y), TILE, TILE, fill=False, edgecolor="0.6", linewidth=0.6))
        axis.text(x + TILE / 2, y - 0.03, label, ha="center", va="bottom", fontsize=min(9, 64 / across))
    down = math.ceil(len(pictures) / across)
    axis.set(xlim=(-0.06, across - 0.06), ylim=(down * CELL_HEIGHT - 0.2, -0.25))
    axis.set_axis_off()
