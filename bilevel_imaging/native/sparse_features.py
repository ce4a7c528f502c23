"""Multinomial logistic models of many sparse examples: logits, gradients and products in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads

# rows of the C code have room for so many classes
MOST_CLASSES = 16
# of its blocks: examples, and neighboring features that are kept together
_EXAMPLES, _GROUPED = 256, 2
_LOGITS, _GRADIENT, _HESSIAN, _MIXED, _CROSS_ENTROPY, _GRAM = range(6)


class SparseExamples:
    """N feature vectors a_i with labels y_i, of which only the features that are not 0 are kept.

    W, V and Q are ``(C, d)`` with C <= 16. Everything has the dtype of the features.

    Args:
        features: ``(N, d)``, float32 or float64, on the CPU.
        labels: ``(N,)`` int64 in [0, C).
    """

    def __init__(self, features: Tensor, labels: Tensor):
        self.count, self.width = features.shape
        self.dtype, self.labels = features.dtype, labels.contiguous()
        padding = (0, -self.width % _GROUPED, 0, -self.count % _EXAMPLES)
        blocks = torch.nn.functional.pad(features, padding).unflatten(0, (-1, _EXAMPLES)).unflatten(2, (-1, _GROUPED))
        blocks = blocks.transpose(1, 2)
        present = (blocks != 0).any(3)
        self._values = blocks[present]
        self._places = present.nonzero()[:, 2].to(torch.uint16)
        self._starts = torch.nn.functional.pad(present.sum(2).flatten().cumsum(0), (1, 0))

    def logits(self, w: Tensor) -> Tensor:
        """W a_i, ``(C, N)``."""
        rows = w.new_empty(self.count, MOST_CLASSES)
        self._run(_LOGITS, w, rows=rows)
        return rows[:, : len(w)].T.contiguous()

    def gradient(self, w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i weights_i (p_i - e_{y_i}) a_i^T ``(C, d)``, weights ``(N,)``, and the softmax p_i of the logits.

        Returns:
            the sum, and p ``(N, 16)``, meaningless beyond the classes there are.
        """
        out, rows = w.new_empty(w.shape), w.new_empty(self.count, MOST_CLASSES)
        self._run(_GRADIENT, w, weights=weights, rows=rows, out=out)
        return out, rows

    def hessian(self, v: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """sum_i weights_i (diag(p_i) - p_i p_i^T) V a_i a_i^T with p ``(N, 16)`` as above, ``(C, d)``."""
        out = v.new_empty(v.shape)
        self._run(_HESSIAN, v, weights=weights, rows=rows, out=out)
        return out

    def mixed(self, q: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """weights_i <p_i - e_{y_i}, Q a_i> with p ``(N, 16)`` as above, ``(N,)``."""
        single = q.new_empty(self.count)
        self._run(_MIXED, q, weights=weights, rows=rows, single=single)
        return single

    def cross_entropy(self, w: Tensor) -> Tensor:
        """log sum_k exp(<w_k, a_i>) - <w_{y_i}, a_i>, ``(N,)``."""
        single = w.new_empty(self.count)
        self._run(_CROSS_ENTROPY, w, single=single)
        return single

    def gram(self, v: Tensor, weights: Tensor) -> Tensor:
        """sum_i weights_i <a_i, v> a_i for v ``(d,)``."""
        out = v.new_empty(v.shape)
        self._run(_GRAM, v.unsqueeze(0), weights=weights, out=out)
        return out

    def _run(
        self,
        mode: int,
        matrix: Tensor,
        *,
        weights: Tensor | None = None,
        rows: Tensor | None = None,
        single: Tensor | None = None,
        out: Tensor | None = None,
    ) -> None:
        matrix = matrix.contiguous()
        weights = None if weights is None else weights.contiguous()
        kernel = function("sparse_pass", self.dtype)
        given = (self._values, self._places, self._starts, matrix, self.labels, weights, rows, single, out)
        kernel(*integers(mode), *map(pointer, given), *integers(self.count, self.width, len(matrix)), threads())
