"""A hypergradient without its images: what a step needs of it, and what a checkpoint can hold."""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.hypergradients.result import Hypergradient
from bilevel_imaging.tensors import entries, length
from bilevel_imaging.upper_level.base import Objective
from bilevel_imaging.upper_level.quasi_newton import flatten


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Numbers of a hypergradient; the names are those of :class:`bilevel_imaging.Hypergradient`."""

    grad: dict[str, Tensor]
    bound: float
    certified: bool
    reason: str
    loss: float
    loss_interval: tuple[float, float]
    distance: float
    residual: float
    cost: Cost

    @classmethod
    def of(cls, h: Hypergradient) -> Slope:
        """That of a hypergradient."""
        return cls(**{f.name: getattr(h, f.name) for f in fields(cls)})

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(g.numel() for g in self.grad.values())

    @property
    def norm(self) -> float:
        """||grad||_2 over all parameters."""
        return length(entries(self.grad))


@dataclass(frozen=True)
class Ahead:
    """A slope that was computed where a step ended, for the next one to begin with.

    It is of no use where anything has changed since: theta, the exact term of the objective (the price of a sampling
    pattern grows in the course of a run), or the objective itself.

    Attributes:
        slope: which the step before has paid for.
        theta: where, ``(n,)``.
        exact: value of the exact term there.
        objective: whose; ``None`` after a checkpoint, which can't tell.
    """

    slope: Slope
    theta: Tensor
    exact: float
    objective: weakref.ref[Objective] | None = field(default=None, compare=False)

    @classmethod
    def at(cls, objective: Objective, slope: Slope) -> Ahead:
        """At the current theta of the objective."""
        paid = replace(slope, cost=Cost())
        return cls(paid, flatten(objective.theta), _exact(objective), weakref.ref(objective))

    def fits(self, objective: Objective) -> bool:
        """Whether it is what the objective would compute now."""
        if self.objective is not None and self.objective() is not objective:
            return False
        return torch.equal(self.theta, flatten(objective.theta)) and self.exact == _exact(objective)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and tensors."""
        state = asdict(self.slope)
        return {**state, "cost": None, "theta": self.theta, "exact": self.exact}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Ahead:
        """What :meth:`state_dict` returned."""
        names = {name: value for name, value in state.items() if name not in ("theta", "exact")}
        lower, upper = state["loss_interval"]
        return cls(Slope(**{**names, "cost": Cost(), "loss_interval": (lower, upper)}), state["theta"], state["exact"])


def _exact(objective: Objective) -> float:
    term = getattr(objective, "exact_term", None)
    return 0.0 if term is None else term()[0]
