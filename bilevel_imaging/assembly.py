"""From settings to objects: images, energy, solvers, objective and method of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.config import RegularizerConfig, RunConfig, UpperConfig
from bilevel_imaging.data import (
    Degradation,
    ImageFolder,
    ImagePairs,
    center_crop,
    extract_patches,
    list_images,
    photographs,
    split_names,
)
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.errors import DataError
from bilevel_imaging.linear_solvers import LINEAR_SOLVERS
from bilevel_imaging.lower_solvers import LOWER_SOLVERS
from bilevel_imaging.regularizers import REGULARIZERS, Regularizer
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.upper_level import UPPER_LEVEL_METHODS, UpperLevelMethod

# Noise and masks of validation and test images do not depend on the seed of a run, so that runs compare.
NOISE_SEEDS = {"val": 1_000_001, "test": 1_000_002}
PHOTOGRAPH_PARTS: dict[str, Any] = {"train": "train", "val": "validation", "test": "test"}
HELD_OUT = 0.1  # part of a training folder that validates when no validation folder is given


def device_of(config: RunConfig) -> torch.device:
    """The device asked for.

    Raises:
        ValueError: CUDA asked for and not available.
    """
    available = torch.cuda.is_available()
    if config.problem.device == "cuda" and not available:
        raise ValueError("problem.device: cuda is not available on this machine. Choose cpu or auto.")
    return torch.device("cuda" if available and config.problem.device != "cpu" else "cpu")


def degradation_of(config: RunConfig, part: str) -> Degradation:
    """Operator and noise for the part "train", "val" or "test"."""
    p = config.problem
    return Degradation(
        p.kind, p.sigma, p.blur_size, p.blur_std, p.kept_fraction, seed=NOISE_SEEDS.get(part, config.seed)
    )


def load_images(config: RunConfig, part: str) -> list[tuple[str, Tensor]]:
    """Whole images of the part "train", "val" or "test" by name, ``(C, H, W)`` float64 in [0, 1].

    A folder that is not given is replaced as :class:`bilevel_imaging.config.DataConfig` says.

    Raises:
        DataError: a folder or image cannot be used.
    """
    data = config.data
    folder = getattr(data, part)
    if not folder and part == "test" and (data.val or data.train):
        return load_images(config, "val")
    if folder and not (part == "train" and not data.val):
        return load_folder(folder, config)
    if not data.train:
        images = photographs(data.color, PHOTOGRAPH_PARTS[part])
        return _first(list(images.items()), data.max_images)
    names = list_images(data.train)
    if len(names) < 2:
        raise DataError(f"{data.train}: only one image, none is left to validate with. Set data.val to another folder.")
    split = split_names(names, (1 - HELD_OUT, HELD_OUT, 0.0))
    return load_folder(data.train, config, split.train if part == "train" else split.validation)


def load_folder(
    folder: str | Path, config: RunConfig, names: tuple[str, ...] | None = None
) -> list[tuple[str, Tensor]]:
    """Images of a folder, all or those named, at most ``data.max_images``."""
    images = ImageFolder(folder, config.data.color)
    positions = [i for i, name in enumerate(images.names) if names is None or name in names]
    return [images[i] for i in _first(positions, config.data.max_images)]


def _first(items: list, count: int) -> list:
    return items[:count] if count else items


def training_pairs(config: RunConfig) -> ImagePairs:
    """Training patches and their measurements."""
    images = load_images(config, "train")
    patches = extract_patches(images, config.data.patch_size, config.data.patches_per_image, config.seed)
    dtype = getattr(torch, config.problem.dtype)
    return ImagePairs.build(patches, degradation_of(config, "train"), dtype, device_of(config))


def evaluation_pairs(
    config: RunConfig,
    part: str,
    images: list[tuple[str, Tensor]] | None = None,
    *,
    crop: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> ImagePairs:
    """Images to evaluate on and their measurements.

    Args:
        config: the settings.
        part: "val" or "test", decides on the noise.
        images: instead of those of the part.
        crop: largest height and width, 0 for whole images; ``None`` for ``data.eval_size``.
        dtype: float64, so that certified distances are not limited by rounding, or that of the training.
    """
    size = config.data.eval_size if crop is None else crop
    chosen = load_images(config, part) if images is None else images
    if size:
        chosen = [(n, center_crop(x, (min(size, x.shape[-2]), min(size, x.shape[-1])), n)) for n, x in chosen]
    return ImagePairs.build(chosen, degradation_of(config, part), dtype, device_of(config))


def make_regularizer(config: RegularizerConfig) -> Regularizer:
    """The regularizer at its start."""
    build = REGULARIZERS[config.kind]
    given = {n: v for n, v in vars(config).items() if n not in ("kind", "options")}
    accepted = inspect.signature(build).parameters
    defaults = RegularizerConfig()
    for name, value in given.items():
        if name not in accepted and value != getattr(defaults, name):
            raise ValueError(f"regularizer.{name}: {config.kind} does not take it. Leave it out.")
    kept = {n: v for n, v in given.items() if n in accepted}
    return _call(build, {**kept, **config.options}, "regularizer.options", config.kind)


def make_energy(config: RunConfig, regularizer: Regularizer | None = None) -> VariationalEnergy:
    """The variational energy, on the device of the run."""
    regularizer = make_regularizer(config.regularizer) if regularizer is None else regularizer
    ridge = config.resolved().problem.ridge
    return VariationalEnergy(regularizer, ridge=ridge or 0.0).to(device_of(config))


def make_objective(config: RunConfig, energy: VariationalEnergy, pairs: ImagePairs) -> BilevelObjective:
    """The upper-level objective with the solvers of the settings.

    Raises:
        ValueError: nothing to learn, or larger minibatches than there are pairs.
    """
    if not energy.theta:
        raise ValueError("regularizer: nothing to learn. Set regularizer.learn_weight or learn_smoothing to true.")
    minibatch = config.upper.minibatch
    if minibatch is not None and minibatch > len(pairs):
        raise ValueError(f"upper.minibatch: expected at most {len(pairs)}, the number of patches. Got {minibatch}.")
    solvers: dict[str, Any] = {}
    for name, registry in (("lower", LOWER_SOLVERS), ("linear", LINEAR_SOLVERS)):
        settings = getattr(config, name)
        limits = {} if settings.max_iter is None else {"max_iter": settings.max_iter}
        solvers[name] = registry[settings.solver](**limits)
    generator = None if minibatch is None else torch.Generator().manual_seed(config.seed)
    return BilevelObjective(
        energy, pairs, batch_size=config.data.batch_size, minibatch=minibatch, generator=generator, **solvers
    )


def make_method(config: UpperConfig) -> UpperLevelMethod:
    """The upper-level method.

    Raises:
        ValueError: a setting that the method does not take.
    """
    build = UPPER_LEVEL_METHODS[config.method]
    given = {n: getattr(config, n) for n in ("lr", "relative", "error_tol", "residual_tol", "tolerance")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in inspect.signature(build).parameters:
            raise ValueError(f"upper.{name}: {config.method} does not take it. Leave it out.")
    return _call(build, {**given, **config.options}, "upper.options", config.method)


def _call(build: Callable[..., Any], arguments: Mapping[str, Any], key: str, name: str) -> Any:
    """Build; arguments that do not exist are named instead of a TypeError."""
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{key}: {name}: {error}.") from error
    return build(**arguments)
