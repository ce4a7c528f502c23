"""The variational reconstruction as a differentiable layer: a deepinv ``Reconstructor`` with an implicit backward."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import deepinv
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bilevel_imaging.checks import instance
from bilevel_imaging.cost import Cost
from bilevel_imaging.energies.variational import VariationalEnergy, VariationalProblem
from bilevel_imaging.errors import NotCertifiedWarning
from bilevel_imaging.hypergradients._replay import Replay
from bilevel_imaging.hypergradients.evaluation import Estimate, estimate
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.refinement import Refiner
from bilevel_imaging.hypergradients.requests import check_solvers
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.lower_solvers import LowerSolver, NewtonCG
from bilevel_imaging.tensors import all_finite, inner, norm


@dataclass(frozen=True, kw_only=True)
class LayerCertificate:
    """What is known of one call of a :class:`BilevelReconstructor` and of its own backward.

    Attributes:
        distance_bound: ||x_i - x_i*|| <= distance_bound, ``(B,)``; inf if not certified.
        converged: whether the requested accuracy was reached, ``(B,)``.
        backward_bound: Euclidean bound of the error of the theta gradient for the cotangent that came in (the
            cotangent's own dependence on x is the loss's business); ``None`` before a backward, and after one that
            asked for no theta gradient. The gradient in y has no bound.
        certified: whether the bounds that there are rest on true constants.
        reason: why not, in words; empty if certified.
        cost: work and time of the forward, plus that of its latest backward once one ran.
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

    ``.certificate`` is that of the latest call, completed by that call's own backward; a backward of an earlier call
    leaves it alone. A backward without certificate warns once, in words. A backward evaluates with the tensors that its
    forward saw, whatever the modules hold by then; where one of them was changed in place it raises, as PyTorch's own
    layers do. It is differentiable once: a second derivative through it raises.
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
        instance("energy", energy, VariationalEnergy, "a VariationalEnergy, e.g. VariationalEnergy(TotalVariation())")
        check_solvers(lower, linear)
        self.energy = energy
        self.lower, self.linear = lower or NewtonCG(), linear or ConjugateGradient()
        self.error_tol, self.residual_tol = error_tol, residual_tol
        self.certificate: LayerCertificate | None = None
        self._latest: LayerCertificate | None = None  # the same before its backward
        self._warned = self._warned_of_physics = False

    def forward(self, y: Tensor, physics: deepinv.physics.Physics, x0: Tensor | None = None) -> Tensor:
        """Reconstruct ``(B, C, H, W)`` from measurements y.

        Warns once where a tensor of the physics requires a gradient: it gets none.

        Raises:
            ValueError: what :meth:`VariationalEnergy.bind` raises; in the backward, a cotangent with NaN or inf.
            RuntimeError: in the backward, y, a parameter or a tensor of the physics that was changed in place since.
        """
        started = time.perf_counter()
        problem = self.energy.bind(y, physics)
        if torch.is_grad_enabled():
            self._warn_of_learned(physics)
        weight = self.energy.data_weight
        modules = [problem.regularizer, physics] if weight is None else [problem.regularizer, physics, weight]
        watched = [*self.energy.parameters(), *physics.parameters(), *physics.buffers()]
        call = _Call(self, problem, Replay(*modules), watched, started)
        return _Minimize.apply(call, x0, y, *problem.theta.values())

    def _warn_of_learned(self, physics: deepinv.physics.Physics) -> None:
        tensors = (*physics.named_parameters(), *physics.named_buffers())
        # x does not depend on the noise model
        names = [name for name, t in tensors if t.requires_grad and "noise_model" not in name.split(".")]
        if names and not self._warned_of_physics:
            self._warned_of_physics = True
            warnings.warn(
                f"Expected a physics without learned tensors. Got {type(physics).__name__} with requires_grad=True for "
                f"{', '.join(names)}: this layer is differentiated in y and the parameters of the energy, and the "
                "gradient of these is None.",
                stacklevel=5,  # past the calls of nn.Module
            )

    def _solve(self, problem: VariationalProblem, x0: Tensor | None, started: float) -> tuple[Tensor, LayerCertificate]:
        start = problem.initial() if x0 is None else x0.detach()
        relative = 1e-12 if problem.dtype == torch.float64 else 1e-5
        error_tol = relative * norm(start).clamp(min=1.0) if self.error_tol is None else self.error_tol
        solution = self.lower.solve(problem, start, error_tol)
        certified = bool(torch.isfinite(solution.distance_bound).all())
        why = problem.constants().reason or "the distance to the minimizer is not bounded"
        certificate = LayerCertificate(
            distance_bound=solution.distance_bound,
            converged=solution.converged,
            backward_bound=None,
            certified=certified,
            reason="" if certified else f"not certified: {why}",
            cost=problem.cost.copy() + Cost(seconds=time.perf_counter() - started),
        )
        self.certificate = self._latest = certificate
        return solution.x, certificate

    def _adjoint(
        self, problem: VariationalProblem, x: Tensor, cotangent: Tensor, learn: bool
    ) -> tuple[Tensor, Estimate | None]:
        """q with H q = cotangent, ``(B, C, H, W)``, and what that makes of the theta gradient if it is asked for."""
        relative = self.residual_tol or (1e-10 if problem.dtype == torch.float64 else 1e-5)
        residual_tol = relative * norm(cotangent)
        if not learn:
            return self.linear.solve(problem.linearize(x), cotangent, residual_tol).q, None
        exact = problem.double() or problem
        linear_loss = LossOracle(_Pairing(cotangent.to(exact.dtype)), x, problem.shape)
        point = Refiner(problem, linear_loss, self.lower, self.linear).point(x)
        q = self.linear.solve(point.working, cotangent, residual_tol).q
        return q, estimate(point, q.to(exact.dtype))

    def _complete(self, forward: LayerCertificate, result: Estimate | None, cost: Cost) -> None:
        """The certificate of a forward after a backward of it, and the warning if that is not certified."""
        done = replace(forward, cost=forward.cost + cost)
        if result is not None:
            bound = float(result.best(tuple(result.bounds))[0].sum()) if result.bounds else float("inf")
            reason = forward.reason
            if bound == float("inf"):
                why = result.point.reason or result.point.near_kink or "the bound is not finite; reduce error_tol"
                reason = f"not certified: {why}"
            done = replace(done, backward_bound=bound, certified=not reason, reason=reason)
        if self._latest is forward:
            self.certificate = done
        if not done.certified and not self._warned:
            self._warned = True
            text = f"The gradient of this layer is {done.reason}."
            warnings.warn(text, NotCertifiedWarning, stacklevel=2)


class _Pairing:
    """The linear loss <cotangent, x>, whose hypergradient is the vector-Jacobian product asked for."""

    smoothness, convex = 0.0, True

    def __init__(self, cotangent: Tensor):
        self.cotangent = cotangent

    def __call__(self, x: Tensor, x_true: Tensor) -> Tensor:
        return inner(self.cotangent, x)

    def grad(self, x: Tensor, x_true: Tensor) -> Tensor:
        return self.cotangent


@dataclass(frozen=True)
class _Call:
    """One call of the layer: what its backward evaluates again."""

    layer: BilevelReconstructor
    problem: VariationalProblem
    replay: Replay
    watched: list[Tensor]
    started: float


class _Minimize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x0: Tensor | None, y: Tensor, *theta: Tensor) -> Tensor:
        x, certificate = call.layer._solve(call.problem, x0, call.started)
        ctx.layer, ctx.problem, ctx.replay, ctx.certificate = call.layer, call.problem, call.replay, certificate
        # by their version counters autograd sees what was changed in place
        ctx.save_for_backward(x, y, *theta, *call.watched)
        return x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        x, y, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = ctx.replay.run(lambda: _gradients(ctx, x, cotangent))
        if torch.is_grad_enabled():  # create_graph=True
            inputs = (cotangent, y, *saved[: len(ctx.problem.theta)])
            gradients = [None if g is None else _Once.apply(g, *inputs) for g in gradients]
        return None, None, *gradients


def _gradients(ctx: Any, x: Tensor, cotangent: Tensor) -> list[Tensor | None]:
    """Vector-Jacobian products: that in y, and those in theta in its order; ``None`` where not asked for."""
    layer, problem = ctx.layer, ctx.problem
    if not all_finite(cotangent):
        bad = torch.nonzero(~torch.isfinite(cotangent).flatten(1).all(1)).flatten().tolist()
        raise ValueError(
            "Expected a finite cotangent, the gradient of the loss in the reconstruction. Got NaN or inf in samples "
            f"{bad} of it."
        )
    started, before = time.perf_counter(), problem.cost.copy()
    in_y, *in_theta = ctx.needs_input_grad[2:]
    q, result = layer._adjoint(problem, x, cotangent, any(in_theta))
    gradients = [problem.data.apply(q) if in_y else None]
    for name, wanted in zip(problem.theta, in_theta, strict=True):
        gradients.append(len(q) * result.grad[name] if wanted else None)  # from the mean over the batch to the sum
    layer._complete(ctx.certificate, result, problem.cost - before + Cost(seconds=time.perf_counter() - started))
    return gradients


class _Once(torch.autograd.Function):
    """A gradient, tied to all that it depends on, so that a second derivative raises instead of being left out."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *cotangents: Tensor) -> None:
        raise RuntimeError(
            "Expected one derivative of BilevelReconstructor, which is only once differentiable. Got a second one "
            "(create_graph=True and a derivative of the gradient)."
        )
