"""Multinomial logistic regression with a learned weight for every example: the lower level of data hypercleaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Directional, Linearization, LocalChange, Preconditioner
from bilevel_imaging.energies.labeled_features import LabeledFeatures, covariance
from bilevel_imaging.energies.problem import LowerLevelProblem

__all__ = ["WeightedLogisticProblem"]

# of the cross-entropy as a function of the logits: sup ||D^2||, sup ||D^3||, sup ||D||
SECOND, THIRD, FIRST = 0.5, math.sqrt(2) / (3 * math.sqrt(3)), math.sqrt(2)
# a preconditioner is built anew once the curvatures of the examples have changed by this part of their sum
_STALE = 0.5


class WeightedLogisticProblem(LowerLevelProblem):
    """g(W; theta) = 1/N sum_i sigmoid(theta_i) CE(W a_i, y_i) + ridge ||W||^2, one problem.

    CE is the cross-entropy of the softmax of the logits W a_i. A bias is a feature that is always 1; it is penalized
    like the rest. Ehrhardt & Roberts (2023), Section 4.2, with pixels for features.

    Args:
        examples: the N feature vectors and labels.
        theta: ``(N,)`` parameter; the weight of example i is sigmoid(theta_i).
        ridge: > 0; the strong convexity constant is twice that.

    Attributes:
        factorizations: matrices factored for preconditioners so far.

    Raises:
        ValueError: theta does not fit, or the ridge is not positive.
    """

    def __init__(self, examples: LabeledFeatures, theta: Tensor, *, ridge: float, cost: Cost | None = None):
        if theta.shape != (examples.count,):
            raise ValueError(f"Expected one theta per example, ({examples.count},). Got {tuple(theta.shape)}.")
        if not 0 < ridge < math.inf:
            raise ValueError(f"Expected ridge > 0: the data alone are not strongly convex. Got {ridge!r}.")
        self.examples, self.ridge = examples, ridge
        self.theta = {"theta": theta}
        self.dtype, self.device = examples.features.dtype, examples.features.device
        self.shape = torch.Size((1, *examples.shape))
        self.cost = Cost() if cost is None else cost
        self._last_theta: Tensor | None = None
        self._kept: dict[str, Any] = {}
        self._factor: tuple[Tensor, Tensor] | None = None
        self.factorizations = 0
        self._exact: WeightedLogisticProblem | None = None

    def weights(self) -> Tensor:
        """sigmoid(theta_i) / N, ``(N,)``."""
        theta = self.theta["theta"]
        if torch.is_grad_enabled() and theta.requires_grad:
            return self._weights(theta)
        return self._at_theta("weights", lambda: self._weights(theta.detach()))

    def _weights(self, theta: Tensor) -> Tensor:
        return torch.sigmoid(theta.to(self.dtype)) / self.examples.count

    def _at_theta(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made at the current theta, made now if it was not: comparing theta is cheaper."""
        theta = self.theta["theta"].detach()
        if self._last_theta is None or not torch.equal(self._last_theta, theta):
            self._last_theta, self._kept = theta.clone(), {}
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _value(self, x: Tensor) -> Tensor:
        return (self.weights() @ self.examples.cross_entropy(x[0]) + self.ridge * x.square().sum()).unsqueeze(0)

    def _grad(self, x: Tensor) -> Tensor:
        return (self.examples.gradient(x[0], self.weights())[0] + 2 * self.ridge * x[0]).unsqueeze(0)

    def _linearize(self, x: Tensor) -> Linearization:
        return _LogisticLinearization(self, x)

    def initial(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def constants(self) -> Constants:
        """Bounds for all W at the current theta; those of the mixed derivative are of order N^(-1/2)."""
        return self._at_theta("constants", self._evaluate_constants)

    @torch.no_grad()
    def _evaluate_constants(self) -> Constants:
        weights, norms = self.weights(), self.examples.norms
        largest = self.largest_gram()
        slopes = self.slopes()
        # |<J c, V>| <= sum_i |c_i| slopes_i ||p_i - e_{y_i}|| ||V a_i|| with ||c|| = 1, likewise for differences of J
        share = slopes / weights.clamp(min=torch.finfo(weights.dtype).tiny).sqrt()
        values = {
            "strong_convexity": torch.full_like(largest, 2 * self.ridge) * (1 - 4 * torch.finfo(self.dtype).eps),
            "smoothness": SECOND * largest + 2 * self.ridge,
            "hessian_lipschitz": THIRD * torch.minimum(weights @ norms**3, norms.amax() * largest),
            "mixed_norm": FIRST * share.amax() * largest.sqrt(),
            "mixed_lipschitz": SECOND
            * torch.minimum((slopes * norms.square()).norm(), (share * norms).amax() * largest.sqrt()),
        }
        up = 1 + 1e3 * torch.finfo(self.dtype).eps
        return Constants(**{k: (v if k == "strong_convexity" else up * v).unsqueeze(0) for k, v in values.items()})

    def largest_gram(self) -> Tensor:
        """Bound of the largest eigenvalue of sum_i sigmoid(theta_i)/N a_i a_i^T, a scalar."""
        return self.examples.gram_bound(self.weights())

    def cholesky_factor(self, curvatures: Tensor) -> Tensor:
        """Of sum_i curvatures_i a_i a_i^T + 2 ridge I, or of that for curvatures not far from these, ``(d, d)``.

        It only speeds up solvers; it costs as much as some Hessian-vector products and is kept as long as possible.
        """
        if self._factor is None or bool((curvatures - self._factor[0]).abs().sum() > _STALE * self._factor[0].sum()):
            matrix = self.examples.gram(curvatures)
            matrix.diagonal().add_(2 * self.ridge)
            self._factor = curvatures, torch.linalg.cholesky(matrix)
            self.factorizations += 1
        return self._factor[1]

    def slopes(self) -> Tensor:
        """Derivative of ``weights`` in theta, ``(N,)``."""
        return self.weights() * torch.sigmoid(-self.theta["theta"].to(self.dtype))

    def double(self) -> WeightedLogisticProblem:
        if self.dtype == torch.float64:
            return self
        if self._exact is None:  # built once: it keeps constants and factors of its own
            theta = self.theta["theta"]
            self._exact = WeightedLogisticProblem(self.examples.double(), theta, ridge=self.ridge, cost=self.cost)
        return self._exact

    def gradient_rounding(self, x: Tensor) -> Tensor:
        """Logits are rounded independently of each other; sums over examples are as large as their largest part."""
        with torch.no_grad():
            weights, norms = self.weights(), self.examples.norms
            size = x.detach().norm()
            single = (weights * norms * (SECOND * norms * size + FIRST)).norm()
            largest = self.constants().smoothness[0] / SECOND
            total = single + FIRST * (largest * weights.sum()).sqrt() + 2 * self.ridge * size
            return (4 * torch.finfo(self.dtype).eps * total).unsqueeze(0)


class _LogisticLinearization(Linearization):
    """Keeps the probabilities p_i; with covariances S_i = diag(p_i) - p_i p_i^T, H V = sum_i w_i S_i V a_i a_i^T + 2
    ridge V."""

    def __init__(self, problem: WeightedLogisticProblem, x: Tensor):
        self.problem, self.examples = problem, problem.examples
        self.constants = problem.constants()
        self.weights = problem.weights()
        gradient, self._rows = self.examples.gradient(x[0], self.weights)
        self.grad = (gradient + 2 * problem.ridge * x[0]).unsqueeze(0)

    def hvp(self, v: Tensor) -> Tensor:
        product = self.examples.hessian(v[0], self.weights, self._rows)
        return (product + 2 * self.problem.ridge * v[0]).unsqueeze(0)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {"theta": self.examples.mixed(q[0], self.problem.slopes(), self._rows)}

    @cached_property
    def probabilities(self) -> Tensor:
        """p, ``(C, N)``."""
        return self.examples.planes(self._rows)

    @cached_property
    def _misfit_norms(self) -> Tensor:
        """||p_i - e_{y_i}||, ``(N,)``."""
        return (self.probabilities - self.examples.targets).norm(dim=0)

    def preconditioner(self) -> Preconditioner:
        """The same block for every class: with the mean of the nonzero eigenvalues of S_i instead of S_i."""
        traces = 1 - self.probabilities.square().sum(0)
        factor = self.problem.cholesky_factor(self.weights.detach() * traces / (self.examples.classes - 1))
        return Preconditioner(lambda v: torch.cholesky_solve(v[0].T, factor).T.unsqueeze(0).contiguous())

    def mixed_norm_bound(self) -> Tensor:
        """||J||^2 <= lambda_max of sum_i slopes_i^2 ||p_i - e_{y_i}||^2 a_i a_i^T (a product of Schur), ``(1,)``."""
        scale = 1 / self.weights.amax().clamp(min=torch.finfo(self.weights.dtype).tiny)
        columns = (scale * self.problem.slopes() * self._misfit_norms).square()
        bound = self.examples.gram_bound(columns).sqrt() / scale
        return bound.double().unsqueeze(0) * (1 + 1e3 * torch.finfo(self.grad.dtype).eps)

    def directional(self, q: Tensor, radius: Tensor) -> Directional:
        """On any ball: ||D^3|| of the cross-entropy and the length of what q does to the logits of every example."""
        logits = self.examples.logits(q[0])
        lengths = (logits - logits.mean(0)).norm(dim=0)  # equal logits for all classes change nothing
        norms, slopes = self.examples.norms, self.problem.slopes()
        hessian = torch.minimum(
            (self.weights * norms.square()) @ lengths, self.examples.gram_bound(self.weights * lengths)
        )
        scale = 1 / self.weights.amax().clamp(min=torch.finfo(self.weights.dtype).tiny)
        along = scale * slopes * lengths
        mixed = torch.minimum((along * norms).norm(), self.examples.gram_bound(along.square()).sqrt()) / scale
        up = 1 + 1e3 * torch.finfo(q.dtype).eps
        return Directional((up * THIRD * hessian).unsqueeze(0), (up * SECOND * mixed).unsqueeze(0))

    @property
    def length_scale(self) -> float:
        return 1 / (FIRST * float(self.examples.norms.amax()))

    def relative_curvature(self, radius: Tensor, strong_convexity: Tensor) -> Tensor:
        """Third central moments are at most the range of the logits of e times their variance."""
        return FIRST * self.examples.norms.amax() / strong_convexity.sqrt()

    def local_change(self, q: Tensor, radius: Tensor, strong_convexity: Tensor) -> LocalChange:
        """D^3 g[e, q, u] and D J c[e] are sums of covariances, each at most the product of standard deviations."""
        logits = self.examples.logits(q[0])
        span = (logits.amax(0) - logits.amin(0)).amax()
        energy = (self.weights * covariance(self.probabilities, logits) * logits).sum().clamp(min=0).sqrt()
        up = 1 + 1e3 * torch.finfo(q.dtype).eps
        largest = torch.sigmoid(-self.problem.theta["theta"].detach().to(q.dtype)).amax()
        return LocalChange((up * span).unsqueeze(0), largest.reshape(1, 1).double(), (up * energy).unsqueeze(0))

    def mixed_block_norms(self, strong_convexity: Tensor) -> Tensor:
        return (self.mixed_norm_bound() / strong_convexity.double().sqrt()).unsqueeze(1)
