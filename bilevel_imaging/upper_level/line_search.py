"""Line search with values and gradients of bounded errors: the Armijo test is relaxed by what the values may be off."""

from __future__ import annotations

from typing import Any

from bilevel_imaging.upper_level.base import Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    Compared,
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    compare,
    not_worth,
    report,
    require_all_images,
    value_with,
    within_certificate,
)
from bilevel_imaging.upper_level.conditions import RelativeError
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.step_sizes import LARGEST_FIRST_MOVE

MAX_TRIALS = 40
# without a noise level of their own, values are computed to this part of the decrease asked for: the relaxed test then
# still implies a decrease of the true loss, by half of it
NOISE_SHARE = 1 / 8


class NoisyLineSearch(UpperLevelMethod):
    """Generic line search with noise of Berahas, Cao & Scheinberg (2021), along negative hypergradients h.

    With ||h - grad F|| <= C ||h|| (the norm test, certified) and values whose errors are at most eps_f, a step a is
    accepted if

        F~(theta - a h) <= F~(theta) - c a ||h||^2 + 2 eps_f,

    and then a becomes a / gamma for the next iteration; otherwise gamma a is tried. For 2 eps_f stands the sum of the
    certified errors of both values: an accepted step raises the true loss by 4 eps_f - c a ||h||^2 at most. In the
    paper eps_f is a given constant and theta ends in a neighborhood of the solution that it determines; here values can
    be as accurate as one wants, so that by default eps_f is an eighth of the decrease asked for, where rounding allows
    it, and no accepted step raises the loss.

    Args:
        relative: C, in (0, 1).
        lr: first step; ``None`` for one that changes the parameters by at most 0.5.
        noise: eps_f > 0; ``None`` for an eighth of the decrease asked for.
        gamma: factor of backtracking, in (0, 1).
        decrease: c, in (0, 1/2).
        largest_move: largest change of one parameter in one step.
        tolerance: stop when a / 2 ||h||^2 is less than this fraction of the loss.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        relative: float = 0.1,
        lr: float | None = None,
        noise: float | None = None,
        gamma: float = 0.7,
        decrease: float = 0.1,
        largest_move: float = 2.0,
        tolerance: float = 1e-6,
        stationarity_tol: float | None = None,
    ):
        self.condition = RelativeError(relative)
        check_positive(lr=lr, noise=noise, largest_move=largest_move, stationarity_tol=stationarity_tol)
        check_range("gamma", gamma, 0.0, 1.0)
        check_range("decrease", decrease, 0.0, 0.5)
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        self.noise, self.gamma, self.decrease, self.largest_move = noise, gamma, decrease, largest_move
        self.tolerance, self.stationarity_tol = tolerance, stationarity_tol
        self.step_size = 0.0 if lr is None else lr  # first to try; 0 before the first step
        self.error_tol = 0.0  # accuracy of the last value; 0 before the first
        self.steps = 0

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one line search; theta is left unchanged where no step is accepted.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "the line search compares losses of all images")
        h = objective.hypergradient(**self.condition.accuracy(self.steps))
        theta, direction = flatten(objective.theta), flatten(h.grad)
        old, cost, refinements = value_with(h), h.cost, 0
        stop = certified_stationary(h, self.stationarity_tol) or within_certificate(h)
        if self.steps:
            stop = stop or not_worth(0.5 * self.step_size * h.norm**2, self.tolerance, h.loss)
        if stop:
            return report(h, old, cost, stop=stop)
        self.steps += 1
        largest = float(direction.abs().max())
        a = min(self.step_size or LARGEST_FIRST_MOVE / largest, self.largest_move / largest)
        for backtracks in range(MAX_TRIALS):
            needed = self.decrease * a * h.norm**2
            goal = self.noise or NOISE_SHARE * needed
            both = compare(objective, old, theta, -a * direction, goal, self.error_tol)
            old, self.error_tol = both.old, both.error_tol
            cost, refinements = cost + both.cost, refinements + both.refinements
            if self._accepted(both, needed):
                self.step_size = a / self.gamma
                moved = a * h.norm
                counts = {"refinements": refinements, "backtracks": backtracks}
                return report(h, both.new, cost, step_size=a, moved=moved, extra={"noise": both.noise}, **counts)
            a *= self.gamma
        assign(objective.theta, theta)
        self.step_size = a
        stop = "no step along the negative hypergradient lowers the loss by more than its values may be off"
        return report(h, old, cost, refinements=refinements, backtracks=MAX_TRIALS, stop=stop)

    def _accepted(self, both: Compared, needed: float) -> bool:
        """The relaxed Armijo test; where nothing is certified, the plain one."""
        return both.lower_by(needed)

    def state_dict(self) -> dict[str, Any]:
        """Step length, accuracy of the values and number of steps."""
        return {"step_size": self.step_size, "error_tol": self.error_tol, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"step_size", "error_tol", "steps"}, "NoisyLineSearch")
        self.step_size, self.error_tol = float(state["step_size"]), float(state["error_tol"])
        self.steps = int(state["steps"])
