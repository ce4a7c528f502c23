"""From settings to objects: images, energy, solvers, objective and method of a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.checks import argument_names, boolean
from bilevel_imaging.config import SMALLEST_IMAGE, RegularizerConfig, RunConfig, UpperConfig
from bilevel_imaging.data import (
    Degradation,
    ImageFolder,
    ImagePairs,
    RandomPatches,
    center_crop,
    extract_patches,
    list_images,
    photographs,
    split_names,
)
from bilevel_imaging.energies import DATA_WEIGHTS, DataWeight, VariationalEnergy
from bilevel_imaging.errors import DataError
from bilevel_imaging.export import load_regularizer
from bilevel_imaging.linear_solvers import LINEAR_SOLVERS
from bilevel_imaging.lower_solvers import LOWER_SOLVERS
from bilevel_imaging.regularizers import REGULARIZERS, Regularizer
from bilevel_imaging.regularizers.noise_conditional import NoiseConditional
from bilevel_imaging.regularizers.ridge import RidgeRegularizer
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.training.random_objective import RandomPatchObjective
from bilevel_imaging.training.warm_starts import DiskWarmStarts, NoWarmStarts, WarmStarts
from bilevel_imaging.upper_level import UPPER_LEVEL_METHODS, SamplingPenalty, UpperLevelMethod
from bilevel_imaging.upper_level.first_order import optimizer_options

# Noise and masks of validation and test images do not depend on the seed of a run, so that runs compare.
NOISE_SEEDS = {"val": 1_000_001, "test": 1_000_002}
PHOTOGRAPH_PARTS: dict[str, Any] = {"train": "train", "val": "validation", "test": "test"}
HELD_OUT = 0.1  # part of a training folder that validates when no validation folder is given
# training patches at most with which the weight of the baseline is chosen: more of them hardly move one number
BASELINE_PATCHES = 64
WARM_FOLDER = "warm_starts"
NOT_ARGUMENTS = ("kind", "options", "start", "start_scale")  # settings that are no arguments of the regularizer
# what is measured is the image as a whole
WHOLE = ("tomography", "mri")


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
    """Operator and noise for the part "train", "val", "test", or "baseline" (as "train", with the noise of tests)."""
    names = [f.name for f in fields(Degradation) if f.name not in ("seed", "sigma_range")]
    return Degradation(
        **{name: getattr(config.problem, name) for name in names},
        seed=NOISE_SEEDS.get(part, config.seed),
        sigma_range=config.problem.sigma_range if part == "train" else None,
    )


def load_images(config: RunConfig, part: str, dtype: torch.dtype = torch.float64) -> list[tuple[str, Tensor]]:
    """Whole images of the part "train", "val" or "test" by name, ``(C, H, W)`` in [0, 1], rounded to ``dtype``.

    A folder that is not given is replaced as :class:`bilevel_imaging.config.DataConfig` says.

    Raises:
        DataError: a folder or image cannot be used.
    """
    data = config.data
    folder = getattr(data, part)
    if not folder and part == "test" and (data.val or data.train):
        return load_images(config, "val", dtype)
    if folder and not (part == "train" and not data.val):
        return load_folder(folder, config, dtype=dtype)
    if not data.train:
        images = photographs(data.color, PHOTOGRAPH_PARTS[part])
        return [(name, image.to(dtype)) for name, image in _first(list(images.items()), data.max_images)]
    names = list_images(data.train)
    if len(names) < 2:
        [(name, _)] = load_folder(data.train, config)  # one that can't be read is the first thing to say
        raise DataError(
            f"{data.train}: only one image, {name}; none is left to validate with. Set data.val to another folder."
        )
    split = split_names(names, (1 - HELD_OUT, HELD_OUT, 0.0))
    return load_folder(data.train, config, split.train if part == "train" else split.validation, dtype)


def load_folder(
    folder: str | Path,
    config: RunConfig,
    names: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[tuple[str, Tensor]]:
    """Images of a folder, all or those named, at most ``data.max_images``, rounded to ``dtype`` one by one."""
    images = ImageFolder(folder, config.data.color)
    positions = [i for i, name in enumerate(images.names) if names is None or name in names]
    chosen = (images[i] for i in _first(positions, config.data.max_images))
    return [(name, image.to(dtype)) for name, image in chosen]


def _first(items: list, count: int) -> list:
    return items[:count] if count else items


def training_data(config: RunConfig) -> ImagePairs | RandomPatches:
    """What the training sees: fixed patches and their measurements, or minibatches of new ones."""
    if not config.data.random_patches:
        return training_pairs(config)
    return RandomPatches(
        _with_patches(load_images(config, "train", torch.float32), config),
        degradation_of(config, "train"),
        config.data.patch_size,
        _minibatch(config),
        dtype=getattr(torch, config.problem.dtype),
        device=device_of(config),
        seed=config.seed,
    )


def _with_patches(images: list[tuple[str, Tensor]], config: RunConfig) -> list[tuple[str, Tensor]]:
    """The images, each of them as large as a patch.

    Raises:
        DataError: one is smaller.
    """
    size = config.data.patch_size
    for name, image in images:
        height, width = image.shape[-2:]
        if (most := min(height, width)) < size:
            raise DataError(
                f"data.patch_size: expected at most {most}, as {name} is too small for more, {height}x{width} pixels "
                f"(height x width). Got {size}; ask for less or remove the image."
            )
    return images


def _minibatch(config: RunConfig) -> int:
    if config.upper.minibatch is None:
        raise ValueError("upper.minibatch: expected the number of patches of a step. Got null.")
    return config.upper.minibatch


def training_pairs(config: RunConfig, part: str = "train") -> ImagePairs:
    """Fixed training patches and their measurements.

    Args:
        config: the settings.
        part: "train", or "baseline" for at most ``BASELINE_PATCHES`` from all over the set with the noise of the
            tests, to choose the weight of the baseline.
    """
    images = _with_patches(load_images(config, "train"), config)
    if config.problem.kind in WHOLE:
        patches = [(name, center_crop(image, config.data.patch_size, name)) for name, image in images]
    else:
        patches = extract_patches(images, config.data.patch_size, config.data.patches_per_image, config.seed)
    if part == "baseline":
        patches = patches[:: math.ceil(len(patches) / BASELINE_PATCHES)]
    dtype = getattr(torch, config.problem.dtype)
    return ImagePairs.build(patches, degradation_of(config, part), dtype, device_of(config))


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
        crop: largest height and width, 0 for whole images; ``None`` for ``data.eval_size``. In tomography crops are
            square, and with weights that belong to one size of images they have that of the patches.
        dtype: float64, so that certified distances are not limited by rounding, or that of the training.

    Raises:
        DataError: an image that is too small.
        ValueError: a crop that does not fit the weights.
    """
    size = config.data.eval_size if crop is None else crop
    chosen = load_images(config, part) if images is None else images
    if config.problem.has_weight_grid:
        _with_patches(chosen, config)
    chosen = [(name, center_crop(x, _evaluated(config, x, size, bool(crop)), name)) for name, x in chosen]
    for name, x in chosen:
        if min(x.shape[-2:]) < SMALLEST_IMAGE:
            raise DataError(
                f"{name}: the image is too small to be scored, {x.shape[-2]}x{x.shape[-1]} pixels; expected at least "
                f"{SMALLEST_IMAGE}x{SMALLEST_IMAGE}. Remove it."
            )
    return ImagePairs.build(chosen, degradation_of(config, part), dtype, device_of(config))


def _evaluated(config: RunConfig, image: Tensor, size: int, asked: bool) -> tuple[int, int]:
    """Height and width of an image that are evaluated."""
    patch = config.data.patch_size
    if config.problem.has_weight_grid:
        if asked and size != patch:
            raise ValueError(f"crop: the learned data weights are for {patch}x{patch} images. Got {size}.")
        return patch, patch
    height, width = (min(size or n, n) for n in image.shape[-2:])
    return (min(height, width),) * 2 if config.problem.kind == "tomography" else (height, width)


def make_regularizer(config: RegularizerConfig) -> Regularizer:
    """The regularizer at its start.

    Raises:
        ValueError: a setting that it does not take, or a start of another kind or size.
    """
    build = REGULARIZERS[config.kind]
    given = {n: v for n, v in vars(config).items() if n not in NOT_ARGUMENTS and v is not None}
    accepted = inspect.signature(build).parameters
    defaults = RegularizerConfig()
    for name, value in given.items():
        if name not in accepted and value != getattr(defaults, name):
            raise ValueError(f"regularizer.{name}: {config.kind} does not take it. Leave it out.")
    kept = {n: v for n, v in given.items() if n in accepted}
    regularizer = _call(build, {**kept, **config.options}, "regularizer.options", config.kind)
    if config.start:
        start = load_regularizer(config.start)
        if config.start_scale is not None and not isinstance(start, RidgeRegularizer):
            raise ValueError(f"regularizer.start_scale: {type(start).__name__} in {config.start} does not take it.")
        try:
            if config.start_scale is not None:
                start = start.rescaled(1.0, config.start_scale)
            _start_from(regularizer, start)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"regularizer.start: {config.start} does not fit {config.kind}: {error}") from error
    return regularizer


def _start_from(regularizer: Regularizer, start: Regularizer) -> None:
    """Give a regularizer the parameters of another; one for all noise levels may start with that for one of them."""
    ours, theirs = ({n: p.shape for n, p in r.named_parameters()} for r in (regularizer, start))
    if type(start) is type(regularizer) and ours == theirs:
        regularizer.load_state_dict(start.state_dict())
    elif isinstance(regularizer, RidgeRegularizer) and isinstance(start, RidgeRegularizer):
        regularizer.start_from(start)
    elif isinstance(regularizer, NoiseConditional) and not isinstance(start, NoiseConditional):
        _start_from(regularizer.regularizer, start)
    elif type(start) is not type(regularizer):
        raise ValueError(f"it holds a {type(start).__name__}")
    else:
        raise ValueError(f"expected parameters of the shapes {ours}, not {theirs}")


def make_data_weight(config: RunConfig) -> DataWeight | None:
    """The weights of the data term at their start, if there are any.

    Raises:
        ValueError: an option that they do not take.
    """
    problem, size = config.problem, config.data.patch_size
    if problem.data_weight is None:
        return None
    options = dict(problem.data_weight_options)
    if problem.has_weight_grid:
        rows = 1 if boolean("problem.data_weight_options.per_column", options.pop("per_column", False)) else size
        options.setdefault("shape", (rows, size if problem.kind == "mri" else size // 2 + 1))
    build = DATA_WEIGHTS[problem.data_weight]
    allowed = argument_names(build) + ["per_column"] * problem.has_weight_grid
    return _call(build, options, "problem.data_weight_options", problem.data_weight, allowed)


def make_energy(
    config: RunConfig, regularizer: Regularizer | None = None, data_weight: DataWeight | None = None
) -> VariationalEnergy:
    """The variational energy, on the device of the run.

    Args:
        config: the settings.
        regularizer: ``None`` for regularizer and weights of the data term at the start of the training.
        data_weight: with a regularizer: the weights of the data term, ``None`` for 1.
    """
    if regularizer is None:
        regularizer, data_weight = make_regularizer(config.regularizer), make_data_weight(config)
    ridge = config.resolved().problem.ridge or 0.0
    return VariationalEnergy(regularizer, ridge=ridge, data_weight=data_weight).to(device_of(config))


def make_objective(
    config: RunConfig, energy: VariationalEnergy, data: ImagePairs | RandomPatches, folder: Path | None = None
) -> BilevelObjective | RandomPatchObjective:
    """The upper-level objective with the solvers of the settings.

    Args:
        config: the settings.
        energy: holds the parameters that are learned.
        data: what :func:`training_data` returned.
        folder: the run folder; needed for warm starts on the disk.

    Raises:
        ValueError: nothing to learn, larger minibatches than there are pairs, or no folder.
    """
    if not energy.theta:
        raise ValueError("regularizer: nothing to learn. Set regularizer.learn_weight or learn_smoothing to true.")
    for part in config.upper.lr_scale:
        if not any(part in name for name in energy.theta):
            raise ValueError(
                f"upper.lr_scale: no parameter has {part!r} in its name. Names: {', '.join(energy.theta)}."
            )
    options: dict[str, Any] = {"batch_size": config.data.batch_size}
    for name, registry in (("lower", LOWER_SOLVERS), ("linear", LINEAR_SOLVERS)):
        settings = getattr(config, name)
        limits = {} if settings.max_iter is None else {"max_iter": settings.max_iter}
        options[name] = registry[settings.solver](**limits)
    if config.upper.sampling_penalty:
        price = config.upper.sampling_penalty
        options["penalty"] = SamplingPenalty(energy, price, price * config.upper.sampling_binary)
    if isinstance(data, RandomPatches):
        return RandomPatchObjective(energy, data, **options)
    minibatch = config.upper.minibatch
    if minibatch is not None and minibatch > len(data):
        raise ValueError(f"upper.minibatch: expected at most {len(data)}, the number of patches. Got {minibatch}.")
    if minibatch is not None:
        options["generator"] = torch.Generator().manual_seed(config.seed)
        options["warm"] = _warm_starts(config, data, folder)
    return BilevelObjective(energy, data, minibatch=minibatch, **options)


def _warm_starts(config: RunConfig, pairs: ImagePairs, folder: Path | None) -> WarmStarts:
    if config.data.warm_starts == "memory":
        return WarmStarts("cpu")
    if config.data.warm_starts == "none":
        return NoWarmStarts()
    if folder is None:
        raise ValueError("data.warm_starts: expected a run folder for warm starts on the disk. Got none.")
    shapes = {index: x.shape for index, x in zip(pairs.indices, pairs.x, strict=True)}
    return DiskWarmStarts(folder / WARM_FOLDER, shapes, pairs.x[0].dtype)


# settings that a method may take as arguments of the same names
_METHOD_SETTINGS = (
    *("lr", "relative", "error_tol", "residual_tol", "tolerance", "stationarity_tol"),
    *("schedule", "warmup", "clip", "average", "lr_scale"),
)


def make_method(config: UpperConfig) -> UpperLevelMethod:
    """The upper-level method.

    Raises:
        ValueError: a setting that the method does not take.
    """
    build = UPPER_LEVEL_METHODS[config.method]
    defaults, accepted = UpperConfig(), inspect.signature(build).parameters
    given = {n: getattr(config, n) for n in _METHOD_SETTINGS if getattr(config, n) != getattr(defaults, n)}
    for name in given:
        if name not in accepted:
            raise ValueError(f"upper.{name}: {config.method} does not take it. Leave it out.")
    for name in _METHOD_SETTINGS:
        if name in config.options and name != "schedule":  # hoag has another one, of accuracies
            raise ValueError(f"upper.options: {name}: it is a setting of its own. Choose it by upper.{name}.")
    if "total_steps" in accepted:
        given["total_steps"] = config.max_steps
    own = {*_METHOD_SETTINGS, "total_steps"} - ({"schedule"} if config.method == "hoag" else set())
    allowed = [name for name in argument_names(build) if name not in own]
    if isinstance(build, partial):  # an optimizer of torch
        allowed += optimizer_options(*build.args)
    return _call(build, {**given, **config.options}, "upper.options", config.method, allowed)


def _call(
    build: Callable[..., Any], arguments: Mapping[str, Any], key: str, name: str, options: list[str] | None = None
) -> Any:
    """Build; arguments that do not exist are named, with the ``options`` that do, instead of a TypeError."""
    allowed = argument_names(build) if options is None else options
    if unknown := [given for given in arguments if given not in {*argument_names(build), *allowed}]:
        raise ValueError(f"{key}: {name} does not take {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")
    try:
        inspect.signature(build).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{key}: {name}: {error}.") from error
    try:
        return build(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{key.partition('.')[0]}: {name}: {error}") from error
