"""Settings of a training run: plain dataclasses, the same in YAML, on the command line and in Python."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float64")
# pixels along each side of what is validated and tested: SSIM needs a few
SMALLEST_CROP = 16
# and of any image or patch
SMALLEST_IMAGE = 8
DEVICES = ("auto", "cpu", "cuda")
# what may change when a run is continued: nothing on which its steps depend (training images are compared by content)
RESUME_MAY_CHANGE = ("upper.max_steps", "logging.", "data.train", "data.val", "data.test")
WARM_STARTS = ("memory", "disk", "none")
# Operators with a null space, or nearly one, need one for strong convexity; all of them have a norm of about 1. Where
# much is missing, a large one would pull the image towards 0.
DEFAULT_RIDGE = {
    "denoising": 0.0,
    "deblurring": 1e-3,
    "inpainting": 1e-3,
    "super_resolution": 1e-3,
    "tomography": 1e-4,
    "mri": 1e-4,
}
# parameters are logarithms: this changes them by 5 % in a step, where the optimizers' own defaults change 0.1 %
DEFAULT_LR = {"adam": 0.05, "adamw": 0.05, "rmsprop": 0.05, "inexact_adam": 0.05}
# a change of the loss by 1e-5 of itself changes the PSNR by 4e-5 dB
DEFAULT_TOLERANCE = {"maid": 1e-5}

# of images in [0, 1]; what is larger is meant in other units
LARGEST_NOISE = 5.0


@dataclass(frozen=True)
class DataConfig:
    """Images.

    Tomography and MRI measure an image as a whole: there every patch is an object of its own, and the operator is that
    for its size. Fixed patches are then the centers of the images, one each; random ones may lie anywhere.

    Attributes:
        train: folder of training images; empty for the bundled photographs.
        val: folder of validation images; empty for the bundled ones, or a part of the training folder held out.
        test: folder of test images; empty for the bundled ones, or the validation images with a folder of your own.
        patch_size: height and width of the training patches, pixels.
        patches_per_image: patches from every training image; in tomography and MRI it is always the center alone.
        random_patches: instead of so many fixed patches, cut ``upper.minibatch`` new ones for every step, turned and
            flipped at random, with new noise; for large folders and many steps of a first-order method.
        color: train on RGB instead of gray images; not in MRI.
        batch_size: most images solved together; limits memory, and changes results within their certificates only.
            Under torchrun processes share the batches, which become smaller where some would have too little to do.
        max_images: use the first so many images of every set; 0 for all.
        eval_size: validation and test images are cropped to at most this height and width, pixels; to a square in
            tomography, and to patch_size with problem.data_weight frequencies or mask, whose weights are for that size.
        warm_starts: with minibatches of fixed patches, where the last solutions of every patch are kept to start from:
            memory (and every checkpoint), disk (files in the run folder; resuming after a kill is then exact to the
            accuracy of the solves, not bit for bit) or none.
    """

    train: str = ""
    val: str = ""
    test: str = ""
    patch_size: int = 128
    patches_per_image: int = 2
    random_patches: bool = False
    color: bool = False
    batch_size: int = 64
    max_images: int = 0
    eval_size: int = 256
    warm_starts: str = "memory"

    def __post_init__(self) -> None:
        _true_or_false("data", self, "random_patches", "color")
        _one_of("data.warm_starts", self.warm_starts, WARM_STARTS)
        least_sizes = (
            ("patch_size", SMALLEST_IMAGE),
            ("patches_per_image", 1),
            ("batch_size", 1),
            ("eval_size", SMALLEST_CROP),
        )
        for name, least in least_sizes:
            _at_least(f"data.{name}", getattr(self, name), least)
        _at_least("data.max_images", self.max_images, 0)


@dataclass(frozen=True)
class ProblemConfig:
    """Forward operator, noise and arithmetic.

    Attributes:
        kind: denoising, deblurring (Gaussian blur), inpainting (missing pixels), super_resolution (every factor-th
            pixel after a Gaussian blur), tomography (parallel beams) or mri (one coil, some columns of k-space; images
            are complex and start with an imaginary part of zero, and scores are those of magnitudes).
        sigma: standard deviation of the noise in the measurement, in units of the image range [0, 1]; in tomography,
            of the largest value in the noiseless sinogram of the image; in mri, of the largest magnitude of the image,
            for the real and the imaginary part of every measured entry each (the transform is unitary).
        sigma_range: [low, high] to give every training patch a noise level of its own, uniform between them; sigma is
            then that of validation and test alone. null for sigma everywhere.
        blur_size: width of the blur kernel, pixels, odd.
        blur_std: standard deviation of the blur kernel, pixels.
        kept_fraction: part of the pixels that inpainting keeps.
        ridge: coefficient of 1/2 ||x||^2; null for 0 in denoising, 0.0001 in tomography and mri, and 0.001 otherwise.
        dtype: float32 or float64, for the training.
        device: auto (CUDA if there is one), cpu or cuda.
        padding: what deblurring sees outside of the image: circular, reflect, replicate, constant (zeros) or valid
            (nothing: measurements are smaller than images).
        factor: of super_resolution.
        views: directions of tomography, equispaced in [0, 180) degrees.
        acceleration: of mri, 1 / part of the columns of k-space that are measured.
        center_fraction: of mri, part of the columns around the zero frequency that is measured for certain.
        data_weight: learn weights W of the misfit 1/2 ||W^(1/2) (A x - y)||^2: noise (one number, any kind),
            frequencies (one per frequency; denoising, circular deblurring, mri), mask (how much every entry of k-space
            is used: a sampling pattern; mri, with acceleration 1 for a choice of all). null for 1. The grid search that
            results are compared with always has 1.
        data_weight_options: arguments of the weights by name, e.g. value (of noise and frequencies) or start (of mask)
            at the start; per_column true for one number per column instead of one per entry of the grid.
    """

    kind: str = "denoising"
    sigma: float = 0.1
    sigma_range: tuple[float, float] | None = None
    blur_size: int = 9
    blur_std: float = 1.5
    kept_fraction: float = 0.7
    ridge: float | None = None
    dtype: str = "float32"
    device: str = "auto"
    padding: str = "circular"
    factor: int = 2
    views: int = 60
    acceleration: float = 4.0
    center_fraction: float = 0.08
    data_weight: str | None = None
    data_weight_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from bilevel_imaging.data.degradations import KINDS, PADDINGS

        _one_of("problem.kind", self.kind, KINDS)
        _one_of("problem.padding", self.padding, PADDINGS)
        _one_of("problem.dtype", self.dtype, DTYPES)
        _one_of("problem.device", self.device, DEVICES)
        _number("problem.sigma", self.sigma, ">= 0")
        if max(self.sigma, *(self.sigma_range or (0.0,))) > LARGEST_NOISE:
            raise ValueError(
                f"problem.sigma: expected at most {LARGEST_NOISE:g}, as images are in [0, 1]; divide levels of 8-bit "
                f"images by 255. Got {self.sigma_range or self.sigma}."
            )
        if self.sigma_range is not None and not 0 <= self.sigma_range[0] <= self.sigma_range[1] < math.inf:
            low, high = self.sigma_range
            raise ValueError(f"problem.sigma_range: expected finite numbers 0 <= low <= high. Got [{low}, {high}].")
        _number("problem.blur_std", self.blur_std, "> 0")
        if self.blur_size < 1 or self.blur_size % 2 == 0:
            raise ValueError(f"problem.blur_size: expected an odd number >= 1. Got {self.blur_size}.")
        for name in ("kept_fraction", "center_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"problem.{name}: expected a number in (0, 1]. Got {getattr(self, name)}.")
        _at_least("problem.factor", self.factor, 2)
        _at_least("problem.views", self.views, 1)
        if not 1 <= self.acceleration < math.inf:
            raise ValueError(f"problem.acceleration: expected a finite number >= 1. Got {self.acceleration}.")
        if self.padding != "circular" and self.kind != "deblurring":
            raise ValueError(f"problem.padding: {self.kind} does not take it. Leave it out.")
        self._check_data_weight()
        if self.ridge is not None:
            needed = self.kind != "denoising"
            _number("problem.ridge", self.ridge, "> 0" if needed else ">= 0", f" for {self.kind}" if needed else "")

    def _check_data_weight(self) -> None:
        from bilevel_imaging.energies import DATA_WEIGHTS

        if self.data_weight is None:
            if self.data_weight_options:
                raise ValueError("problem.data_weight_options: expected problem.data_weight with them. Got null.")
            return
        _one_of("problem.data_weight", self.data_weight, DATA_WEIGHTS)
        circular = self.kind == "denoising" or (self.kind == "deblurring" and self.padding == "circular")
        if self.data_weight == "mask" and self.kind != "mri":
            raise ValueError(f"problem.data_weight: mask is for mri. Got {self.kind}; noise fits every kind.")
        if self.data_weight == "frequencies" and self.kind != "mri" and not circular:
            what = f"{self.kind} with padding {self.padding}" if self.kind == "deblurring" else self.kind
            raise ValueError(
                f"problem.data_weight: frequencies is for denoising, circular deblurring and mri. Got {what}; noise "
                "fits every kind."
            )

    @property
    def has_weight_grid(self) -> bool:
        """Whether the data weights belong to one size of images."""
        return self.data_weight in ("frequencies", "mask")


@dataclass(frozen=True)
class RegularizerConfig:
    """The regularizer and where its parameters start.

    Attributes:
        kind: name of the regularizer, e.g. total_variation or tikhonov.
        start: file of an exported regularizer whose parameters are the start, e.g. a run's regularizer.safetensors; it
            must be of this kind and size, or of those of the regularizer inside noise_conditional. Empty for the start
            that the other settings give.
        start_scale: R(scale x) / scale instead of the R of that file (ridge regularizers): its potentials bend within a
            range this many times smaller, which fits better once they are as sharp as their knots allow.
        weight: its weight at the start; null for the regularizer's own default.
        smoothing: its smoothing at the start (total variation, fields of experts); null likewise.
        isotropic: one root per pixel instead of one per difference (total variation).
        couple_channels: one root for all channels (total variation, color).
        learn_weight: learn the weight; null for the regularizer's own default.
        learn_smoothing: learn the smoothing; null likewise.
        operator: identity or gradient (tikhonov).
        options: further arguments of the regularizer by name.
    """

    kind: str = "total_variation"
    weight: float | None = None
    smoothing: float | None = None
    isotropic: bool = True
    couple_channels: bool = False
    learn_weight: bool | None = None
    learn_smoothing: bool | None = None
    operator: str = "gradient"
    options: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    start_scale: float | None = None

    def __post_init__(self) -> None:
        from bilevel_imaging.regularizers import REGULARIZERS, Tikhonov

        _one_of("regularizer.kind", self.kind, REGULARIZERS)
        _one_of("regularizer.operator", self.operator, Tikhonov.OPERATORS)
        _true_or_false("regularizer", self, "isotropic", "couple_channels")
        _true_or_false("regularizer", self, "learn_weight", "learn_smoothing", null=True)
        for name in ("weight", "smoothing", "start_scale"):
            if getattr(self, name) is not None:
                _number(f"regularizer.{name}", getattr(self, name), "> 0")
        if self.start_scale is not None and not self.start:
            raise ValueError("regularizer.start_scale: expected a file in regularizer.start, whose scale it changes.")

    def resolved(self) -> RegularizerConfig:
        """With the regularizer's own defaults where it takes what was left open."""
        from bilevel_imaging.regularizers import REGULARIZERS

        accepted = inspect.signature(REGULARIZERS[self.kind]).parameters
        names = ("weight", "smoothing", "learn_weight", "learn_smoothing")
        left = [n for n in names if getattr(self, n) is None and n in accepted and n not in self.options]
        own = {n: accepted[n].default for n in left if accepted[n].default is not inspect.Parameter.empty}
        return replace(self, **own)


@dataclass(frozen=True)
class LowerConfig:
    """Lower-level solver: computes the reconstructions.

    Attributes:
        solver: name of the solver, e.g. newton_cg, lbfgs or accelerated_gradient.
        max_iter: iteration limit per image; null for the solver's own.
    """

    solver: str = "newton_cg"
    max_iter: int | None = None

    def __post_init__(self) -> None:
        from bilevel_imaging.lower_solvers import LOWER_SOLVERS

        _one_of("lower.solver", self.solver, LOWER_SOLVERS)
        if self.max_iter is not None:
            _at_least("lower.max_iter", self.max_iter, 1)


@dataclass(frozen=True)
class LinearConfig:
    """Linear solver: computes the adjoints of the hypergradients.

    Attributes:
        solver: name of the solver, e.g. conjugate_gradient.
        max_iter: iteration limit per image; null for the solver's own.
    """

    solver: str = "conjugate_gradient"
    max_iter: int | None = None

    def __post_init__(self) -> None:
        from bilevel_imaging.linear_solvers import LINEAR_SOLVERS

        _one_of("linear.solver", self.solver, LINEAR_SOLVERS)
        if self.max_iter is not None:
            _at_least("linear.max_iter", self.max_iter, 1)


@dataclass(frozen=True)
class UpperConfig:
    """Upper-level method: changes the parameters. null leaves a choice to the method.

    Attributes:
        method: maid (chooses accuracies and steps itself), another that compares losses of all images such as hoag,
            a first-order one such as adam or sgd, one of these with accuracies and steps that fall (inexact_sgd,
            inexact_adam), or one that follows the reconstructions instead of computing them anew (fsla, which needs
            hundreds of its cheap steps, mrbo, vrbo).
        max_steps: steps of the whole run; it ends earlier when the method has converged.
        lr: learning rate of a first-order method, the first one if it falls.
        relative: hypergradients are certified to this fraction of their norm.
        error_tol: fixed lower-level accuracy instead of relative (first-order methods); of inexact_* the first one.
        residual_tol: fixed adjoint accuracy instead of relative (first-order methods); likewise.
        tolerance: stop when a step is predicted to lower the loss by less than this fraction (maid, noisy_line_search,
            noisy_trust_region, kunisch_pock); what counts as equal in dfo_ls and grid.
        stationarity_tol: stop when the norm of the exact hypergradient is certified to be at most this; null for never.
        minibatch: patches of one step, in shuffled order (first-order methods); null for all.
        schedule: of the learning rate: constant, or cosine, which falls to a hundredth of it over max_steps
            (first-order methods); another max_steps at a resume changes it from there on.
        warmup: first steps, in which the learning rate rises linearly from zero (first-order methods).
        clip: scale hypergradients down to so many times the running median of their norms, at least 1, so that one bad
            minibatch cannot wreck a long run (first-order methods); null for never.
        average: part of the run at its end, between 0 and 1, over which the parameters are averaged; the average is
            what is validated, exported and evaluated (first-order methods). 0 for the last parameters.
        lr_scale: factors of lr by part of a parameter's name, e.g. {"regularizer.log_weight": 0.1}; the longest part
            that fits counts (first-order methods).
        sampling_penalty: with problem.data_weight mask: what measuring all of k-space costs, in the units of the loss,
            which is 1/2 times the sum of the squared errors of an image; the mean of the mask is multiplied by it. Set
            regularizer.learn_weight to false: else the weight and the whole mask shrink together to avoid it.
        sampling_binary: further price of S (1 - S) over sampling_penalty, which drives S to 0 or 1; it grows from
            nothing after a third of max_steps to this number at their end (first-order methods).
        options: further arguments of the method by name.
    """

    method: str = "maid"
    max_steps: int = 50
    lr: float | None = None
    relative: float | None = None
    error_tol: float | None = None
    residual_tol: float | None = None
    tolerance: float | None = None
    stationarity_tol: float | None = None
    minibatch: int | None = None
    schedule: str = "constant"
    warmup: int = 0
    clip: float | None = None
    average: float = 0.0
    lr_scale: dict[str, float] = field(default_factory=dict)
    sampling_penalty: float = 0.0
    sampling_binary: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from bilevel_imaging.upper_level import ALL_IMAGES_METHODS, UPPER_LEVEL_METHODS
        from bilevel_imaging.upper_level.long_runs import SCHEDULES

        _one_of("upper.method", self.method, UPPER_LEVEL_METHODS)
        _at_least("upper.max_steps", self.max_steps, 0)
        for name in ("lr", "relative", "error_tol", "residual_tol", "tolerance", "stationarity_tol"):
            if getattr(self, name) is not None:
                _number(f"upper.{name}", getattr(self, name), "> 0")
        for name in ("sampling_penalty", "sampling_binary"):
            _number(f"upper.{name}", getattr(self, name), ">= 0")
        if self.sampling_binary and not self.sampling_penalty:
            raise ValueError("upper.sampling_binary: expected upper.sampling_penalty > 0 with it. Got 0.")
        if self.sampling_binary and self.method in ALL_IMAGES_METHODS:
            raise ValueError(
                f"upper.sampling_binary: changes the loss from step to step, but {self.method} compares losses. "
                "Choose another upper.method."
            )
        _one_of("upper.schedule", self.schedule, SCHEDULES)
        _at_least("upper.warmup", self.warmup, 0)
        if self.clip is not None and not 1 <= self.clip < math.inf:
            raise ValueError(f"upper.clip: expected a finite number >= 1. Got {self.clip}.")
        if not 0 <= self.average <= 1:
            raise ValueError(f"upper.average: expected a number in [0, 1]. Got {self.average}.")
        for part, scale in self.lr_scale.items():
            _number(f"upper.lr_scale: {part}", scale, "> 0")
        if self.minibatch is not None:
            _at_least("upper.minibatch", self.minibatch, 1)
            if self.method in ALL_IMAGES_METHODS:
                raise ValueError(
                    f"upper.minibatch: {self.method} compares losses of all images. Choose another upper.method."
                )
            if self.stationarity_tol is not None:
                raise ValueError(
                    "upper.stationarity_tol: a minibatch does not say how large the mean is. Leave it out."
                )


@dataclass(frozen=True)
class LoggingConfig:
    """What is shown and saved while training; none of it changes the result.

    Attributes:
        validate_every: steps between two validations; 0 for only at the end.
        validate_images: validate with the first so many images; 0 for all.
        checkpoint_every: steps between two checkpoints.
        tensorboard: write TensorBoard events.
        progress: show the progress.
        evaluate: at the end, compare on the test images with total variation (or the same tikhonov) whose weight is
            found by a grid search on training patches; false for the scores of what was learned alone.
    """

    validate_every: int = 5
    validate_images: int = 0
    checkpoint_every: int = 5
    tensorboard: bool = True
    progress: bool = True
    evaluate: bool = True

    def __post_init__(self) -> None:
        _true_or_false("logging", self, "tensorboard", "progress", "evaluate")
        _at_least("logging.validate_every", self.validate_every, 0)
        _at_least("logging.validate_images", self.validate_images, 0)
        _at_least("logging.checkpoint_every", self.checkpoint_every, 1)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run.

    Attributes:
        data: images.
        problem: forward operator, noise and arithmetic.
        regularizer: the regularizer and where its parameters start.
        lower: lower-level solver.
        linear: linear solver.
        upper: upper-level method.
        logging: what is shown and saved.
        seed: of patches, noise and minibatches; validation and test noise is the same for every seed.
    """

    data: DataConfig = field(default_factory=DataConfig)
    problem: ProblemConfig = field(default_factory=ProblemConfig)
    regularizer: RegularizerConfig = field(default_factory=RegularizerConfig)
    lower: LowerConfig = field(default_factory=LowerConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    upper: UpperConfig = field(default_factory=UpperConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        from bilevel_imaging.upper_level import ALL_IMAGES_METHODS, FOLLOWING_METHODS

        data, upper = self.data, self.upper
        if data.color and self.problem.kind == "mri":
            raise ValueError("data.color: mri reconstructs complex images of one channel. Leave it out.")
        if upper.sampling_penalty and self.problem.data_weight != "mask":
            raise ValueError(
                f"upper.sampling_penalty: expected problem.data_weight mask. Got {self.problem.data_weight or 'null'}."
            )
        if data.random_patches and upper.method in ALL_IMAGES_METHODS:
            raise ValueError(
                f"data.random_patches: {upper.method} compares losses of all images. Choose another upper.method."
            )
        if upper.method in FOLLOWING_METHODS and (data.random_patches or data.warm_starts == "none"):
            key = "random_patches" if data.random_patches else "warm_starts"
            raise ValueError(
                f"data.{key}: {upper.method} keeps a point of every patch from step to step. Choose fixed patches, "
                "with warm starts in memory or on the disk."
            )
        if data.random_patches and upper.minibatch is None:
            raise ValueError(
                "data.random_patches: expected upper.minibatch, the number of patches of a step. Got null."
            )
        if data.warm_starts != "memory" and (data.random_patches or upper.minibatch is None):
            raise ValueError(
                f"data.warm_starts: expected memory unless fixed patches come in minibatches. Got {data.warm_starts}."
            )

    def resolved(self) -> RunConfig:
        """The same with choices that were left open filled in and folders as absolute paths."""
        folders = {n: _absolute(getattr(self.data, n)) for n in ("train", "val", "test")}
        regularizer = replace(self.regularizer.resolved(), start=_absolute(self.regularizer.start))
        ridge, upper = self.problem.ridge, self.upper
        lr = DEFAULT_LR.get(upper.method) if upper.lr is None else upper.lr
        tolerance = DEFAULT_TOLERANCE.get(upper.method) if upper.tolerance is None else upper.tolerance
        if ridge is None:
            ridge = DEFAULT_RIDGE[self.problem.kind]
        return replace(
            self,
            data=replace(self.data, **folders),
            problem=replace(self.problem, ridge=ridge),
            regularizer=regularizer,
            upper=replace(upper, lr=lr, tolerance=tolerance),
        )

    def differences(self, other: RunConfig) -> list[str]:
        """Dotted names of the settings in which two configurations differ."""
        result = [] if self.seed == other.seed else ["seed"]
        for group in fields(self):
            mine, theirs = getattr(self, group.name), getattr(other, group.name)
            if mine != theirs and group.name != "seed":
                names = [f.name for f in fields(mine)]
                result += [f"{group.name}.{n}" for n in names if getattr(mine, n) != getattr(theirs, n)]
        return result

    def check_resumes(self, saved: RunConfig) -> None:
        """Refuse to continue a run with other settings.

        Raises:
            ValueError: something differs from ``saved`` that may not.
        """
        changed = [name for name in saved.differences(self) if not name.startswith(RESUME_MAY_CHANGE)]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: cannot change when a run is resumed, only upper.max_steps, logging and the "
                "folders of images can. Start a new run for other settings."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The settings that ``dataclasses.asdict`` gave, of other versions too: what one of them lacks is a default."""
        groups: dict[str, Any] = {}
        for group in (f for f in fields(cls) if f.name in values):
            value = values[group.name]
            if is_dataclass(kind := group.default_factory):
                names = {f.name for f in fields(kind)}
                value = kind(**{name: one for name, one in value.items() if name in names})  # type: ignore[operator]
            groups[group.name] = value
        return cls(**groups)


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().resolve()) if folder else ""


def _one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}: expected one of {', '.join(allowed)}. Got {value!r}.")


def _true_or_false(group: str, settings: Any, *names: str, null: bool = False) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (isinstance(value, bool) or (null and value is None)):
            expected = "true, false or null" if null else "true or false"
            raise ValueError(f"{group}.{name}: expected {expected}. Got {value!r}.")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}: expected an integer >= {least}. Got {value}.")


def _number(key: str, value: float, condition: str, when: str = "") -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and condition == "> 0"):
        raise ValueError(f"{key}: expected a finite number {condition}{when}. Got {value}.")
