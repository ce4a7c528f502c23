"""What single-loop and variance-reduced methods share: draws, recursive directions, certificates now and then."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients import Hypergradient
from bilevel_imaging.lower_solvers.accelerated_gradient import constant_schedule
from bilevel_imaging.tensors import per_sample
from bilevel_imaging.upper_level.accuracy_schedules import Decay
from bilevel_imaging.upper_level.base import Objective, SampledObjective, Samples, StepReport, UpperLevelMethod
from bilevel_imaging.upper_level.certified_steps import check_state, report, require_problems, value_with
from bilevel_imaging.upper_level.quasi_newton import assign, flatten
from bilevel_imaging.upper_level.step_sizes import first_step_size

# images that were never solved are solved once, until their hypergradient is certified to this accuracy
START_RELATIVE = 0.1


@dataclass(frozen=True)
class Part:
    """Images of a draw with a point x and an adjoint q of each, ``(B, *image)``, and the derivatives at x if known."""

    samples: Samples
    x: Tensor
    q: Tensor
    linearization: Linearization | None = None


class SampledMethod(UpperLevelMethod):
    """theta_{k+1} = theta_k - lr rho_k s_k d_k with d_k = h_k + (1 - a_k) (d_{k-1} - h_k'), of the images of a draw.

    h_k is their mean hypergradient -J^T q at theta_k, h_k' that at theta_{k-1}: their difference removes most of the
    noise of the draw from the change of d (momentum-based variance reduction, "STORM"; Cutkosky & Orabona 2019). With
    all images drawn there is no noise, and d_k = h_k. What x and q are, and how they move, is up to the subclass.

    The report certifies h_k at theta_k, before it enters d_k, in step 0 and every ``certify_every`` steps: distance and
    residual are measured, and the a posteriori bound holds for any x and q. Its cost is counted; it changes nothing
    else. In the steps between, the loss is that of the points as they are and nothing is certified.

    Args:
        lr: step size; ``None`` for what moves no parameter by more than a tenth of rho_0 in the first step.
        decay: the factors s_k.
        certify_every: steps from one certificate to the next; 0 for none.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, lr: float | None, decay: Decay, certify_every: int):
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"Expected lr as a finite number > 0, or None. Got {lr!r}.")
        if certify_every < 0:
            raise ValueError(f"Expected certify_every >= 0. Got {certify_every!r}.")
        self.lr, self.decay, self.certify_every = lr, decay, certify_every
        self.steps = 0
        self.direction: Tensor | None = None  # d of the last step, (n,) float64
        self.theta: Tensor | None = None  # theta at which it was made

    @abc.abstractmethod
    def _advance(self, parts: Sequence[Part]) -> list[Part]:
        """Where x and q go at the current theta."""

    @abc.abstractmethod
    def _earlier(self, parts: Sequence[Part]) -> list[Part]:
        """The x and q that belong to the theta before, which is the current one during the call."""

    @abc.abstractmethod
    def _renewal(self) -> float:
        """a_k in [0, 1]: 1 forgets the directions before, 0 trusts them for ever."""

    def _rate(self, parts: Sequence[Part]) -> float:
        """rho_k in (0, 1], how fast x and q follow theta; those that are solved anew in every step follow at once."""
        return 1.0

    def _everything(self) -> bool:
        """Whether this step draws all images."""
        return False

    def step(self, objective: Objective) -> StepReport:
        """One draw, one step of its x and q, one step of theta.

        Raises:
            ValueError: mu or L of the lower level is not known, or the objective hands out no problems or keeps no
                points.
        """
        objective = require_problems(objective, "minibatch", "draw", "keep", "solve", "certify", "exact_term")
        clock = time.perf_counter()
        everything = objective.minibatch is None or self._everything()
        drawn = objective.draw(everything=everything)
        before = _work(drawn)
        parts = [_started(objective, samples) for samples in drawn]
        after = self._advance(parts)
        h, loss = _mean(objective, after)
        theta = flatten(objective.theta)
        if self.direction is None or everything:
            direction = h
        else:
            with _elsewhere(objective.theta, self.theta):
                earlier, _ = _mean(objective, self._earlier(parts))
            direction = h + (1 - self._renewal()) * (self.direction - earlier)
        due = self.certify_every > 0 and self.steps % self.certify_every == 0
        certificate = objective.certify([(p.samples, p.x, p.q) for p in after]) if due else None
        if self.lr is None:
            self.lr = first_step_size(h)
        pace = self.lr * self._rate(parts) * self.decay.factor(self.steps)
        assign(objective.theta, theta - pace * direction)
        for part in after:
            objective.keep(part.samples, part.x, part.q)
        self.direction, self.theta = direction, theta
        self.steps += 1
        moved = float((flatten(objective.theta) - theta).norm())
        cost = _work(drawn) - before + Cost(seconds=time.perf_counter() - clock)
        return self._report(certificate, h, loss, pace, moved, cost)

    def _report(
        self, certificate: Hypergradient | None, h: Tensor, loss: float, pace: float, moved: float, cost: Cost
    ) -> StepReport:
        extra = {"direction_norm": float(self.direction.norm())}
        if certificate is not None:
            return report(certificate, value_with(certificate), cost, step_size=pace, moved=moved, extra=extra)
        when = f"only every {self.certify_every} steps" if self.certify_every else "switched off"
        return StepReport(
            loss=loss,
            loss_lower=-math.inf,
            loss_upper=math.inf,
            grad_norm=float(h.norm()),
            error_bound=math.inf,
            certified=False,
            reason=f"not certified: certificates are {when} (certify_every)",
            error_tol=math.inf,
            residual_tol=math.inf,
            step_size=pace,
            accepted=moved > 0,
            refinements=0,
            backtracks=0,
            param_change=moved,
            cost=cost,
            extra=extra,
        )

    def state_dict(self) -> dict[str, Any]:
        """Step size, number of steps, the last direction and its theta."""
        return {"lr": self.lr, "steps": self.steps, "direction": self.direction, "theta": self.theta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        check_state(state, set(self.state_dict()), type(self).__name__)
        self.lr = None if state["lr"] is None else float(state["lr"])
        self.steps = int(state["steps"])
        self.direction, self.theta = (
            None if state[name] is None else state[name].detach().clone().cpu() for name in ("direction", "theta")
        )


def coefficients(problem: LowerLevelProblem, x: Tensor, *, accelerated: bool = True) -> tuple[Tensor, Tensor]:
    """Step 1 / L and Nesterov's momentum (1 - sqrt(mu / L)) / (1 + sqrt(mu / L)), or none, ``(B, 1, ...)``.

    Raises:
        ValueError: mu or L is not known.
    """
    constants = problem.constants()
    mu, smoothness = constants.strong_convexity, constants.smoothness
    if mu is None or smoothness is None:
        raise ValueError(
            "Expected an energy with known constants mu and L, for the steps of the lower level. Got none: "
            f"{constants.reason or 'its constants() do not give both'}."
        )
    step, momentum = constant_schedule(mu, smoothness, 0)
    if not accelerated:
        momentum = torch.zeros_like(momentum)
    return per_sample(step.detach().to(x), x), per_sample(momentum.detach().to(x), x)


def gradient(problem: LowerLevelProblem, x: Tensor) -> Tensor:
    """G(x), ``(B, *image)``, without a graph."""
    with torch.no_grad():
        return problem.grad(x)


def _started(objective: SampledObjective, samples: Samples) -> Part:
    if samples.x is None or samples.q is None:
        h = objective.solve(samples, START_RELATIVE)
        return Part(samples, h.x, h.q)
    return Part(samples, samples.x, samples.q)


def _mean(objective: SampledObjective, parts: Sequence[Part]) -> tuple[Tensor, float]:
    """The mean of -J^T q at the current theta with the exact term, ``(n,)`` float64, and the loss at the points."""
    count = sum(len(part.samples.indices) for part in parts)
    value, total = exact_term(objective)
    for part in parts:
        at = part.linearization or part.samples.problem.linearize(part.x)
        product = at.mixed_vjp(part.q)
        total = total - flatten({name: product[name] for name in objective.theta}) / count
        value += float(part.samples.loss.value(part.x).double().sum()) / count
    return total, value


def exact_term(objective: SampledObjective) -> tuple[float, Tensor]:
    """Value and gradient, ``(n,)`` float64, of the term that needs no reconstruction, at the current theta."""
    value, slopes = objective.exact_term()
    return value, flatten({name: slopes.get(name, torch.zeros_like(t)) for name, t in objective.theta.items()})


def _work(drawn: Sequence[Samples]) -> Cost:
    return sum((samples.problem.cost for samples in drawn), Cost())


@contextmanager
def _elsewhere(theta: dict[str, Tensor], flat: Tensor) -> Iterator[None]:
    """theta is ``flat`` inside; what it was is put back bit for bit."""
    here = flatten(theta)
    assign(theta, flat)
    try:
        yield
    finally:
        assign(theta, here)
