"""MAID, the method of adaptive inexact descent, with a three-way test on certified intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    MAX_STALLED,
    certified_stationary,
    check_positive,
    check_range,
    first_error_tol,
    not_worth,
    report,
    require_all_images,
    value_with,
    within_certificate,
)
from bilevel_imaging.upper_level.quasi_newton import InverseHessian, assign, flatten
from bilevel_imaging.upper_level.step_sizes import LARGEST_FIRST_MOVE

# a trial value is first computed to this fraction of the distance that its interval would need by itself
TIGHTEN, MAX_TIGHTENINGS, MAX_TRIALS = 0.1, 8, 25
# factor of steps that are too short to tell what they do
LENGTHEN = 10.0
LARGEST_MOVE = 2.0
# up to this many parameters, stationary points are checked for being plateaus
FEW_PARAMETERS = 16
# distance at which hypergradients beside a point give its Hessian, in log-parameters
PROBE = 0.1


@dataclass(frozen=True)
class _Trial:
    """Outcome of one line-search trial."""

    verdict: str  # "accept", "reject", "undecided"
    value: CertifiedValue
    refinements: int


class MAID(UpperLevelMethod):
    """Descent with hypergradients accurate enough to descend, and steps that decrease the true loss for certain.

    After Salehi, Mukherjee, Roberts & Ehrhardt (2023). Where the paper tightens both accuracies whenever a line search
    fails, here every trial is accepted (F_hi(new) <= F_lo(old) - c t <h, P h>), rejected for sure
    (F_lo(new) > F_hi(old) - c t <h, P h>), or undecided, and only undecided trials are tightened. Directions are
    preconditioned by L-BFGS built from curvature that exceeds the certified errors. Accuracies and the first step
    come from the problem: nothing needs tuning.

    Args:
        relative: hypergradients are refined until bound <= relative * ||h|| (C = 1 - eta of the descent test), < 1.
        decrease: Armijo constant c, in (0, 1/2).
        tolerance: stop when the step predicted to be optimal lowers the loss by less than this fraction of it.
        memory: L-BFGS pairs; 0 for plain descent directions.
        largest_move: largest change of one parameter in one step (parameters are logarithms or of order 1).
        stationarity_tol: stop when ||grad F|| is certified to be at most this, plateau or not; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        relative: float = 0.1,
        decrease: float = 1e-4,
        tolerance: float = 1e-6,
        memory: int = 10,
        largest_move: float = LARGEST_MOVE,
        stationarity_tol: float | None = None,
    ):
        for name, value, low, high in (
            ("relative", relative, 0.0, 1.0),
            ("decrease", decrease, 0.0, 0.5),
            ("tolerance", tolerance, 0.0, 1.0),
            ("largest_move", largest_move, 0.0, float("inf")),
        ):
            check_range(name, value, low, high)
        check_positive(stationarity_tol=stationarity_tol)
        if memory < 0:
            raise ValueError(f"Expected memory >= 0. Got {memory!r}.")
        self.relative, self.decrease, self.tolerance = relative, decrease, tolerance
        self.largest_move, self.stationarity_tol = largest_move, stationarity_tol
        self.inverse = InverseHessian(memory) if memory else None
        self.growth = 1.0  # length of the next step in units of the quasi-Newton step
        self.step_size = 0.0  # length t of the last accepted step along -P h; 0 before the first
        self.error_tol = 0.0  # accuracy of the last decisive value; 0 before the first
        self.previous: dict[str, Any] | None = None

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one line search. theta is left unchanged if no certified decrease is found.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "MAID compares losses of all images")
        h = objective.hypergradient(relative=self.relative)
        stop = certified_stationary(h, self.stationarity_tol)
        if stop:
            return self._report(h, h, 0.0, 0, 0, 0.0, h.cost, stop)
        theta, flat = flatten(objective.theta), flatten(h.grad)
        self._learn_curvature(theta, flat, h.bound)
        direction = self._direction(flat)
        slope = float(flat @ direction)
        self.previous = {"theta": theta, "grad": flat, "bound": h.bound}
        stop = self._finished(h, slope)
        if stop:
            return self._look_around(objective, h, theta, stop)
        first = self._first_step(direction)
        return self._search(objective, h, theta, direction, slope, first)

    def _look_around(self, objective: Objective, h: Hypergradient, theta: Tensor, stop: str) -> StepReport:
        """Before stopping, try long moves along the flattest directions: a plateau looks stationary from inside.

        Smoothed total variation has one: for large smoothing only weight / smoothing matters, and both can fall
        together a long way before the loss does.
        """
        moves, cost = self._flat_moves(objective, h, theta)
        refinements = 0
        # so far away losses differ a lot: start coarse again instead of with the accuracy of the last line search
        self.error_tol, fine = 0.0, self.error_tol
        for number, move in enumerate(moves):
            assign(objective.theta, theta + move)
            # positive even where the loss is zero: a move that changes nothing is no progress
            trial = self._try(objective, h, max(self.tolerance * abs(h.loss), 1e-300))
            cost, refinements = cost + trial.value.cost, refinements + trial.refinements
            if trial.verdict == "accept":
                if self.inverse is not None:
                    self.inverse.reset()
                self.previous, self.step_size = None, 0.0
                moved = float(move.norm())
                return self._report(h, trial.value, moved, refinements, number, moved, cost, "")
        assign(objective.theta, theta)
        self.error_tol = fine
        return self._report(h, h, 0.0, refinements, len(moves), 0.0, cost, stop)

    def _flat_moves(self, objective: Objective, h: Hypergradient, theta: Tensor) -> tuple[list[Tensor], Cost]:
        """Moves of length ``largest_move`` both ways along the eigenvectors of the Hessian, flattest first.

        The Hessian comes from one hypergradient per parameter, a little beside theta: for few parameters only.
        """
        cost, n = h.cost, len(theta)
        if n > FEW_PARAMETERS:
            return [], cost
        columns = []
        for direction in torch.eye(n, dtype=torch.float64):
            assign(objective.theta, theta + PROBE * direction)
            beside = objective.hypergradient(relative=self.relative)
            cost = cost + beside.cost
            columns.append((flatten(beside.grad) - flatten(h.grad)) / PROBE)
        hessian = torch.stack(columns)
        if not bool(torch.isfinite(hessian).all()):
            return [], cost
        values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.T))
        flattest_first = vectors.T[values.abs().argsort()]
        lengths = self.largest_move / flattest_first.abs().amax(1, keepdim=True)
        return [sign * move for move in lengths * flattest_first for sign in (-1.0, 1.0)], cost

    def _learn_curvature(self, theta: Tensor, flat: Tensor, bound: float) -> None:
        if self.inverse is None or self.previous is None:
            return
        noise = bound + self.previous["bound"]
        s = theta - self.previous["theta"]
        if not (noise < float("inf") and float(s.norm()) > 0):
            return
        z = flat - self.previous["grad"]
        self.inverse.update(s, z, noise)
        # along negative curvature no pair can be kept and the step would stay as short as it is: lengthen it
        self.growth = 2 * self.growth if float(s @ z) <= 0 else 1.0

    def _direction(self, flat: Tensor) -> Tensor:
        direction = flat if self.inverse is None else self.inverse.apply(flat)
        # a positive definite P can still be so ill-conditioned that the direction is hardly a descent direction
        if float(flat @ direction) < 1e-4 * float(flat.norm() * direction.norm()):
            self.inverse.reset()
            return flat.clone()
        return direction

    def _first_step(self, direction: Tensor) -> float:
        largest = float(direction.abs().max())
        if self.inverse is not None and self.inverse.pairs:
            wanted = self.growth
        else:
            wanted = 2 * self.step_size if self.step_size else LARGEST_FIRST_MOVE / largest
        return min(wanted, self.largest_move / largest)

    def _finished(self, h: Hypergradient, slope: float) -> str:
        known = h.norm > 0 and self.inverse is not None and self.inverse.pairs
        return (not_worth(0.5 * slope, self.tolerance, h.loss) if known else "") or within_certificate(h)

    def _search(self, objective, h: Hypergradient, theta, direction, slope, t: float) -> StepReport:
        """Backtrack along -P h until a trial is certified to decrease the loss."""
        cost, refinements = h.cost, 0
        value: CertifiedValue | None = None
        shortened = False
        long_enough = LARGEST_FIRST_MOVE / float(direction.abs().max())
        for backtracks in range(MAX_TRIALS):
            assign(objective.theta, theta - t * direction)
            trial = self._try(objective, h, self.decrease * t * slope)
            cost, refinements = cost + trial.value.cost, refinements + trial.refinements
            value = trial.value
            if trial.verdict == "accept":
                self.step_size = t
                moved = t * float(direction.norm())
                return self._report(h, value, t, refinements, backtracks, moved, cost, "")
            if trial.verdict == "undecided":
                if shortened:
                    break  # shorter steps change the loss even less than what can't be told apart already
                if t < long_enough:  # so does this one, and nothing says yet that a longer one is too long
                    t = min(LENGTHEN * t, long_enough)
                    continue
            shortened = True
            t *= self._shrink(h.loss, value.value, t * slope)
        assign(objective.theta, theta)
        stop = "no decrease of the loss can be certified any more along the negative hypergradient"
        if self.inverse is not None and self.inverse.pairs:
            self.inverse.reset()  # perhaps the curvature was wrong: the next step goes along -h
            self.step_size, stop = 0.0, ""
        return self._report(h, h, 0.0, refinements, backtracks, 0.0, cost, stop)

    def _try(self, objective: Objective, h: Hypergradient, needed: float) -> _Trial:
        """Tighten the value at the trial until it is certainly below or certainly not below the old loss - needed."""
        lower, upper = h.loss_interval
        certified = h.certified and upper < float("inf")
        # a coarser start, e.g. after a large drop of the loss, could decide nothing
        error_tol = min(self.error_tol or float("inf"), first_error_tol(h))
        total = Cost()
        width = float("inf")
        refinement = stalled = 0
        while True:
            value = objective.value(error_tol)
            total = total + value.cost
            verdict = self._compare(value, lower - needed, upper - needed) if certified else ""
            if not verdict:  # nothing is certified: compare the estimates
                verdict = "accept" if value.value <= h.loss - needed else "reject"
            if verdict != "undecided":
                # decisive with room to spare: the next value may be coarser
                spare = certified and value.upper - value.lower < 0.1 * abs(h.loss - value.value)
                self.error_tol = error_tol * (2 if spare else 1)
                break
            # warm starts can be more accurate than they were asked to be: the same solution may come again
            stalled = 0 if value.upper - value.lower < 0.5 * width else stalled + 1
            enough = value.upper - value.lower < 0.5 * (upper - lower) or refinement == MAX_TIGHTENINGS
            if enough or stalled == MAX_STALLED:
                break  # a rounding floor, or what is left is the uncertainty of the old loss
            width = min(width, value.upper - value.lower)
            error_tol *= TIGHTEN
            refinement += 1
        value = CertifiedValue(value=value.value, lower=value.lower, upper=value.upper, cost=total)
        return _Trial(verdict, value, refinement)

    @staticmethod
    def _compare(value: CertifiedValue, lower: float, upper: float) -> str:
        if value.upper == float("inf"):
            return ""
        if value.upper <= lower:
            return "accept"
        return "reject" if value.lower > upper else "undecided"

    @staticmethod
    def _shrink(old: float, new: float, predicted: float) -> float:
        """Minimizer of the parabola through both values with the known slope, kept within [0.1, 0.5]."""
        curvature = new - old + predicted
        return min(max(0.5 * predicted / curvature, 0.1), 0.5) if curvature > 0 else 0.5

    def _report(self, h, value, t, refinements, backtracks, moved, cost, stop) -> StepReport:
        after = value_with(value) if isinstance(value, Hypergradient) else value
        counts = {"refinements": refinements, "backtracks": backtracks}
        return report(h, after, cost, step_size=t, moved=moved, stop=stop, **counts)

    def state_dict(self) -> dict[str, Any]:
        """Step size, accuracy, curvature pairs and the last hypergradient."""
        return {
            "growth": self.growth,
            "step_size": self.step_size,
            "error_tol": self.error_tol,
            "previous": self.previous,
            "inverse": None if self.inverse is None else self.inverse.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        missing = {"growth", "step_size", "error_tol", "previous", "inverse"} - set(state)
        if missing:
            raise ValueError(f"Expected a MAID state with {sorted(missing)}. Got {sorted(state)}.")
        if (state["inverse"] is None) != (self.inverse is None):
            raise ValueError(
                "Expected a state saved with the same kind of directions (memory 0 or more). Got the other."
            )
        self.growth, self.step_size = float(state["growth"]), float(state["step_size"])
        self.error_tol = float(state["error_tol"])
        self.previous = None if state["previous"] is None else dict(state["previous"])
        if self.inverse is not None:
            self.inverse.load_state_dict(state["inverse"])
