"""The second experiment of Ehrhardt & Roberts (2023), Section 4.2: weights for digits, some of them wrongly labeled.

    min_theta f(W*(theta))   with   W*(theta) = argmin_W 1/N sum_i sigmoid(theta_i) CE(W a_i, y_i) + ridge ||W||^2,

f the mean cross-entropy on digits with correct labels, from theta = 0. The published settings fix both solvers, the
constant L that these use, their accuracies and the step 10; the setting "maid" is this package's default: Newton-CG,
preconditioned conjugate gradients and MAID with certified hypergradients. All share one budget of iterations of the
lower-level and the adjoint solver.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging import linear_solvers, lower_solvers
from bilevel_imaging.energies import WeightedLogisticProblem
from bilevel_imaging.experiments.hypercleaning_problem import (
    Digits,
    PublishedProblem,
    ValidationLoss,
    area_under_curve,
    digits,
    load,
)
from bilevel_imaging.experiments.hypercleaning_published import BEST, PUBLISHED
from bilevel_imaging.experiments.hypercleaning_report import figures, table
from bilevel_imaging.linear_solvers import LinearSolver
from bilevel_imaging.training.progress import hidden
from bilevel_imaging.upper_level import MAID, ProblemObjective

__all__ = ["BEST", "PUBLISHED", "SETTINGS", "Digits", "digits", "figures", "load", "run", "table"]

RIDGE, STEP_SIZE, BUDGET = 1e-3, 10.0, 100_000
Scheduled = lower_solvers.GradientDescent | lower_solvers.HeavyBall | lower_solvers.AcceleratedGradient
LOWER: dict[str, Callable[[], Scheduled]] = {
    "gd": lower_solvers.GradientDescent,
    "hb": lower_solvers.HeavyBall,
    "fista": lower_solvers.AcceleratedGradient,
}
ADJOINT: dict[str, Callable[..., LinearSolver]] = {
    "gd": linear_solvers.GradientDescent,
    "hb": linear_solvers.HeavyBall,
    "cg": linear_solvers.ConjugateGradient,
}
TOLERANCES = (0.1, 0.01)
MAID_SETTING = "maid"
# lower-level solver / adjoint solver / error_tol / residual_tol
SETTINGS = (
    MAID_SETTING,
    *(f"{x}/{q}/{e}/{d}" for x, q, e, d in itertools.product(LOWER, ADJOINT, TOLERANCES, TOLERANCES)),
)
# points of a curve that are kept
POINTS = 200
# accuracy at which the objective at the end of a run is enclosed
FINAL_ERROR = 1e-4

# what stopped a run
SPENT, TIME = "budget", "minutes"

Record = dict[str, Any]


@dataclass
class _Progress:
    """A run in progress: what it has spent and its curve, one entry per upper-level iteration."""

    setting: str
    problem: WeightedLogisticProblem
    loss: ValidationLoss
    budget: int
    minutes: float
    started: float
    bar: tqdm
    lower: int = 0
    adjoint: int = 0
    steps: int = 0

    def __post_init__(self) -> None:
        self.curve: list[dict[str, float]] = []

    @property
    def left(self) -> int:
        return max(0, self.budget - self.lower - self.adjoint)

    @property
    def stopped(self) -> str:
        """Why the run is over, in words; empty if it is not."""
        if not self.left:
            return SPENT
        return TIME if time.perf_counter() - self.started >= 60 * self.minutes else ""

    def note(self, objective: float) -> None:
        spent, seconds = self.lower + self.adjoint, round(time.perf_counter() - self.started, 2)
        self.curve.append({"step": self.steps, "iterations": spent, "objective": objective, "seconds": seconds})
        self.bar.set_postfix_str(f"{self.setting}, validation loss {objective:.4f}", refresh=False)
        self.bar.update(self.budget - self.left - self.bar.n)


def run(
    data: Digits,
    settings: Sequence[str] = (MAID_SETTING, BEST),
    *,
    budget: int = BUDGET,
    minutes: float = math.inf,
    earlier: Sequence[Record] = (),
    save: Callable[[Record], None] | None = None,
    progress: bool = False,
) -> Record:
    """Every setting from theta = 0 until its budget is spent.

    Args:
        data: what is learned from.
        settings: some of ``SETTINGS``, or "all".
        budget: iterations of the lower-level and of the adjoint solver together, per setting.
        minutes: wall-clock limit per setting.
        earlier: records to go on with. Their runs are kept, of two the later one, and a setting that is among them is
            run only if a limit of time had stopped it.
        save: called with the record after every setting.
        progress: show a bar on the terminal for every setting.

    Returns:
        a JSON-able record: "settings", "constants" at theta = 0, and "runs" by setting.

    Raises:
        ValueError: an unknown setting, a budget that is not positive, or an earlier record of other data or budget.
    """
    names = list(SETTINGS) if list(settings) == ["all"] else list(settings)
    unknown = [name for name in names if name not in SETTINGS]
    if unknown or not names:
        raise ValueError(
            f"Expected settings as {MAID_SETTING}, all, or lower/adjoint/error_tol/residual_tol, e.g. {BEST}, with "
            f"{', '.join(LOWER)} / {', '.join(ADJOINT)} / 0.1, 0.01 / 0.1, 0.01. Got {', '.join(unknown) or 'none'}."
        )
    if budget < 1 or not minutes > 0:
        raise ValueError(f"Expected budget >= 1 and minutes > 0. Got {budget} and {minutes}.")
    loss = ValidationLoss(data.validation)
    record: Record = {
        "experiment": "hypercleaning",
        "budget": budget,
        "examples": data.training.count,
        "corrupted": int(data.corrupted.sum()),
        "validation": data.validation.count,
        "constants": _constants(data, loss),
        "runs": {},
    }
    for old in earlier:
        for key in ("budget", "examples", "corrupted", "validation"):
            if old.get(key) != record[key]:
                raise ValueError(f"Expected an earlier record with {key} = {record[key]}. Got {old.get(key)}.")
        record["runs"] |= old["runs"]
    for name in names:
        if name in record["runs"] and record["runs"][name]["stopped"] != TIME:
            continue
        problem = _problem(data, WeightedLogisticProblem if name == MAID_SETTING else PublishedProblem)
        with tqdm(total=budget, unit=" iterations", disable=hidden(progress), leave=False) as bar:
            current = _Progress(name, problem, loss, budget, minutes, time.perf_counter(), bar)
            outcome = (_maid if name == MAID_SETTING else _fixed)(current)
        record["runs"][name] = {**outcome, **_detection(problem, data.corrupted)}
        _sort(record)
        if save is not None:
            save(record)
    _sort(record)
    return record


def _sort(record: Record) -> None:
    """Runs in the order of the settings."""
    record["runs"] = {name: record["runs"][name] for name in SETTINGS if name in record["runs"]}


def _problem(data: Digits, kind: type[WeightedLogisticProblem]) -> WeightedLogisticProblem:
    theta = torch.zeros_like(data.training.norms).requires_grad_(True)
    return kind(data.training, theta, ridge=RIDGE)


def _constants(data: Digits, loss: ValidationLoss) -> dict[str, float]:
    known, published = (_problem(data, kind).constants() for kind in (WeightedLogisticProblem, PublishedProblem))
    names = ("strong_convexity", "smoothness", "hessian_lipschitz", "mixed_norm", "mixed_lipschitz")
    constants = {name: float(getattr(known, name)) for name in names}
    return {**constants, "published_smoothness": float(published.smoothness), "loss_smoothness": loss.smoothness}


def _fixed(progress: _Progress) -> Record:
    """The published method: fixed accuracies and step, W from the last iteration, the adjoint from 0."""
    names = progress.setting.split("/")
    error_tol, residual_tol = float(names[2]), float(names[3])
    lower, linear = LOWER[names[0]](), ADJOINT[names[1]]()
    problem, loss, theta = progress.problem, progress.loss, progress.problem.theta["theta"]
    x, stop = problem.initial(), ""
    with torch.no_grad():
        while not stop:
            x = _solved(progress, lower, x, error_tol)
            progress.note(float(loss(x)))
            stop = progress.stopped
            if stop:
                break
            linearization = problem.linearize(x)
            adjoint = linear.solve(linearization, loss.grad(x), residual_tol, max_iter=progress.left)
            progress.adjoint += int(adjoint.iterations)
            stop = "" if bool(adjoint.converged) else progress.stopped or f"adjoint: {adjoint.reason[0]}"
            if not stop:
                theta += STEP_SIZE * linearization.mixed_vjp(adjoint.q)["theta"]
                progress.steps += 1
    return _outcome(progress, stop)


def _solved(progress: _Progress, lower: Scheduled, x: Tensor, error_tol: float) -> Tensor:
    """The lower level to ``error_tol`` from x; like the published loops with at least one iteration."""
    problem = progress.problem
    solution = lower.solve(problem, x, error_tol, max_iter=progress.left)
    progress.lower += max(1, int(solution.iterations))
    if int(solution.iterations):
        return solution.x
    constants = problem.constants()
    step, _ = lower.schedule(float(constants.strong_convexity), float(constants.smoothness), 0)
    return x - step * problem.grad(x)


def _maid(progress: _Progress) -> Record:
    """The default of this package; every product with all examples counts, those that certify included."""
    objective, method, stop = ProblemObjective(progress.problem, progress.loss), MAID(), ""
    certified = []
    _spent(progress)
    with torch.no_grad():
        progress.note(float(progress.loss(objective.x)))
    while not stop:
        report = method.step(objective)
        progress.steps += int(report.accepted)
        _spent(progress)
        if report.accepted:
            progress.note(report.loss)
            relative = report.error_bound / report.grad_norm if report.grad_norm else math.inf
            certified.append({"loss": [report.loss_lower, report.loss_upper], "relative_bound": relative})
        stop = report.stop or progress.stopped
    return {**_outcome(progress, stop, objective.x), "certified": certified}


def _spent(progress: _Progress) -> None:
    """All gradients and products so far, and for every preconditioner what its floating-point operations compare to."""
    cost, (classes, features) = progress.problem.cost, progress.problem.examples.shape
    progress.lower = cost.gradients + progress.problem.factorizations * math.ceil(features / (2 * classes))
    progress.adjoint = cost.hvps + cost.mixed_products


def _outcome(progress: _Progress, stopped: str, x: Tensor | None = None) -> Record:
    seconds = time.perf_counter() - progress.started
    objective = ProblemObjective(progress.problem, progress.loss, start=x)
    final, published = objective.value(FINAL_ERROR), PUBLISHED.get(progress.setting)
    return {
        "stopped": stopped,
        "minutes": None if math.isinf(progress.minutes) else progress.minutes,
        "steps": progress.steps,
        "lower": progress.lower,
        "adjoint": progress.adjoint,
        "iterations": progress.lower + progress.adjoint,
        "seconds": round(seconds, 1),
        "objective": progress.curve[-1]["objective"],
        "final_interval": [final.lower, final.upper],
        "published": None if published is None else list(published),
        "ratio": None if published is None else progress.curve[-1]["objective"] / published[0],
        "curve": thinned(progress.curve),
    }


def thinned(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most ``POINTS`` entries and the last one."""
    stride = math.ceil(len(curve) / POINTS)
    return [*curve[:-1:stride], curve[-1]]


def _detection(problem: WeightedLogisticProblem, corrupted: Tensor) -> Record:
    """How well small weights tell the corrupted examples: area under the curve, and the mean weights."""
    theta = problem.theta["theta"].detach().cpu()
    weights = torch.sigmoid(theta)
    return {
        "auc": area_under_curve(-theta, corrupted.cpu()),
        "weight_corrupted": float(weights[corrupted].mean()),
        "weight_clean": float(weights[~corrupted].mean()),
    }
