"""Time to a reconstruction with a certified distance to the minimizer, by learned regularizers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import deepinv
import torch

from bilevel_imaging.data import photographs
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.regularizers import Regularizer
from bilevel_imaging.training.reconstruction import energy_of, minimize

PHOTOGRAPH = "camera"


def run(
    regularizers: Mapping[str, Regularizer],
    *,
    size: int = 256,
    noise: float = 25 / 255,
    accuracy: float = 1e-3,
    repeats: int = 5,
) -> dict[str, Any]:
    """Denoise the middle of a photograph, float32, until the distance is certified.

    Args:
        regularizers: by name.
        size: pixels along each side.
        noise: standard deviation.
        accuracy: distance to the minimizer relative to the norm of the photograph.
        repeats: timed calls after one to warm up; medians count.

    Returns:
        The record that is saved as JSON.

    Raises:
        ValueError: if the photograph is smaller than that.
    """
    picture = photographs()[PHOTOGRAPH]
    if not 0 < size <= min(picture.shape[-2:]):
        raise ValueError(f"Expected a size of 1 to {min(picture.shape[-2:])} pixels. Got {size}.")
    top, left = ((n - size) // 2 for n in picture.shape[-2:])
    x = picture[None, :, top : top + size, left : left + size].float()
    y = x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    rows = {name: _timed(regularizer, x, y, accuracy, repeats) for name, regularizer in regularizers.items()}
    settings = {"photograph": PHOTOGRAPH, "size": size, "noise": noise, "accuracy": accuracy, "repeats": repeats}
    return {"settings": settings, "environment": environment("cpu"), "results": rows}


def _timed(regularizer: Regularizer, x: torch.Tensor, y: torch.Tensor, accuracy: float, repeats: int) -> dict[str, Any]:
    tol = accuracy * float(x.norm())
    wall, cpu = [], []
    for _ in range(repeats + 1):
        problem = energy_of(regularizer, "cpu").bind(y, deepinv.physics.Denoising())
        start, used = time.perf_counter(), time.process_time()
        found, info = minimize(problem, error_tol=tol)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {
        "wall_seconds": sorted(wall[1:])[repeats // 2],
        "cpu_seconds": sorted(cpu[1:])[repeats // 2],
        "relative_distance": float(info.distance_bound[0]) / float(x.norm()),
        "certified": bool(info.converged[0]),
        "psnr": float(-10 * (found - x).square().mean().log10()),
        "cost": asdict(problem.cost),
    }


def table(record: dict[str, Any]) -> str:
    """The record as text."""
    lines = [
        f"{'regularizer':34s} {'wall s':>7s} {'CPU s':>7s} {'distance':>9s} {'PSNR':>6s} {'grads':>6s} {'HVPs':>6s}"
    ]
    for name, row in record["results"].items():
        lines.append(
            f"{name:34s} {row['wall_seconds']:7.2f} {row['cpu_seconds']:7.2f} {row['relative_distance']:9.1e} "
            f"{row['psnr']:6.2f} {row['cost']['gradients']:6.0f} {row['cost']['hvps']:6.0f}"
            + ("" if row["certified"] else "   not certified")
        )
    return "\n".join(lines)
