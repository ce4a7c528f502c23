"""Grid search over few parameters: the baseline that needs losses alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.upper_level.base import CertifiedValue, Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    check_positive,
    check_range,
    check_state,
    report_without_hypergradient,
    require_all_images,
)
from bilevel_imaging.upper_level.quasi_newton import assign, flatten

MAX_VALUES = 1000
TIGHTEN, MAX_ROUNDS = 0.1, 8
# which of several better points is the best one need not be known better than to this part of what is gained
ENOUGH = 0.1


class GridSearch(UpperLevelMethod):
    """Nested grids around theta; every step evaluates one.

    A grid has ``points`` values of every parameter, evenly spaced over theta +- width, theta among them. The losses are
    computed coarsely first, then more accurately for those that may still be the smallest. theta moves to the smallest
    if that is certainly below the loss at theta. Then the width becomes the spacing of the grid, at most half of what
    it was, unless the smallest loss is on the rim: there the next grid is as wide again, so that the search can leave
    the first one.

    Args:
        points: values per parameter, odd and >= 3.
        width: half the width of the first grid (parameters are logarithms or of order 1).
        final_width: stop when the width is smaller.
        error_tol: accuracy of the first losses, in the units of x.
        tolerance: losses that differ by less than this fraction count as equal.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        points: int = 5,
        width: float = 2.0,
        final_width: float = 1e-2,
        error_tol: float = 0.1,
        tolerance: float = 1e-5,
    ):
        check_positive(width=width, final_width=final_width, error_tol=error_tol)
        if points < 3 or points % 2 == 0:
            raise ValueError(f"Expected points as an odd number >= 3. Got {points!r}.")
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        self.points, self.width, self.final_width = points, width, final_width
        self.error_tol, self.tolerance = error_tol, tolerance

    def step(self, objective: Objective) -> StepReport:
        """One grid.

        Raises:
            ValueError: the objective takes minibatches, or the grid would have more than ``MAX_VALUES`` points.
        """
        require_all_images(objective, "a grid search compares losses of all images")
        theta = flatten(objective.theta)
        moves = self._moves(len(theta))
        values, error_tol, cost, rounds = self._losses(objective, theta, moves)
        center = len(moves) // 2
        best = min(values, key=lambda i: (values[i].upper, values[i].value))
        if not self._better(values[best], values[center]):
            best = center
        assign(objective.theta, theta + moves[best])
        # accuracies that decided this grid are the first of the next, with some room to become coarser again
        self.error_tol = min(self.error_tol, 10 * error_tol)
        if float(moves[best].abs().max()) < 0.999 * self.width:
            self.width *= min(2 / (self.points - 1), 0.5)
        moved = float(moves[best].norm())
        narrow = f"the grid is narrower than {self.final_width:g}"
        return report_without_hypergradient(
            values[best],
            cost,
            grad_norm=0.0,
            error_tol=error_tol,
            moved=moved,
            refinements=rounds,
            backtracks=0,
            stop=narrow if self.width < self.final_width else "",
            extra={"width": self.width, "points": float(len(moves))},
        )

    @staticmethod
    def _better(best: CertifiedValue, center: CertifiedValue) -> bool:
        """Whether the loss is smaller for certain; where nothing is certified, the estimates decide."""
        return best.upper < center.lower or (best.upper == math.inf and best.value < center.value)

    def check_size(self, parameters: int) -> None:
        if self.points**parameters > MAX_VALUES:
            most = int(math.log(MAX_VALUES, self.points))
            raise ValueError(
                f"Expected at most {most} parameters for a grid of {self.points} values each. Got {parameters}; choose "
                "a method that uses hypergradients."
            )

    def _moves(self, n: int) -> list[Tensor]:
        """All offsets from theta, the middle one 0."""
        self.check_size(n)
        half = self.points // 2
        steps = [self.width * k / half for k in range(-half, half + 1)]
        return [torch.tensor(move, dtype=torch.float64) for move in itertools.product(steps, repeat=n)]

    def _losses(
        self, objective: Objective, theta: Tensor, moves: list[Tensor]
    ) -> tuple[dict[int, CertifiedValue], float, Cost, int]:
        """(losses of what may be the best point, and of the middle one; accuracy; work; refinements)."""
        error_tol, cost = self.error_tol, Cost()
        values: dict[int, CertifiedValue] = {}
        candidates, center, rounds = list(range(len(moves))), len(moves) // 2, 0
        while True:
            for i in candidates:
                assign(objective.theta, theta + moves[i])
                value = objective.value(error_tol)
                cost = cost + value.cost
                if i not in values or value.upper - value.lower <= values[i].upper - values[i].lower:
                    values[i] = value
            limit = min(value.upper for value in values.values())
            candidates = [i for i in candidates if values[i].lower <= limit]
            if len(candidates) == 1 or not math.isfinite(limit) or rounds == MAX_ROUNDS:
                break
            gain = values[center].lower - limit
            widest = max(values[i].upper - values[i].lower for i in candidates)
            if widest < max(ENOUGH * gain, self.tolerance * abs(limit)):
                break  # all that is left is much better than the middle, or nothing is worth telling apart
            error_tol, rounds = TIGHTEN * error_tol, rounds + 1
        return values, error_tol, cost, rounds

    def state_dict(self) -> dict[str, Any]:
        """Width and accuracy of the next grid."""
        return {"width": self.width, "error_tol": self.error_tol}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"width", "error_tol"}, "GridSearch")
        self.width, self.error_tol = float(state["width"]), float(state["error_tol"])
