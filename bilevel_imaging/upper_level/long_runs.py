"""What lets long runs of noisy steps converge: a schedule of the learning rate, clipped norms, an averaged tail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

SCHEDULES = ("constant", "cosine")
# the cosine ends at this fraction of the learning rate
FINAL_FACTOR = 0.01
# norms in the running median, and how many there must be before anything is clipped
WINDOW, FIRST_CLIPPED = 101, 11


def schedule_factor(schedule: str, step: int, total_steps: int, warmup: int = 0) -> float:
    """What the learning rate of a step is multiplied by: a pure function, so that a resumed run needs no state.

    Args:
        schedule: "constant": 1; "cosine": half a period from 1 to ``FINAL_FACTOR``, reached at the last step
            (Loshchilov and Hutter, SGDR, ICLR 2017, without restarts).
        step: 0 for the first step; steps after the last keep its factor.
        total_steps: of the whole run.
        warmup: the first so many steps rise linearly, from 1 / warmup to 1.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0)
    return FINAL_FACTOR + (1 - FINAL_FACTOR) * 0.5 * (1 + math.cos(math.pi * progress))


class NormClip:
    """Scales down hypergradients whose norm exceeds a multiple of the running median of the norms before.

    The median is that of the last ``WINDOW`` norms as they came, unclipped: a single huge one moves it by one rank,
    and a lasting change of scale is followed within half a window.

    Args:
        multiple: >= 1.
    """

    def __init__(self, multiple: float):
        self.multiple = multiple
        self.norms: list[float] = []

    def factor(self, norm: float) -> float:
        """What to multiply a hypergradient of this norm by, at most 1; remembers the norm."""
        known = len(self.norms) + 1 >= FIRST_CLIPPED
        limit = self.multiple * median(self.norms) if known else math.inf
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-WINDOW:]
        return limit / norm if norm > limit else 1.0


class TailAverage:
    """Mean of theta over the last part of a run (Polyak and Juditsky 1992): the noise of the minibatches averages out.

    Args:
        fraction: part of the steps that count, in (0, 1].
        total_steps: of the whole run.
    """

    def __init__(self, fraction: float, total_steps: int):
        self.first = total_steps - max(1, round(fraction * total_steps))
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    def update(self, theta: Mapping[str, Tensor], step: int) -> None:
        """Count theta after ``step`` (0 for the first); before the last part nothing is kept."""
        if step < self.first:
            self.count, self.mean = 0, {}
            return
        self.count += 1
        with torch.no_grad():
            for name, tensor in theta.items():
                if self.count == 1:
                    self.mean[name] = tensor.detach().clone()
                else:
                    self.mean[name] += (tensor - self.mean[name]) / self.count

    def state_dict(self) -> dict[str, Any]:
        """Mean and count."""
        return {"count": self.count, "mean": dict(self.mean)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.count = int(state["count"])
        self.mean = {name: tensor.detach().clone() for name, tensor in state["mean"].items()}
