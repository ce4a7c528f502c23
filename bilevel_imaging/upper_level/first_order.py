"""Any torch optimizer, fed with certified hypergradients."""

from __future__ import annotations

from typing import Any

import torch

from bilevel_imaging.upper_level.base import Objective, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.quasi_newton import flatten


class FirstOrder(UpperLevelMethod):
    """Writes the hypergradient into ``.grad`` and lets a ``torch.optim`` optimizer step.

    The optimizer does not know how accurate its gradients are; this method asks for a relative accuracy (or for fixed
    tolerances) and reports the certificate of every step.

    Args:
        optimizer: name of a class in ``torch.optim`` whose step needs no closure, e.g. "Adam", "SGD".
        lr: learning rate; ``None`` for the optimizer's own default.
        relative: bound <= relative * ||h||; the default 0.1 if no tolerance is given.
        error_tol: fixed lower-level accuracy instead.
        residual_tol: fixed adjoint accuracy instead.
        **options: further arguments of the optimizer.

    Raises:
        ValueError: unknown optimizer, one that needs a closure, or contradictory accuracies.
    """

    def __init__(
        self,
        optimizer: str = "Adam",
        *,
        lr: float | None = None,
        relative: float | None = None,
        error_tol: float | None = None,
        residual_tol: float | None = None,
        **options: Any,
    ):
        known = {n: c for n, c in vars(torch.optim).items() if _usable(c)}
        names = {n.lower(): n for n in known}
        if optimizer.lower() not in names:
            raise ValueError(f"Unknown optimizer {optimizer!r}. Choose from {sorted(known)}.")
        tolerances = error_tol is not None or residual_tol is not None
        if tolerances and relative is not None:
            raise ValueError("Expected relative, or error_tol and residual_tol. Got both.")
        self.name = names[optimizer.lower()]
        self.build, self.options = known[self.name], dict(options)
        if lr is not None:
            self.options["lr"] = lr
        self.accuracy = {"relative": 0.1 if relative is None else relative}
        if tolerances:
            self.accuracy = {"error_tol": error_tol, "residual_tol": residual_tol}
        self.optimizer: torch.optim.Optimizer | None = None
        self._pending: dict[str, Any] | None = None

    def _prepare(self, objective: Objective) -> torch.optim.Optimizer:
        if self.optimizer is None:
            try:
                self.optimizer = self.build(list(objective.theta.values()), **self.options)
            except TypeError as error:
                raise ValueError(f"torch.optim.{self.name} does not take {sorted(self.options)}: {error}") from error
            if self._pending is not None:
                self.optimizer.load_state_dict(self._pending)
                self._pending = None
        return self.optimizer

    def step(self, objective: Objective) -> StepReport:
        """One hypergradient, one optimizer step; the loss reported is that before the step."""
        optimizer = self._prepare(objective)
        h = objective.hypergradient(**self.accuracy)
        before = flatten(objective.theta)
        for name, tensor in objective.theta.items():
            tensor.grad = h.grad[name].detach().to(tensor.dtype).clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved = float((flatten(objective.theta) - before).norm())
        return StepReport(
            loss=h.loss,
            loss_lower=h.loss_interval[0],
            loss_upper=h.loss_interval[1],
            grad_norm=h.norm,
            error_bound=h.bound,
            certified=h.certified,
            reason=h.reason,
            error_tol=h.distance,
            residual_tol=h.residual,
            step_size=float(optimizer.param_groups[0]["lr"]),
            accepted=moved > 0,
            refinements=0,
            backtracks=0,
            param_change=moved,
            cost=h.cost,
        )

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own state."""
        state = self._pending if self.optimizer is None else self.optimizer.state_dict()
        return {"name": self.name, "optimizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state.get("name") != self.name:
            raise ValueError(f"Expected a state of the optimizer {self.name}. Got one of {state.get('name')}.")
        if self.optimizer is None:
            self._pending = state["optimizer"]
        elif state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])


def _usable(candidate: Any) -> bool:
    if not (isinstance(candidate, type) and issubclass(candidate, torch.optim.Optimizer)):
        return False
    return candidate not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
