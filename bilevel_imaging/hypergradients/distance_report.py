"""How far is a point from the minimizer? Every certificate of ||x - x*|| for an x from anywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_imaging import certificates
from bilevel_imaging.certificates import distances
from bilevel_imaging.derivatives import Linearization
from bilevel_imaging.energies.problem import LowerLevelProblem
from bilevel_imaging.hypergradients.evaluation import ENERGY_SLACK
from bilevel_imaging.hypergradients.point import dual_norm
from bilevel_imaging.linear_solvers import ConjugateGradient, LinearSolver
from bilevel_imaging.tensors import inner, norm

DISTANCE_CERTIFICATES = ("gradient", "metric", "newton", "kantorovich", "local", "smallest")
# the Newton system is first solved to FIRST_RESIDUAL ||G||, then until ||r|| / mu is this share of ||s||
FIRST_RESIDUAL, RESIDUAL_SHARE = 1e-2, 1e-2


@torch.no_grad()
def distance_certificates(
    problem: LowerLevelProblem, x: Tensor, *, linear: LinearSolver | None = None
) -> dict[str, Tensor]:
    """Certified bounds of ||x_i - x_i*||, by name, for any x; each ``(B,)`` float64, inf where it does not apply.

    - "gradient": G / mu (Nesterov 2018, Section 2.1.3);
    - "metric": ||G||_{M^-1} / sqrt(lambda_min(M)) with M below every Hessian, where the problem has one;
    - "newton": ||s|| + (one of the above at x + s) for an inexact Newton step s;
    - "kantorovich": see ``certificates.distances.kantorovich``; needs L_H, and x near x*;
    - "local": from the norm of the Hessian, for self-concordant energies; needs x near x*;
    - "smallest": of all these.

    Everything is evaluated in float64 where the problem can be, and rounding is part of every bound. The cost is two
    gradients and the Hessian products of one linear solve.

    Args:
        problem: a batch of B lower-level problems.
        x: the points, ``(B, *image)``; in float32 the numbers that are stored are meant.
        linear: solver of the Newton system; ``None`` for conjugate gradients.

    Raises:
        ValueError: x of another shape than the problem's, or x or a parameter not finite.
    """
    if x.shape != problem.shape:
        raise ValueError(f"Expected x of the problem's shape {tuple(problem.shape)}. Got {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError("Expected a finite x. Got NaN or inf.")
    if found := problem.not_finite():
        raise ValueError(f"Expected finite parameters. Got {found}.")
    exact = problem.double()
    exact = problem if exact is None else exact
    at = _Gradient.at(exact, x.detach().to(exact.dtype))
    unknown = at.norm.new_full(at.norm.shape, torch.inf)
    result = dict.fromkeys(DISTANCE_CERTIFICATES, unknown)
    if at.linearization.constants.strong_convexity is not None:
        step = _NewtonStep.solve(at, linear or ConjugateGradient(preconditioner="auto"))
        result |= {
            "gradient": at.by_norm,
            "metric": at.by_metric,
            "newton": step.norm + _Gradient.at(exact, at.x + step.s).distance,
            "kantorovich": _kantorovich(at, step),
            "local": _local(at, step),
        }
    stacked = torch.stack(list(result.values())).nan_to_num(nan=torch.inf, posinf=torch.inf)
    result = dict(zip(result, stacked, strict=True))
    return {**result, "smallest": stacked.amin(0)}


@dataclass(frozen=True)
class _Gradient:
    """The gradient at a point, with what it says of the distance by itself.

    Attributes:
        problem, x: where.
        linearization: at x.
        norm: ||G|| as measured, ``(B,)`` float64.
        rounding: bound of the error of G, ``(B,)`` float64.
    """

    problem: LowerLevelProblem
    x: Tensor
    linearization: Linearization
    norm: Tensor
    rounding: Tensor

    @classmethod
    def at(cls, problem: LowerLevelProblem, x: Tensor) -> _Gradient:
        linearization = problem.linearize(x)
        rounding = problem.gradient_rounding(x).double()
        return cls(problem, x, linearization, norm(linearization.grad).double(), rounding)

    @property
    def strong_convexity(self) -> Tensor:
        return self.linearization.constants.strong_convexity.double()

    @property
    def by_norm(self) -> Tensor:
        return certificates.distance(self.norm + self.rounding, self.strong_convexity)

    @property
    def by_metric(self) -> Tensor:
        metric = self.problem.metric()
        if metric is None:
            return torch.full_like(self.norm, torch.inf)
        root = metric.lowest.double().sqrt()
        return (self.dual_norm(self.linearization.grad) + self.rounding / root) / root

    @property
    def distance(self) -> Tensor:
        return torch.minimum(self.by_norm, self.by_metric)

    def dual_norm(self, v: Tensor) -> Tensor:
        """Bound of ||v||_{H^-1} without a solve, ``(B,)`` float64."""
        metric = self.problem.metric()
        return dual_norm(norm(v).double(), self.strong_convexity, metric, lambda: metric.squared_norm(v).sqrt())


@dataclass(frozen=True)
class _NewtonStep:
    """An inexact Newton step s and its residual r = -G - H s; ``(B,)`` float64.

    Attributes:
        s: ``(B, *image)``.
        norm: ||s||.
        residual_dual_norm: ||r||_{H^-1} with rounding of G and of H s.
        dual_gradient_norm: ||G||_{H^-1} likewise.
    """

    s: Tensor
    norm: Tensor
    residual_dual_norm: Tensor
    dual_gradient_norm: Tensor

    @classmethod
    def solve(cls, at: _Gradient, linear: LinearSolver) -> _NewtonStep:
        rhs, mu = -at.linearization.grad, at.strong_convexity
        tol = FIRST_RESIDUAL * at.norm
        solution = linear.solve(at.linearization, rhs, tol.to(rhs.dtype))
        wanted = RESIDUAL_SHARE * mu * norm(solution.q).double()
        if bool((wanted < tol).any()):
            tol = torch.minimum(wanted, tol)
            solution = linear.resume(at.linearization, rhs, solution, tol.to(rhs.dtype))
        s, s_norm = solution.q, norm(solution.q).double()
        product = at.linearization.hvp(s)
        r = rhs - product
        smoothness = at.linearization.constants.smoothness
        size = 10 * norm(product).double() if smoothness is None else smoothness.double() * s_norm
        unit = 8 * torch.finfo(s.dtype).eps
        rounding = unit * size + unit * at.norm + at.rounding
        dual = at.dual_norm(r)
        if solution.energy_norm is not None and solution.residual is not None:
            known = solution.energy_norm.double() * (1 + ENERGY_SLACK) + at.dual_norm(r - solution.residual)
            dual = torch.minimum(dual, known)
        dual = dual + rounding / mu.sqrt()
        # the exact identity holds for the exact G and r: each is off by at most its rounding
        decrement = inner(s, rhs).double() + at.rounding * s_norm
        crossed = inner(s, r).double() + rounding * s_norm
        gradient = distances.dual_gradient_norm(decrement, crossed, dual) * (1 + 1e-10)
        return cls(s, s_norm, dual, gradient)


def _kantorovich(at: _Gradient, step: _NewtonStep) -> Tensor:
    mu, constants = at.strong_convexity, at.linearization.constants
    residual = mu.sqrt() * step.residual_dual_norm
    radius = distances.kantorovich_radius(step.norm, residual, mu) * (1 + 1e-6)
    ball = at.linearization.constants_on_ball(radius.to(at.x.dtype))
    lipschitz = (constants if ball is None else ball).hessian_lipschitz
    if lipschitz is None:
        return torch.full_like(mu, torch.inf)
    return distances.kantorovich(step.norm, residual, mu, lipschitz.double())


def _local(at: _Gradient, step: _NewtonStep) -> Tensor:
    mu = at.strong_convexity
    dual = torch.minimum(step.dual_gradient_norm, at.dual_norm(at.linearization.grad) + at.rounding / mu.sqrt())
    radius = (certificates.TRIAL_FACTOR * dual).clamp(min=1e-150)
    curvature = at.linearization.relative_curvature(radius, mu)
    if curvature is None:
        return torch.full_like(mu, torch.inf)
    energy = certificates.energy_distance(dual, curvature.double())
    return distances.local_distance(energy, curvature.double(), step.norm, step.residual_dual_norm, mu)
