"""MAID, the method of adaptive inexact descent, with a three-way test on certified intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bilevel_imaging.checks import whole
from bilevel_imaging.cost import Cost
from bilevel_imaging.upper_level.base import CertifiedValue, CurvedObjective, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    MAX_STALLED,
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    first_error_tol,
    half_width,
    not_worth,
    report,
    require_all_images,
    require_problems,
    value_with,
    within_certificate,
)
from bilevel_imaging.upper_level.plateaus import flat_moves
from bilevel_imaging.upper_level.quasi_newton import InverseHessian, assign, curvature_at_end, flatten
from bilevel_imaging.upper_level.sensitivities import FEW_PARAMETERS
from bilevel_imaging.upper_level.slope import Ahead, Slope
from bilevel_imaging.upper_level.trust_region_models import trust_region_step

# factor of the accuracy of a trial value that decides nothing, and how often it is applied
TIGHTEN, MAX_TIGHTENINGS, MAX_TRIALS = 0.1, 8, 25
# the first value is so accurate that its half-width should be this part of the decrease that the slope promises; if
# values before needed it, up to FINEST times as fine
COARSEST, FINEST = 0.5, 0.01
# half-widths over ||grad f|| error_tol are not counted on to be smaller: warm starts can be better than asked for
SHARPEST = 1e-3
# a trial that certainly decreases the loss by less than this part of what the slope promises is a wrong step
SUFFICIENT = 0.1
# factor of steps that are too short to tell what they do
LENGTHEN = 10.0
MODELS = ("auto", "gauss_newton", "secant")
# relative residuals of the linear systems for dx*/dtheta
SENSITIVITY = 0.1
# change of one parameter by the first step, and by any
FIRST_MOVE, LARGEST_MOVE = 1.0, 2.0


@dataclass(frozen=True)
class _Trial:
    """Outcome of one line-search trial."""

    verdict: str  # "accept", "reject", "undecided"
    value: CertifiedValue
    refinements: int


class MAID(UpperLevelMethod):
    """Descent with hypergradients accurate enough to descend, and steps that decrease the true loss for certain.

    After Salehi, Mukherjee, Roberts & Ehrhardt (2023). Where the paper tightens both accuracies whenever a line search
    fails, here every trial is accepted (F_hi(new) <= F_lo(old) - c t <h, P h>), rejected for sure (F_lo(new) >
    F_hi(old) - t <h, P h> / 10: it can't be a good step), or undecided, and only undecided trials are tightened.
    After a step that took its first trial at once, the next trial is judged by the hypergradient there, which the step
    after it begins with. With few parameters and solves in compiled code steps are Gauss-Newton steps, from derivatives
    of the minimizers; else directions are preconditioned by the sizes of the entries of h and by L-BFGS built from the
    curvature at the ends of the steps, where that exceeds the certified errors. A loss is positive: no step is so long
    that its slope promises more than all of it. Accuracies and the first step come from the problem: nothing needs
    tuning.

    Args:
        relative: hypergradients are refined until bound <= relative * ||h|| (C = 1 - eta of the descent test), < 1;
            typical errors are a hundred times smaller than their bounds.
        decrease: Armijo constant c, in (0, 1/2).
        tolerance: stop when the step predicted to be optimal lowers the loss by less than this fraction of it.
        memory: L-BFGS pairs; 0 for plain descent directions.
        model: "gauss_newton" (a linear system per parameter and image in every step; needs an objective that tells its
            :meth:`~bilevel_imaging.upper_level.CurvedObjective.gauss_newton`), "secant" (``memory``), or "auto": the
            first for up to 4 parameters where the objective says that it pays (isotropic total variation of single
            channels for denoising, deblurring and inpainting), unless ``memory`` is 0.
        largest_move: largest change of one parameter in one step (parameters are logarithms or of order 1).
        stationarity_tol: stop when ||grad F|| is certified to be at most this, plateau or not; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        relative: float = 0.5,
        decrease: float = 1e-4,
        tolerance: float = 1e-6,
        memory: int = 40,
        model: str = "auto",
        largest_move: float = LARGEST_MOVE,
        stationarity_tol: float | None = None,
    ):
        for name, value, low, high in (
            ("relative", relative, 0.0, 1.0),
            ("decrease", decrease, 0.0, 0.5),
            ("tolerance", tolerance, 0.0, 1.0),
            ("largest_move", largest_move, 0.0, math.inf),
        ):
            check_range(name, value, low, high)
        check_positive(stationarity_tol=stationarity_tol)
        memory = whole("memory", memory, 0)
        if model not in MODELS:
            raise ValueError(f"Expected model as one of {', '.join(MODELS)}. Got {model!r}.")
        self.relative, self.decrease, self.tolerance = relative, decrease, tolerance
        self.largest_move, self.stationarity_tol = largest_move, stationarity_tol
        self.model = model
        self.inverse = InverseHessian(memory) if memory else None
        self.growth = 1.0  # length of the next step in units of the quasi-Newton step; inf for the longest allowed
        self.step_size = 0.0  # length t of the last accepted step along -P h; 0 before the first; for memory 0
        self.error_tol = 0.0  # accuracy of the last decisive value; 0 before the first
        self.sharpness = 1.0  # half-width of that value over ||grad f|| error_tol: corrected values are far better
        self.sure = False  # whether the last line search took its first trial at once
        self.misled = False  # whether no step along the last Gauss-Newton direction was accepted
        self.ahead: Ahead | None = None  # the hypergradient where the last step ended, if it came with that
        self.previous: dict[str, Any] | None = None

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one line search. theta is left unchanged if no certified decrease is found.

        Raises:
            ValueError: the objective takes minibatches.
        """
        require_all_images(objective, "MAID compares losses of all images")
        ahead, self.ahead = self.ahead, None
        h = ahead.slope if ahead is not None and ahead.fits(objective) else self._slope(objective)
        stop = certified_stationary(h, self.stationarity_tol)
        if stop:
            return self._report(h, h, 0.0, 0, 0, 0.0, h.cost, stop)
        theta, flat = flatten(objective.theta), flatten(h.grad)
        self._learn_curvature(theta, flat, h)
        h, matrix = self._curvature(objective, h)
        direction = self._direction(flat, matrix)
        slope = float(flat @ direction)
        noise = half_width(value_with(h))
        self.previous = {"theta": theta, "grad": flat, "bound": h.bound, "loss": h.loss, "noise": noise}
        scaled = matrix is not None or (self.inverse is not None and bool(self.inverse.pairs))
        stop = self._finished(h, slope, scaled)
        if stop:
            return self._look_around(objective, h, theta, stop)
        first = self._first_step(h, direction, slope, matrix)
        # the first Gauss-Newton step is as likely to be good as one that follows a good one
        sure = scaled and (self.sure or (matrix is not None and not self.step_size))
        return self._search(objective, h, theta, direction, slope, first, sure=sure, modeled=matrix is not None)

    def _slope(self, objective: Objective) -> Slope:
        return Slope.of(objective.hypergradient(relative=self.relative))

    def _look_around(self, objective: Objective, h: Slope, theta: Tensor, stop: str) -> StepReport:
        """Before stopping, try long moves along the flattest directions: a plateau looks stationary from inside.

        Smoothed total variation has one: for large smoothing only weight / smoothing matters, and both can fall
        together a long way before the loss does.
        """
        moves, spent = flat_moves(objective, h, theta, length=self.largest_move, relative=self.relative)
        cost, refinements = h.cost + spent, 0
        self.sure = False
        # so far away losses differ a lot: start coarse again instead of with the accuracy of the last line search
        self.error_tol, fine = 0.0, self.error_tol
        for number, move in enumerate(moves):
            assign(objective.theta, theta + move)
            # positive even where the loss is zero: a move that changes nothing is no progress
            trial = self._try(objective, h, max(self.tolerance * abs(h.loss), 1e-300), math.inf)
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

    def _learn_curvature(self, theta: Tensor, flat: Tensor, h: Slope) -> None:
        if self.inverse is None or self.previous is None:
            return
        before = self.previous
        s, noise = theta - before["theta"], h.bound + before["bound"]
        if not (noise < math.inf and float(s.norm()) > 0):
            return
        rise, slopes = h.loss - before["loss"], float(s @ (flat + before["grad"]))
        z = curvature_at_end(s, flat - before["grad"], rise, slopes, half_width(value_with(h)) + before["noise"])
        if self.inverse.update(s, z, noise):
            self.growth = 1.0
        else:  # too little curvature to be seen, so that the next step would be as short again, or none
            self.growth = LENGTHEN * self.growth if float(s @ z) > 0 else math.inf

    def _curvature(self, objective: Objective, h: Slope) -> tuple[Slope, Tensor | None]:
        """The Gauss-Newton matrix where steps are made of that, and the hypergradient with its work."""
        wanted = self.model == "gauss_newton"
        if self.model == "auto" and self.inverse is not None:
            curved = isinstance(objective, CurvedObjective) and objective.gauss_newton_pays
            wanted = h.parameters <= FEW_PARAMETERS and curved
        if not wanted or self.misled or h.norm == 0:
            return h, None
        found = cast(CurvedObjective, require_problems(objective, "gauss_newton")).gauss_newton(SENSITIVITY)
        if found is None:
            if self.model == "gauss_newton":
                raise ValueError(
                    "Expected an objective without a penalty, and with warm starts, for Gauss-Newton steps. Got one "
                    "that can't tell its Gauss-Newton matrix; choose model='secant'."
                )
            return h, None
        matrix, spent = found
        return replace(h, cost=h.cost + spent), matrix if bool(matrix.isfinite().all()) else None

    def _direction(self, flat: Tensor, matrix: Tensor | None) -> Tensor:
        if self.inverse is not None:
            self.inverse.observe(flat)
        if matrix is not None:
            return -trust_region_step(partial(torch.mv, matrix), flat, self.largest_move)[0]
        if self.inverse is None:
            return flat
        direction = self.inverse.apply(flat)
        # a positive definite P can still be so ill-conditioned that the direction is hardly a descent direction
        if float(flat @ direction) < 1e-4 * float(flat.norm() * direction.norm()):
            self.inverse.reset()
            return self.inverse.apply(flat)
        return direction

    def _first_step(self, h: Slope, direction: Tensor, slope: float, matrix: Tensor | None) -> float:
        largest = float(direction.abs().max())
        if matrix is not None:
            wanted = 1.0
        elif self.inverse is None:
            wanted = 2 * self.step_size or FIRST_MOVE / largest
        elif self.inverse.pairs:
            wanted = self.growth
        else:  # no scale is known: one long step tells more of the curvature than many short ones
            wanted = self.growth * FIRST_MOVE / largest
        if h.loss > 0:
            wanted = min(wanted, h.loss / slope)
        return min(wanted, self.largest_move / largest)

    def _finished(self, h: Slope, slope: float, scaled: bool) -> str:
        known = h.norm > 0 and scaled
        return (not_worth(0.5 * slope, self.tolerance, h.loss) if known else "") or within_certificate(h)

    def _search(
        self, objective, h: Slope, theta, direction, slope, t: float, *, sure: bool, modeled: bool
    ) -> StepReport:
        """Backtrack along -P h until a trial is certified to decrease the loss. ``sure``: expect that of the first;
        ``modeled``: -P h is a Gauss-Newton step."""
        cost, refinements = h.cost, 0
        shortened = self.sure = False
        long_enough = FIRST_MOVE / float(direction.abs().max())
        for backtracks in range(MAX_TRIALS):
            assign(objective.theta, theta - t * direction)
            trial = self._try(objective, h, self.decrease * t * slope, t * slope, ahead=sure and backtracks == 0)
            value, cost, refinements = trial.value, cost + trial.value.cost, refinements + trial.refinements
            if trial.verdict == "accept":
                self.step_size, self.sure, self.misled = t, backtracks == refinements == 0, False
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
        self.misled = modeled
        if modeled or (self.inverse is not None and self.inverse.pairs):
            if self.inverse is not None:
                self.inverse.reset()  # perhaps the curvature was wrong: the next step goes without
            self.step_size, self.growth, stop = 0.0, 1.0, ""
        return self._report(h, h, 0.0, refinements, backtracks, 0.0, cost, stop)

    def _try(self, objective: Objective, h: Slope, needed: float, promised: float, *, ahead: bool = False) -> _Trial:
        """Tighten the value at the trial until it is certainly below the old loss - needed, or certainly too high.

        Too high is a decrease of less than a part of what the slope ``promised``; where that is inf, of ``needed``.
        ``ahead``: the trial is taken for the next point, whose hypergradient knows the loss better than a value does.
        """
        lower, upper = h.loss_interval
        certified = h.certified and upper < math.inf
        wanted = max(needed, SUFFICIENT * promised) if promised < math.inf else needed
        total = Cost()
        if ahead and certified:
            there = self._slope(objective)
            value, total = value_with(there), there.cost
            verdict = self._compare(value, lower - needed, upper - wanted)
            if verdict == "accept":
                self.ahead = Ahead.at(objective, there)
            if verdict in ("accept", "reject"):
                return _Trial(verdict, replace(value, cost=total), 0)
        # coarser, or coarser than the last one after a large drop of the loss, could decide nothing
        size = max(2 * abs(h.loss), 1e-12) ** 0.5  # about ||grad f||
        coarsest = min(first_error_tol(h.loss), COARSEST * promised / (size * self.sharpness))
        error_tol = max(min(self.error_tol or math.inf, coarsest), FINEST * coarsest)
        width = math.inf
        refinement = stalled = 0
        while True:
            value = objective.value(error_tol)
            total = total + value.cost
            verdict = self._compare(value, lower - needed, upper - wanted) if certified else ""
            if not verdict:  # nothing is certified: compare the estimates
                verdict = "accept" if value.value <= h.loss - needed else "reject"
            if verdict != "undecided":
                # decisive with room to spare: the next value may be coarser
                spare = certified and value.upper - value.lower < 0.1 * abs(h.loss - value.value)
                self.error_tol = error_tol * (2 if spare else 1)
                if certified:
                    self.sharpness = min(max(half_width(value) / (size * error_tol), SHARPEST), 1.0)
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
        if value.upper == math.inf:
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
        after = value_with(value) if isinstance(value, Slope) else value
        counts = {"refinements": refinements, "backtracks": backtracks}
        return report(h, after, cost, step_size=t, moved=moved, stop=stop, **counts)

    def state_dict(self) -> dict[str, Any]:
        """Step size, accuracy, curvature pairs and the last hypergradient."""
        return {
            "growth": self.growth,
            "step_size": self.step_size,
            "error_tol": self.error_tol,
            "sharpness": self.sharpness,
            "sure": self.sure,
            "misled": self.misled,
            "ahead": None if self.ahead is None else self.ahead.state_dict(),
            "previous": self.previous,
            "inverse": None if self.inverse is None else self.inverse.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, set(self.state_dict()) - {"sure", "misled", "ahead"}, "MAID")  # which older states have not
        if (state["inverse"] is None) != (self.inverse is None):
            raise ValueError("Expected a state of the same kind of directions (memory 0 or more). Got the other.")
        for name in ("growth", "step_size", "error_tol", "sharpness"):
            setattr(self, name, float(state[name]))
        self.sure, self.misled = (bool(state.get(name, False)) for name in ("sure", "misled"))
        ahead = state.get("ahead")
        self.ahead = None if ahead is None else Ahead.from_state(ahead)
        self.previous = None if state["previous"] is None else dict(state["previous"])
        if self.inverse is not None:
            self.inverse.load_state_dict(state["inverse"])
