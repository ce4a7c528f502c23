"""Learned columns of k-space against fixed ones: as many of them, each measured or not, weights tuned for each."""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import torch
from deepinv.physics import MRI
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging.data import ImagePairs, cartesian_mask, keyed_generator
from bilevel_imaging.energies import SamplingMask, VariationalEnergy
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.training.evaluation import (
    baseline,
    grid_search,
    mean_loss,
    pair_metrics,
    reconstruct_pairs,
    viewable_pairs,
)
from bilevel_imaging.training.progress import hidden

# columns at the center of the random pattern, as part of all
CENTER = 0.08
# images that weight and smoothing are searched on, at most: more of them hardly move two numbers
TUNED_ON = 4
# logit of an S that is nothing, with a square that float32 still holds
NOTHING = -40.0
LEARNED, LOW, RANDOM = "learned", "low frequencies", "variable density"


def losses_without(
    weight: SamplingMask, regularizer: Regularizer, pairs: ImagePairs, *, ridge: float = 0.0, progress: bool = False
) -> Tensor:
    """1/2 ||x* - x||^2, mean over the pairs, with S of one column after another put to 0, ``(columns,)`` float64.

    What a column is worth. S itself does not tell: where the regularizer does nothing, as at the zero frequency, a tiny
    S is as good as 1, and the price of measuring makes it tiny.

    Args:
        weight: with one S per column.
        regularizer: with which the mask was learned.
        pairs: measurements of all of k-space.
        ridge: of the energy.
        progress: show a bar on a terminal.
    """
    without = copy.deepcopy(weight).requires_grad_(False)
    energy = VariationalEnergy(regularizer, ridge=ridge, data_weight=without)
    points: dict[int, Tensor] = {}
    mean_loss(energy, pairs, points)
    losses = []
    for k in tqdm(range(without.logits.shape[1]), unit="column", disable=hidden(progress), leave=False):
        without.logits[0, k] = NOTHING
        losses.append(mean_loss(energy, pairs, dict(points)))
        without.logits[0, k] = weight.logits.detach()[0, k]
    return torch.tensor(losses, dtype=torch.float64)


def patterns(weight: SamplingMask, losses: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Which columns are measured, ``(columns,)`` of 0 and 1 float64 by name, the zero frequency in the middle.

    As many as S has on average, rounded: those without which the loss is largest; those of the lowest frequencies; and
    the central 8 percent with others drawn with probabilities proportional to (1 - |k| / k_max)^2.

    Args:
        weight: with one S per column.
        losses: as from :func:`losses_without`.
        seed: of the random pattern.

    Raises:
        ValueError: a mask that is not of columns.
    """
    mask = weight.mask.detach().double().cpu()
    if mask.dim() != 2 or mask.shape[0] != 1:
        raise ValueError(f"Expected a sampling mask of shape (1, columns). Got {tuple(mask.shape)}.")
    columns = mask.shape[-1]
    count = max(1, round(float(mask.sum())))
    center = min(CENTER, count / columns)
    distance = (torch.arange(columns, dtype=torch.float64) - columns // 2).abs()
    generator = keyed_generator("sampling patterns", seed, columns)
    return {
        LEARNED: _first(losses.argsort(descending=True, stable=True), count),
        LOW: _first(distance.argsort(stable=True), count),
        RANDOM: cartesian_mask(columns, columns / count, center, generator),
    }


def _first(order: Tensor, count: int) -> Tensor:
    chosen = torch.zeros(len(order), dtype=torch.float64)
    chosen[order[:count]] = 1
    return chosen


def restricted(pairs: ImagePairs, columns: Tensor) -> ImagePairs:
    """The same images with only these columns of k-space measured, of measurements of all of it."""

    def physics(shape: tuple[int, ...]) -> MRI:
        like = pairs.x[0]
        mask = columns.to(like).expand(1, 1, *shape[-2:]).clone()
        return MRI(mask=mask, img_size=(2, *shape[-2:]), device=like.device)

    measured = [y * columns.to(y) for y in pairs.y]
    return ImagePairs(list(pairs.names), list(pairs.x), measured, physics, indices=list(pairs.indices))


def compare_patterns(
    weight: SamplingMask,
    regularizer: Regularizer,
    train: ImagePairs,
    test: ImagePairs,
    *,
    ridge: float,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Score the learned columns beside fixed patterns of the same number, zero-filled and with total variation.

    Weight and smoothing of the total variation are searched on the training images anew for every pattern, so that none
    is at a disadvantage.

    Args:
        weight: the learned mask, one S per column.
        regularizer: with which the mask was learned; decides on the kind of total variation, see ``baseline``.
        train: measurements of all of k-space, to choose columns and to tune on.
        test: likewise, to score.
        ridge: of the energy.
        seed: of the random pattern.
        progress: show a bar on a terminal.

    Returns:
        by pattern: "columns", "share", "psnr" and "ssim" with means for "zero_filled" and "reconstructed", "weight"
        and "smoothing".
    """
    result, train = {}, train.subset(range(min(len(train), TUNED_ON)))
    losses = losses_without(weight, regularizer, train, ridge=ridge, progress=progress)
    for name, columns in patterns(weight, losses, seed).items():
        search = grid_search(regularizer, restricted(train, columns), ridge=ridge)
        tuned = baseline(regularizer, search.weight, search.smoothing).to(train.x[0].device)
        part = restricted(test, columns)
        images = reconstruct_pairs(VariationalEnergy(tuned, ridge=ridge), part)[0]
        scores = {"zero_filled": pair_metrics(part, viewable_pairs(part)), "reconstructed": pair_metrics(part, images)}
        result[name] = {
            "columns": columns.nonzero().flatten().tolist(),
            "share": float(columns.mean()),
            **{metric: {kind: fmean(v[metric]) for kind, v in scores.items()} for metric in ("psnr", "ssim")},
            "weight": search.weight,
            "smoothing": search.smoothing,
        }
    return result


def describe_patterns(found: dict[str, Any]) -> list[str]:
    """Lines for a report."""
    width = max(map(len, found))
    return [
        f"{name:{width}}  {len(made['columns'])} columns: zero filled {made['psnr']['zero_filled']:.2f} dB, "
        f"total variation {made['psnr']['reconstructed']:.2f} dB, SSIM {made['ssim']['reconstructed']:.4f}"
        for name, made in found.items()
    ]
