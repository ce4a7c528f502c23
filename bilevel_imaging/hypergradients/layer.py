"""The variational reconstruction as a differentiable layer: a deepinv ``Reconstructor`` with an implicit backward."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import deepinv
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.variational import VariationalEnergy, VariationalProblem
from bilevel_imaging.errors import NotCertifiedWarning
from bilevel_imaging.hypergradients.evaluation import estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.refinement import Refiner
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.tensors import inner, norm


@dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """What is known of the last call of a :class:`BilevelReconstructor`.

    Attributes:
        distance_bound: ||x_i - x_i*|| <= distance_bound, ``(B,)``; inf if not certified.
        converged: whether the requested accuracy was reached, ``(B,)``.
        backward_bound: Euclidean bound of the error of the last theta gradient for the cotangent that came in
            (the cotangent's own dependence on x is the loss's business); ``None`` before a backward.
        certified: whether the bounds rest on true constants.
        reason: why not, in words.
        cost: work of the forward, plus that of the backward once it ran.
    """

    distance_bound: Tensor
    converged: Tensor
    backward_bound: float | None
    certified: bool
    reason: str
    cost: Cost


class BilevelReconstructor(deepinv.models.Reconstructor):
    """x*(theta; y) = argmin_x g(x, theta; y), differentiable in theta and y for any torch loss and optimizer.

    Args:
        energy: the variational energy; its parameters are this module's.
        lower: lower-level solver; ``None`` for Newton-CG.
        linear: solver of the adjoint systems; ``None`` for conjugate gradients.
        error_tol: certified distance asked for, in the units of x; ``None`` for nearly all that the dtype holds
            (1e-12 of ||x|| in float64, 1e-5 in float32).
        residual_tol: adjoint accuracy relative to the incoming cotangent; ``None`` for 1e-10 (float64), 1e-5 (float32).

    The last certificate is at ``.certificate``. A backward without certificate warns once, in words.
    """

    def __init__(
        self,
        energy: VariationalEnergy,
        lower: LowerSolver | None = None,
        linear: LinearSolver | None = None,
        *,
        error_tol: float | None = None,
        residual_tol: float | None = None,
    ):
        super().__init__()
        self.energy = energy
        self.lower, self.linear = lower or NewtonCG(), linear or ConjugateGradient()
        self.error_tol, self.residual_tol = error_tol, residual_tol
        self.certificate: LayerCertificate | None = None
        self._warned = False

    def forward(self, y: Tensor, physics: deepinv.physics.Physics, x0: Tensor | None = None) -> Tensor:
        """Reconstruct ``(B, C, H, W)`` from measurements y.

        Raises:
            ValueError: what :meth:`VariationalEnergy.bind` raises.
        """
        problem = self.energy.bind(y, physics)
        return _Minimize.apply(self, problem, x0, y, *problem.theta.values())

    def _forward(self, problem: VariationalProblem, x0: Tensor | None) -> Tensor:
        start = problem.initial() if x0 is None else x0.detach()
        relative = 1e-12 if problem.dtype == torch.float64 else 1e-5
        error_tol = relative * norm(start).clamp(min=1.0) if self.error_tol is None else self.error_tol
        solution = self.lower.solve(problem, start, error_tol)
        reason = problem.constants().reason
        self.certificate = LayerCertificate(
            distance_bound=solution.distance_bound,
            converged=solution.converged,
            backward_bound=None,
            certified=bool(torch.isfinite(solution.distance_bound).all()),
            reason=f"not certified: {reason}" if reason else "",
            cost=problem.cost.copy(),
        )
        return solution.x

    def _backward(self, problem: VariationalProblem, x: Tensor, cotangent: Tensor) -> Tensor:
        before = problem.cost.copy()
        relative = self.residual_tol or (1e-10 if problem.dtype == torch.float64 else 1e-5)
        exact = problem.double() or problem
        linear_loss = LossOracle(_Pairing(cotangent.to(exact.dtype)), x, problem.shape)
        refiner = Refiner(problem, linear_loss, self.lower, self.linear)
        point = refiner.point(x)
        q = self.linear.solve(point.working, cotangent, relative * norm(cotangent)).q
        result = estimate(point, q.to(exact.dtype))
        bound = float("inf")
        if result.bounds:
            bound = float(result.best(tuple(result.bounds))[0].sum())
        reason = result.point.reason
        if self.certificate is not None:
            self.certificate = replace(
                self.certificate,
                backward_bound=bound,
                certified=bound < float("inf"),
                reason=f"not certified: {reason}" if reason else "",
                cost=self.certificate.cost + (problem.cost - before),
            )
        if bound == float("inf") and not self._warned:
            self._warned = True
            warnings.warn(f"The gradient of this layer is not certified: {reason}.", NotCertifiedWarning, stacklevel=2)
        return q


class _Pairing:
    """The linear loss <cotangent, x>, whose hypergradient is the vector-Jacobian product asked for."""

    smoothness, convex = 0.0, True

    def __init__(self, cotangent: Tensor):
        self.cotangent = cotangent

    def __call__(self, x: Tensor, x_true: Tensor) -> Tensor:
        return inner(self.cotangent, x)

    def grad(self, x: Tensor, x_true: Tensor) -> Tensor:
        return self.cotangent


class _Minimize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, problem, x0, y, *theta):
        x = layer._forward(problem, x0)
        ctx.layer, ctx.problem = layer, problem
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        q = ctx.layer._backward(ctx.problem, x, cotangent)
        products = ctx.problem.linearize(x).mixed_vjp(q) if any(ctx.needs_input_grad[4:]) else {}
        theta = [-products[name] if name in products else None for name in ctx.problem.theta]
        y = ctx.problem.data.apply(q) if ctx.needs_input_grad[3] else None
        return None, None, None, y, *theta
