"""Values of the arguments of a regularizer with the best mean PSNR on noisy images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging.data import ImagePairs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.regularizers import Regularizer, TotalVariation
from bilevel_imaging.training.evaluation import reconstruct_pairs
from bilevel_imaging.training.figures import peak_signal_to_noise
from bilevel_imaging.training.progress import hidden

# Powers of 2 by which a search moves: it ends 9 % apart, where the PSNR differs by less than 0.01 dB.
STEPS = (1.0, 0.5, 0.25, 0.125)
LEAST_GAIN = 1e-3  # dB; on a plateau the search stays
# root mean square distance to the minimizer: at 28 dB it changes the PSNR by 2e-4 dB
TUNING_ACCURACY = 3e-4


def rescaled(regularizer: Regularizer, weight: float, scale: float) -> Regularizer:
    """(weight / scale) R(scale x), which is what the regularizer's own ``rescaled(weight, scale)`` returns.

    Raises:
        ValueError: the regularizer has no such method.
    """
    if not hasattr(regularizer, "rescaled"):
        raise ValueError(
            f"Expected a regularizer that can be rescaled to tune it. Got {type(regularizer).__name__}, which has no "
            "rescaled(weight, scale). Score it at the noise level it was learned for, without tuning."
        )
    return regularizer.rescaled(weight, scale)


def total_variation(weight: float, smoothing: float) -> TotalVariation:
    """The baseline; nothing is learned in it."""
    return TotalVariation(weight, smoothing, learn_weight=False, learn_smoothing=False)


def tuned(
    build: Callable[..., Regularizer],
    start: Mapping[str, float],
    pairs: ImagePairs,
    *,
    ridge: float = 0.0,
    bar: str | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """The best values of the arguments of ``build``, by :func:`coarse_to_fine`.

    Args:
        build: from positive numbers to a regularizer.
        start: argument names and the values that the search begins with.
        pairs: images and measurements to tune on.
        ridge: of the energy.
        bar: text of a progress bar, shown on a terminal.

    Returns:
        the values, and what they are based on: "psnr" reached and the number of "tries".
    """
    points: dict[int, Tensor] = {}
    device = pairs.x[0].device
    error_tol = TUNING_ACCURACY * min(x.numel() for x in pairs.x) ** 0.5
    with tqdm(desc=bar, unit=" tries", disable=hidden(bar is not None), leave=False) as shown:

        def score(values: Sequence[float]) -> float:
            regularizer = build(**dict(zip(start, values, strict=True))).to(device)
            with torch.no_grad():
                energy = VariationalEnergy(regularizer, ridge=ridge)
                points.update(reconstruct_pairs(energy, pairs, error_tol=error_tol, starts=points)[0])
            psnr = fmean(peak_signal_to_noise(points[i], x) for i, x in zip(pairs.indices, pairs.x, strict=True))
            shown.set_postfix_str(f"{psnr:.2f} dB", refresh=False)
            shown.update()
            return psnr

        best, psnr, tries = coarse_to_fine(score, tuple(start.values()))
    return dict(zip(start, best, strict=True)), {"psnr": psnr, "tries": tries}


def coarse_to_fine(
    score: Callable[[Sequence[float]], float], start: Sequence[float]
) -> tuple[tuple[float, ...], float, int]:
    """Positive numbers with a large score: along one coordinate after the other, by smaller and smaller factors.

    With the factors 2^s, s in ``STEPS``: walk along a coordinate as long as the score rises by more than
    ``LEAST_GAIN``, take the next one, and go over to the next factor when no coordinate rises any more. A score that is
    not finite is the worst. No point is tried twice.

    Returns:
        the best point, its score, and how many points were tried.
    """
    tried: dict[tuple[float, ...], float] = {}  # by exponents of 2, which are exact

    def at(exponents: tuple[float, ...]) -> float:
        if exponents not in tried:
            value = score([s * 2**e for s, e in zip(start, exponents, strict=True)])
            tried[exponents] = value if abs(value) < float("inf") else -float("inf")
        return tried[exponents]

    best = (0.0,) * len(start)
    at(best)
    for step in STEPS:
        moved = True
        while moved:
            moved = False
            for i in range(len(start)):
                for sign in (step, -step):
                    while at(ahead := (*best[:i], best[i] + sign, *best[i + 1 :])) > tried[best] + LEAST_GAIN:
                        best, moved = ahead, True
    return tuple(s * 2**e for s, e in zip(start, best, strict=True)), tried[best], len(tried)
