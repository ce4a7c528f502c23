"""How the cost of a hypergradient grows: with pixels, with images, and what a second process gains.

Every picture is put together from the same kind of tiles, so that one of a million pixels is as hard as one of a
thousand.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from bilevel_imaging.experiments.benchmark.data_parallel import STEPS
from bilevel_imaging.experiments.benchmark.memory import peak
from bilevel_imaging.experiments.benchmark.workloads import WORKLOADS, Task
from bilevel_imaging.experiments.environment import environment
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.native.memory import keep_freed
from bilevel_imaging.upper_level import SquaredError

TILE = 64
SIZES = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 4, 16, 64, 256)
RELATIVE = 0.1
UNDISTURBED = 1.9
TITLES = {"size": "one image by pixels along its sides", "images": "images of 64x64 in one batch"}
PARTS = (*TITLES, "processes")
KEPT = ", freed memory kept"
COLUMNS = (("CPU s", 8), ("ns/pixel", 9), ("grads", 6), ("HVPs", 6), ("faults/pixel", 12), ("MiB", 6))

Record = dict[str, Any]
Row = dict[str, Any]


def run(
    parts: Sequence[str] = PARTS,
    *,
    sizes: Sequence[int] = SIZES,
    batches: Sequence[int] = BATCHES,
    repeats: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> Record:
    """The record that is saved as JSON.

    Args:
        parts: some of ``PARTS``.
        sizes: pixels along the sides of single images, multiples of 64.
        batches: numbers of images of 64x64.
        repeats: timed calls after one to warm up; the fastest counts, what else the machine does only adds to it.
        say: told what is going on, line by line.
    """
    record: Record = {"environment": environment("cpu"), "relative": RELATIVE, "repeats": repeats}
    makes = {
        "size": lambda: [(size, task(size=size)) for size in sizes],
        "images": lambda: [(count, task(images=count)) for count in batches],
    }
    series = {name: make() for name, make in makes.items() if name in parts}
    for name, tasks in series.items():
        record[name] = _series(name, tasks, repeats, say)
    if series and keep_freed():
        say("with freed memory kept")
        for name, tasks in series.items():
            record[name + KEPT] = _series(name, tasks, repeats, say)
    if "processes" in parts:
        record["processes"] = data_parallel(say)
    return record


def task(*, images: int = 1, size: int = TILE) -> Task:
    """Total variation denoising of so many images, or of one put together from tiles of 64x64."""
    workload = replace(WORKLOADS["W4b"], images=images, size=size, tile=TILE, tiled=size > TILE)
    return workload.build()


def _series(what: str, tasks: Sequence[tuple[int, Task]], repeats: int, say: Callable[[str], None]) -> list[Row]:
    """One row for every task; all of them in turn, so that what else the machine does falls on all alike."""
    calls: dict[int, list[Row]] = {number: [] for number, _ in tasks}
    for _ in range(repeats + 1):
        for number, one in tasks:
            calls[number].append(_timed(one))
    rows = []
    for number, one in tasks:
        row = {what: number, "pixels": one.y.numel(), **min(calls[number][1:], key=lambda call: call["cpu_seconds"])}
        row["cpu_nanoseconds_per_pixel"] = 1e9 * row["cpu_seconds"] / row["pixels"]
        row["peak_memory_mib"] = peak(lambda one=one: _compute(one))
        rows.append(row)
        say(f"  {what} {number}: {row['cpu_seconds']:.4f} CPU s, {row['cpu_nanoseconds_per_pixel']:.0f} ns per pixel")
    return rows


def _compute(one: Task) -> Hypergradient:
    return hypergradient(one.problem(), SquaredError(), one.x_true, relative=RELATIVE)


def _timed(one: Task) -> Row:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start, cpu = time.perf_counter(), time.process_time()
    found = _compute(one)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - start
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "gradients": found.cost.gradients / len(one.y),
        "hvps": found.cost.hvps / len(one.y),
        "relative_bound": found.relative_bound,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults,
    }


def data_parallel(say: Callable[[str], None] = lambda text: None) -> Record:
    """Hypergradient steps per wall second of one and of two processes of one thread.

    What the machine can gain at most are two runs at the same time that have nothing to do with each other: threads of
    one core share it.

    Raises:
        RuntimeError: torchrun failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "bilevel_imaging.experiments.benchmark.data_parallel"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"torchrun failed:\n{done.stderr}")
    rounds = json.loads(done.stdout.splitlines()[-1])
    # where two runs were left less than two processors, something else ran, and a gain says nothing
    clean = [one for one in rounds if one["independent_runs"][1] > UNDISTURBED] or rounds
    record = {
        "steps": STEPS,
        "rounds": rounds,
        "undisturbed_rounds": sum(one["independent_runs"][1] > UNDISTURBED for one in rounds),
        "steps_per_second": {name: statistics.median(one[name][0] for one in clean) for name in rounds[0]},
        "gain": _gain(clean, "all_processes"),
        "gain_of_independent_runs": _gain(clean, "independent_runs"),
        "logical_processors": os.cpu_count(),
        "cores_according_to_the_system": physical_cores(),
    }
    say(f"  two processes: {record['gain']:.2f} times the steps of one")
    return record


def _gain(rounds: list[dict[str, Any]], name: str) -> float:
    """Over one process, the median of all rounds."""
    return statistics.median(one[name][0] / one["one_process"][0] for one in rounds)


def physical_cores() -> int | None:
    """Cores that have execution units of their own, as far as the system tells (a virtual machine may not)."""
    try:
        with open("/proc/cpuinfo") as lines:
            words = [line.split(":")[1].strip() for line in lines if line.startswith(("physical id", "core id"))]
    except OSError:
        return None
    return len(set(zip(words[::2], words[1::2], strict=True))) or None


def table(record: Record) -> str:
    """The record as text."""
    lines = []
    for name, what in TITLES.items():
        for kept in ("", KEPT):
            lines += _rows(f"{what}{kept}", name, record.get(name + kept, []))
    if "processes" in record:
        found = record["processes"]
        rates = ", ".join(f"{name.replace('_', ' ')} {rate:.2f}" for name, rate in found["steps_per_second"].items())
        lines += [
            f"hypergradient steps per second: {rates}",
            f"two processes: {found['gain']:.2f} times the steps of one; two independent runs: "
            f"{found['gain_of_independent_runs']:.2f} times ({found['logical_processors']} logical processors, "
            f"{found['cores_according_to_the_system']} cores according to the system, {found['undisturbed_rounds']} of "
            f"{len(found['rounds'])} rounds undisturbed)",
        ]
    return "\n".join(lines).rstrip()


def _rows(title: str, name: str, rows: Sequence[Row]) -> list[str]:
    """One series as a table."""
    if not rows:
        return []
    heads = "".join(f" {head:>{width}s}" for head, width in COLUMNS)
    lines = [title, f"{name:>8s}{heads}"]
    for row in rows:
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        lines.append(
            f"{row[name]:8d} {row['cpu_seconds']:8.4f} {row['cpu_nanoseconds_per_pixel']:9.0f} {row['gradients']:6.1f} "
            f"{row['hvps']:6.1f} {row['page_faults'] / row['pixels']:12.5f} {memory:>6s}"
        )
    return [*lines, ""]
