"""How good a learned regularizer is: PSNR and SSIM of its reconstructions, beside the usual grid search."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepinv
import torch
from deepinv.physics import MRI, Blur
from torch import Tensor
from torch.nn import functional

from bilevel_imaging.data import Batch, ImagePairs, magnitude
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.energies.binding import data_term
from bilevel_imaging.lower_solvers import LowerSolver
from bilevel_imaging.regularizers import Regularizer, Tikhonov, TotalVariation
from bilevel_imaging.training.mean import bind_batch
from bilevel_imaging.training.reconstruction import minimize

MEASUREMENT, LEARNED, GRID_SEARCH = "measurement", "learned", "grid_search"
METRICS = ("psnr", "ssim")
# images reconstructed together at most
MAX_BATCH = 8

# The baseline: what one would do without bilevel learning, TV with a small smoothing and the best weight. Which of the
# usual smoothings is better depends on the images (by 0.2 dB on the bundled ones), so the training images decide.
BASELINE_SMOOTHINGS = (0.01, 0.001)
GRID = tuple(10 ** (-4 + k / 3) for k in range(16))  # 1e-4 to 10
REFINEMENTS = 6  # further weights between the two neighbors of the best one; even, to leave out the best itself


def image_metrics(x: Tensor, x_true: Tensor) -> dict[str, list[float]]:
    """PSNR in dB and SSIM of every image ``(B, C, H, W)``, for the range [0, 1]; values outside are not clipped.

    Two channels are real and imaginary part of a complex image, whose magnitude is compared.
    """
    x, x_true = magnitude(x.detach().double()), magnitude(x_true.double())
    with torch.no_grad():
        values = {"psnr": deepinv.metric.PSNR(max_pixel=1)(x, x_true), "ssim": deepinv.metric.SSIM()(x, x_true)}
    return {name: [float(v) for v in value.reshape(-1)] for name, value in values.items()}


def viewable(batch: Batch) -> Tensor:
    """The measurements as images of the shape of x: themselves where they are, else a simple first reconstruction.

    For MRI the zero-filled A^T y; after a blur with "valid" padding y with its border repeated; else (super-resolution,
    tomography) A^T y times the number with the smallest misfit.
    """
    x, y, physics = batch.x, batch.y, batch.physics
    if isinstance(physics, MRI):
        return physics.A_adjoint(y)
    if y.shape == x.shape:
        return y
    if isinstance(physics, Blur):
        rows, columns = x.shape[-2] - y.shape[-2], x.shape[-1] - y.shape[-1]
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return functional.pad(y, sides, mode="replicate")
    return data_term(y, physics).initial()


def viewable_pairs(pairs: ImagePairs) -> dict[int, Tensor]:
    """:func:`viewable` of every measurement, ``(C, H, W)``, by ``ImagePairs.indices``."""
    shown: dict[int, Tensor] = {}
    for batch in pairs.batches(MAX_BATCH):
        shown.update(zip(batch.indices.tolist(), viewable(batch).unbind(0), strict=True))
    return shown


def reconstruct_pairs(
    energy: VariationalEnergy,
    pairs: ImagePairs,
    *,
    error_tol: float | None = None,
    solver: LowerSolver | None = None,
    starts: Mapping[int, Tensor] | None = None,
    batch_size: int = MAX_BATCH,
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """Reconstruct every image of a set.

    Args:
        energy: with the regularizer to use.
        pairs: images and measurements.
        error_tol: see :func:`bilevel_imaging.training.reconstruction.minimize`.
        solver: lower-level solver, ``None`` for Newton-CG.
        starts: warm starts by index.
        batch_size: most images at once.

    Returns:
        reconstructions ``(C, H, W)`` and certified distances to the minimizers, by ``ImagePairs.indices``.
    """
    points: dict[int, Tensor] = {}
    distances: dict[int, float] = {}
    for batch in pairs.batches(batch_size):
        indices = batch.indices.tolist()
        warm = starts is not None and all(i in starts for i in indices)
        x0 = torch.stack([starts[i] for i in indices]) if warm and starts is not None else None
        x, info = minimize(bind_batch(energy, batch), x0, error_tol, solver)
        points.update(zip(indices, x.unbind(0), strict=True))
        distances.update(zip(indices, info.distance_bound.tolist(), strict=True))
    return points, distances


def mean_loss(
    energy: VariationalEnergy, pairs: ImagePairs, points: dict[int, Tensor], batch_size: int = MAX_BATCH
) -> float:
    """1/2 ||x* - x||^2, mean over the pairs, at reconstructions that start from ``points`` and replace them."""
    with torch.no_grad():
        points.update(reconstruct_pairs(energy, pairs, starts=points, batch_size=batch_size)[0])
    errors = zip(pairs.indices, pairs.x, strict=True)
    return _mean([0.5 * float((points[i] - x).double().square().sum()) for i, x in errors])


def pair_metrics(pairs: ImagePairs, images: Mapping[int, Tensor]) -> dict[str, list[float]]:
    """Metrics in the order of the pairs, one image at a time: sizes differ."""
    result: dict[str, list[float]] = {name: [] for name in METRICS}
    for index, x_true in zip(pairs.indices, pairs.x, strict=True):
        for name, values in image_metrics(images[index][None], x_true[None]).items():
            result[name] += values
    return result


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class GridSearch:
    """The best single weight for training images.

    Attributes:
        weight: the best weight.
        smoothing: the better one of ``BASELINE_SMOOTHINGS``, ``None`` where the regularizer has none.
        loss: mean upper-level loss on the training images there.
        tried: every (weight, smoothing, loss), in the order tried.
    """

    weight: float
    smoothing: float | None
    loss: float
    tried: list[tuple[float, float | None, float]]


def baseline(regularizer: Regularizer, weight: float, smoothing: float | None) -> Regularizer:
    """The regularizer that a grid search tunes: the same Tikhonov, or else TV with a given smoothing."""
    if isinstance(regularizer, Tikhonov) or smoothing is None:
        return Tikhonov(weight, getattr(regularizer, "operator", "gradient"), learn_weight=False)
    kind = {n: getattr(regularizer, n) for n in ("isotropic", "couple_channels") if hasattr(regularizer, n)}
    return TotalVariation(weight, smoothing, learn_weight=False, learn_smoothing=False, **kind)


def grid_search(regularizer: Regularizer, pairs: ImagePairs, *, ridge: float = 0.0) -> GridSearch:
    """The weight with the smallest mean squared error on the *training* images; never sees test images.

    Criterion and images are those of the learning, so that both have had the same chance. A logarithmic grid (three
    weights a decade, from small to large until the loss has risen twice in a row) is refined once around its best, and
    the best three weights are joined by a parabola. Total variation is tuned with two fixed smoothings, of which the
    one with the smaller loss counts.

    Args:
        regularizer: decides on the baseline, see :func:`baseline`.
        pairs: training images.
        ridge: of the energy.
    """
    device = pairs.x[0].device
    tried: list[tuple[float, float | None, float]] = []
    points: dict[int, Tensor] = {}
    grid: Sequence[float] = GRID
    for smoothing in (None,) if isinstance(regularizer, Tikhonov) else BASELINE_SMOOTHINGS:

        def loss(weight: float, smoothing: float | None = smoothing) -> float:
            energy = VariationalEnergy(baseline(regularizer, weight, smoothing).to(device), ridge=ridge)
            # as accurate as an evaluation: with a tenth of it, weights 20 % apart could not be told apart
            value = mean_loss(energy, pairs, points, batch_size=64)
            tried.append((weight, smoothing, value))
            return value

        best = _best_weight(loss, grid)
        grid = [w for w in GRID if best / 3 < w < best * 3]  # the best weight hardly depends on a small smoothing
    weight, smoothing, value = min(tried, key=lambda entry: entry[2])
    return GridSearch(weight=weight, smoothing=smoothing, loss=value, tried=tried)


def _best_weight(loss: Callable[[float], float], grid: Sequence[float]) -> float:
    """Walk along a grid, refine around its best, and end with a parabola."""
    tried: dict[float, float] = {}
    _walk(lambda weight: tried.setdefault(weight, loss(weight)), grid)
    best = min(tried, key=lambda w: tried[w])
    below = max((w for w in tried if w < best), default=best / 2)
    above = min((w for w in tried if w > best), default=best * 2)
    for k in range(1, REFINEMENTS + 1):
        weight = below * (above / below) ** (k / (REFINEMENTS + 1))
        tried[weight] = loss(weight)
    weight = _parabola_minimum(tried)
    tried[weight] = loss(weight)
    return min(tried, key=lambda w: tried[w])


def _parabola_minimum(tried: Mapping[float, float]) -> float:
    """Minimizer of the parabola in log(weight) through the best weight and its neighbors: no grid in the result."""
    weights = sorted(tried)
    best = min(range(len(weights)), key=lambda i: tried[weights[i]])
    if not 0 < best < len(weights) - 1:
        return weights[best]
    (a, b, c), (fa, fb, fc) = zip(*((math.log(w), tried[w]) for w in weights[best - 1 : best + 2]), strict=True)
    left, right = (b - a) * (fb - fc), (b - c) * (fb - fa)
    return math.exp(b - 0.5 * ((b - a) * left - (b - c) * right) / (left - right)) if left != right else weights[best]


def _walk(loss: Callable[[float], float], grid: Sequence[float]) -> None:
    rises, last = 0, float("inf")
    for weight in grid:
        value = loss(weight)
        rises = rises + 1 if value > last else 0
        last = value
        if rises == 2:
            return


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of several methods on one set of images.

    Attributes:
        names: of the images.
        scores: metric ("psnr", "ssim") to method ("measurement", "learned", "grid_search") to values by image; those of
            a measurement that is no image are those of :func:`viewable`.
        distance_bound: method to certified distances of its reconstructions to its minimizers, by image.
        pictures: images by method, "gt" included, ``(C, H, W)`` each, in the order of ``names``.
    """

    names: list[str]
    scores: dict[str, dict[str, list[float]]]
    distance_bound: dict[str, list[float]]
    pictures: dict[str, list[Tensor]] = field(repr=False)

    def mean(self, metric: str) -> dict[str, float]:
        """Mean over the images by method."""
        return {method: _mean(values) for method, values in self.scores[metric].items()}

    def to_dict(self) -> dict[str, Any]:
        """Means under the keys of summary.json, and every image."""
        images = {
            name: {metric: {m: v[i] for m, v in self.scores[metric].items()} for metric in METRICS}
            | {"distance_bound": {m: v[i] for m, v in self.distance_bound.items()}}
            for i, name in enumerate(self.names)
        }
        return {**{metric: self.mean(metric) for metric in METRICS}, "images": images}

    def table(self) -> str:
        """PSNR and SSIM by image and method as plain text; the best value of a row is marked."""
        methods = list(self.scores["psnr"])
        width = max([len("mean"), *map(len, self.names)])
        header = [f"PSNR {m.replace('_', ' ')}" for m in methods] + [f"SSIM {m.replace('_', ' ')}" for m in methods]
        lines = ["  ".join([f"{'image':{width}}", *(f"{h:>{len(h) + 1}}" for h in header)])]
        rows = [
            (n, {k: {m: v[i] for m, v in s.items()} for k, s in self.scores.items()}) for i, n in enumerate(self.names)
        ]
        for name, row in [*rows, ("mean", {k: self.mean(k) for k in METRICS})]:
            cells = []
            for metric, digits in (("psnr", 2), ("ssim", 4)):
                best = max(row[metric].values())
                cells += [f"{v:.{digits}f}{'*' if v == best else ' '}" for v in row[metric].values()]
            columns = [f"{c:>{len(h) + 1}}" for c, h in zip(cells, header, strict=True)]
            lines.append("  ".join([f"{name:{width}}", *columns]).rstrip())
        return "\n".join(lines)


def evaluate(energies: Mapping[str, VariationalEnergy], pairs: ImagePairs) -> Evaluation:
    """Score the measurements and the reconstructions of several energies.

    Args:
        energies: by method name, e.g. "grid_search" and "learned".
        pairs: images and measurements, in float64 for the sharpest certificates.
    """
    images = {MEASUREMENT: viewable_pairs(pairs)}
    distances: dict[str, list[float]] = {}
    for method, energy in energies.items():
        images[method], bounds = reconstruct_pairs(energy, pairs)
        distances[method] = [bounds[i] for i in pairs.indices]
    scores = {method: pair_metrics(pairs, points) for method, points in images.items()}
    return Evaluation(
        names=list(pairs.names),
        scores={metric: {method: scores[method][metric] for method in images} for metric in METRICS},
        distance_bound=distances,
        pictures={"gt": list(pairs.x), **{m: [points[i] for i in pairs.indices] for m, points in images.items()}},
    )
