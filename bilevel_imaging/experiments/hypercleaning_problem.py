"""Data hypercleaning as a bilevel problem: digits, the validation loss, and the objective that methods see."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from scipy.stats import rankdata
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.data import corrupt_labels, load_mnist
from bilevel_imaging.energies import LabeledFeatures, WeightedLogisticProblem
from bilevel_imaging.energies.logistic import SECOND
from bilevel_imaging.hypergradients import Hypergradient, hypergradient, loss_interval
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.upper_level import CertifiedValue

TRAIN, CORRUPTED, VALIDATION = 20_000, 0.1, 5_000
# of the first W, which only tells its size
FIRST_ERROR = 0.1


@dataclass(frozen=True)
class Digits:
    """What is learned from.

    Attributes:
        training: features with a bias, labels partly wrong.
        corrupted: which are, bool ``(N,)``.
        validation: features with a bias, correct labels.
    """

    training: LabeledFeatures
    corrupted: Tensor
    validation: LabeledFeatures


def load(folder: Path | None = None) -> Digits:
    """The digits of the paper: the first 20,000, a tenth of them corrupted, and 5,000 test digits for validation.

    Args:
        folder: as in :func:`bilevel_imaging.data.load_mnist`.

    Raises:
        DataError: no MNIST.
    """
    images, labels = (part[:TRAIN] for part in load_mnist(folder, train=True))
    others, correct = (part[:VALIDATION] for part in load_mnist(folder, train=False))
    changed, corrupted = corrupt_labels(labels, round(CORRUPTED * len(labels)))
    return digits(images, changed, corrupted, others, correct)


def digits(images: Tensor, labels: Tensor, corrupted: Tensor, others: Tensor, correct: Tensor) -> Digits:
    """Images ``(N, ...)`` and labels ``(N,)`` of two sets, pixels as features beside a bias."""
    classes = 1 + int(torch.maximum(labels.max(), correct.max()))

    def labeled(x: Tensor, y: Tensor) -> LabeledFeatures:
        pixels = x.flatten(1)
        return LabeledFeatures(torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1), y, classes)

    return Digits(labeled(images, labels), corrupted, labeled(others, correct))


class PublishedProblem(WeightedLogisticProblem):
    """The lower level with the constant L of the published runs, which sets steps and momenta of their solvers.

    L = 1/N sum_i sigmoid(theta_i) ||a_i||^2 + 2 ridge, several times that of :class:`WeightedLogisticProblem`.
    """

    def largest_gram(self) -> Tensor:
        """What gives that L, a scalar."""
        return self.weights() @ self.examples.norms.square() / SECOND


class ValidationLoss:
    """f(W) = mean cross-entropy on examples with clean labels; the ground truth that losses are called with is unused.

    Attributes:
        smoothness: Lipschitz constant of the gradient in W, an upper bound.
        convex: True.
    """

    convex = True

    def __init__(self, examples: LabeledFeatures):
        self.examples = examples
        equal = torch.full_like(examples.norms, 1 / examples.count)
        self.smoothness = SECOND * float(examples.gram_bound(equal))

    def _at(self, x: Tensor) -> LabeledFeatures:
        return self.examples.double() if x.dtype == torch.float64 else self.examples

    def __call__(self, x: Tensor, x_true: Tensor | None = None) -> Tensor:
        """``(1, C, d)`` to ``(1,)``."""
        return self._at(x).cross_entropy(x[0]).mean().unsqueeze(0)

    def grad(self, x: Tensor, x_true: Tensor | None = None) -> Tensor:
        """Gradient in W, ``(1, C, d)``."""
        examples = self._at(x)
        return examples.gradient(x[0], torch.full_like(examples.norms, 1 / examples.count))[0].unsqueeze(0)


class CleaningObjective:
    """F(theta) = f(W*(theta)) with certified values and hypergradients; W and the adjoint are kept for the next start.

    Args:
        problem: the lower level; its theta is changed in place by a method.
        loss: the upper level.
        lower: lower-level solver, ``None`` for Newton-CG.
        linear: adjoint solver, ``None`` for preconditioned conjugate gradients.
        start: W to start from; ``None`` for a rough solution at the current theta.
    """

    def __init__(
        self,
        problem: WeightedLogisticProblem,
        loss: ValidationLoss,
        *,
        lower: LowerSolver | None = None,
        linear: LinearSolver | None = None,
        start: Tensor | None = None,
    ):
        self.problem, self.loss, self.theta = problem, loss, problem.theta
        self.lower = lower or NewtonCG()
        self.linear = linear or ConjugateGradient(preconditioner="auto")
        # accuracies relative to the size of W need one that is not 0
        self.x = self.lower.solve(problem, None, FIRST_ERROR).x if start is None else start
        self.q: Tensor | None = None
        self._unused = torch.zeros_like(self.x)

    def value(self, error_tol: float) -> CertifiedValue:
        """Certified interval of F, the lower level solved to ``error_tol``; the last adjoint sharpens it."""
        started, before = time.perf_counter(), self.problem.cost.copy()
        solution = self.lower.solve(self.problem, self.x, error_tol)
        found = loss_interval(self.problem, self.loss, self._unused, solution.x, self.q, error_tol=error_tol)
        self.x = solution.x
        cost = self.problem.cost - before + Cost(seconds=time.perf_counter() - started)
        value, lower, upper = (float(v) for v in found)
        return CertifiedValue(value=value, lower=lower, upper=upper, cost=cost)

    def hypergradient(self, **accuracy: Any) -> Hypergradient:
        """Certified hypergradient at the current theta, to the accuracy asked for."""
        solvers = {"lower": self.lower, "linear": self.linear, "x0": self.x, "q0": self.q}
        result = hypergradient(self.problem, self.loss, self._unused, **solvers, **accuracy)
        self.x, self.q = cast(Tensor, result.x), cast(Tensor, result.q)  # one batch: no tuples
        return result


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example has a larger score than a negative one, ties counting half, ``(N,)`` each."""
    ranks = torch.from_numpy(rankdata(scores.cpu().numpy()))
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(ranks) - count)))
