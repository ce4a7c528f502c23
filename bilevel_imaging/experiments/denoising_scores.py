"""The standard denoising benchmark: PSNR and SSIM of regularizers on whole gray images with Gaussian noise.

For every image x in [0, 1] and every noise level, y = x + noise, neither clipped nor quantized; the noise of an image
depends on the seed, its name and its size alone. A regularizer R gives argmin_z 1/2 ||z - y||^2 + R(z) (+ the ridge it
was learned with), certified to lie within a distance of the exact minimizer; scores are those of the whole image,
without clipping.

Two things may be tuned, on other images than those of the scores, by the same search for the largest mean PSNR:

- a regularizer learned for another noise level: weight and scale of (weight / scale) R(scale z);
- the baseline, total variation: weight and smoothing.

Noise levels are standard deviations in units of 1/255.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging._version import __version__
from bilevel_imaging.data import Batch, Degradation, ImageFolder, ImagePairs, center_crop, keyed_generator, photographs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.experiments.denoising_report import figure, markdown, table
from bilevel_imaging.experiments.denoising_tuning import rescaled, total_variation, tuned
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.training.evaluation import image_metrics
from bilevel_imaging.training.mean import bind_batch
from bilevel_imaging.training.metrics_log import finite_or_none
from bilevel_imaging.training.progress import hidden
from bilevel_imaging.training.reconstruction import PIXEL_ACCURACY, energy_of, minimize

__all__ = ["ImageSet", "figure", "load_images", "markdown", "rescaled", "run", "table"]

LEVELS = 255.0
TUNABLE = ("weight", "scale")
BASELINE = "TV, tuned"
NOISY = "noisy"
SMALLEST_CROP = 16  # SSIM looks at windows of 11 pixels

Record = dict[str, Any]


@dataclass(frozen=True)
class ImageSet:
    """Gray images to score or to tune on.

    Attributes:
        label: what the record calls them.
        images: ``(1, H, W)`` in [0, 1] by name.
    """

    label: str
    images: dict[str, Tensor] = field(repr=False)


class DenoisingRecord(dict[str, Any]):
    """The record, plain JSON, with the regularizers that were adapted.

    Attributes:
        learned: by the name of the regularizer and the noise level.
    """

    def __init__(self, record: Record, learned: Mapping[str, tuple[Regularizer, Record]]):
        super().__init__(record)
        self.learned = {name: regularizer for name, (regularizer, _) in learned.items()}
        self._settings = {name: settings for name, (_, settings) in learned.items()}

    def saved_with(self, name: str) -> Record:
        """What belongs into the file of an adapted regularizer: arguments of ``save_regularizer``."""
        return self._settings[name]


def load_images(
    folder: str | Path | None, *, part: str = "test", crop: int | None = None, max_images: int | None = None
) -> ImageSet:
    """The first images of a folder in the order of their names, or the bundled photographs of one part.

    Args:
        folder: ``None`` for bundled photographs.
        part: of the bundled photographs, "train", "validation" or "test".
        crop: largest height and width, pixels, cut from the middle; ``None`` for whole images.
        max_images: ``None`` for all.

    Raises:
        DataError: folder or files that cannot be used.
        ValueError: crop or max_images too small.
    """
    if crop is not None and crop < SMALLEST_CROP:
        raise ValueError(f"Expected crop >= {SMALLEST_CROP} pixels. Got {crop}.")
    if max_images is not None and max_images < 1:
        raise ValueError(f"Expected max_images >= 1. Got {max_images}.")
    if folder is None:
        label, source = f"bundled photographs ({part})", list(photographs(part=part).items())[:max_images]
    else:
        files = ImageFolder(folder, min_size=SMALLEST_CROP)
        label, source = files.root.resolve().name, [files[i] for i in range(len(files))[:max_images]]
    return ImageSet(label, {name: _cropped(image, crop, name) for name, image in source})


def _cropped(image: Tensor, crop: int | None, name: str) -> Tensor:
    if crop is None:
        return image
    return center_crop(image, (min(crop, image.shape[-2]), min(crop, image.shape[-1])), name).contiguous()


def noisy(image: Tensor, name: str, sigma: float, seed: int) -> Tensor:
    """The image with noise of standard deviation sigma / 255, float64; by (seed, name, shape) alone."""
    generator = keyed_generator("denoising scores", seed, name, tuple(image.shape))
    noise = torch.randn(image.shape, dtype=torch.float64, generator=generator)
    return image.double() + sigma / LEVELS * noise


def run(
    regularizers: Mapping[str, Regularizer] | None = None,
    images: ImageSet | None = None,
    *,
    sigmas: Sequence[float] = (25.0,),
    seed: int = 0,
    tuning: ImageSet | None = None,
    tune: Sequence[str] = (),
    tv: bool | None = None,
    progress: bool = False,
    device: str = "cpu",
) -> DenoisingRecord:
    """Score regularizers; Ctrl-C ends early with what all methods have finished ("complete" is then false).

    Args:
        regularizers: by the name to print; their ``ridge`` and ``noise_level``, if they have them, are used.
        images: to score on; ``None`` for the bundled test photographs.
        sigmas: standard deviations of the noise, in units of 1/255.
        seed: of the noise.
        tuning: images to tune on, where something is tuned; ``None`` for the bundled training photographs.
        tune: what to adapt of every regularizer to every noise level: "weight", "scale" or both. A large scale gains
            little and costs time. One that is left alone is right if images are as likely at any contrast.
        tv: add total variation with tuned weight and smoothing; ``None``: if there are no regularizers.
        progress: show bars on a terminal.
        device: where to compute, and where the regularizers are.

    Returns:
        settings, tuned values, scores by image and means, as plain JSON; and what was adapted.

    Raises:
        ValueError: nothing to score, a noise level that is not positive, or a regularizer that cannot be tuned.
    """
    regularizers = dict(regularizers or {})
    tv = not regularizers if tv is None else tv
    _check(regularizers, sigmas, tune, tv)
    images = load_images(None) if images is None else images
    if tune or tv:
        tuning = load_images(None, part="train") if tuning is None else tuning
        _check_apart(images, tuning)
    else:
        tuning = None
    record: Record = {
        "settings": {
            "images": images.label,
            "shapes": {name: list(image.shape[-2:]) for name, image in images.images.items()},
            "sigmas": [float(sigma) for sigma in sigmas],
            "seed": seed,
            "tuning_images": None if tuning is None else tuning.label,
            "tuned_regularizers": list(tune),
            "accuracy_per_pixel": PIXEL_ACCURACY,
        },
        "environment": {"bilevel_imaging": __version__, **environment(device)},
        "methods": {name: _describe(regularizer) for name, regularizer in regularizers.items()},
        "complete": False,
        "levels": [],
    }
    adapted: dict[str, tuple[Regularizer, Record]] = {}
    try:
        for sigma in record["settings"]["sigmas"]:
            level = {"sigma": sigma, "tuned": {}, "images": {}, "mean": {}}
            pairs = None if tuning is None else _pairs(tuning, sigma, seed, device)
            methods = _methods(level, regularizers, pairs, tune=tune, tv=tv, progress=progress, device=device)
            record["levels"].append(level)
            for name in regularizers if tune else ():
                energy, problem = methods[name], {"kind": "denoising", "sigma": sigma / LEVELS}
                settings = {"ridge": energy.ridge, "noise_level": sigma / LEVELS}
                extra = {"problem": problem, "adapted": level["tuned"][name], "adapted_on": tuning.label}
                adapted[f"{name} sigma {sigma:g}"] = (energy.regularizer, {**settings, "extra": extra})
            _score(level, methods, images, seed, progress, device)
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    for level in record["levels"]:
        level["mean"] = _means(level["images"])
    return DenoisingRecord(finite_or_none(record), adapted)


def _pairs(tuning: ImageSet, sigma: float, seed: int, device: str) -> ImagePairs:
    degradation = Degradation("denoising", sigma=sigma / LEVELS, seed=seed)
    return ImagePairs.build(tuning.images, degradation, torch.float32, device)  # see TUNING_ACCURACY


def _check(regularizers: Mapping[str, Regularizer], sigmas: Sequence[float], tune: Sequence[str], tv: bool) -> None:
    """Refuse now what would fail after hours."""
    if not regularizers and not tv:
        raise ValueError("Expected a regularizer or tv=True. Got neither: there is nothing to score.")
    if not sigmas or not all(0 < sigma < float("inf") for sigma in sigmas) or len(set(sigmas)) != len(sigmas):
        raise ValueError(f"Expected different noise levels > 0, in units of 1/255. Got {list(sigmas)}.")
    taken = {NOISY, BASELINE} & set(regularizers)
    if taken:
        raise ValueError(f"Expected other names than {NOISY!r} and {BASELINE!r}. Got {', '.join(taken)}; rename it.")
    if not set(tune) <= set(TUNABLE):
        raise ValueError(f"Expected tune among {', '.join(TUNABLE)}. Got {list(tune)}.")
    if tune:
        for name, regularizer in regularizers.items():
            if getattr(regularizer, "data_weight", None) is not None:
                raise ValueError(f"{name} was learned with weights of the data term. Score it without tuning.")
            rescaled(regularizer, 1.0, 1.0)


def _check_apart(images: ImageSet, tuning: ImageSet) -> None:
    """Refuse to tune on the images that are scored, under whatever name."""
    for name, image in images.images.items():
        for other, candidate in tuning.images.items():
            if image.shape == candidate.shape and torch.equal(image, candidate):
                raise ValueError(
                    f"Expected other images for tuning than for the scores. Got {name} = {other} in both; "
                    "give another folder."
                )


def _describe(regularizer: Regularizer) -> Record:
    noise_level = getattr(regularizer, "noise_level", None)
    return {
        "class": type(regularizer).__name__,
        "parameters": sum(p.numel() for p in regularizer.parameters()),
        "learned_for_sigma": None if noise_level is None else LEVELS * float(noise_level),
        "ridge": float(getattr(regularizer, "ridge", 0.0)),
    }


def _methods(
    level: Record,
    regularizers: Mapping[str, Regularizer],
    tuning: ImagePairs | None,
    *,
    tune: Sequence[str],
    tv: bool,
    progress: bool,
    device: str,
) -> dict[str, VariationalEnergy]:
    """What is minimized at one noise level, tuned where asked for; notes the tuned values in ``level``."""
    methods: dict[str, VariationalEnergy] = {}
    noise = level["sigma"] / LEVELS
    bar = f"sigma {level['sigma']:g}, tuning {{}}" if progress else None

    def best(name: str, build: Callable[..., Regularizer], start: Mapping[str, float], ridge: float = 0.0) -> None:
        values, evidence = tuned(build, start, tuning, ridge=ridge, bar=bar and bar.format(name))
        level["tuned"][name] = values | evidence
        methods[name] = VariationalEnergy(build(**values).to(tuning.x[0].device), ridge=ridge)

    if tv:
        best(BASELINE, total_variation, {"weight": 0.7 * noise, "smoothing": 0.01})
    for name, regularizer in regularizers.items():
        energy = energy_of(regularizer, device)
        if not tune:
            methods[name] = energy
            continue
        # the right values if images were as likely at any contrast
        ratio = noise / (getattr(regularizer, "noise_level", None) or noise)
        values = {"weight": ratio, "scale": 1 / ratio}
        kept = {key: value for key, value in values.items() if key not in tune}
        best(name, partial(rescaled, regularizer, **kept), {key: values[key] for key in tune}, energy.ridge)
        level["tuned"][name] |= kept
    return methods


def _score(
    level: Record, methods: Mapping[str, VariationalEnergy], images: ImageSet, seed: int, progress: bool, device: str
) -> None:
    """Scores of every image, entered when all methods have finished it."""
    total = len(images.images) * len(methods)
    with tqdm(total=total, desc=f"sigma {level['sigma']:g}", disable=hidden(progress), leave=False) as bar:
        for name, image in images.images.items():
            x = image.double().to(device)[None]
            y = noisy(image, name, level["sigma"], seed).to(device)[None]
            row = {NOISY: {key: value[0] for key, value in image_metrics(y, x).items()}}
            for method, energy in methods.items():
                begin = time.perf_counter()
                point, distance = _denoised(energy, y, level["sigma"] / LEVELS)
                seconds = time.perf_counter() - begin
                scores = {key: value[0] for key, value in image_metrics(point, x).items()}
                row[method] = {**scores, "distance": distance, "seconds": seconds}
                bar.set_postfix_str(f"{name}, {method}: {scores['psnr']:.2f} dB", refresh=False)
                bar.update()
            level["images"][name] = row


def _denoised(energy: VariationalEnergy, y: Tensor, noise_level: float) -> tuple[Tensor, float]:
    """The reconstruction and its certified distance to the minimizer; the latter waits for the device."""
    with torch.no_grad():
        physics = Degradation("denoising").physics(y.shape[1:], y.dtype, y.device)
        batch = Batch(torch.zeros(1, dtype=torch.int64), y, y, physics, y.new_tensor([noise_level]))
        point, info = minimize(bind_batch(energy, batch))
    return point, float(info.distance_bound)


def _means(images: Mapping[str, Record]) -> Record:
    """By method and number, over the images; a distance is the largest instead."""
    rows = list(images.values())
    if not rows:
        return {}
    means = {m: {key: fmean(row[m][key] for row in rows) for key in scores} for m, scores in rows[0].items()}
    for method, scores in means.items():
        if "distance" in scores:
            scores["distance"] = max(row[method]["distance"] for row in rows)
    return means
