"""Workloads times libraries in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bilevel_imaging.experiments.benchmark import ours, report
from bilevel_imaging.experiments.benchmark.measuring import measure
from bilevel_imaging.experiments.benchmark.method import Ladder
from bilevel_imaging.experiments.benchmark.peers import ADAPTERS
from bilevel_imaging.experiments.benchmark.workloads import WORKLOADS, Task, Workload
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

LEVELS = (1e-1, 1e-2, 1e-3, 1e-4)
REFERENCE = 1e-8


def run(
    names: Sequence[str],
    peers: Sequence[str],
    *,
    levels: Sequence[float] = LEVELS,
    repeats: int = 5,
    cap: float = 10.0,
    compiled: bool = False,
    device: str = "cpu",
    images: int | None = None,
    workloads: dict[str, Workload] = WORKLOADS,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """The record that is saved as JSON.

    Args:
        names: of the workloads.
        peers: names of other libraries, see ``peers.ADAPTERS``.
        levels: relative errors of interest.
        repeats: timed calls of the fastest settings.
        cap: CPU seconds of a call after which no tighter setting of its method is tried.
        compiled: whether to measure compiled kernels of ours, too.
        device: of our tensors and of other PyTorch libraries.
        images: of every workload at most so many; ``None`` for all.
        workloads: by name.
        say: told what is going on, line by line.
        keep: given the record so far after every workload.
    """
    present, skipped = installed(peers)
    record: dict[str, Any] = {
        "environment": environment_with(device, [ADAPTERS[name].PACKAGE for name in present]),
        "levels": list(levels),
        "repeats": repeats,
        "cap_cpu_seconds": cap,
        "device": device,
        "memory": "rise of the resident high-water mark during a call in the same process; JAX: by its compiler",
        "skipped": skipped,
        "workloads": {},
    }
    for name in names:
        workload = workloads[name]
        if images is not None:
            workload = replace(workload, images=min(images, workload.images))
        say(f"{name}: {workload.title}, {workload.images} images")
        record["workloads"][name] = _workload(
            workload, present, levels=levels, repeats=repeats, cap=cap, compiled=compiled, device=device, say=say
        )
        keep(record)
    return record


def _workload(
    workload: Workload, present: Sequence[str], *, compiled: bool, device: str, levels: Sequence[float], **options: Any
) -> dict[str, Any]:
    task = workload.build(device)
    truth = reference(task)
    ladders: dict[str, Callable[[], list[Ladder]]] = {ours.NAME: partial(ours.ladders, task)}
    if compiled:
        ladders[ours.COMPILED] = partial(ours.ladders, task, compiled=True)
    for peer in present:
        ladders[ADAPTERS[peer].NAME] = partial(ADAPTERS[peer].ladders, task)
    rows = [row.record() for row in measure(ladders, flatten(truth.grad), levels=levels, **options)]
    return {
        "title": workload.title,
        "images": workload.images,
        "size": workload.size,
        "parameters": task.theta.numel(),
        "reference_relative_bound": truth.relative_bound,
        "rows": rows,
        "summary": report.summary(rows, levels),
        "dominated": report.dominated(rows),
    }


def reference(task: Task) -> Hypergradient:
    """The hypergradient of the same data in float64, certified as far as float64 allows, at most to ``REFERENCE``."""
    return hypergradient(task.problem(torch.float64), SquaredError(), task.x_true.double(), relative=REFERENCE)


def installed(peers: Sequence[str], adapters: Mapping[str, Any] = ADAPTERS) -> tuple[list[str], dict[str, str]]:
    """Names of those that are installed, and what is missing."""
    present, skipped = [], {}
    for name in peers:
        package = adapters[name].PACKAGE
        if _version(package) is None:
            skipped[adapters[name].NAME] = f"skipped, not installed: pip install {package}"
        else:
            present.append(name)
    return present, skipped


def environment_with(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """What is measured on, with the versions of JAX and other packages."""
    return environment(device) | {name: _version(name) for name in sorted({"jax", *packages})}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
