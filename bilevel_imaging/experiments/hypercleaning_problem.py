"""Data hypercleaning as a bilevel problem: digits, the lower level of the published runs, and the validation loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor

from bilevel_imaging.data import corrupt_labels, load_mnist
from bilevel_imaging.energies import LabeledFeatures, WeightedLogisticProblem
from bilevel_imaging.energies.logistic import SECOND

TRAIN, CORRUPTED, VALIDATION = 20_000, 0.1, 5_000


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


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive example has a larger score than a negative one, ties counting half, ``(N,)`` each."""
    ranks = torch.from_numpy(rankdata(scores.cpu().numpy()))
    count = int(positive.sum())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(ranks) - count)))
