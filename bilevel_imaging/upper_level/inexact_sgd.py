"""Stochastic gradient descent with hypergradients that start rough and become more accurate as the steps shrink."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.upper_level.accuracy_schedules import Decay, DecayingTolerances
from bilevel_imaging.upper_level.base import Objective
from bilevel_imaging.upper_level.certified_steps import check_state
from bilevel_imaging.upper_level.first_order import FirstOrder
from bilevel_imaging.upper_level.quasi_newton import flatten
from bilevel_imaging.upper_level.step_sizes import first_step_size

# where no tolerance is given, the first one is this part of ||x - x_true||, the root of twice the loss
FIRST_ERROR_SHARE = 0.3
# accuracy of the hypergradient from which what was left open is derived
FIRST_RELATIVE = 0.1


class InexactFirstOrder(FirstOrder):
    """Inexact SGD (Salehi, Mukherjee, Roberts & Ehrhardt 2024), or another ``torch.optim`` optimizer in its place.

    Step k takes a hypergradient h_k of the next minibatch with ||x - x*|| <= e_0 c_k and ||grad f - H q|| <= d_0 c_k,
    and with "SGD" theta_{k+1} = theta_k - lr s_k h_k. Both factors, c_k = (k + 1)^-error_power and
    s_k = (k + 1)^-step_power, may be replaced by 1 / (1 + log(k + 1)) or by 1. With "Adam" and others s_k multiplies
    the learning rate. Small errors early are a waste next to the noise of the minibatches, which the falling steps
    average out.

    What is left open comes from the problem: the first hypergradient is then accurate to 10 %, and its loss and its
    norm set the first tolerances and the first step.

    Args:
        optimizer: name of a class in ``torch.optim`` whose step needs no closure.
        lr: first learning rate; ``None``: for "SGD" what moves no parameter by more than a tenth in the first step, for
            others their own default.
        error_tol: e_0, in the units of x; ``None`` for three tenths of the distance from the truth (squared error).
        residual_tol: d_0; ``None`` for e_0.
        error_schedule: of both tolerances, "power", "log" or "constant".
        error_power: of "power".
        step_schedule: of the learning rate, likewise.
        step_power: of "power"; the theory wants it between 1/2 and 1 with minibatches.
        warmup: as in :class:`FirstOrder`, like all further arguments.
        total_steps: likewise; needed for ``average``.
        clip: likewise.
        average: likewise.
        lr_scale: likewise.
        stationarity_tol: likewise.
        **options: further arguments of the optimizer.

    Raises:
        ValueError: unknown optimizer or schedule, or a number out of range.
    """

    def __init__(
        self,
        optimizer: str = "SGD",
        *,
        lr: float | None = None,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        error_schedule: str = "power",
        error_power: float = 0.5,
        step_schedule: str = "power",
        step_power: float = 0.5,
        warmup: int = 0,
        total_steps: int | None = None,
        clip: float | None = None,
        average: float = 0.0,
        lr_scale: Mapping[str, float] | None = None,
        stationarity_tol: float | None = None,
        **options: Any,
    ):
        super().__init__(
            optimizer,
            lr=lr,
            warmup=warmup,
            total_steps=total_steps,
            clip=clip,
            average=average,
            lr_scale=lr_scale,
            stationarity_tol=stationarity_tol,
            **options,
        )
        self.open_lr = lr is None and self.name == "SGD"
        self.step_decay, self.error_decay = Decay(step_schedule, step_power), Decay(error_schedule, error_power)
        if error_tol is None and residual_tol is not None:
            raise ValueError("Expected error_tol with residual_tol. Got residual_tol alone.")
        self.condition: DecayingTolerances | None = None
        if error_tol is not None:
            self.condition = self._tolerances(error_tol, error_tol if residual_tol is None else residual_tol)

    def _tolerances(self, error_tol: float, residual_tol: float) -> DecayingTolerances:
        return DecayingTolerances(error_tol, residual_tol, self.error_decay)

    def _hypergradient(self, objective: Objective) -> Hypergradient:
        if self.condition is None:
            h = objective.hypergradient(relative=FIRST_RELATIVE)
            error_tol = FIRST_ERROR_SHARE * math.sqrt(2 * max(h.loss, 1e-12))
            self.condition = self._tolerances(error_tol, error_tol)
        else:
            h = objective.hypergradient(**self.condition.accuracy(self.steps))
            if self.condition.holds(h, self.steps) is False:
                h = replace(h, reason=self.condition.describe(h, self.steps))
        if self.open_lr:
            self.open_lr = False
            self._set_lr(first_step_size(flatten(h.grad)))
        return h

    def _set_lr(self, lr: float) -> None:
        """The learning rate from this step on; the factors of ``lr_scale`` stay."""
        for group in self.optimizer.param_groups:
            group["full_lr"] *= lr / self.lr
        self.lr = lr

    def _pace(self) -> float:
        return super()._pace() * self.step_decay.factor(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """That of :class:`FirstOrder`, and what was derived from the first hypergradient."""
        tolerances = None if self.condition is None else [self.condition.error_tol, self.condition.residual_tol]
        return {**super().state_dict(), "lr": None if self.open_lr else self.lr, "tolerances": tolerances}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, {"lr", "tolerances"}, "InexactFirstOrder")
        super().load_state_dict(state)
        self.open_lr = state["lr"] is None
        if state["lr"] is not None:
            self.lr = float(state["lr"])
        self.condition = None if state["tolerances"] is None else self._tolerances(*state["tolerances"])
