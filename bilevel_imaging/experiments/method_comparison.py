"""Upper-level methods side by side: the same start and budget of work, and losses measured alike afterwards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bilevel_imaging.cost import Cost
from bilevel_imaging.training.metrics_log import finite_or_none
from bilevel_imaging.training.progress import hidden
from bilevel_imaging.upper_level import UPPER_LEVEL_METHODS, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

Record = dict[str, Any]

# a step is kept when the work has grown by this factor since the last one kept, the last step always
THINNING = 1.15


@dataclass(frozen=True)
class MethodSpec:
    """A method as it takes part in a comparison.

    Attributes:
        label: its name in tables. Several with one label are one method tuned by hand: the best of them counts.
        build: makes a new one.
        settings: what distinguishes it, for the record: plain numbers and strings by name.
        max_steps: steps at most; ``None`` for as many as the budget allows.
    """

    label: str
    build: Callable[[], UpperLevelMethod]
    settings: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None


def named(label: str, method: str, *, start: dict[str, Any] | None = None, **options: Any) -> MethodSpec:
    """One of ``UPPER_LEVEL_METHODS``.

    Args:
        label: its name in tables.
        method: its name in the registry.
        start: entries of its ``state_dict()`` that are replaced before the first step, for what is no setting.
        **options: its arguments.

    Raises:
        ValueError: an unknown name.
    """
    if method not in UPPER_LEVEL_METHODS:
        raise ValueError(f"Unknown method {method!r}. Choose from {', '.join(UPPER_LEVEL_METHODS)}.")

    def build() -> UpperLevelMethod:
        made = UPPER_LEVEL_METHODS[method](**options)
        if start is not None:
            made.load_state_dict({**made.state_dict(), **start})
        return made

    return MethodSpec(label, build, {"method": method, **options, **(start or {})})


def run(
    specs: Sequence[MethodSpec],
    make: Callable[[MethodSpec, int], Objective],
    *,
    budget: int,
    error_tol: float,
    seeds: Sequence[int] = (0,),
    reference: Callable[[int], Objective] | None = None,
    known: Sequence[Record] = (),
    save: Callable[[Record], None] | None = None,
    progress: bool = False,
) -> Record:
    """Every method from the same theta until its budget is spent, it stops, or a number is not finite.

    A step that begins within the budget is finished. What measuring the losses afterwards costs counts for no method.
    Ctrl-C ends the comparison; the methods that are finished then are kept.

    Args:
        specs: the methods.
        make: from a method and a seed to an objective of its own, with theta and warm starts as at the start.
        budget: gradients, Hessian-vector and mixed products of the lower level, per method and seed.
        error_tol: accuracy of the reconstructions with which the losses are measured.
        seeds: the comparison is repeated with each.
        reference: objective with which the losses of a seed are measured, e.g. in float64; ``None`` for ``make``.
        known: runs of an interrupted comparison with this budget and these seeds, which are not repeated.
        save: called with the record after every run.
        progress: show a bar on a terminal.

    Returns:
        a JSON-able record: "budget", "error_tol", "seeds", "complete" and "runs", each with what :func:`_follow` notes.

    Raises:
        ValueError: a budget that is not positive, no method, or no seed.
    """
    if budget < 1 or not specs or not seeds:
        raise ValueError(
            f"Expected budget >= 1, methods and seeds. Got {budget}, {len(specs)} methods, {len(seeds)} seeds."
        )
    record: Record = {"budget": budget, "error_tol": error_tol, "seeds": list(seeds), "complete": False, "runs": []}
    bar = tqdm(total=budget * len(specs) * len(seeds), unit=" products", disable=hidden(progress), leave=False)
    try:
        for seed in seeds:
            judge = make(specs[0], seed) if reference is None else reference(seed)
            for spec in specs:
                bar.set_postfix_str(spec.label, refresh=False)
                done = budget * (len(record["runs"]) + 1)
                identity = {"label": spec.label, "seed": seed, "settings": spec.settings}
                one = next((old for old in known if all(old[key] == value for key, value in identity.items())), None)
                if one is None:
                    one = _measured(_follow(spec, make(spec, seed), budget, bar), judge, error_tol)
                    one = finite_or_none({"label": spec.label, "seed": seed, **one})
                record["runs"].append(one)
                bar.update(done - bar.n)
                if save is not None:
                    save(record)
        record["complete"] = True
    except KeyboardInterrupt:
        pass
    finally:
        bar.close()
    return record


def _follow(spec: MethodSpec, objective: Objective, budget: int, bar: tqdm) -> Record:
    """Run one method: its settings, "steps", "cost", "seconds", why it "ended", and the points of its "curve".

    A point has the "step", the "work" and "seconds" so far, and "loss", "lower", "upper", "grad_norm" and "bound" as
    the method reports them; "theta" is that after the step (an average, where the method learns one).
    """
    method, cost, seconds, step, ended = spec.build(), Cost(), 0.0, 0, ""
    curve = [_point(None, 0, cost, 0.0, flatten(objective.theta))]
    while not ended:
        started = time.perf_counter()
        try:
            report = method.step(objective)
        except ValueError as error:
            ended = "failed: " + " ".join(str(error).split())
            break
        seconds += time.perf_counter() - started
        bar.update(min(report.cost.work, budget - min(cost.work, budget)))
        cost, step = cost + report.cost, step + 1
        ended = _ended(spec, report, objective, step, cost.work, budget)
        if ended or cost.work >= THINNING * curve[-1]["work"]:
            theta = flatten(method.learned() or objective.theta)
            curve.append(_point(report, step, cost, seconds, theta))
    return {
        "settings": spec.settings,
        "ended": ended,
        "steps": step,
        "work": cost.work,
        "seconds": seconds,
        "cost": {name: getattr(cost, name) for name in ("gradients", "hvps", "mixed_products")},
        "curve": curve,
    }


def _point(report: StepReport | None, step: int, cost: Cost, seconds: float, theta: Tensor) -> Record:
    point: Record = {"step": step, "work": cost.work, "seconds": seconds, "theta": theta}
    if report is None:
        return {**point, "loss": None, "lower": None, "upper": None, "grad_norm": None, "bound": None}
    reported = {"loss": report.loss, "lower": report.loss_lower, "upper": report.loss_upper}
    return {**point, **reported, "grad_norm": report.grad_norm, "bound": report.error_bound}


def _ended(spec: MethodSpec, report: StepReport, objective: Objective, step: int, work: int, budget: int) -> str:
    """Why the method goes no further, in words; "" if it does."""
    numbers = (report.loss, report.grad_norm)
    if not all(map(math.isfinite, numbers)) or not bool(torch.isfinite(flatten(objective.theta)).all()):
        return "not finite"
    if report.stop:
        return report.stop
    if work >= budget:
        return "budget"
    return f"{step} steps" if step == spec.max_steps else ""


def _measured(one: Record, judge: Objective, error_tol: float) -> Record:
    """With the true losses at the points of the curve under "measured", and that at the end under "final"."""
    before = flatten(judge.theta)
    for point in one["curve"]:
        theta = point.pop("theta")
        point["measured"] = None
        if bool(torch.isfinite(theta).all()):
            assign(judge.theta, theta)
            value = judge.value(error_tol)
            point["measured"] = {"loss": value.value, "lower": value.lower, "upper": value.upper}
    assign(judge.theta, before)
    return {**one, "final": one["curve"][-1]["measured"]}
