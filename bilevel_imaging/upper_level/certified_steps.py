"""What deterministic methods share: losses accurate enough to compare, certified stationarity, the report of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from bilevel_imaging.checks import described, number
from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, SampledObjective, StepReport
from bilevel_imaging.upper_level.conditions import gradient_norm_interval
from bilevel_imaging.upper_level.quasi_newton import assign
from bilevel_imaging.upper_level.slope import Slope

# losses that a relaxed test compares are computed to this part of the decrease it asks for: it then still implies no
# increase of the true one
NOISE_SHARE = 1 / 4
# changes of the accuracy of one value, and how many of them
LARGEST_CHANGE, SMALLEST_CHANGE, MAX_CHANGES = 0.1, 1e-4, 12
# solvers may be far more accurate than they were asked to be: so many changes may pass without effect
MAX_STALLED = 3


def require_objective(objective: Objective) -> None:
    """Refuse what no method can do a step with, e.g. a lower-level problem.

    Raises:
        ValueError: no objective.
    """
    needed = ("theta", "hypergradient")  # first-order methods do without values
    if isinstance(objective, type) or not all(hasattr(objective, name) for name in needed):
        raise ValueError(
            "Expected objective as an upper-level objective, e.g. BilevelObjective(energy, pairs) or "
            f"ProblemObjective(problem, loss, x_true). Got {described(objective)}."
        )


def require_all_images(objective: Objective, what: str) -> None:
    """Refuse minibatches, and what is no objective.

    Args:
        objective: of a method.
        what: why, as in "MAID compares losses of all images".

    Raises:
        ValueError: the objective takes minibatches, or is none.
    """
    require_objective(objective)
    if getattr(objective, "minibatch", None) is not None:
        raise ValueError(f"Expected an objective without minibatches: {what}.")


def require_problems(objective: Objective, *names: str) -> SampledObjective:
    """The objective, unless it keeps its lower-level problems to itself.

    Args:
        objective: of a method.
        names: what the method needs of a :class:`SampledObjective`.

    Raises:
        ValueError: something of it is not there.
    """
    require_objective(objective)
    if not all(hasattr(objective, name) for name in names):
        raise ValueError(
            "Expected an objective that hands out lower-level problems (SampledObjective). Got "
            f"{type(objective).__name__}; use BilevelObjective."
        )
    return cast(SampledObjective, objective)


def check_range(name: str, value: float, low: float, high: float, *, closed: bool = False) -> None:
    """Refuse numbers outside (low, high); ``closed`` allows low itself.

    Raises:
        ValueError: out of range.
    """
    number(name, value, f"a number in {'[' if closed else '('}{low}, {high})")
    if not (low < value < high or (closed and value == low)):
        raise ValueError(f"Expected {name} in {'[' if closed else '('}{low}, {high}). Got {value!r}.")


def check_positive(**values: float | None) -> None:
    """Refuse numbers that are not positive and finite; ``None`` passes.

    Raises:
        ValueError: naming the first of them.
    """
    for name, value in values.items():
        if value is not None and not 0 < number(name, value, "a positive number or None") < math.inf:
            raise ValueError(f"Expected {name} as a positive number or None. Got {value!r}.")


def check_state(state: dict[str, Any], names: set[str], method: str) -> None:
    """Refuse states that lack something.

    Raises:
        ValueError: names are missing.
    """
    missing = names - set(state)
    if missing:
        raise ValueError(f"Expected a state of {method} with {sorted(missing)}. Got {sorted(state)}.")


def certified_stationary(h: Hypergradient | Slope, tolerance: float | None) -> str:
    """In words, that ||grad F|| <= tolerance for certain; "" where the certificate does not say so.

    Args:
        h: hypergradient of all images.
        tolerance: ``None`` for never.
    """
    if tolerance is None or not gradient_norm_interval(h)[1] <= tolerance:
        return ""
    return f"certified stationary: ||grad F|| <= {gradient_norm_interval(h)[1]:.3g}, asked for {tolerance:.3g}"


def value_with(h: Hypergradient | Slope) -> CertifiedValue:
    """The loss that came with a hypergradient; it cost nothing more."""
    return CertifiedValue(value=h.loss, lower=h.loss_interval[0], upper=h.loss_interval[1], cost=Cost())


def half_width(value: CertifiedValue) -> float:
    """The certified error of the estimate; inf if nothing is certified."""
    return max(value.upper - value.value, value.value - value.lower)


def not_worth(predicted: float, tolerance: float, loss: float) -> str:
    """In words, that a step is predicted to lower the loss by less than this fraction of it; "" for enough."""
    return f"predicted decrease below {tolerance:g} of the loss" if predicted < tolerance * abs(loss) else ""


def within_certificate(h: Hypergradient | Slope) -> str:
    """In words, that h is not longer than its certified error, so that it says nothing of a descent; "" otherwise."""
    if h.norm == 0:
        return "the hypergradient is zero"
    if h.certified and h.bound >= h.norm:
        return f"stationary to within the certificate: ||grad F|| <= {h.norm + h.bound:.3g}"
    return ""


def first_error_tol(loss: float) -> float:
    """Distance at which ||grad f|| times it is about a tenth of the loss: ||grad f|| ~ sqrt(2 L_f F)."""
    return 0.1 * max(abs(loss), 1e-12) ** 0.5


def value_within(
    objective: Objective, goal: float, error_tol: float, *, hopeless: float = math.inf
) -> tuple[CertifiedValue, float, int]:
    """The loss at the current theta with a certified error of at most ``goal``, where rounding allows it.

    Args:
        objective: whose theta it is.
        goal: largest half-width of the interval.
        error_tol: lower-level accuracy of the first try.
        hopeless: a loss that is certainly above this need not be known better.

    Returns:
        the narrowest interval found (with the cost of all tries; without certificates the first estimate), the
        accuracy that gave it, and the number of tries beside the first.
    """
    best = objective.value(error_tol)
    best_tol, cost, stalled, tries = error_tol, best.cost, 0, 0
    while goal < half_width(best) < math.inf and tries < MAX_CHANGES and stalled < MAX_STALLED:
        if best.lower > hopeless:
            break
        error_tol *= min(max(0.5 * goal / half_width(best), SMALLEST_CHANGE), LARGEST_CHANGE)
        value = objective.value(error_tol)
        cost, tries = cost + value.cost, tries + 1
        stalled = stalled + 1 if half_width(value) > 0.5 * half_width(best) else 0
        if half_width(value) < half_width(best):
            best, best_tol = value, error_tol
    return CertifiedValue(value=best.value, lower=best.lower, upper=best.upper, cost=cost), best_tol, tries


@dataclass(frozen=True)
class Compared:
    """Two losses, each with a certified error of at most the goal where rounding allows it.

    Attributes:
        old: at theta.
        new: at theta + s.
        error_tol: accuracy of the reconstructions that gave the second.
        cost: of both.
        refinements: changes of the accuracy.
    """

    old: CertifiedValue
    new: CertifiedValue
    error_tol: float
    cost: Cost
    refinements: int

    @property
    def noise(self) -> float:
        """The sum of both certified errors; 0 where nothing is certified."""
        total = half_width(self.old) + half_width(self.new)
        return total if math.isfinite(total) else 0.0

    def lower_by(self, needed: float) -> bool:
        """Whether the loss fell by ``needed``, a test relaxed by the noise."""
        return self.old.value - self.new.value + self.noise >= needed


def compare(
    objective: Objective, old: CertifiedValue, theta: Tensor, s: Tensor, goal: float, error_tol: float
) -> Compared:
    """The losses at theta and theta + s; theta + s is left behind.

    Args:
        objective: whose theta is the first one, or any where ``old`` is good enough.
        old: the loss there, as far as it is known.
        theta: ``(n,)``.
        s: ``(n,)``.
        goal: largest half-width of both intervals; a new loss that is certainly larger need not be known that well.
        error_tol: accuracy of the reconstructions to begin with; 0 for one of a tenth of the loss.
    """
    cost, refinements = Cost(), 0
    tolerance = error_tol or first_error_tol(old.value)
    if goal < half_width(old) < math.inf:
        assign(objective.theta, theta)
        again, tolerance, refinements = value_within(objective, goal, tolerance)
        old, cost = min(old, again, key=half_width), again.cost
    assign(objective.theta, theta + s)
    new, tolerance, tries = value_within(objective, goal, 2 * tolerance, hopeless=old.upper)
    return Compared(old, new, tolerance, cost + new.cost, refinements + tries)


def report(
    h: Hypergradient | Slope,
    value: CertifiedValue,
    cost: Cost,
    *,
    step_size: float = 0.0,
    moved: float = 0.0,
    refinements: int = 0,
    backtracks: int = 0,
    stop: str = "",
    extra: dict[str, float] | None = None,
) -> StepReport:
    """The report of a step along a hypergradient; ``value`` is the loss after it, a positive ``moved`` its length."""
    return StepReport(
        loss=value.value,
        loss_lower=value.lower,
        loss_upper=value.upper,
        grad_norm=h.norm,
        error_bound=h.bound,
        certified=h.certified,
        reason=h.reason,
        error_tol=h.distance,
        residual_tol=h.residual,
        step_size=step_size,
        accepted=moved > 0,
        refinements=refinements,
        backtracks=backtracks,
        param_change=moved,
        cost=cost,
        stop=stop,
        extra=extra or {},
    )


def report_without_hypergradient(
    value: CertifiedValue,
    cost: Cost,
    *,
    grad_norm: float,
    error_tol: float,
    moved: float,
    refinements: int,
    backtracks: int,
    stop: str,
    extra: dict[str, float],
) -> StepReport:
    """The report of a derivative-free step: the loss is certified, there is no hypergradient that could be."""
    return StepReport(
        loss=value.value,
        loss_lower=value.lower,
        loss_upper=value.upper,
        grad_norm=grad_norm,
        error_bound=math.inf,
        certified=False,
        reason="derivative-free: there is no hypergradient to certify",
        error_tol=error_tol,
        residual_tol=0.0,
        step_size=moved,
        accepted=moved > 0,
        refinements=refinements,
        backtracks=backtracks,
        param_change=moved,
        cost=cost,
        stop=stop,
        extra=extra,
    )
