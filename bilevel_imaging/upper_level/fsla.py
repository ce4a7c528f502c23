"""FSLA: lower level, adjoint and theta move together, one step each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.checks import boolean
from bilevel_imaging.upper_level.accuracy_schedules import Decay
from bilevel_imaging.upper_level.sampled_method import Part, SampledMethod, coefficients, gradient


class SingleLoop(SampledMethod):
    """The fully single-loop algorithm (Li, Gu & Huang 2022): nothing is solved, everything is followed.

    For the images of a draw, at theta_k:
        x+ = z - G(z) / L with z = x + m (x - x-),
        q+ = w - (H(x+) w - grad f(x+)) / L with w = q + m (q - q-),
        h_k = -mean J(x+)^T q+, and h_k' with x, q as they were and theta_{k-1} in place of theta_k;
    then theta moves as in :class:`SampledMethod` with a_k = renewal s_k. Two gradients, one Hessian product and one
    product with J per image and step, and with minibatches another gradient and product with J for h_k'.

    L and mu are the certified constants of every image. The published steps have m = 0; here m is Nesterov's momentum
    for mu and L, without which x and q follow theta sqrt(L / mu) times more slowly. Unlike in the paper the lower level
    of an image has no noise, so that its steps need not shrink. An image that is drawn for the first time is solved
    once.

    Args:
        lr: first step size of theta; ``None`` for what moves no parameter by more than a tenth in the first step.
        step_power: s_k = (1 + k / decay_steps)^-step_power.
        decay_steps: see above.
        renewal: a_0 in (0, 1], the share of d that does not come from the directions before.
        accelerated: momentum of x and q; ``False`` for m = 0.
        certify_every: steps from one certificate to the next; 0 for none.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        step_power: float = 0.5,
        decay_steps: float = 100.0,
        renewal: float = 0.5,
        accelerated: bool = True,
        certify_every: int = 10,
    ):
        super().__init__(lr, Decay("power", step_power, offset=decay_steps), certify_every)
        if not 0 < renewal <= 1:
            raise ValueError(f"Expected renewal in (0, 1]. Got {renewal!r}.")
        self.renewal, self.accelerated = renewal, boolean("accelerated", accelerated)
        # x - x- and q - q- by image; empty without momentum
        self.velocities: dict[int, tuple[Tensor, Tensor]] = {}

    def _renewal(self) -> float:
        return self.renewal * self.decay.factor(self.steps)

    def _rate(self, parts: Sequence[Part]) -> float:
        rates = []
        for part in parts:
            constants = part.samples.problem.constants()
            ratio = float((constants.strong_convexity / constants.smoothness).min())
            rates.append(ratio**0.5 if self.accelerated else ratio)
        return min(rates)

    def _advance(self, parts: Sequence[Part]) -> list[Part]:
        return [self._one_step(part) for part in parts]

    def _earlier(self, parts: Sequence[Part]) -> list[Part]:
        return list(parts)

    def _one_step(self, part: Part) -> Part:
        samples, x, q = part.samples, part.x, part.q
        step, momentum = coefficients(samples.problem, x, accelerated=self.accelerated)
        x_velocity, q_velocity = self._known_velocities(samples.indices, x)
        ahead = x + momentum * x_velocity
        x_new = ahead - step * gradient(samples.problem, ahead)
        ahead, at = q + momentum * q_velocity, samples.problem.linearize(x_new)
        q_new = ahead - step * (at.hvp(ahead) - samples.loss.grad(x_new))
        if self.accelerated:
            moves = zip((x_new - x).unbind(0), (q_new - q).unbind(0), strict=True)
            self.velocities.update(zip(samples.indices, ((a.clone(), b.clone()) for a, b in moves), strict=True))
        return Part(samples, x_new, q_new, at)

    def _known_velocities(self, indices: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(like[0])
        known = [self.velocities.get(i, (zero, zero)) for i in indices]
        return torch.stack([x.to(like) for x, _ in known]), torch.stack([q.to(like) for _, q in known])

    def state_dict(self) -> dict[str, Any]:
        """That of :class:`SampledMethod` and the velocities."""
        return {**super().state_dict(), "velocities": {i: list(pair) for i, pair in self.velocities.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.velocities = {i: (x.detach().clone(), q.detach().clone()) for i, (x, q) in state["velocities"].items()}
