"""Time to a hypergradient of known error: ours with its certificate, beside plain PyTorch unrolling, in one run."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import deepinv
import torch
from torch import Tensor

from bilevel_imaging.data import Degradation, ImagePairs, extract_patches, photographs
from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.regularizers import TotalVariation
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

UNROLLED_STEPS = (30, 60, 120)
BASELINE = "unrolled 60 steps, autograd"


@dataclass(frozen=True)
class Workload:
    """Smoothed TV denoising of photograph crops.

    Attributes:
        images: crops, all in one batch.
        size: pixels along each side.
        weight: TV weight.
        smoothing: TV smoothing.
        sigma: standard deviation of the noise.
        dtype: "float32" or "float64".
        device: "cpu" or "cuda".
    """

    images: int = 16
    size: int = 128
    weight: float = 0.1
    smoothing: float = 0.01
    sigma: float = 0.1
    dtype: str = "float32"
    device: str = "cpu"

    def build(self, dtype: torch.dtype | None = None) -> tuple[VariationalEnergy, Tensor, Tensor]:
        """Energy, ground truth and measurements, ``(images, 1, size, size)``."""
        pictures = photographs()
        each = -(-self.images // len(pictures))
        crops = extract_patches(pictures, self.size, each, seed=0)[: self.images]
        pairs = ImagePairs.build(
            crops, Degradation("denoising", sigma=self.sigma), dtype or getattr(torch, self.dtype), self.device
        )
        energy = VariationalEnergy(TotalVariation(self.weight, self.smoothing)).to(self.device)
        return energy, torch.stack(pairs.x), torch.stack(pairs.y)


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        name: method.
        seconds: median of the repeats.
        error: true relative error of the hypergradient, against a float64 reference.
        bound: relative bound that the method itself reports; ``None`` if it reports none.
        gradients: lower-level gradients per image.
        hvps: Hessian-vector products per image.
        mixed_products: products with the mixed derivative per image.
    """

    name: str
    seconds: float
    error: float
    bound: float | None
    gradients: float
    hvps: float
    mixed_products: float


def _value(z: Tensor, y: Tensor, weight: Tensor, smoothing: Tensor) -> Tensor:
    dx = torch.nn.functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
    dy = torch.nn.functional.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1))
    return 0.5 * ((z - y) ** 2).sum() + weight * torch.sqrt(dx * dx + dy * dy + smoothing * smoothing).sum()


def _autograd_gradient(z: Tensor, y: Tensor, weight: Tensor, smoothing: Tensor) -> Tensor:
    leaf = z if z.requires_grad else z.detach().requires_grad_(True)
    return torch.autograd.grad(_value(leaf, y, weight, smoothing), leaf, create_graph=True)[0]


def _written_gradient(z: Tensor, y: Tensor, weight: Tensor, smoothing: Tensor) -> Tensor:
    dx = torch.nn.functional.pad(z[..., 1:] - z[..., :-1], (0, 1))
    dy = torch.nn.functional.pad(z[..., 1:, :] - z[..., :-1, :], (0, 0, 0, 1))
    length = torch.sqrt(dx * dx + dy * dy + smoothing * smoothing)
    px, py = dx / length, dy / length
    transposed = torch.nn.functional.pad(px[..., :-1], (1, 0)) - px
    transposed = transposed + torch.nn.functional.pad(py[..., :-1, :], (0, 0, 1, 0)) - py
    return z - y + weight * transposed


def plain_unrolling(
    energy: VariationalEnergy, x_true: Tensor, y: Tensor, steps: int, gradient: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """What one writes without this package: accelerated gradient steps recorded by autograd, then ``backward``.

    ``gradient`` is that of the energy by autograd, which is what needs no formula, or written out by hand. The step is
    1 / (1 + 8 weight / smoothing), the momentum that of Nesterov for strongly convex functions.
    """
    regularizer = energy.regularizer
    weight, smoothing = regularizer.log_weight.exp().to(y.dtype), regularizer.log_smoothing.exp().to(y.dtype)
    smoothness = float((1 + 8 * weight / smoothing).detach())
    momentum = (smoothness**0.5 - 1) / (smoothness**0.5 + 1)
    x = z = y
    for _ in range(steps):
        ahead = z - gradient(z, y, weight, smoothing) / smoothness
        x, z = ahead, ahead + momentum * (ahead - x)
    loss = 0.5 * ((x - x_true) ** 2).sum() / len(y)
    names = list(energy.theta)
    return dict(zip(names, torch.autograd.grad(loss, [energy.theta[n] for n in names]), strict=True))


def run(workload: Workload, *, repeats: int = 7, relatives: tuple[float, ...] = (0.5, 0.1, 0.01)) -> dict[str, Any]:
    """All methods, each ``repeats`` times after one warm-up; medians. Returns the record that is saved as JSON."""
    energy, x_true, y = workload.build()
    reference = _reference(workload)
    methods: dict[str, Callable[[], Any]] = {}
    for steps in UNROLLED_STEPS:
        for kind, gradient in (("autograd", _autograd_gradient), ("hand-written", _written_gradient)):
            methods[f"unrolled {steps} steps, {kind} gradient"] = partial(
                plain_unrolling, energy, x_true, y, steps, gradient
            )
    for eta in relatives:
        methods[f"certified, relative={eta:g}"] = lambda eta=eta: hypergradient(
            energy.bind(y, deepinv.physics.Denoising()), SquaredError(), x_true, relative=eta
        )
    methods["polished, error_tol=0.01"] = lambda: hypergradient(
        energy.bind(y, deepinv.physics.Denoising()), SquaredError(), x_true, error_tol=0.01, certificate="polished"
    )
    outputs, seconds = {}, {}
    for name, method in methods.items():  # one method at a time: each finds the memory that its own last run freed
        outputs[name] = method()
        seconds[name] = [_timed(method, workload.device) for _ in range(repeats)]
    results = [_result(name, _median(seconds[name]), outputs[name], reference, len(y)) for name in methods]
    return {
        "workload": asdict(workload),
        "environment": environment(workload.device),
        "repeats": repeats,
        "reference_relative_bound": reference.relative_bound,
        "bounds_by_certificate": {k: v / outputs_norm(outputs, relatives[0]) for k, v in bounds(outputs, relatives)},
        "results": [asdict(r) for r in results],
    }


def bounds(outputs: dict[str, Any], relatives: tuple[float, ...]) -> list[tuple[str, float]]:
    """Every certificate of the first certified run, largest first."""
    first: Hypergradient = outputs[f"certified, relative={relatives[0]:g}"]
    return sorted(first.bounds.items(), key=lambda item: -item[1])


def outputs_norm(outputs: dict[str, Any], eta: float) -> float:
    """Norm of the first certified estimate."""
    return outputs[f"certified, relative={eta:g}"].norm


def _reference(workload: Workload) -> Hypergradient:
    energy, x_true, y = workload.build()
    return hypergradient(
        energy.bind(y.double(), deepinv.physics.Denoising()), SquaredError(), x_true.double(), relative=1e-8
    )


def _timed(method: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    method()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _result(name: str, seconds: float, output: Any, reference: Hypergradient, batch: int) -> Result:
    true = flatten(reference.grad)
    if isinstance(output, Hypergradient):
        error = float((flatten(output.grad) - true).norm() / true.norm())
        cost = output.cost
        bound: float | None = output.relative_bound
        counts = (cost.gradients / batch, cost.hvps / batch, cost.mixed_products / batch)
    else:
        steps = float(name.split()[1])
        error, bound, counts = float((flatten(output) - true).norm() / true.norm()), None, (steps, steps, steps)
    return Result(name, seconds, error, bound, *counts)


def environment(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "torch": torch.__version__,
        "deepinv": deepinv.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "processor": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }


def table(record: dict[str, Any]) -> str:
    """The record as a text table; seconds relative to 60 unrolled steps."""
    rows = record["results"]
    base = next(r["seconds"] for r in rows if r["name"].startswith(BASELINE))
    lines = [
        f"{'method':41s} {'time/unrolled 60':>16s} {'seconds':>8s} {'true error':>11s} {'own bound':>10s} "
        f"{'grads':>6s} {'HVPs':>6s} {'mixed':>6s}   (work per image; unrolling: one reverse sweep per step)"
    ]
    for r in rows:
        bound = "none" if r["bound"] is None else f"{r['bound']:.2e}"
        lines.append(
            f"{r['name']:41s} {r['seconds'] / base:16.2f} {r['seconds']:8.3f} {r['error']:11.2e} {bound:>10s} "
            f"{r['gradients']:6.0f} {r['hvps']:6.0f} {r['mixed_products']:6.0f}"
        )
    certificates = ", ".join(f"{name} {value:.2e}" for name, value in record["bounds_by_certificate"].items())
    lines.append(f"relative bounds of the first certified run by certificate: {certificates}")
    return "\n".join(lines)
