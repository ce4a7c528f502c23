"""MRBO and VRBO: hypergradients of minibatches whose noise is removed by differences between two theta."""

from __future__ import annotations

from collections.abc import Sequence

from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver, Neumann
from bilevel_imaging.upper_level.accuracy_schedules import Decay
from bilevel_imaging.upper_level.sampled_method import Part, SampledMethod, coefficients, gradient

ADJOINTS = ("conjugate_gradient", "neumann")


class _VarianceReduced(SampledMethod):
    """h_k after ``lower_steps`` accelerated gradient steps of x and ``adjoint_steps`` of an adjoint solver.

    Yang, Ji & Liang (2021) have one lower level with noisy gradients, and reduce their variance too. Here every image
    has one of its own without noise, so that its gradient is exact, but a point that was left alone since its image was
    last drawn belongs to an older theta. Therefore both hypergradients of a difference start from the same x and q and
    make the same steps, each at its own theta. The steps are 1 / L with momentum from mu and L, for the certified
    constants of every image; both start from where the last ones of the image ended, and an image that is drawn for
    the first time is solved once.
    """

    def __init__(
        self, lr: float | None, decay: Decay, lower_steps: int, adjoint: str, adjoint_steps: int, certify_every: int
    ):
        super().__init__(lr, decay, certify_every)
        if adjoint not in ADJOINTS:
            raise ValueError(f"Expected adjoint as one of {', '.join(ADJOINTS)}. Got {adjoint!r}.")
        for name, count in (("lower_steps", lower_steps), ("adjoint_steps", adjoint_steps)):
            if count < 1:
                raise ValueError(f"Expected {name} >= 1. Got {count}.")
        self.lower_steps = lower_steps
        self.solver: LinearSolver = (
            ConjugateGradient(max_iter=adjoint_steps, preconditioner="auto")
            if adjoint == "conjugate_gradient"
            else Neumann(adjoint_steps)
        )

    def _advance(self, parts: Sequence[Part]) -> list[Part]:
        return [self._followed(part) for part in parts]

    _earlier = _advance

    def _followed(self, part: Part) -> Part:
        problem, x = part.samples.problem, part.x
        step, momentum = coefficients(problem, x)
        previous = x
        for _ in range(self.lower_steps):
            ahead = x + momentum * (x - previous)
            previous, x = x, ahead - step * gradient(problem, ahead)
        at = problem.linearize(x)
        # a tolerance that is never met: all steps are made
        q = self.solver.solve(at, part.samples.loss.grad(x), 0.0, q0=part.q).q
        return Part(part.samples, x, q, at)


class MRBO(_VarianceReduced):
    """The momentum-based recursive bilevel optimizer (Yang, Ji & Liang 2021, Algorithm 1).

    d_k = h_k + (1 - a_k) (d_{k-1} - h_k') with s_k = (1 + k / decay_steps)^(-1/3) and a_k = renewal s_k^2, see
    :class:`SampledMethod`. For what a lower level for every image changes, and for x and q, see the base class.

    Args:
        lr: first step size of theta; ``None`` for what moves no parameter by more than a tenth in the first step.
        decay_steps: see above.
        renewal: a_0 in (0, 1].
        lower_steps: gradient steps of x in every step and at both theta.
        adjoint: "conjugate_gradient" or "neumann" (steps 1 / L).
        adjoint_steps: its iterations.
        certify_every: steps from one certificate to the next; 0 for none.

    Raises:
        ValueError: a number out of range, or an unknown adjoint.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        decay_steps: float = 100.0,
        renewal: float = 0.5,
        lower_steps: int = 10,
        adjoint: str = "conjugate_gradient",
        adjoint_steps: int = 10,
        certify_every: int = 10,
    ):
        decay = Decay("power", 1 / 3, offset=decay_steps)
        super().__init__(lr, decay, lower_steps, adjoint, adjoint_steps, certify_every)
        if not 0 < renewal <= 1:
            raise ValueError(f"Expected renewal in (0, 1]. Got {renewal!r}.")
        self.renewal = renewal

    def _renewal(self) -> float:
        return self.renewal * self.decay.factor(self.steps) ** 2


class VRBO(_VarianceReduced):
    """The variance-reduced bilevel optimizer (Yang, Ji & Liang 2021, Algorithm 2), with steps that need not fall.

    Every ``period`` steps d_k is the hypergradient of all images; in between d_k = d_{k-1} + h_k - h_k' follows it as
    theta moves (SPIDER; Fang et al. 2018). The inner loop of the paper, in which x moves at the new theta, has
    ``lower_steps`` steps and uses one minibatch, so that its differences add up to h_k - h_k'. For what a lower level
    for every image changes see the base class.

    Args:
        lr: step size of theta; ``None`` for what moves no parameter by more than a tenth in the first step.
        period: steps from one hypergradient of all images to the next.
        lower_steps: gradient steps of x in every step and at both theta.
        adjoint: "conjugate_gradient" or "neumann" (steps 1 / L).
        adjoint_steps: its iterations.
        certify_every: steps from one certificate to the next; 0 for none.

    Raises:
        ValueError: a number out of range, or an unknown adjoint.
    """

    def __init__(
        self,
        *,
        lr: float | None = None,
        period: int = 10,
        lower_steps: int = 10,
        adjoint: str = "conjugate_gradient",
        adjoint_steps: int = 10,
        certify_every: int = 10,
    ):
        super().__init__(lr, Decay("constant"), lower_steps, adjoint, adjoint_steps, certify_every)
        if period < 1:
            raise ValueError(f"Expected period >= 1. Got {period}.")
        self.period = period

    def _everything(self) -> bool:
        return self.steps % self.period == 0

    def _renewal(self) -> float:
        return 0.0
