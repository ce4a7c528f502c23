"""Labeled feature vectors for multinomial logistic models: products, and bounds of weighted Gram matrices."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bilevel_imaging import native

# sweeps of the power method for the vector that bounds start from, and of every bound
_FIRST_SWEEPS, _SWEEPS = 12, 2
# keeps entries of that vector positive where no example has a feature
_SMALLEST = 1e-6
# up to this part of features other than 0, compiled code that skips zeros is faster (measured: up to 0.5 to 0.9)
_SPARSE = 0.5


class LabeledFeatures:
    """N feature vectors a_i with labels y_i, and the products of matrices of weights W ``(C, d)`` with all of them.

    Where at least half of the features are 0 and no graph is recorded, compiled code makes one pass over the others.

    Args:
        features: ``(N, d)``, float64 or float32, finite.
        labels: ``(N,)`` integers in [0, classes).
        classes: C >= 2.

    Raises:
        ValueError: shapes that do not fit, features that are not finite, or labels out of range.
    """

    def __init__(self, features: Tensor, labels: Tensor, classes: int):
        if features.dim() != 2 or not features.numel() or labels.shape != features.shape[:1]:
            raise ValueError(
                "Expected features (N, d) and labels (N,), not empty. "
                f"Got {tuple(features.shape)} and {tuple(labels.shape)}."
            )
        if not features.is_floating_point() or not bool(features.isfinite().all()):
            raise ValueError(f"Expected finite floating-point features. Got {features.dtype} or NaN or inf.")
        lowest, highest = int(labels.min()), int(labels.max())
        if classes < 2 or lowest < 0 or highest >= classes:
            raise ValueError(
                f"Expected labels in [0, classes) with classes >= 2. Got {lowest} to {highest}, classes={classes}."
            )
        self.features, self.labels, self.classes = features, labels.long(), classes
        self.norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64).to(features.dtype)

    @property
    def count(self) -> int:
        """N."""
        return self.features.shape[0]

    @property
    def shape(self) -> torch.Size:
        """Of W: ``(C, d)``."""
        return torch.Size((self.classes, self.features.shape[1]))

    @cached_property
    def targets(self) -> Tensor:
        """Labels as unit vectors, ``(C, N)``."""
        hot = torch.zeros(self.classes, self.count, dtype=self.features.dtype, device=self.features.device)
        return hot.scatter_(0, self.labels.unsqueeze(0), 1.0)

    @cached_property
    def _exact(self) -> LabeledFeatures:
        return LabeledFeatures(self.features.double(), self.labels, self.classes)

    def double(self) -> LabeledFeatures:
        """The same in float64, cast once."""
        return self if self.features.dtype == torch.float64 else self._exact

    @cached_property
    def _is_sparse(self) -> bool:
        fits = self.classes <= native.MOST_CLASSES and self.features.shape[1] <= native.MOST_FEATURES
        return fits and int(self.features.count_nonzero()) <= _SPARSE * self.features.numel()

    @cached_property
    def _packed(self) -> native.SparseExamples:
        return native.SparseExamples(self.features, self.labels)

    def _compiled(self, *given: Tensor) -> native.SparseExamples | None:
        """Compiled code for products with such tensors, ``None`` where PyTorch has to make them."""
        return self._packed if native.serves(self.features, *given) and self._is_sparse else None

    def _compiled_with(self, rows: Tensor, *given: Tensor) -> native.SparseExamples | None:
        """The same for p as in :meth:`gradient`, which compiled code must have made."""
        return self._compiled(rows, *given) if rows.dim() == 3 else None

    def logits(self, w: Tensor) -> Tensor:
        """W a_i for all i, ``(C, N)``."""
        packed = self._compiled(w)
        # contiguous: reductions over classes are several times faster that way
        return (self.features @ w.T.contiguous()).T.contiguous() if packed is None else packed.logits(w)

    def cross_entropy(self, w: Tensor) -> Tensor:
        """log sum_k exp(<w_k, a_i>) - <w_{y_i}, a_i>, ``(N,)``."""
        packed = self._compiled(w)
        if packed is not None:
            return packed.cross_entropy(w)
        logits = self.logits(w)
        return torch.logsumexp(logits, 0) - logits.gather(0, self.labels.unsqueeze(0))[0]

    def gradient(self, w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i weights_i (p_i - e_{y_i}) a_i^T ``(C, d)``, weights ``(N,)``, with the softmax p_i of the logits.

        Returns:
            the sum, and p for :meth:`planes` and the products below.
        """
        packed = self._compiled(w, weights)
        if packed is not None:
            return packed.gradient(w, weights)
        probabilities = torch.softmax(self.logits(w), 0)
        return (weights * (probabilities - self.targets)) @ self.features, probabilities

    def hessian(self, v: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """sum_i weights_i S_i V a_i a_i^T ``(C, d)`` with the covariances S_i = diag(p_i) - p_i p_i^T; p as above."""
        packed = self._compiled_with(rows, v, weights)
        if packed is not None:
            return packed.hessian(v, weights, rows)
        return (weights * covariance(self.planes(rows), self.logits(v))) @ self.features

    def mixed(self, q: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """weights_i <p_i - e_{y_i}, Q a_i> ``(N,)``; p as above."""
        packed = self._compiled_with(rows, q, weights)
        if packed is not None:
            return packed.mixed(q, weights, rows)
        return weights * ((self.planes(rows) - self.targets) * self.logits(q)).sum(0)

    def planes(self, rows: Tensor) -> Tensor:
        """p as above in the shape ``(C, N)``."""
        return rows if rows.dim() == 2 else self._packed.planes(rows, self.classes)

    def gram(self, weights: Tensor) -> Tensor:
        """sum_i weights_i a_i a_i^T, ``(d, d)``, weights ``(N,)``."""
        return self.features.T @ (weights.unsqueeze(1) * self.features)

    def gram_bound(self, weights: Tensor) -> Tensor:
        """Upper bound of the largest eigenvalue of sum_i weights_i a_i a_i^T, weights ``(N,)`` >= 0; a scalar.

        For nonnegative features, such as pixels, it is close: lambda_max <= max_j (G v)_j / v_j for every v > 0
        (Collatz & Wielandt). Other features are replaced by their absolute values.
        """
        return self._sweeps(weights.detach(), self._perron, _SWEEPS)[0]

    @cached_property
    def _sizes(self) -> LabeledFeatures:
        """The absolute values of the features."""
        if not bool((self.features < 0).any()):
            return self
        return LabeledFeatures(self.features.abs(), self.labels, self.classes)

    @cached_property
    def _perron(self) -> Tensor:
        """A positive vector close to the top eigenvector for equal weights."""
        equal = torch.full_like(self.norms, 1 / self.count)
        return self._sweeps(equal, torch.ones_like(self.features[0]), _FIRST_SWEEPS)[1]

    def _sweeps(self, weights: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = torch.full_like(v[0], torch.inf)
        for _ in range(count):
            product = self._sizes._gram_product(v, weights)
            best = torch.minimum(best, (product / v).amax())
            v = product / product.amax().clamp(min=torch.finfo(v.dtype).tiny) + _SMALLEST
        # sums of numbers of one sign: relative errors of as many units as there are terms
        return best * (1 + 2 * sum(self.features.shape) * torch.finfo(v.dtype).eps), v

    @torch.no_grad()
    def _gram_product(self, v: Tensor, weights: Tensor) -> Tensor:
        """sum_i weights_i <a_i, v> a_i, ``(d,)``."""
        packed = self._compiled(v, weights)
        if packed is not None:
            return packed.gram(v, weights)
        return (weights * (self.features @ v)) @ self.features


def covariance(probabilities: Tensor, logits: Tensor) -> Tensor:
    """(diag(p_i) - p_i p_i^T) z_i for every column z_i of the logits, ``(C, N)``."""
    product = probabilities * logits
    return product - probabilities * product.sum(0)
