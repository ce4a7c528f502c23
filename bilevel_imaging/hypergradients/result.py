"""What a hypergradient estimate says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.linear_solvers.base import LinearSolution
from bilevel_imaging.lower_solvers.base import LowerSolution
from bilevel_imaging.tensors import entries, length


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """Estimate of dF/dtheta for F = mean over the batch of f_i(x_i*(theta)), with its certificate.

    Attributes:
        grad: estimate by parameter name, shapes of the parameters.
        bound: ||grad - dF/dtheta||_2 <= bound over all parameters together; inf if not certified.
        component_bounds: bound of every entry, same shapes as ``grad``; ``None`` if not available.
        relative_bound: bound / ||grad||.
        certified: whether ``bound`` is finite and rests on true constants only.
        reason: why not, in words; empty if certified.
        certificate: which bound it is: "classical", "directional", "metric", "local" or "polished".
        bounds: every bound that was evaluated, by name (for comparison; ``bound`` is the one in force).
        before_polish: the estimate before the Newton correction and its bound ||h - h_N|| + B_N, nearly exact;
            ``None`` when no correction was made.
        verified_by: with certificate "polished", a still better estimate with its bound; ``bound`` is the distance to
            it plus that bound, which tells the error of ``grad`` from both sides. ``None`` where it could not be had.
        terms: where the bound comes from: "lower", "linear", "remainder", "rounding"; they add up to ``bound``.
        loss: estimate of F (corrected value).
        loss_interval: certified F_lo <= F <= F_hi; (-inf, inf) if not certified.
        sample_bounds: per-sample contributions to the bound, ``(B,)`` float64; their mean is >= ``bound``.
        x: lower-level point of the estimate, ``(B, *image)``; for an average over batches, a tuple of them.
        q: adjoint of the estimate, likewise.
        lower: result of the lower-level solve, likewise.
        linear: result of the adjoint solve, likewise.
        cost: work spent.
        failure_probability: of ``bound``, summed over all samples and points at which ||J|| was bounded from random
            products (it is where J has too many columns and no a priori bound); 0 for a certain bound.
    """

    grad: dict[str, Tensor]
    bound: float
    component_bounds: dict[str, Tensor] | None
    relative_bound: float
    certified: bool
    reason: str
    certificate: str
    bounds: dict[str, float]
    before_polish: tuple[dict[str, Tensor], float] | None
    verified_by: tuple[dict[str, Tensor], float] | None = None
    terms: dict[str, float]
    loss: float
    loss_interval: tuple[float, float]
    sample_bounds: Tensor
    x: Tensor | tuple[Tensor, ...]
    q: Tensor | tuple[Tensor, ...]
    lower: LowerSolution | tuple[LowerSolution, ...]
    linear: LinearSolution | tuple[LinearSolution, ...]
    cost: Cost
    failure_probability: float = 0.0

    @property
    def norm(self) -> float:
        """||grad||_2 over all parameters."""
        return length(entries(self.grad))

    @property
    def distance(self) -> float:
        """Largest certified distance ||x_i - x_i*|| over the samples: the accuracy epsilon that was reached."""
        lower = self.lower if isinstance(self.lower, tuple) else (self.lower,)
        return max(float(s.distance_bound.max()) for s in lower)

    @property
    def residual(self) -> float:
        """Largest adjoint residual over the samples: the accuracy delta that was reached."""
        linear = self.linear if isinstance(self.linear, tuple) else (self.linear,)
        return max(float(s.residual_norm.max()) for s in linear)


def average(parts: Sequence[Hypergradient], sizes: Sequence[int], *, earlier: Cost | None = None) -> Hypergradient:
    """The hypergradient of the mean over several batches of the given sizes; bounds and intervals average too.

    Args:
        parts: one per batch.
        sizes: number of samples in each.
        earlier: work already spent on these batches, added to the cost.
    """
    weights = [size / sum(sizes) for size in sizes]

    def mean(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(weights, values, strict=True))

    cost = sum((p.cost for p in parts), Cost()) + (earlier or Cost())
    if len(parts) == 1:
        return replace(parts[0], cost=cost)
    grad = {n: sum(w * p.grad[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0].grad}
    components = None
    if all(p.component_bounds is not None for p in parts):
        components = {
            n: sum(w * p.component_bounds[n] for w, p in zip(weights, parts, strict=True)) for n in parts[0].grad
        }
    verified_by = _average_pair(parts, weights, "verified_by")
    bound = _against((grad, mean([p.bound for p in parts])), verified_by)[1]
    size = length(entries(grad))
    reasons = sorted({p.reason for p in parts if p.reason})
    return Hypergradient(
        grad=grad,
        bound=bound,
        component_bounds=components,
        relative_bound=bound / size if size > 0 else float("inf"),
        certified=all(p.certified for p in parts),
        reason="; ".join(reasons),
        certificate=parts[0].certificate,
        bounds={n: mean([p.bounds[n] for p in parts]) for n in parts[0].bounds if all(n in p.bounds for p in parts)},
        before_polish=_against(_average_pair(parts, weights, "before_polish"), verified_by or (grad, bound)),
        verified_by=verified_by,
        terms={n: mean([p.terms[n] for p in parts]) for n in parts[0].terms},
        loss=mean([p.loss for p in parts]),
        loss_interval=(mean([p.loss_interval[0] for p in parts]), mean([p.loss_interval[1] for p in parts])),
        sample_bounds=torch.cat([p.sample_bounds for p in parts]),
        x=tuple(p.x for p in parts),
        q=tuple(p.q for p in parts),
        lower=tuple(p.lower for p in parts),
        linear=tuple(p.linear for p in parts),
        cost=cost,
        failure_probability=sum(p.failure_probability for p in parts),
    )


def _average_pair(parts: Sequence[Hypergradient], weights: Sequence[float], name: str):
    """Mean of the estimates called ``name`` and of their bounds; ``None`` if a part has none."""
    pairs = [getattr(p, name) for p in parts]
    if any(pair is None for pair in pairs):
        return None
    grad = {n: sum(w * pair[0][n] for w, pair in zip(weights, pairs, strict=True)) for n in parts[0].grad}
    return grad, sum(w * pair[1] for w, pair in zip(weights, pairs, strict=True))


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum(float((a[n] - b[n]).double().square().sum()) for n in a) ** 0.5


def _against(pair, reference):
    """The estimate of a pair with the bound that its distance to a better one gives, where that is smaller."""
    if pair is None or reference is None:
        return pair
    return pair[0], min(pair[1], _distance(pair[0], reference[0]) + reference[1])
