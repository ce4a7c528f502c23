"""Every regularizer, forward operator and solver under test, and independent references to compare them with.

A new model or solver is one line here, and every property test then runs over it. The reference here shares no code
with the package: dense matrices in numpy, Newton's method with iterative refinement in extended precision. For models
that it does not know there is ``autograd_reference``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepinv
import numpy as np
import pytest
import torch
from autograd_reference import AutogradReference
from torch import Tensor, nn

import bilevel_imaging as bi
from bilevel_imaging import linear_solvers, lower_solvers
from bilevel_imaging.energies import LowerLevelProblem

LONG = np.longdouble


class UserRegularizer(bi.Regularizer):
    """What a user writes: ``fn`` alone, here weight * sum log cosh of all differences (cyclic)."""

    def __init__(self, weight: float = 0.1, smoothing: float = 0.1):
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor(math.log(weight), dtype=torch.float64))
        self.smoothing = smoothing

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for axis in (-1, -2):
            t = (x - x.roll(1, axis)) / self.smoothing
            total = total + (t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2)).flatten(1).sum(1)
        return self.log_weight.exp().to(x.dtype) * self.smoothing * total


Build = Callable[[float, float], bi.Regularizer]

# name -> builder from (weight, smoothing)
CERTIFIED_REGULARIZERS: dict[str, Build] = {
    "tv_isotropic": lambda w, s: bi.TotalVariation(w, s),
    "tv_anisotropic": lambda w, s: bi.TotalVariation(w, s, isotropic=False),
    "tv_coupled": lambda w, s: bi.TotalVariation(w, s, couple_channels=True),
    "tv_weight_only": lambda w, s: bi.TotalVariation(w, s, learn_smoothing=False),
    "tv_smoothing_only": lambda w, s: bi.TotalVariation(w, s, isotropic=False, learn_weight=False),
    "tikhonov_identity": lambda w, s: bi.Tikhonov(w),
    "tikhonov_gradient": lambda w, s: bi.Tikhonov(w, operator="gradient"),
}
# certified on balls that no kink reaches
KINKED_REGULARIZERS: dict[str, Build] = {
    "huber_isotropic": lambda w, s: bi.regularizers.HuberTotalVariation(w, s),
    "huber_anisotropic": lambda w, s: bi.regularizers.HuberTotalVariation(w, s, isotropic=False),
    "huber_weight_only": lambda w, s: bi.regularizers.HuberTotalVariation(w, s, learn_smoothing=False),
    "linear_spline": lambda w, s: bi.regularizers.LinearSpline(w, s, learn_weight=True),
    # slopes that rise and fall
    "linear_spline_slopes": lambda w, s: bi.regularizers.LinearSpline(w, s, [0.7 / s, 1 / s, 0.2 / s]),
}
# certified, but not in the reference below: ``autograd_reference`` is for them
COMPOSED_REGULARIZERS: dict[str, Build] = {
    "second_order_tv": lambda w, s: bi.SecondOrderTotalVariation(w, s),
    "sum_of_orders": lambda w, s: bi.Sum(bi.TotalVariation(w, s), bi.SecondOrderTotalVariation(w / 2, s)),
    "scaled_sum": lambda w, s: bi.Scaled(
        bi.Sum(bi.TotalVariation(1.0, s, learn_weight=False), bi.Tikhonov(0.5, "gradient")), w
    ),
}
# likewise; they see all channels together, and have parameters of several numbers: (weight, smoothing, channels)
JOINT_REGULARIZERS: dict[str, Callable[[float, float, int], bi.Regularizer]] = {
    "fields_of_experts": lambda w, s, c: bi.FieldsOfExperts(2, 3, c, weight=w / 2, smoothing=s),
    "convex_ridge": lambda w, s, c: bi.ConvexRidge((2,), 3, c, knots=4, level=w / 2, curvature=w / 2 / s),
    "input_convex": lambda w, s, c: bi.InputConvex(c, (2, 2), 3, beta=1 / s, weight=5 * w),
    "noise_conditional": lambda w, s, c: bi.NoiseConditional(
        bi.FieldsOfExperts(2, 3, c, weight=w / 2, smoothing=s), (0.05, 0.2), reference=0.08
    ).at_noise_level(0.1),
}
REGULARIZERS: dict[str, Callable[..., bi.Regularizer]] = {
    **CERTIFIED_REGULARIZERS,
    **KINKED_REGULARIZERS,
    **COMPOSED_REGULARIZERS,
    **JOINT_REGULARIZERS,
    "user": UserRegularizer,
}


def _kernel(channels: int, generator: torch.Generator, size: int = 3) -> Tensor:
    kernel = torch.rand(1, channels, size, size, generator=generator) + 0.1
    return kernel / kernel.sum((-2, -1), keepdim=True)


def _laplacian() -> Tensor:
    return torch.tensor([[0.1, -0.5, 0.1], [-0.5, 1.7, -0.4], [0.1, -0.7, 0.2]]).reshape(1, 1, 3, 3)


def _inpainting(shape: tuple[int, ...], generator: torch.Generator, *, binary: bool) -> deepinv.physics.Physics:
    observed = torch.rand(1, *shape[1:], generator=generator)
    mask = (observed > 0.4).float() if binary else 0.3 + observed
    return deepinv.physics.Inpainting(tuple(shape[1:]), mask=mask)


def _mri(shape: tuple[int, ...], generator: torch.Generator, *, binary: bool) -> deepinv.physics.Physics:
    """A mask that keeps half of the frequencies, or weights of both signs, different for real and imaginary part."""
    drawn = torch.rand(1, 1 if binary else 2, *shape[2:], generator=generator)
    mask = (drawn > 0.5).float() if binary else (0.3 + drawn) * torch.where(drawn * 10 % 1 > 0.3, 1, -1)
    return deepinv.physics.MRI(mask=mask)


# name -> builder from the shape (B, C, H, W) and a generator
PHYSICS: dict[str, Callable[[tuple[int, ...], torch.Generator], deepinv.physics.Physics]] = {
    "denoising": lambda shape, g: deepinv.physics.Denoising(),
    "inpainting": lambda shape, g: _inpainting(shape, g, binary=True),
    "weighting": lambda shape, g: _inpainting(shape, g, binary=False),
    "blur_fft": lambda shape, g: deepinv.physics.BlurFFT(tuple(shape[1:]), filter=_kernel(1, g)),
    "blur_fft_color": lambda shape, g: deepinv.physics.BlurFFT(tuple(shape[1:]), filter=_kernel(shape[1], g)),
    # the filter in float64: nothing about this operator is uncertain
    "blur_circular": lambda shape, g: deepinv.physics.Blur(filter=_kernel(1, g).double(), padding="circular"),
    "mri": lambda shape, g: _mri(shape, g, binary=True),
    "mri_weighted": lambda shape, g: _mri(shape, g, binary=False),
}
COMPLEX_PHYSICS = ("mri", "mri_weighted")  # real and imaginary part are the two channels
# operators without an exact spectrum: only A and A_adjoint are used
GENERIC_PHYSICS: dict[str, Callable[[tuple[int, ...], torch.Generator], deepinv.physics.Physics]] = {
    "blur_reflect": lambda shape, g: deepinv.physics.Blur(filter=_kernel(1, g), padding="reflect"),
    # entries of both signs: A_adjoint of something positive says nothing about the size of the terms
    "sharpen_replicate": lambda shape, g: deepinv.physics.Blur(filter=_laplacian(), padding="replicate"),
}
NEEDS_RIDGE = ("inpainting", "blur_fft", "blur_fft_color", "blur_circular", "mri", *GENERIC_PHYSICS)

LOWER_SOLVERS = lower_solvers.LOWER_SOLVERS
LINEAR_SOLVERS = linear_solvers.LINEAR_SOLVERS
IMAGES = ("noisy", "flat", "saturated", "ramp", "zero")


def images(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A ground truth and what is measured of it before the forward operator, float64 ``(B, C, H, W)`` each."""
    batch, channels, height, width = shape
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    columns = torch.arange(width, dtype=torch.float64)[None, :]
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    level = torch.rand((batch, channels, 1, 1), dtype=torch.float64, generator=generator)
    if kind == "flat":
        return level.expand(shape).clone(), level.expand(shape).clone()
    if kind == "zero":
        return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    if kind == "ramp":
        ramp = level * (0.31 * rows / height + 0.47 * columns / width)
        return ramp, ramp + 1e-4 * noise
    if kind == "saturated":
        x = (torch.rand(shape, dtype=torch.float64, generator=generator) > 0.5).double()
        return x, (x + 0.5 * noise).clamp(0, 1).round()
    x = 0.2 + 0.6 * ((rows + 2 * columns + 5 * level) % 7 < 3).double()
    return x, x + 0.1 * noise


@dataclass
class Case:
    """One batch of problems with everything it was made from."""

    name: str
    energy: bi.VariationalEnergy
    physics: deepinv.physics.Physics
    y: Tensor
    x_true: Tensor
    problem: LowerLevelProblem


def build(
    regularizer: str = "tv_isotropic",
    physics: str = "denoising",
    *,
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
    channels: int = 1,
    size: tuple[int, int] = (8, 9),
    weight: float = 0.1,
    smoothing: float = 0.05,
    ridge: float | None = None,
    kind: str = "noisy",
    seed: int = 0,
) -> Case:
    """A batch of problems; ``ridge`` defaults to what the operator needs, and so does ``channels`` where it must."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 2 if physics in COMPLEX_PHYSICS else channels, *size)
    operator = {**PHYSICS, **GENERIC_PHYSICS}[physics](shape, generator)
    if physics in GENERIC_PHYSICS:
        operator = operator.to(dtype)
    x_true, clean = images(kind, shape, generator)
    x_true, y = x_true.to(dtype), copy.deepcopy(operator).double().A(clean).to(dtype)
    needed = 0.02 if physics in NEEDS_RIDGE else 0.0
    joint = (shape[1],) if regularizer in JOINT_REGULARIZERS else ()
    energy = bi.VariationalEnergy(
        REGULARIZERS[regularizer](weight, smoothing, *joint), ridge=needed if ridge is None else ridge
    )
    return Case(f"{regularizer}-{physics}", energy, operator, y, x_true, energy.bind(y, operator))


def product(
    *, physics: tuple[str, ...] = tuple(PHYSICS), user: bool = True, kinked: bool = False
) -> Iterator[tuple[str, str]]:
    """All pairs (regularizer, physics); without ``user`` those that the reference knows, with ``kinked`` also those
    whose parameters are vectors."""
    left_out = () if user else ("user", *COMPOSED_REGULARIZERS, *JOINT_REGULARIZERS)
    left_out += () if kinked else (*KINKED_REGULARIZERS, *JOINT_REGULARIZERS)
    for regularizer in (name for name in REGULARIZERS if name not in left_out):
        for operator in physics:
            yield regularizer, operator


def mostly_slow(pairs: Iterable[tuple[str, str]], every: int = 12) -> list[Any]:
    """The pairs as parameters of a test: one out of ``every`` is quick, the others are marked slow.

    The quick ones lie on diagonals of the table, so that all names on either side are among them as far as possible.
    """
    pairs = list(pairs)
    rows, columns = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    return [
        pytest.param(a, b, marks=[pytest.mark.slow] if (rows.index(a) + columns.index(b)) % every else [])
        for a, b in pairs
    ]


# --------------------------------------------------------------------------------------------------------------------
# the independent reference


def forward_matrix(physics: deepinv.physics.Physics, shape: tuple[int, ...], sample: int) -> np.ndarray | None:
    """A as a dense matrix in extended precision, its entries exactly the stored numbers; ``None`` for the identity."""
    channels, height, width = shape[1:]
    pixels = channels * height * width
    if isinstance(physics, deepinv.physics.Denoising):
        return None
    if isinstance(physics, deepinv.physics.Inpainting):
        mask = physics.mask.double().expand(shape[0], *shape[1:])[sample]
        return np.diag(mask.flatten().numpy().astype(LONG))
    if isinstance(physics, deepinv.physics.MRI):
        mask = physics.mask.double().expand(shape)[sample].numpy().astype(LONG)
        return mask.reshape(-1, 1) * fourier_matrix(height, width)
    kernel = physics.filter.double()
    if isinstance(physics, deepinv.physics.Blur) and physics.padding != "circular":
        columns = torch.eye(pixels, dtype=torch.float64).reshape(pixels, channels, height, width)
        return copy.deepcopy(physics).double().A(columns).flatten(1).T.numpy().astype(LONG)
    kernel = kernel[sample if kernel.shape[0] > 1 else 0].expand(channels, -1, -1).numpy()
    matrix = np.zeros((pixels, pixels), dtype=LONG)
    index = np.arange(pixels).reshape(channels, height, width)
    for i in range(kernel.shape[-2]):
        for j in range(kernel.shape[-1]):
            shift = (i - (kernel.shape[-2] - 1) // 2, j - (kernel.shape[-1] - 1) // 2)
            source = np.roll(index, shift, (1, 2))
            for c in range(channels):
                np.add.at(matrix, (index[c].ravel(), source[c].ravel()), LONG(kernel[c, i, j]))
    return matrix


def fourier_matrix(height: int, width: int) -> np.ndarray:
    """The unitary Fourier transform with both origins in the middle, real and imaginary parts stacked."""
    rows, columns = (np.arange(n) - n // 2 for n in (height, width))
    turns = [LONG(np.outer(k, k) % n) / n for k, n in ((rows, height), (columns, width))]
    angle = 8 * np.arctan(LONG(1)) * (turns[0][:, None, :, None] + turns[1][None, :, None, :])
    angle = angle.reshape(height * width, height * width)
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.block([[cosine, sine], [-sine, cosine]]) / np.sqrt(LONG(height * width))


def difference_matrix(shape: tuple[int, ...]) -> np.ndarray:
    """D, ``(2, pixels, pixels)``: horizontal and vertical differences, zero rows at the last column and row."""
    channels, height, width = shape[1:]
    index = np.arange(channels * height * width).reshape(channels, height, width)
    matrix = np.zeros((2, index.size, index.size))
    for k, (here, there) in enumerate([(index[..., :-1], index[..., 1:]), (index[:, :-1], index[:, 1:])]):
        matrix[k, here.ravel(), here.ravel()] = -1
        matrix[k, here.ravel(), there.ravel()] = 1
    return matrix


class Reference:
    """x*, adjoint, F and dF/dtheta of one sample with f = 1/2 ||x - x_true||^2, in extended precision.

    The factorizations are float64, all residuals are extended precision, so that every refinement gains several
    digits; ``uncertainty`` of each result is 4 times its last change plus a few units of float64 relative to the size
    of the terms that are added up: it is the reference's own error, far below any certificate.
    """

    def __init__(self, case: Case, sample: int = 0):
        regularizer, shape = case.energy.regularizer, tuple(case.x_true.shape)
        self.shape = shape[1:]
        self.weight = np.exp(LONG(float(regularizer.log_weight.detach())))
        self.ridge = LONG(case.energy.ridge)
        self.names = [n for n, p in regularizer.named_parameters() if p.requires_grad]
        self.D = difference_matrix(shape)
        self.A = forward_matrix(case.physics, shape, sample)
        self._set_model(regularizer)
        self.y = case.y[sample].detach().double().numpy().ravel().astype(LONG)
        self.x_true = case.x_true[sample].detach().double().numpy().ravel().astype(LONG)
        A64 = np.eye(self.D.shape[-1]) if self.A is None else self.A.astype(np.float64)
        self.AtA64 = A64.T @ A64
        self._solve()

    # --- the model, for z = D x of shape (2, pixels)
    def _set_model(self, regularizer: bi.Regularizer) -> None:
        self.tv = isinstance(regularizer, bi.TotalVariation)
        if self.tv:
            self.nu2 = np.exp(2 * LONG(float(regularizer.log_smoothing.detach())))
            self.isotropic, self.coupled = regularizer.isotropic, regularizer.couple_channels
            return
        self.identity = regularizer.operator == "identity"
        self.normal = np.eye(self.D.shape[-1]) if self.identity else sum(d.T @ d for d in self.D)

    def _differences(self, x: np.ndarray) -> np.ndarray:
        image = x.reshape(self.shape)
        z = np.zeros((2, *self.shape), dtype=x.dtype)
        z[0, ..., :-1] = image[..., 1:] - image[..., :-1]
        z[1, :, :-1] = image[:, 1:] - image[:, :-1]
        return z.reshape(2, -1)

    def _normal(self, x: np.ndarray) -> np.ndarray:
        return x if self.identity else self._adjoint(self._differences(x))

    def _group(self, a: np.ndarray) -> np.ndarray:
        if not self.isotropic:
            return a
        a = a.sum(0, keepdims=True)
        if self.coupled:
            a = a.reshape(1, self.shape[0], -1).sum(1, keepdims=True)
            a = np.broadcast_to(a, (1, self.shape[0], a.shape[-1])).reshape(1, -1)
        return a

    def _field(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        z = self._differences(x)
        return z, np.sqrt(self._group(z * z) + self.nu2)

    def _adjoint(self, p: np.ndarray) -> np.ndarray:
        horizontal, vertical = p.reshape(2, *self.shape)
        out = -horizontal - vertical
        out[..., 1:] += horizontal[..., :-1]
        out[:, 1:] += vertical[:, :-1]
        return out.ravel()

    def value(self, x: np.ndarray) -> LONG:
        """g(x)."""
        misfit = (x if self.A is None else self.A @ x) - self.y
        total = (misfit @ misfit + self.ridge * (x @ x)) / 2
        if not self.tv:
            return total + self.weight / 2 * (x @ self._normal(x))
        s = self._field(x)[1]
        if self.coupled:
            s = s.reshape(self.shape[0], -1)[:1]
        return total + self.weight * s.sum()

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """G(x) in extended precision."""
        misfit = (x if self.A is None else self.A @ x) - self.y
        data = misfit if self.A is None else self.A.T @ misfit
        if self.tv:
            z, s = self._field(x)
            inside = self._adjoint(z / s)
        else:
            inside = self._normal(x)
        return data + self.ridge * x + self.weight * inside

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """H(x) v in extended precision."""
        data = v if self.A is None else self.A.T @ (self.A @ v)
        if self.tv:
            z, s = self._field(x)
            dv = self._differences(v)
            inside = self._adjoint(dv / s - z / s**3 * self._group(z * dv))
        else:
            inside = self._normal(v)
        return data + self.ridge * v + self.weight * inside

    def hessian(self, x: np.ndarray) -> np.ndarray:
        """H(x), dense, float64."""
        H = self.AtA64 + float(self.ridge) * np.eye(x.size)
        if not self.tv:
            return H + float(self.weight) * self.normal
        z, s = (a.astype(np.float64) for a in self._field(x))
        s = np.broadcast_to(s, z.shape)
        n = z / s
        scaled = sum(d.T @ (d / t[:, None]) for d, t in zip(self.D, s, strict=True))
        if not self.isotropic:
            outer = sum(d.T @ (d * (m**2 / t)[:, None]) for d, m, t in zip(self.D, n, s, strict=True))
        else:
            rows = (n[0] / np.sqrt(s[0]))[:, None] * self.D[0] + (n[1] / np.sqrt(s[1]))[:, None] * self.D[1]
            if self.coupled:
                rows = rows.reshape(self.shape[0], -1, x.size).sum(0)
            outer = rows.T @ rows
        return H + float(self.weight) * (scaled - outer)

    def columns(self, x: np.ndarray) -> np.ndarray:
        """J(x), ``(n, pixels)``."""
        if not self.tv:
            return np.stack([self.weight * (self._normal(x))])
        z, s = self._field(x)
        both = {"log_weight": z / s, "log_smoothing": -self.nu2 * z / s**3}
        return np.stack([self.weight * self._adjoint(both[name]) for name in self.names])

    # --- Newton's method, then refinement
    def _newton(self, x: np.ndarray, limit: int, accuracy: float) -> tuple[np.ndarray, np.ndarray, bool]:
        """(x, the last step, whether no more is gained): damped steps until they are below ``accuracy``."""
        smallest = LONG(np.inf)
        for _ in range(limit):
            G = self.gradient(x)
            size = np.sqrt(G @ G)
            step = -np.linalg.solve(self.hessian(x), G.astype(np.float64)).astype(LONG)
            length = float(np.sqrt(step @ step))
            t, slope, value = LONG(1), G @ step, self.value(x)
            while t > 1e-12 and length > 1e-13 and self.value(x + t * step) > value + 1e-4 * t * slope:
                trial = self.gradient(x + t * step)
                if np.sqrt(trial @ trial) <= 0.9 * min(size, smallest):
                    break  # near the end energies say nothing any more; a record, so that no cycle passes
                t /= 2
            x = x + t * step
            if t == 1 and length < accuracy and (accuracy > 1e-11 or size >= smallest / 2):
                return x, t * step, True
            smallest = min(smallest, size)
        return x, t * step, False

    def _approach(self, x: np.ndarray) -> np.ndarray:
        """A point from which Newton's method converges."""
        if self.tv:
            # it is slow on total variation with little smoothing: start from problems with more
            wanted, self.nu2 = self.nu2, LONG(1)
            while self.nu2 > 4 * wanted:
                x = self._newton(x, 30, 1e-3)[0]
                self.nu2 /= 6
            self.nu2 = wanted
        return x

    def _solve(self) -> None:
        x = self._approach(self.x_true.copy() if self.A is not None else self.y.copy())
        x, step, done = self._newton(x, 1000, 1e-11)
        if not done:
            raise RuntimeError("the reference did not converge")
        size = float(np.sqrt(x @ x))
        self.x, self.x_uncertainty = x, 4 * float(np.sqrt(step @ step)) + 1e-18 * size
        H = np.linalg.inv(self.hessian(x))
        b = x - self.x_true
        q = np.zeros_like(b)
        for _ in range(12):
            change = (H @ (b - self.product(x, q)).astype(np.float64)).astype(LONG)
            q = q + change
        self.q = q
        self.J = self.columns(x)
        self.grad = -(self.J @ q)
        self.loss = float(b @ b) / 2
        # what the last changes of x and q can still do to the results, through finite perturbations of that size
        last_q = float(np.sqrt(change @ change))
        moved = self.columns(x + 4 * step)
        norm_q, norm_J = float(np.sqrt(q @ q)), float(np.sqrt((self.J**2).sum()))
        shifted = (H @ (b - self.product(x + 4 * step, q)).astype(np.float64)).astype(np.float64)
        self.uncertainty = (
            float(np.abs((moved - self.J) @ q).sum())
            + norm_J * (4 * last_q + 4 * float(np.linalg.norm(shifted)) + np.linalg.norm(H, 2) * self.x_uncertainty)
            + 1e-18 * norm_q * (norm_J + float(self.weight) * math.sqrt(q.size))
        )
        self.loss_uncertainty = float(np.sqrt(b @ b)) * self.x_uncertainty + 1e-18 * self.loss


class KinkedReference(Reference):
    """The same for potentials of differences whose derivative is a linear spline psi', among them Huber's.

    psi'(t) = sum_k s_k clip(t - k spacing, 0, spacing); of a vector z, psi(|z|).
    """

    def _set_model(self, regularizer: bi.Regularizer) -> None:
        self.coupled, self.isotropic = False, getattr(regularizer, "isotropic", False)
        self.stretch = LONG(1)
        if isinstance(regularizer, bi.regularizers.HuberTotalVariation):
            self.spacing = np.exp(LONG(float(regularizer.log_smoothing.detach())))
            self.slopes = np.array([1 / self.spacing])
        else:
            self.spacing = LONG(regularizer.spacing)
            self.slopes = np.exp(regularizer.log_slopes.detach().double().numpy().astype(LONG))

    def _approach(self, x: np.ndarray) -> np.ndarray:
        # psi'(t / stretch): the same saturation, reached later
        self.stretch = LONG(max(1.0, 2 / float(self.spacing * len(self.slopes))))
        while self.stretch > 1.5:
            x = self._newton(x, 30, 1e-3)[0]
            self.stretch /= 2
        self.stretch = LONG(1)
        return x

    def _parts(self, t: np.ndarray) -> np.ndarray:
        """How far t has come in every interval, ``(n, ...)``."""
        knots = self.spacing * np.arange(len(self.slopes)).reshape(-1, 1, 1)
        return np.clip(t / self.stretch - knots, 0, self.spacing)

    def _derivatives(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(z, z / |z|, psi'(|z|) / |z|, psi''(|z|))."""
        z = self._differences(x)
        t = np.sqrt(self._group(z * z))
        first = np.tensordot(self.slopes, self._parts(t), 1)
        interval = np.minimum((t / (self.stretch * self.spacing)).astype(int), len(self.slopes))
        second = np.append(self.slopes, 0)[interval] / self.stretch
        safe = np.where(t > 0, t, 1)
        return z, z / safe, np.where(t > 0, first / safe, second), second

    def value(self, x: np.ndarray) -> LONG:
        """g(x)."""
        misfit = (x if self.A is None else self.A @ x) - self.y
        z = self._differences(x)
        t = np.sqrt(self._group(z * z))
        ends = self.spacing * np.arange(1, len(self.slopes) + 1).reshape(-1, 1, 1)
        areas = self._parts(t) ** 2 / 2 + self.spacing * np.maximum(t / self.stretch - ends, 0)
        psi = self.stretch * np.tensordot(self.slopes, areas, 1)
        return (misfit @ misfit + self.ridge * (x @ x)) / 2 + self.weight * psi.sum()

    def gradient(self, x: np.ndarray) -> np.ndarray:
        """G(x) in extended precision."""
        misfit = (x if self.A is None else self.A @ x) - self.y
        z, _, ratio, _ = self._derivatives(x)
        data = misfit if self.A is None else self.A.T @ misfit
        return data + self.ridge * x + self.weight * self._adjoint(ratio * z)

    def product(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """H(x) v in extended precision."""
        data = v if self.A is None else self.A.T @ (self.A @ v)
        _, n, ratio, second = self._derivatives(x)
        dv = self._differences(v)
        inside = ratio * dv + (second - ratio) * n * self._group(n * dv)
        if not self.isotropic:
            inside = second * dv  # without 0 / 0 in a flat image
        return data + self.ridge * v + self.weight * self._adjoint(inside)

    def hessian(self, x: np.ndarray) -> np.ndarray:
        """H(x), dense, float64."""
        _, n, ratio, second = (a.astype(np.float64) for a in self._derivatives(x))
        H = self.AtA64 + float(self.ridge) * np.eye(x.size)
        if not self.isotropic:
            return H + float(self.weight) * sum(d.T @ (s[:, None] * d) for d, s in zip(self.D, second, strict=True))
        scaled = sum(d.T @ (ratio[0][:, None] * d) for d in self.D)
        rows = n[0][:, None] * self.D[0] + n[1][:, None] * self.D[1]
        return H + float(self.weight) * (scaled + rows.T @ ((second - ratio)[0][:, None] * rows))

    def columns(self, x: np.ndarray) -> np.ndarray:
        """J(x), ``(n, pixels)``."""
        z, n, ratio, second = self._derivatives(x)
        rows = []
        for name in self.names:
            if name == "log_weight":
                rows.append(ratio * z)
            elif name == "log_smoothing":
                rows.append(-second * z)
            else:
                t = np.sqrt(self._group(z * z))
                rows += list(self.slopes.reshape(-1, 1, 1) * self._parts(t) * n)
        return np.stack([self.weight * self._adjoint(row) for row in rows])


def reference_of(case: Case, sample: int = 0) -> Reference | AutogradReference:
    """The reference for the regularizer of a case."""
    regularizer = case.energy.regularizer
    if isinstance(regularizer, bi.TotalVariation | bi.Tikhonov):
        return Reference(case, sample)
    if isinstance(regularizer, bi.regularizers.HuberTotalVariation | bi.regularizers.LinearSpline):
        return KinkedReference(case, sample)
    return autograd_reference_of(case, sample)


def autograd_reference_of(case: Case, sample: int = 0) -> AutogradReference:
    """The reference that needs nothing but ``fn``, for any regularizer."""
    A = forward_matrix(case.physics, tuple(case.x_true.shape), sample)
    problem = case.problem.double() or case.problem
    own = problem.subset(torch.tensor([sample]))
    start = LOWER_SOLVERS["newton_cg"](max_iter=12).solve(problem if own is None else own, None, 1e-4).x
    return AutogradReference(case.energy, A, case.y[sample], case.x_true[sample], start[sample if own is None else 0])


def reference(case: Case) -> tuple[np.ndarray, float, float, float, list[Reference | AutogradReference]]:
    """(dF/dtheta, its uncertainty, F, its uncertainty, samples) for F = mean over the batch."""
    samples = [reference_of(case, i) for i in range(case.y.shape[0])]
    grad = np.mean([s.grad for s in samples], axis=0)
    return (
        grad,
        float(np.mean([s.uncertainty for s in samples])),
        float(np.mean([s.loss for s in samples])),
        float(np.mean([s.loss_uncertainty for s in samples])),
        samples,
    )


def exact_loss(objective: bi.BilevelObjective) -> tuple[float, float]:
    """(F, its uncertainty) at the current theta, from the dense reference in extended precision."""
    losses, uncertainties = [], []
    for position in range(len(objective.pairs)):
        batch = objective.pairs.batch([position])
        problem = objective.energy.bind(batch.y, batch.physics)
        _, _, loss, uncertainty, _ = reference(Case("pair", objective.energy, batch.physics, batch.y, batch.x, problem))
        losses.append(float(loss))
        uncertainties.append(float(uncertainty))
    # and a few units of rounding for the sum
    return sum(losses) / len(losses), max(uncertainties) + 1e-15 * sum(losses)
