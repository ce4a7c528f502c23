"""Any torch optimizer, fed with certified hypergradients."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.checks import argument_names, boolean
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.upper_level.base import Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    certified_stationary,
    check_positive,
    check_state,
    report,
    require_all_images,
    require_objective,
    value_with,
)
from bilevel_imaging.upper_level.long_runs import SCHEDULES, NormClip, TailAverage, schedule_factor
from bilevel_imaging.upper_level.quasi_newton import flatten


class FirstOrder(UpperLevelMethod):
    """Writes the hypergradient into ``.grad`` and lets a ``torch.optim`` optimizer step.

    The optimizer does not know how accurate its gradients are; this method asks for a relative accuracy (or for fixed
    tolerances) and reports the certificate of every step. Schedule and averaging depend on the number of the step and
    on ``total_steps`` alone: a resumed run continues bit for bit, and one resumed with other ``total_steps`` follows
    the new schedule from there on.

    Args:
        optimizer: name of a class in ``torch.optim`` whose step needs no closure, e.g. "Adam", "SGD".
        lr: learning rate; ``None`` for the optimizer's own default.
        relative: bound <= relative * ||h||; the default 0.1 if no tolerance is given.
        error_tol: fixed lower-level accuracy instead.
        residual_tol: fixed adjoint accuracy instead.
        schedule: of the learning rate: "constant", or "cosine" down to a hundredth of it over ``total_steps``.
        warmup: steps in which the learning rate rises linearly first.
        total_steps: of the whole run; needed for "cosine" and ``average``.
        clip: hypergradients longer than so many times the running median of the norms are scaled down to that; at
            least 1, ``None`` for never.
        average: part of the run at its end, in [0, 1], over which theta is averaged; 0 for no averaging. The steps
            are not changed; :meth:`learned` gives the average.
        lr_scale: factors of the learning rate by part of a parameter's name, e.g. ``{"filters": 0.3}``; of several
            that occur in a name the longest counts.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.
            Not with minibatches.
        **options: further arguments of the optimizer.

    Raises:
        ValueError: unknown optimizer or option of it, one that needs a closure, contradictory accuracies, or a number
            out of range.
    """

    def __init__(
        self,
        optimizer: str = "Adam",
        *,
        lr: float | None = None,
        relative: float | None = None,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        schedule: str = "constant",
        warmup: int = 0,
        total_steps: int | None = None,
        clip: float | None = None,
        average: float = 0.0,
        lr_scale: Mapping[str, float] | None = None,
        stationarity_tol: float | None = None,
        **options: Any,
    ):
        known = _optimizers()
        names = {n.lower(): n for n in known}
        if optimizer.lower() not in names:
            raise ValueError(f"Unknown optimizer {optimizer!r}. Choose from {sorted(known)}.")
        tolerances = error_tol is not None or residual_tol is not None
        if tolerances and relative is not None:
            raise ValueError("Expected relative, or error_tol and residual_tol. Got both.")
        _check(schedule, warmup, total_steps, clip, average, lr_scale)
        check_positive(stationarity_tol=stationarity_tol)
        self.stationarity_tol = stationarity_tol
        self.name = names[optimizer.lower()]
        self.build, self.options = known[self.name], dict(options)
        if unknown := options.keys() - set(allowed := optimizer_options(self.name)):
            raise ValueError(
                f"Expected options of torch.optim.{self.name}, some of {', '.join(allowed)}. "
                f"Got {', '.join(sorted(unknown))}."
            )
        defaults = {n: p.default for n, p in inspect.signature(self.build).parameters.items()}
        for option, value in options.items():
            if isinstance(defaults.get(option), bool):  # torch takes any text for true
                boolean(option, value)
        self.lr = defaults["lr"] if lr is None else lr
        self.lr_scale = dict(lr_scale or {})
        self.accuracy = {"relative": 0.1 if relative is None else relative}
        if tolerances:
            self.accuracy = {"error_tol": error_tol, "residual_tol": residual_tol}
        self.schedule, self.warmup, self.total_steps = schedule, warmup, total_steps or 0
        self.clip = None if clip is None else NormClip(clip)
        self.average = TailAverage(average, self.total_steps) if average else None
        self.steps = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self._pending: dict[str, Any] | None = None

    def _prepare(self, objective: Objective) -> torch.optim.Optimizer:
        if self.optimizer is None:
            try:
                self.optimizer = self.build(self._groups(objective.theta), **self.options)
            except TypeError as error:
                raise ValueError(f"torch.optim.{self.name} does not take {sorted(self.options)}: {error}") from error
            if self._pending is not None:
                self.optimizer.load_state_dict(self._pending)
                self._pending = None
        return self.optimizer

    def _groups(self, theta: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Parameter groups of one learning rate each, in the order of theta."""
        unused = [part for part in self.lr_scale if not any(part in name for name in theta)]
        if unused:
            raise ValueError(f"Expected lr_scale for parts of the names {', '.join(theta)}. Got {', '.join(unused)}.")
        groups: dict[float, list[Tensor]] = {}
        for name, tensor in theta.items():
            part = max((p for p in self.lr_scale if p in name), key=len, default="")
            groups.setdefault(self.lr_scale.get(part, 1.0), []).append(tensor)
        return [
            {"params": params, "lr": self.lr * scale, "full_lr": self.lr * scale} for scale, params in groups.items()
        ]

    def _hypergradient(self, objective: Objective) -> Hypergradient:
        """That of this step, as accurate as asked for."""
        return objective.hypergradient(**self.accuracy)

    def _pace(self) -> float:
        """What the learning rates are multiplied by in this step."""
        return schedule_factor(self.schedule, self.steps, self.total_steps, self.warmup)

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one optimizer step; the loss reported is that before the step.

        Raises:
            ValueError: no objective, or ``stationarity_tol`` with one that takes minibatches.
        """
        require_objective(objective)
        if self.stationarity_tol is not None:
            require_all_images(objective, "a minibatch does not say whether the mean over all images is stationary")
        optimizer = self._prepare(objective)
        h = self._hypergradient(objective)
        stop = certified_stationary(h, self.stationarity_tol)
        if stop:
            return report(h, value_with(h), h.cost, stop=stop)
        before = flatten(objective.theta)
        factor = 1.0 if self.clip is None else self.clip.factor(h.norm)
        for name, tensor in objective.theta.items():
            grad = h.grad[name].detach().to(tensor.dtype)
            tensor.grad = grad.clone() if factor == 1 else factor * grad
        pace = self._pace()
        for group in optimizer.param_groups:
            group["lr"] = pace * group["full_lr"]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(objective.theta, self.steps)
        self.steps += 1
        moved = float((flatten(objective.theta) - before).norm())
        extra = {} if self.clip is None else {"clip_factor": factor}
        return report(h, value_with(h), h.cost, step_size=pace * self.lr, moved=moved, extra=extra)

    def learned(self) -> dict[str, Tensor] | None:
        """The average, once the last part of the run has begun."""
        return dict(self.average.mean) if self.average is not None and self.average.count else None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own state, the number of steps, the norms before and the average."""
        state = self._pending if self.optimizer is None else self.optimizer.state_dict()
        return {
            "name": self.name,
            "optimizer": state,
            "steps": self.steps,
            "norms": [] if self.clip is None else list(self.clip.norms),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state.get("name") != self.name:
            raise ValueError(f"Expected a state of the optimizer {self.name}. Got one of {state.get('name')}.")
        check_state(state, {"optimizer", "steps", "norms", "average"}, "FirstOrder")
        if self.optimizer is None:
            self._pending = state["optimizer"]
        elif state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.steps = int(state["steps"])
        if self.clip is not None:
            self.clip.norms = [float(norm) for norm in state["norms"]]
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])


def optimizer_options(name: str) -> list[str]:
    """What the class of this name in ``torch.optim`` takes besides parameters and learning rate."""
    build = next(c for known, c in _optimizers().items() if known.lower() == name.lower())
    return [option for option in argument_names(build) if option not in ("params", "lr")]


def _optimizers() -> dict[str, Any]:
    return {name: c for name, c in vars(torch.optim).items() if _usable(c)}


def _check(
    schedule: str,
    warmup: int,
    total_steps: int | None,
    clip: float | None,
    average: float,
    lr_scale: Mapping[str, float] | None,
) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"Expected schedule as one of {', '.join(SCHEDULES)}. Got {schedule!r}.")
    if warmup < 0:
        raise ValueError(f"Expected warmup >= 0 steps. Got {warmup}.")
    if clip is not None and not 1 <= clip < math.inf:
        raise ValueError(f"Expected clip >= 1 and finite, or None. Got {clip}.")
    if not 0 <= average <= 1:
        raise ValueError(f"Expected average in [0, 1]. Got {average}.")
    if total_steps is None and (average or schedule == "cosine"):
        raise ValueError("Expected total_steps with a cosine schedule or an average. Got None.")
    for part, scale in (lr_scale or {}).items():
        if not part or not 0 < scale < math.inf:
            raise ValueError(f"Expected lr_scale as parts of names with factors > 0. Got {part!r}: {scale}.")


def _usable(candidate: Any) -> bool:
    if not (isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)):
        return False
    return candidate not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
