"""A way to compute a hypergradient at one setting, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """A hypergradient.

    Attributes:
        gradient: all parameters in one vector, ``(P,)``.
        gradients: lower-level gradients per image, recorded ones included; ``None`` where they can't be counted.
        hvps: Hessian-vector products per image, likewise.
        bound: relative error bound that the method itself reports; ``None`` if it reports none.
        x: the approximate minimizers it belongs to, as arrays of its library; ``None`` where they are not kept.
        loss: the upper-level loss there, likewise.
    """

    gradient: Tensor
    gradients: float | None = None
    hvps: float | None = None
    bound: float | None = None
    x: Any = None
    loss: float | None = None


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        name: in words.
        compute: one call; returns when the numbers are on the host.
        memory: MiB that a call takes, where the library knows it better than the system.
    """

    name: str
    compute: Callable[[], Answer]
    memory: Callable[[], float | None] | None = None


@dataclass(frozen=True)
class Ladder:
    """Settings of one method from the loosest to the tightest: tried in this order until one passes every level.

    Attributes:
        method: in words.
        settings: made one by one.
    """

    method: str
    settings: Callable[[], Iterator[Setting]]
