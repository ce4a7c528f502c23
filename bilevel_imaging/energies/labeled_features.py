"""Labeled feature vectors for multinomial logistic models: products, and bounds of weighted Gram matrices."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

# sweeps of the power method for the vector that bounds start from, and of every bound
_FIRST_SWEEPS, _SWEEPS = 12, 2
# keeps entries of that vector positive where no example has a feature
_SMALLEST = 1e-6
# up to this part of entries other than 0, products with sparse matrices are faster
_SPARSE = 0.3


class LabeledFeatures:
    """N feature vectors a_i with labels y_i, and the products of matrices of weights W ``(C, d)`` with all of them.

    Products skip features that are 0, where most are and no graph is recorded.

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
        self._is_sparse = float((features != 0).sum()) <= _SPARSE * features.numel()
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
    def _rows(self) -> Tensor:
        return _compressed(self.features)

    @cached_property
    def _columns(self) -> Tensor:
        return _compressed(self.features.T)

    def logits(self, w: Tensor) -> Tensor:
        """W a_i for all i, ``(C, N)``."""
        rows = self._rows if self._is_sparse and not torch.is_grad_enabled() else self.features
        # contiguous: reductions over classes are several times faster that way
        return (rows @ w.T.contiguous()).T.contiguous()

    def adjoint(self, values: Tensor) -> Tensor:
        """sum_i values_i a_i^T, ``(C, N)`` to ``(C, d)``."""
        if self._is_sparse and not torch.is_grad_enabled():
            return (self._columns @ values.T.contiguous()).T.contiguous()
        return values @ self.features

    def cross_entropy(self, w: Tensor) -> Tensor:
        """log sum_k exp(<w_k, a_i>) - <w_{y_i}, a_i>, ``(N,)``."""
        logits = self.logits(w)
        return torch.logsumexp(logits, 0) - logits.gather(0, self.labels.unsqueeze(0))[0]

    def probabilities(self, w: Tensor) -> Tensor:
        """Softmax of the logits, ``(C, N)``."""
        return torch.softmax(self.logits(w), 0)

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
    def _sizes(self) -> Tensor:
        return self.features.abs() if bool((self.features < 0).any()) else self.features

    @cached_property
    def _perron(self) -> Tensor:
        """A positive vector close to the top eigenvector for equal weights."""
        equal = torch.full_like(self.norms, 1 / self.count)
        return self._sweeps(equal, torch.ones_like(self._sizes[0]), _FIRST_SWEEPS)[1]

    def _sweeps(self, weights: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
        best = torch.full_like(v[0], torch.inf)
        for _ in range(count):
            product = (weights * (self._sizes @ v)) @ self._sizes
            best = torch.minimum(best, (product / v).amax())
            v = product / product.amax().clamp(min=torch.finfo(v.dtype).tiny) + _SMALLEST
        # sums of numbers of one sign: relative errors of as many units as there are terms
        return best * (1 + 2 * sum(self._sizes.shape) * torch.finfo(v.dtype).eps), v


def _compressed(matrix: Tensor) -> Tensor:
    """A sparse copy with 32-bit indices, which saves memory traffic."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse")  # that the format is young
        wide = matrix.contiguous().to_sparse_csr()
        pointers, indices = wide.crow_indices().int(), wide.col_indices().int()
        return torch.sparse_csr_tensor(pointers, indices, wide.values(), wide.shape)
