"""A training run on the clock, which stands still while others look at it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel_imaging.experiments.benchmark.method import Answer
from bilevel_imaging.experiments.benchmark.training.routes import Route
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.training.objective import BilevelObjective
from bilevel_imaging.upper_level import MAID
from bilevel_imaging.upper_level.quasi_newton import flatten

# a method that stops by itself, or has so many steps, has had its chance
MAX_STEPS = 400


class Enough(Exception):
    """Ends a run from outside."""


@dataclass(frozen=True)
class Point:
    """Where a method arrived.

    Attributes:
        theta: the parameters, ``(P,)``.
        loss: the last that the method found, there or one step before.
        cpu: CPU seconds until then.
        wall: wall seconds, likewise.
    """

    theta: Tensor
    loss: float
    cpu: float
    wall: float


@dataclass(eq=False)
class Course:
    """The points of a run.

    Attributes:
        look: told every point, while the clock stands still; raises :class:`Enough` to end the run.
        points: from the first step on.
    """

    look: Callable[[Point], None]
    points: list[Point] = field(default_factory=list)
    _spent: tuple[float, float] = (0.0, 0.0)
    _since: tuple[float, float] = field(default_factory=lambda: _now())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still."""
        now = _now()
        self._spent = (self._spent[0] + now[0] - self._since[0], self._spent[1] + now[1] - self._since[1])
        try:
            yield
        finally:
            self._since = _now()

    def note(self, theta: Tensor, loss: float) -> None:
        """The method has arrived at these parameters."""
        with self.paused():
            point = Point(theta.detach().clone(), loss, *self._spent)
            if not bool(torch.isfinite(point.theta).all()):
                raise Enough("not finite")
            self.points.append(point)
            self.look(point)


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def ours(task: Task, look: Callable[[Point], None]) -> tuple[list[Point], str]:
    """MAID with its defaults: the points after its steps, and why it ended."""
    task = task.at(task.theta, task.x0)
    method, course = MAID(), Course(look)
    try:
        objective = BilevelObjective(task.energy, task.pairs())
        for _ in range(MAX_STEPS):
            report = method.step(objective)
            course.note(flatten(objective.theta), report.loss)
            if report.stop:
                return course.points, report.stop
    except Enough as reason:
        return course.points, str(reason)
    return course.points, f"{MAX_STEPS} steps"


def theirs(task: Task, route: Route, look: Callable[[Point], None]) -> tuple[list[Point], str]:
    """Another library's hypergradients, every solve from the last x, and what moves theta by them."""
    x = task.x0
    course = Course(look)

    def oracle(theta: Tensor) -> tuple[float, Tensor]:
        nonlocal x
        with course.paused():  # bounds of Hessians by our formulas, free of charge
            moved = task.at(theta, x)
            _ = moved.constants, moved.theta, moved.data
        answer: Answer = route.compute(moved)
        if not bool(torch.isfinite(answer.gradient).all()):
            raise Enough("not finite")
        x = answer.x
        return answer.loss, answer.gradient

    try:
        ended = route.outer(oracle, task.theta.double(), course.note)
    except Enough as reason:
        ended = str(reason)
    except ValueError as error:  # of their parameters, far away from anything sensible
        ended = f"failed: {error}".splitlines()[0]
    return course.points, ended
