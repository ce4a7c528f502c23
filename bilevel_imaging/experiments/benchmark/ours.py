"""Our hypergradients: certified to a relative accuracy, at a fixed accuracy with whatever bound that has, polished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bilevel_imaging.experiments.benchmark.method import Answer, Ladder, Setting
from bilevel_imaging.experiments.benchmark.workloads import Task
from bilevel_imaging.hypergradients import Hypergradient, hypergradient
from bilevel_imaging.kernels import compile_kernels
from bilevel_imaging.upper_level import SquaredError
from bilevel_imaging.upper_level.quasi_newton import flatten

NAME, COMPILED = "ours", "ours, compiled kernels"

# of the ladder, which ends where errors are small enough, and one that is measured in any case
RELATIVES, KNOWN = (1.0, 0.5, 0.2, 0.05, 0.02, 0.01, 3e-3, 1e-3, 3e-4, 1e-4), 0.1
# quarters of decades, as for the others
ERROR_TOLS = (1.8, 1.0, 0.56, 0.3, 0.18, 0.1, 0.056, 0.03, 0.018, 0.01, 0.0056, 0.003)
# both accuracies, the linear one as a share of the loss gradient at the measurement; where strong convexity is small a
# distance says little, and the first one may be large
PAIRS = (
    *((300.0, 0.3), (100.0, 0.3), (100.0, 0.1), (30.0, 0.1), (10.0, 0.1), (10.0, 0.05), (3.0, 0.1), (3.0, 0.02)),
    *((1.8, 0.1), (1.8, 0.05), (1.0, 0.1), (1.0, 0.03), (0.56, 0.03), (0.3, 0.1), (0.3, 0.03), (0.3, 0.01)),
    *((0.18, 0.01), (0.1, 0.01), (0.1, 0.003), (0.056, 0.005), (0.03, 0.003), (0.018, 0.003), (0.018, 0.002)),
)


def ladders(task: Task, compiled: bool = False) -> list[Ladder]:
    """All ways, with eager or compiled kernels."""
    relative = [(f"relative={eta:g}", {"relative": eta}) for eta in RELATIVES]
    fixed = [(f"error_tol={e:g}", {"error_tol": e}) for e in ERROR_TOLS]
    size = float((task.y - task.x_true).detach().flatten(1).norm(dim=1).mean())
    pairs = [
        (f"error_tol={e:g}, residual_tol={share:g} ||grad f||", {"error_tol": e, "residual_tol": share * size})
        for e, share in PAIRS
    ]
    polished = [(f"error_tol={e:g}", {"error_tol": e, "certificate": "polished"}) for e in ERROR_TOLS]
    return [
        Ladder("certified", partial(_settings, task, compiled, [(f"relative={KNOWN:g}", {"relative": KNOWN})])),
        Ladder("certified", partial(_settings, task, compiled, relative)),
        Ladder("fixed accuracy", partial(_settings, task, compiled, fixed)),
        Ladder("two accuracies", partial(_settings, task, compiled, pairs)),
        Ladder("fixed accuracy, classical certificate", partial(_settings, task, compiled, _classical(fixed))),
        Ladder("two accuracies, classical certificate", partial(_settings, task, compiled, _classical(pairs))),
        Ladder("polished", partial(_settings, task, compiled, polished)),
    ]


def _classical(named: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The same with the cheapest certificate."""
    return [(name, request | {"certificate": "classical"}) for name, request in named]


def _settings(task: Task, compiled: bool, named: list[tuple[str, dict[str, Any]]]) -> Iterator[Setting]:
    for name, request in named:
        yield Setting(name, partial(_compute, task, compiled, request))


def _compute(task: Task, compiled: bool, request: dict[str, Any]) -> Answer:
    found = _switched(compiled, lambda: hypergradient(task.problem(), SquaredError(), task.x_true, **request))
    count = len(task.y)
    return Answer(flatten(found.grad), found.cost.gradients / count, found.cost.hvps / count, found.relative_bound)


def _switched(compiled: bool, call: Callable[[], Hypergradient]) -> Hypergradient:
    compile_kernels(compiled)
    try:
        return call()
    finally:
        compile_kernels(False)
