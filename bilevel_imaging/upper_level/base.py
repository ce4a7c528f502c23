"""The upper-level contract: methods ask an objective for values and hypergradients *at an accuracy*.

Methods that make the steps of the lower level themselves ask for its problems instead: ``SampledObjective``.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.result import Hypergradient


@dataclass(frozen=True, kw_only=True)
class CertifiedValue:
    """F_lo <= F <= F_hi for the mean loss F over the images asked for.

    Attributes:
        value: the estimate.
        lower: certified lower bound (-inf if not certified).
        upper: certified upper bound (inf if not certified).
        cost: work spent.
    """

    value: float
    lower: float
    upper: float
    cost: Cost


class Objective(Protocol):
    """What a method sees of the data set; ``bilevel_imaging.training.BilevelObjective`` implements it."""

    theta: dict[str, Tensor]

    def value(self, error_tol: float) -> CertifiedValue:
        """The loss at the current theta."""
        ...

    def hypergradient(
        self,
        *,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        relative: float | None = None,
        bound_tol: float | None = None,
    ) -> Hypergradient:
        """The hypergradient at the current theta."""
        ...


@runtime_checkable
class CurvedObjective(Objective, Protocol):
    """An objective that also tells how much it bends, for methods that need no scale then.

    ``bilevel_imaging.training.BilevelObjective`` implements it.

    Attributes:
        gauss_newton_pays: whether fewer steps are worth what a matrix costs; the same on every device.
    """

    gauss_newton_pays: bool

    def gauss_newton(self, relative: float) -> tuple[Tensor, Cost] | None:
        """Mean over the images of W^T f'' W with W = dx*/dtheta at the theta of the last hypergradient, and the work.

        It is F'' without what comes from the curvature of the x*, in the order of theta, ``(n, n)`` float64 on the CPU.
        One linear system per parameter and image is solved to ``relative``; ``None`` where that can't be done, or where
        F has another term.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Images drawn for one step, with the lower-level problems that a method steps through itself.

    Attributes:
        indices: of the images.
        problem: their B lower-level problems; they follow theta, and count the work.
        loss: value ``(B,)`` and gradient ``(B, *image)`` of the upper-level loss at any x.
        x: points where the last steps ended, ``(B, *image)``; ``None`` for the start of the problem.
        q: adjoints where they ended, ``(B, *image)``; ``None`` if the images were never solved.
    """

    indices: tuple[int, ...]
    problem: LowerLevelProblem
    loss: LossOracle
    x: Tensor | None
    q: Tensor | None


@runtime_checkable
class SampledObjective(Objective, Protocol):
    """An objective that also hands out lower-level problems, for methods that take single steps in x and q.

    F = mean over images of f_i(x_i*(theta)) + r(theta), where r is the exact term. The objective chooses the images,
    keeps a point and an adjoint of each, and certifies a mean hypergradient -J^T q for any of them; the method does
    the rest. ``bilevel_imaging.training.BilevelObjective`` implements it.

    Attributes:
        minibatch: images of one draw; ``None`` for all.
    """

    minibatch: int | None

    def draw(self, *, everything: bool = False) -> list[Samples]:
        """The next minibatch, or all images, in batches of one shape.

        Raises:
            ValueError: the objective keeps no points between steps.
        """
        ...

    def keep(self, samples: Samples, x: Tensor, q: Tensor) -> None:
        """Where the steps of these images ended: what the next draw of them starts from."""
        ...

    def solve(self, samples: Samples, relative: float) -> Hypergradient:
        """The hypergradient of these images at the current theta by the solvers of the objective, without r."""
        ...

    def certify(self, parts: Sequence[tuple[Samples, Tensor, Tensor]]) -> Hypergradient:
        """The hypergradient of the mean over all images in ``parts``, with r, from points x and adjoints q as they are.

        Nothing is solved: the bound is the a posteriori one, which holds for any x and q.
        """
        ...

    def exact_term(self) -> tuple[float, dict[str, Tensor]]:
        """Value and gradient of r at the current theta; without the parameters on which r does not depend."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one upper-level step did; scalars only, so that it can be logged and saved as JSON.

    Attributes:
        loss: estimate of F at the theta after the step (or, for first-order methods, at which the gradient was taken).
        loss_lower: certified lower bound of that F; -inf if not certified.
        loss_upper: certified upper bound; inf if not certified.
        grad_norm: norm of the hypergradient used.
        error_bound: certified bound of its error; inf if not certified.
        certified: whether the hypergradient is certified.
        reason: in words when not.
        error_tol: lower-level accuracy epsilon that the hypergradient reached (largest over the images).
        residual_tol: linear accuracy delta that the hypergradient reached (largest over the images).
        step_size: step length used (0 if none was accepted).
        accepted: whether theta moved.
        refinements: number of accuracy refinements inside the step.
        backtracks: number of rejected trial steps.
        param_change: Euclidean length of the change of theta.
        cost: work spent in the step.
        stop: a reason in words when the method says that training is finished, else "".
        extra: further scalars of the method, by name.
    """

    loss: float
    loss_lower: float
    loss_upper: float
    grad_norm: float
    error_bound: float
    certified: bool
    reason: str
    error_tol: float
    residual_tol: float
    step_size: float
    accepted: bool
    refinements: int
    backtracks: int
    param_change: float
    cost: Cost
    stop: str = ""
    extra: dict[str, float] = field(default_factory=dict)


class UpperLevelMethod(abc.ABC):
    """Changes ``objective.theta`` in place, one step at a time; its whole state can be saved and restored exactly."""

    @abc.abstractmethod
    def step(self, objective: Objective) -> StepReport:
        """One step from the current theta.

        Raises:
            ValueError: no objective, or one that the method can't work with.
        """

    def check_size(self, parameters: int) -> None:  # noqa: B027
        """Refuse more parameters than the method is made for, before anything is computed.

        Raises:
            ValueError: naming the limit.
        """

    def learned(self) -> dict[str, Tensor] | None:
        """The theta to validate and export where it is not the current one, e.g. an average; else ``None``."""
        return None

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: plain numbers, strings, tensors, lists and dicts."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: if keys are missing or do not fit.
        """
