"""Newton's method for few parameters, with exact second derivatives of the loss and certified steps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bilevel_imaging.upper_level.base import Objective, SampledObjective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import (
    NOISE_SHARE,
    Compared,
    certified_stationary,
    check_positive,
    check_range,
    check_state,
    compare,
    not_worth,
    report,
    require_all_images,
    require_problems,
    value_with,
    within_certificate,
)
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.sensitivities import MOST_PARAMETERS, gauss_newton, second_derivative, sensitivities

# eigenvalues of F'' are at least this part of the largest
SMALLEST_CURVATURE = 1e-8
# factor of backtracking, and how often
SHRINK, MAX_TRIALS = 0.5, 30


class KunischPock(UpperLevelMethod):
    """Newton's method for weights, after the semismooth Newton method of Kunisch & Pock (2013).

    The paper treats few weights a_i >= 0 of convex regularizers. Its Newton method is for the optimality system of
    image, adjoint and weights together, with complementarity for a >= 0, and needs potentials that are differentiable
    once only ("semismooth"). Three things differ here:

    * Image and adjoint are eliminated: the lower level and its adjoint are solved, and a Newton step in theta uses
      F'' = W^T f'' W - D^2 <p, G> (see :func:`second_derivative`), with W = dx*/dtheta from one linear system per
      parameter. Where second derivatives of potentials jump, autograd differentiates the pieces.
    * Parameters are logarithms of weights: there is no constraint. A weight that should be 0 falls by up to
      exp(-``largest_move``) in every step, until that lowers the loss too little.
    * Steps are safeguarded: eigenvalues of F'' are replaced by their absolute values, no component of the step along
      an eigenvector is longer than ``largest_move``, and with r the sum of the certified errors of both values a step
      t d with d the resulting direction of descent is accepted if

          F~(theta) - F~(theta + t d) + r >= c t |<h, d>|,

      where each error is at most a quarter of the right-hand side, where rounding allows it: an accepted step then
      does not raise the true loss. Otherwise t is halved.

    An exact term r(theta) of the loss counts as linear in F''.

    Args:
        relative: certified relative error of the hypergradients, in (0, 1).
        sensitivity: relative residuals of the linear systems for W, in (0, 1).
        decrease: c, in (0, 1/2).
        largest_move: see above.
        tolerance: stop when the full step is predicted to lower the loss by less than this fraction of it.
        stationarity_tol: stop when ||grad F|| is certified to be at most this; ``None`` for never.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        relative: float = 0.5,
        sensitivity: float = 0.1,
        decrease: float = 0.1,
        largest_move: float = 2.0,
        tolerance: float = 1e-6,
        stationarity_tol: float | None = None,
    ):
        check_range("relative", relative, 0.0, 1.0)
        check_range("sensitivity", sensitivity, 0.0, 1.0)
        check_range("decrease", decrease, 0.0, 0.5)
        check_positive(largest_move=largest_move, stationarity_tol=stationarity_tol)
        check_range("tolerance", tolerance, 0.0, 1.0, closed=True)
        self.relative, self.sensitivity, self.decrease = relative, sensitivity, decrease
        self.largest_move, self.tolerance, self.stationarity_tol = largest_move, tolerance, stationarity_tol
        self.error_tol = 0.0  # accuracy of the last value; 0 before the first
        self.derivatives: list[Tensor] = []  # dx*/dtheta of all batches at the last theta

    def check_size(self, parameters: int) -> None:
        if parameters > MOST_PARAMETERS:
            raise ValueError(
                f"Expected at most {MOST_PARAMETERS} parameters for kunisch_pock, which solves a linear system per "
                f"parameter and image. Got {parameters}; choose maid."
            )

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one F'', one line search; theta is left unchanged where no step is accepted.

        Args:
            objective: a :class:`SampledObjective`.

        Raises:
            ValueError: the objective takes minibatches, or has too many parameters.
        """
        require_all_images(objective, "kunisch_pock compares losses of all images")
        theta = flatten(objective.theta)
        self.check_size(len(theta))
        require_problems(objective, "draw")
        h = objective.hypergradient(relative=self.relative)
        cost, g = h.cost, flatten(h.grad)
        stop = certified_stationary(h, self.stationarity_tol) or within_certificate(h)
        if stop:
            return report(h, value_with(h), cost, stop=stop)
        parts, spent = sensitivities(cast(SampledObjective, objective), self.sensitivity, self.derivatives)
        hessian, more = second_derivative(parts, gauss_newton(parts))
        cost, self.derivatives = cost + spent + more, [part.derivative for part in parts]
        direction, curvature = self._direction(hessian, g)
        slope = -float(g @ direction)
        stop = not_worth(slope - 0.5 * float(curvature), self.tolerance, h.loss)
        if stop:
            return report(h, value_with(h), cost, stop=stop)
        old, t, refinements = value_with(h), 1.0, 0
        for backtracks in range(MAX_TRIALS):
            needed = self.decrease * t * slope
            both = compare(objective, old, theta, t * direction, NOISE_SHARE * needed, self.error_tol)
            old, self.error_tol = both.old, both.error_tol
            cost, refinements = cost + both.cost, refinements + both.refinements
            if self._accepted(both, needed):
                moved = t * float(direction.norm())
                counts = {"refinements": refinements, "backtracks": backtracks}
                return report(h, both.new, cost, step_size=t, moved=moved, **counts)
            t *= SHRINK
        assign(objective.theta, theta)
        stop = "no step along the Newton direction lowers the loss by more than its values may be off"
        return report(h, old, cost, refinements=refinements, backtracks=MAX_TRIALS, stop=stop)

    def _direction(self, hessian: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """(d, <d, |F''| d>): the Newton step of the positive definite model, shortened along each eigenvector."""
        values, vectors = torch.linalg.eigh(hessian)
        values = values.abs()
        values = values.clamp(min=SMALLEST_CURVATURE * float(values.max()))
        along = vectors.T @ g
        steps = -(along / values).nan_to_num().clamp(-self.largest_move, self.largest_move)
        return vectors @ steps, (values * steps.square()).sum()

    def _accepted(self, both: Compared, needed: float) -> bool:
        """The relaxed Armijo test; where nothing is certified, the plain one."""
        return both.lower_by(needed)

    def state_dict(self) -> dict[str, Any]:
        """Accuracy of the values, and dx*/dtheta, where the next linear systems start."""
        return {"error_tol": self.error_tol, "derivatives": list(self.derivatives)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"error_tol", "derivatives"}, "KunischPock")
        self.error_tol, self.derivatives = float(state["error_tol"]), list(state["derivatives"])
