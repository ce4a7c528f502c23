"""Multinomial logistic models of many sparse examples: logits, gradients and products in one pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel_imaging.native.library import function, integers, pointer, threads

# the C code is made for so many classes; others are added to reach the next number
ROOMS = (1, 4, 10, 16)
MOST_CLASSES = ROOMS[-1]
# indices of pairs of features are 16 bits wide
MOST_FEATURES = 2**17
# of its tiles: neighboring features, and bytes of a vector of examples times two; of its chunks: blocks
_GROUPED, _BLOCK_BYTES, _CHUNK = 2, 128, 16
# directions of largest variance that tell which examples are alike, of at most so many features
_DIRECTIONS, _COMPARED = 10, 1024
_LOGITS, _GRADIENT, _HESSIAN, _MIXED, _CROSS_ENTROPY, _GRAM = range(6)


class SparseExamples:
    """N feature vectors a_i with labels y_i, of which most zeros are left out.

    W, V and Q are ``(C, d)`` with C <= 16, d <= 2^17. Everything has the dtype of the features. Pixels of 8 bits, k /
    255 in float32, are kept as bytes.

    Args:
        features: ``(N, d)``, float32 or float64, on the CPU.
        labels: ``(N,)`` int64 in [0, C).
    """

    def __init__(self, features: Tensor, labels: Tensor):
        self.count, self.width = features.shape
        self.dtype = features.dtype
        block = _BLOCK_BYTES // features.element_size()
        self._order = _similar_together(features, block)
        self._labels = labels[self._order]
        missing = -self.count % block
        padding = (0, -self.width % _GROUPED, 0, missing)
        blocks = torch.nn.functional.pad(features[self._order], padding).unflatten(0, (-1, block))
        blocks = blocks.unflatten(2, (-1, _GROUPED)).movedim(1, 3)
        present = (blocks != 0).flatten(2).any(2)
        tiles = blocks[present].contiguous()
        codes = (255 * tiles).round().clamp(0, 255).to(torch.uint8)
        coded = features.dtype == torch.float32 and torch.equal(codes.to(tiles.dtype) / 255, tiles)
        self._values = None if coded else tiles
        self._bytes = codes if coded else None
        self._tile_pairs = present.nonzero()[:, 1].to(torch.uint16)
        self._block_starts = _starts(present.sum(1))
        number = torch.full(present.shape, -1, dtype=torch.int32)
        number[present] = torch.arange(len(tiles), dtype=torch.int32)
        chunks = torch.nn.functional.pad(number, (0, 0, 0, -len(number) % _CHUNK), value=-1)
        chunks = chunks.unflatten(0, (-1, _CHUNK)).transpose(1, 2)
        self._tiles = chunks[chunks >= 0].contiguous()
        self._tile_blocks = (chunks >= 0).nonzero()[:, 2].to(torch.uint8)
        self._pair_starts = _starts((chunks >= 0).sum(2).flatten())
        self._inverse = torch.argsort(self._order)
        self._shape = (len(present), block)

    def logits(self, w: Tensor) -> Tensor:
        """W a_i, ``(C, N)``."""
        rows = self._rows(w)
        self._run(_LOGITS, w, rows=rows)
        return self.planes(rows, len(w))

    def gradient(self, w: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """sum_i weights_i (p_i - e_{y_i}) a_i^T ``(C, d)``, weights ``(N,)``, and the softmax p_i of the logits.

        Returns:
            the sum, and p as :meth:`planes` and the products below read it.
        """
        out, rows = w.new_empty(w.shape), self._rows(w)
        self._run(_GRADIENT, w, weights=weights, rows=rows, out=out)
        return out, rows

    def planes(self, rows: Tensor, classes: int) -> Tensor:
        """p as above in the shape ``(C, N)``."""
        return rows.transpose(0, 1).flatten(1)[:classes, self._inverse]

    def hessian(self, v: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """sum_i weights_i (diag(p_i) - p_i p_i^T) V a_i a_i^T with p as above, ``(C, d)``."""
        out = v.new_empty(v.shape)
        self._run(_HESSIAN, v, weights=weights, rows=rows, out=out)
        return out

    def mixed(self, q: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """weights_i <p_i - e_{y_i}, Q a_i> with p as above, ``(N,)``."""
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

    def _rows(self, w: Tensor) -> Tensor:
        blocks, size = self._shape
        return w.new_empty(blocks, _room(len(w)), size)

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
        tiles = (self._tile_pairs, self._block_starts, self._tiles, self._tile_blocks, self._pair_starts)
        given = (self._values, self._bytes, *tiles, self._order, self._labels, matrix, weights, rows, single, out)
        sizes = integers(self.count, self.width, len(matrix), _room(len(matrix)))
        kernel(*integers(mode), *map(pointer, given), *sizes, threads())


def _room(classes: int) -> int:
    """Number of classes that the C code works with."""
    return next(room for room in ROOMS if room >= classes)


def _starts(counts: Tensor) -> Tensor:
    """Where each of several sequences of these lengths begins, and the end of the last."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _similar_together(features: Tensor, block: int) -> Tensor:
    """An order in which examples with the same features other than 0 are close to each other, ``(N,)``.

    Halved again and again at the median of the principal component in which a part varies most.
    """
    components = _principal_components((features != 0).float())
    parts, finished = [torch.arange(len(features))], []
    while parts:
        part = parts.pop()
        if len(part) <= block:
            finished.append(part)
            continue
        inside = components[part]
        # halves are whole blocks, so that only the last of all is not full
        half = -(-len(part) // (2 * block)) * block
        ordered = part[torch.argsort(inside[:, inside.var(0).argmax()], stable=True)]
        parts += [ordered[half:], ordered[:half]]
    return torch.cat(finished)


def _principal_components(values: Tensor) -> Tensor:
    """The largest of ``values`` ``(N, d)``, ``(N, at most _DIRECTIONS)``: on one thread, so that their bits, and with
    them the order of all sums, are the same for any number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        varied = values.var(0, correction=0).topk(min(_COMPARED, values.shape[1])).indices
        centered = values[:, varied] - values[:, varied].mean(0)
        return centered @ torch.linalg.eigh(centered.T @ centered)[1][:, -_DIRECTIONS:]
    finally:
        torch.set_num_threads(before)
