"""Training runs to be timed, and their true losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bilevel_imaging.energies import VariationalEnergy
from bilevel_imaging.experiments.benchmark.workloads import NOISE, Task, Workload
from bilevel_imaging.regularizers import FieldsOfExperts, TotalVariation
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.upper_level import MAID
from bilevel_imaging.upper_level.base import CertifiedValue
from bilevel_imaging.upper_level.quasi_newton import assign, flatten


@dataclass(frozen=True)
class Training:
    """A run from the parameters of the workload's energy.

    Attributes:
        workload: images, noise and start.
        rates: learning rates of Adam that other libraries are tried with.
        reference_steps: of MAID at most, in float64, to find the best loss with.
        cap: CPU seconds of a run at most.
        error_tol: accuracy with which true losses are measured: distance to the minimizer per pixel along a side.
    """

    workload: Workload
    rates: tuple[float, ...]
    reference_steps: int
    cap: float
    error_tol: float = 1e-5


class Judge:
    """True losses: float64, certified, outside of what is timed.

    Args:
        task: the data and the start.
        error_tol: see :class:`Training`.
    """

    def __init__(self, task: Task, error_tol: float):
        self.error_tol = error_tol * task.y.shape[-1]
        self.objective = BilevelObjective(task.at(task.theta, task.x0).energy, task.pairs(torch.float64))

    def __call__(self, theta: Tensor) -> CertifiedValue:
        assign(self.objective.theta, theta)
        return self.objective.value(self.error_tol)


def reference(task: Task, steps: int) -> Tensor:
    """The parameters that so many steps of MAID in float64 arrive at from the start of the task."""
    objective = BilevelObjective(task.at(task.theta, task.x0).energy, task.pairs(torch.float64))
    method = MAID()
    for _ in range(steps):
        if method.step(objective).stop:
            break
    return flatten(objective.theta)


def _variation(weight: float, smoothing: float) -> VariationalEnergy:
    return VariationalEnergy(TotalVariation(weight, smoothing))


def _experts() -> VariationalEnergy:
    return VariationalEnergy(FieldsOfExperts(4, 3))


def _training(title: str, energy: Callable[[], VariationalEnergy], images: int, size: int, **options) -> Training:
    return Training(Workload(title, NOISE, energy, images, size), **options)


_TV = {"rates": (0.1, 0.3, 1.0), "reference_steps": 60, "cap": 40.0}
_STARTS = {"A": (0.01, 0.1), "B": (0.5, 0.1), "C": (0.01, 0.01)}
TRAININGS = {
    f"W6{name}": _training(
        f"total variation from weight {weight:g}, smoothing {smoothing:g}",
        partial(_variation, weight, smoothing),
        16,
        96,
        **_TV,
    )
    for name, (weight, smoothing) in _STARTS.items()
} | {
    "W6F": _training(
        "Fields of Experts, 4 filters 3x3", _experts, 8, 48, rates=(0.1,), reference_steps=22, cap=60.0, error_tol=1e-4
    )
}
"""By name: total variation from three starts, and learned filters."""
