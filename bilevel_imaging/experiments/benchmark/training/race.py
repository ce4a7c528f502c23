"""All settings of all libraries once, then the fastest ones and ours in turn."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from bilevel_imaging.experiments.benchmark.comparison import environment_with, installed
from bilevel_imaging.experiments.benchmark.ours import NAME
from bilevel_imaging.experiments.benchmark.training.course import Enough, Point, ours, theirs
from bilevel_imaging.experiments.benchmark.training.routes import ROUTES, TUNED, Route, routes
from bilevel_imaging.experiments.benchmark.training.runs import TRAININGS, Judge, Training, reference
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.hypergradients import hypergradient
from bilevel_imaging.upper_level import SquaredError

WITHIN = 0.01
"""What counts is the time until the true loss is so close to the best one, relative to it."""
SLACK = 1.2
"""A setting is given up once it took so many times as long as the fastest one of its library."""
HOPELESS = 6.0
"""And also once it took so many times as long as the fastest one of all libraries so far."""
NEAR = 1.1
"""Losses that a method itself finds larger by this factor are not measured while settings are tried."""
FINALISTS = 2
"""Settings of a library that are timed again."""

Record = dict[str, Any]
Run = Callable[[Callable[[Point], None]], tuple[list[Point], str]]


@dataclass(eq=False)
class Entry:
    """A setting and its runs.

    Attributes:
        library: whose.
        setting: in words.
        run: from the start, given what looks at its points.
        ended: why the first run ended.
        steps: points of the first run.
        seconds: CPU seconds of the first run until it was within, or ``None``.
        spent: CPU seconds of the first run.
        again: the points of the runs that count.
    """

    library: str
    setting: str
    run: Run
    ended: str = ""
    steps: int = 0
    seconds: float | None = None
    spent: float = 0.0
    again: list[list[Point]] = field(default_factory=list)

    def first(self, judge: Callable[[Tensor], float], target: float, limit: float) -> None:
        """Run until the loss is at most ``target`` or ``limit`` CPU seconds have passed."""

        def look(point: Point) -> None:
            if point.loss <= NEAR * target and judge(point.theta) <= target:
                self.seconds = point.cpu
                raise Enough("within")
            if point.cpu > limit:
                raise Enough(f"given up after {point.cpu:.2f} CPU seconds")

        points, self.ended = self.run(look)
        self.steps, self.spent = len(points), points[-1].cpu if points else 0.0

    def once_more(self) -> None:
        """Run half as far again as was needed, with nobody looking, for a curve that shows where it goes."""
        left = iter(range(self.steps + self.steps // 2 + 1))

        def look(point: Point) -> None:
            if next(left, None) is None:
                raise Enough("shown")

        self.again.append(self.run(look)[0])


def run(
    names: Sequence[str],
    peers: Sequence[str],
    *,
    repeats: int = 3,
    trainings: dict[str, Training] = TRAININGS,
    say: Callable[[str], None] = lambda text: None,
    keep: Callable[[Record], None] = lambda record: None,
) -> Record:
    """The record that is saved as JSON.

    Args:
        names: of the trainings.
        peers: names of other libraries, see ``routes.ROUTES``.
        repeats: timed runs of the fastest settings.
        trainings: by name.
        say: told what is going on, line by line.
        keep: given the record so far after every training.
    """
    present, skipped = installed(peers, ROUTES)
    record: Record = {
        "environment": environment_with("cpu", [ROUTES[name].PACKAGE for name in present]),
        "within": WITHIN,
        "repeats": repeats,
        "skipped": skipped,
        "trainings": {},
    }
    for name in names:
        say(f"{name}: {trainings[name].workload.title}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record["trainings"][name] = _race(trainings[name], present, repeats, say)
        keep(record)
    return record


def _race(training: Training, present: Sequence[str], repeats: int, say: Callable[[str], None]) -> Record:
    task = training.workload.build()
    judge = _Remembering(Judge(task, training.error_tol))
    best = judge(reference(task, training.reference_steps))
    say(f"  reference loss {best:.6g}, at the start {judge(task.theta):.6g}")
    entries = [Entry(NAME, "MAID, defaults", partial(ours, task))]
    hypergradient(task.problem(), SquaredError(), task.x_true, relative=0.5)  # what is compiled is compiled
    entries[0].first(judge, (1 + WITHIN) * best, training.cap)
    say(f"  {NAME}: {entries[0].seconds} CPU s, {entries[0].steps} steps")
    finalists = entries[:]
    for name in present:
        limit = min([training.cap, *(HOPELESS * entry.seconds for entry in entries if entry.seconds is not None)])
        tried = _sweep(task, routes(name, task, training.rates), judge, (1 + WITHIN) * best, limit)
        entries += tried
        passed = sorted((entry for entry in tried if entry.seconds is not None), key=lambda entry: entry.seconds)
        finalists += passed[:FINALISTS]
        for entry in passed[:FINALISTS] or tried[:1]:
            say(f"  {entry.library}: {entry.seconds} CPU s, {entry.steps} steps, {entry.setting}")
    for _ in range(repeats):
        for entry in finalists:
            entry.once_more()
    curves = [[[judge(point.theta) for point in points] for points in entry.again] for entry in finalists]
    best = min(best, *judge.known.values())
    rows = [_row(entry, losses, (1 + WITHIN) * best) for entry, losses in zip(finalists, curves, strict=True)]
    return {
        "title": training.workload.title,
        "images": training.workload.images,
        "size": training.workload.size,
        "parameters": task.theta.numel(),
        "first_loss": judge(task.theta),
        "best_loss": best,
        "loss_half_width": judge.half_width,
        "rows": rows,
        "tried": [
            {
                "library": entry.library,
                "setting": entry.setting,
                "cpu_seconds": entry.seconds,
                "steps": entry.steps,
                "ended": entry.ended,
                "spent_cpu_seconds": entry.spent,
            }
            for entry in entries
        ],
        "summary": _summary(rows),
    }


def _sweep(task: Task, tried: list[Route], judge: Callable, target: float, limit: float) -> list[Entry]:
    """Every setting once."""
    entries: list[Entry] = []
    for route in tried:
        entry = Entry(route.library, route.setting, partial(theirs, task, route))
        if not any(route.compute is other.compute for other in tried[: len(entries)]):
            route.compute(task)  # warm up
        entry.first(judge, target, limit)
        if entry.seconds is not None:
            limit = min(limit, SLACK * entry.seconds)
        entries.append(entry)
    return entries


class _Remembering:
    """True losses by parameters, each measured once.

    Attributes:
        known: all of them.
        half_width: of the widest certified interval, relative to the loss.
    """

    def __init__(self, judge: Judge):
        self.judge, self.half_width = judge, 0.0
        self.known: dict[tuple[float, ...], float] = {}

    def __call__(self, theta: Tensor) -> float:
        key = tuple(theta.tolist())
        if key not in self.known:
            value = self.judge(theta)
            self.known[key] = value.value
            self.half_width = max(self.half_width, 0.5 * (value.upper - value.lower) / value.value)
        return self.known[key]


def _row(entry: Entry, losses: list[list[float]], target: float) -> Record:
    """Medians over the runs; the curve is that of the first."""
    hits = []
    for points, values in zip(entry.again, losses, strict=True):
        place = next((k for k, value in enumerate(values) if value <= target), None)
        hits.append(None if place is None else (place + 1, points[place]))
    reached = None not in hits
    return {
        "library": entry.library,
        "setting": entry.setting,
        "cpu_seconds": statistics.median(point.cpu for _, point in hits) if reached else None,
        "wall_seconds": statistics.median(point.wall for _, point in hits) if reached else None,
        "all_cpu_seconds": [point.cpu for _, point in hits] if reached else None,
        "steps": hits[0][0] if reached else None,
        "curve": [
            {"cpu_seconds": point.cpu, "loss": value} for point, value in zip(entry.again[0], losses[0], strict=True)
        ],
    }


def _summary(rows: list[Record]) -> Record:
    """CPU seconds of every library at its fastest, and ours over the best other one's."""
    fastest: dict[str, float] = {}
    for row in rows:
        if row["cpu_seconds"] is not None:
            fastest[row["library"]] = min(row["cpu_seconds"], fastest.get(row["library"], float("inf")))
    others = [seconds for library, seconds in fastest.items() if library not in (NAME, TUNED)]
    ratio = fastest[NAME] / min(others) if others and NAME in fastest else None
    return {"cpu_seconds": fastest, "ratio": ratio}
