"""Every hypergradient method behind one bound: unrolled, frozen, truncated; and which of them are the same."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import Case, build, mostly_slow, reference
from sweep import flat
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging import linear_solvers, lower_solvers
from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.energies.problem import CountedLinearization
from bilevel_imaging.experiments import equivalence
from bilevel_imaging.experiments.equivalence import Workload
from bilevel_imaging.linear_solvers import AcceleratedGradient, JacobianFree, Neumann, Recycled
from bilevel_imaging.lower_solvers.accelerated_gradient import constant_schedule
from bilevel_imaging.tensors import norm, per_sample

F32, F64 = torch.float32, torch.float64
Nesterov = partial(AcceleratedGradient, momentum="constant")
SAME_METHOD = {
    "gradient_descent": linear_solvers.GradientDescent,
    "heavy_ball": linear_solvers.HeavyBall,
    "accelerated_gradient": AcceleratedGradient,
    "nesterov": Nesterov,
}
SCHEDULES = {
    "gradient_descent": lower_solvers.GradientDescent.schedule,
    "heavy_ball": lower_solvers.HeavyBall.schedule,
    "accelerated_gradient": lower_solvers.AcceleratedGradient.schedule,
    "nesterov": constant_schedule,
}
PROBLEMS = [
    ("tv_isotropic", "denoising"),
    ("tv_anisotropic", "inpainting"),
    ("tv_coupled", "blur_circular"),
    ("tikhonov_gradient", "blur_fft"),
    ("quadratic", ""),
]
methods = pytest.mark.parametrize("method", SAME_METHOD)
problems = pytest.mark.parametrize(("regularizer", "physics"), PROBLEMS)


def make(regularizer: str, physics: str, **settings) -> Case | SimpleNamespace:
    """One of the cases, or a batch of random quadratic problems with everything that the tests use of a case."""
    if regularizer != "quadratic":
        return build(regularizer, physics, size=(6, 7), **settings)
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(3, 9, 9, generator=generator, dtype=F64)).Q
    spectrum = torch.stack([torch.logspace(0, decades, 9, dtype=F64) for decades in (0.5, 1.0, 2.0)])
    hessian = basis @ torch.diag_embed(spectrum) @ basis.transpose(1, 2)
    drawn = [torch.randn(shape, generator=generator, dtype=F64) for shape in ((3, 9), (3, 9, 4), (4,), (3, 9))]
    b, mixed, theta, x_true = drawn
    problem = bi.QuadraticProblem((hessian + hessian.transpose(1, 2)) / 2, b, mixed, theta.requires_grad_())
    return SimpleNamespace(problem=problem, x_true=x_true)


def distance(a, b) -> float:
    """||a - b|| / ||b|| of two hypergradients."""
    a, b = (flat(v).astype(float) for v in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def arguments(case: Case) -> tuple:
    return case.problem, bi.SquaredError(), case.x_true


# --- the equivalence theorem


@problems
@methods
@pytest.mark.parametrize(("steps", "adjoint_steps"), [(1, 1), (2, 2), (3, 3), (17, 17), (60, 60), (9, 31), (31, 9)])
def test_inexact_differentiation_is_the_linear_solver(regularizer, physics, method, steps, adjoint_steps):
    case = make(regularizer, physics)
    h = bi.inexact_ad(*arguments(case), method=method, steps=steps, adjoint_steps=adjoint_steps)
    linearization = case.problem.linearize(h.x)
    solution = SAME_METHOD[method](max_iter=adjoint_steps).solve(linearization, h.x - case.x_true, 0.0)
    batch = len(h.x)
    at_the_floor = solution.residual_norm <= 1e-14 * norm(h.x - case.x_true)
    assert ((solution.iterations == adjoint_steps) | at_the_floor).all()
    expected = {name: -product / batch for name, product in linearization.mixed_vjp(solution.q).items()}
    assert distance(h.grad, expected) <= 1e-10
    assert (norm(h.q - solution.q) <= 1e-10 * norm(solution.q)).all()


@methods
def test_the_equivalence_test_can_fail(method):
    """One iteration more, another method, or derivatives that are not frozen: all far from the linear solver."""
    case = make("tv_isotropic", "denoising")
    h = bi.inexact_ad(*arguments(case), method=method, steps=9)
    assert distance(bi.inexact_ad(*arguments(case), method=method, steps=9, adjoint_steps=10).grad, h.grad) > 1e-4
    assert distance(bi.unrolled(*arguments(case), method=method, steps=9).grad, h.grad) > 1e-4
    linearization = case.problem.linearize(h.x)
    for other in set(SAME_METHOD) - {method}:
        q = SAME_METHOD[other](max_iter=9).solve(linearization, h.x - case.x_true, 0.0).q
        assert (norm(q - h.q) > 1e-4 * norm(h.q)).all()


def test_one_frozen_gradient_step_is_jacobian_free():
    case = make("tv_isotropic", "denoising")
    L, mu = case.problem.constants().smoothness[0], case.problem.constants().strong_convexity[0]
    linear = JacobianFree(step=float(2 / (L + mu)))
    frozen = bi.inexact_ad(*arguments(case), method="gradient_descent", steps=1)
    h = bi.hypergradient(
        *arguments(case), lower=lower_solvers.HeavyBall(max_iter=0), linear=linear, x0=frozen.x, error_tol=0.0
    )
    assert distance(h.grad, frozen.grad) <= 1e-12


# --- unrolling against automatic differentiation


def through_autograd(case: Case, method: str, steps: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same derivative recorded by autograd from the published iteration."""
    problem = case.problem
    constants = problem.constants()
    mu, L = constants.strong_convexity.detach(), constants.smoothness.detach()
    x = previous = problem.initial().detach()
    for k in range(steps):
        step, momentum = (per_sample(torch.as_tensor(a).expand(len(x)), x) for a in SCHEDULES[method](mu, L, k))
        ahead = x + momentum * (x - previous)
        at = ahead if method in ("nesterov", "accelerated_gradient") else x
        x, previous = ahead - step * problem.grad(at), x
    loss = 0.5 * (x - case.x_true).square().flatten(1).sum(1).mean()
    return dict(zip(problem.theta, torch.autograd.grad(loss, list(problem.theta.values())), strict=True)), x


@problems
@methods
def test_unrolling_is_automatic_differentiation(regularizer, physics, method):
    case = make(regularizer, physics)
    for steps in (1, 2, 3, 20):
        expected, x = through_autograd(case, method, steps)
        h = bi.unrolled(*arguments(case), method=method, steps=steps)
        assert distance(h.grad, expected) <= 1e-10
        torch.testing.assert_close(h.x, x.detach(), rtol=1e-12, atol=1e-12)
        assert not any(g.requires_grad for g in h.grad.values()) and not h.x.requires_grad
        assert h.loss == pytest.approx(0.5 * float((h.x - case.x_true).square().sum()) / len(x))
        if regularizer == "quadratic":  # H and J do not depend on x
            assert distance(bi.inexact_ad(*arguments(case), method=method, steps=steps).grad, h.grad) <= 1e-10


@methods
@pytest.mark.parametrize("segment", [1, 6, 7, 19, 20, 100])
def test_checkpointed_is_plain(method, segment):
    case = make("tv_isotropic", "denoising")
    kept = bi.unrolled(*arguments(case), method=method, steps=20)
    recomputed = bi.unrolled(*arguments(case), method=method, steps=20, segment=segment)
    assert all(torch.equal(kept.grad[n], recomputed.grad[n]) for n in kept.grad)
    assert torch.equal(kept.q, recomputed.q)
    batch, last = len(kept.x), 20 - segment * (19 // segment)
    assert (kept.cost.gradients, kept.cost.hvps, kept.cost.mixed_products) == (40 * batch, 20 * batch, 20 * batch)
    assert recomputed.cost.gradients == (60 - last) * batch


@methods
def test_checkpoints_spare_memory(method, monkeypatch):
    case = make("tv_isotropic", "denoising")
    points, most, inside = [], [0], case.problem._grad

    def spy(x: Tensor) -> Tensor:
        points.append(weakref.ref(x))
        most[0] = max(most[0], sum(p() is not None for p in points))
        return inside(x)

    monkeypatch.setattr(case.problem, "_grad", spy)
    bi.unrolled(*arguments(case), method=method, steps=64)
    assert most[0] == 64
    points.clear()
    most[0] = 0
    bi.unrolled(*arguments(case), method=method, steps=64, segment=8)
    assert most[0] <= 2 * (64 // 8) + 2 * 8 + 4, "two images for every segment, the points of two segments"


def test_costs_of_inexact_differentiation():
    case = make("tv_isotropic", "denoising")
    before = case.problem.cost.copy()
    h = bi.inexact_ad(*arguments(case), steps=9, adjoint_steps=4)
    batch = len(h.x)
    assert (h.cost.gradients, h.cost.hvps, h.cost.mixed_products) == (10 * batch, 4 * batch, 4 * batch)
    assert h.cost.hvps == (case.problem.cost - before).hvps and h.cost.seconds > 0


@methods
def test_sweeps_of_a_batch_are_those_of_its_samples(method):
    case = build("tv_isotropic", "inpainting", batch=3, size=(6, 7))
    for estimator in (bi.unrolled, bi.inexact_ad):
        whole = estimator(*arguments(case), method=method, steps=9, certify=True)
        alone = []
        for i in range(3):
            problem = case.energy.bind(case.y[i : i + 1], case.physics)
            alone.append(
                estimator(problem, bi.SquaredError(), case.x_true[i : i + 1], method=method, steps=9, certify=True)
            )
        assert torch.equal(whole.q, torch.cat([h.q for h in alone]))
        mean = {n: sum(h.grad[n] for h in alone) / 3 for n in whole.grad}
        assert distance(whole.grad, mean) <= 1e-12
        assert whole.bound <= sum(h.bound for h in alone) / 3 * (1 + 1e-9)


# --- one bound for all


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(p for p in PROBLEMS if p[0] != "quadratic"))
def test_bounds_hold_for_every_sweep(regularizer, physics, dtype):
    case = make(regularizer, physics, dtype=dtype, weight=0.3)
    true, slack, *_ = reference(case)
    for method in SAME_METHOD:
        found = {}
        for steps in (1, 4, 20, 150):
            for estimator in (bi.unrolled, bi.inexact_ad):
                h = estimator(*arguments(case), method=method, steps=steps, certify=True)
                error = float(np.linalg.norm((flat(h.grad) - true).astype(float)))
                assert error <= h.bound + slack and math.isfinite(h.bound)
                assert h.certified and h.reason == "" and h.certificate in bi.hypergradients.CERTIFICATES
                found[estimator, steps] = h.bound / h.norm
        assert found[bi.unrolled, 150] < 1e-2 * found[bi.unrolled, 4]
        assert found[bi.inexact_ad, 150] < 1e-2 * found[bi.inexact_ad, 4]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(p for p in PROBLEMS if p[0] != "quadratic"))
def test_bounds_hold_for_cheap_adjoints(regularizer, physics, dtype):
    case = make(regularizer, physics, dtype=dtype)
    true, slack, *_ = reference(case)
    exact = bi.hypergradient(*arguments(case), error_tol=1e-6)
    step = 1.9 / float(case.problem.constants().smoothness.max())  # beyond 1 / L the bound holds all the same
    linear = [Neumann(1), Neumann(5), Neumann(200), Neumann(7, step=step), JacobianFree(), Recycled()]
    sizes = []
    for solver in linear:
        for q0 in (None, 0.9 * exact.q):
            for error_tol in (1e-1, 1e-6):
                h = bi.hypergradient(
                    *arguments(case), linear=solver, error_tol=error_tol, residual_tol=1e-3, q0=q0
                )  # fmt: skip
                assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= h.bound + slack
                assert h.certified and math.isfinite(h.bound)
        sizes.append(h.bound)
    assert sizes[2] < sizes[1] < sizes[0], "more terms, smaller bounds"


@methods
@pytest.mark.parametrize("estimator", [bi.unrolled, bi.inexact_ad])
def test_the_bound_is_that_of_the_recycled_adjoint_plus_the_distance(estimator, method):
    case = make("tv_isotropic", "denoising", batch=1)
    h = estimator(*arguments(case), method=method, steps=20, certify=True)
    implicit = bi.hypergradient(
        *arguments(case), lower=lower_solvers.HeavyBall(max_iter=0), linear=Recycled(), error_tol=0.0, x0=h.x, q0=h.q
    )  # fmt: skip
    moved = float(np.linalg.norm((flat(h.grad) - flat(implicit.grad)).astype(float)))
    assert h.bound == pytest.approx(moved + min(implicit.bounds.values()), rel=1e-9)
    if estimator is bi.inexact_ad:
        assert moved <= 1e-12 * h.norm
    else:
        assert moved > 1e-6 * h.norm


@methods
def test_quadratics_are_certified(method):
    case = make("quadratic", "")
    adjoint = torch.linalg.solve(case.problem.hessian, case.problem.minimizer() - case.x_true)
    true = -torch.einsum("bdn,bd->n", case.problem.mixed, adjoint) / 3
    for steps in (1, 10, 100):
        for estimator in (bi.unrolled, bi.inexact_ad):
            h = estimator(*arguments(case), method=method, steps=steps, certify=True)
            assert h.certified and float((h.grad["theta"] - true).norm()) <= h.bound


def test_what_can_not_be_certified_says_so():
    case = make("tv_isotropic", "denoising")
    for estimator in (bi.unrolled, bi.inexact_ad):
        h = estimator(*arguments(case), steps=4)
        assert not h.certified and math.isinf(h.bound) and h.certificate == "none"
        assert h.reason.startswith("not certified") and "4" in h.reason
        plain = estimator(
            case.problem, lambda x, t: 0.5 * (x - t).square().flatten(1).sum(1), case.x_true, steps=4, certify=True
        )
        assert not plain.certified and "smoothness" in plain.reason and math.isinf(plain.bound)
        assert distance(plain.grad, h.grad) <= 1e-12


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method": "newton"}, "method"),
        ({"steps": 0}, "steps"),
        ({"x0": torch.zeros(1, 1, 2, 2)}, "x0"),
        ({"x0": torch.zeros(2, 1, 6, 7)}, "x0"),
    ],
)
def test_misuse(settings, match):
    case = make("tv_isotropic", "denoising")
    for estimator in (bi.unrolled, bi.inexact_ad):
        with pytest.raises(ValueError, match=match):
            estimator(*arguments(case), **settings)
        frozen = bi.VariationalEnergy(bi.TotalVariation(learn_weight=False, learn_smoothing=False))
        with pytest.raises(ValueError, match="parameter"):
            estimator(frozen.bind(case.y, case.physics), bi.SquaredError(), case.x_true)
        with pytest.raises(ValueError, match="constants"):
            user = build("user", "denoising")
            estimator(*arguments(user))
    with pytest.raises(ValueError, match="segment"):
        bi.unrolled(*arguments(case), segment=-1)
    with pytest.raises(ValueError, match="adjoint_steps"):
        bi.inexact_ad(*arguments(case), adjoint_steps=0)


# --- the new linear solvers


class Matrices(Linearization):
    """Hessians given as matrices ``(B, d, d)``."""

    def __init__(self, matrix: Tensor, constants: Constants):
        self.matrix, self.constants = matrix, constants
        self.grad = torch.zeros(matrix.shape[:2], dtype=matrix.dtype)

    def hvp(self, v: Tensor) -> Tensor:
        return torch.einsum("bij,bj->bi", self.matrix, v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {}


def system(kappa: float = 50.0, *, smoothness: bool = True, dtype=F64) -> tuple[CountedLinearization, Tensor]:
    """Three systems with eigenvalues spread over [1, kappa], and right-hand sides of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(3, 20, 20, generator=generator, dtype=F64)).Q
    spectrum = torch.logspace(0, math.log10(kappa), 20, dtype=F64)
    matrix = basis @ torch.diag_embed(spectrum.expand(3, 20)) @ basis.transpose(1, 2)
    rhs = torch.randn(3, 20, generator=generator, dtype=F64) * torch.tensor([1.0, 1e-12, 1e9], dtype=F64)[:, None]
    ones = torch.ones(3, dtype=dtype)
    constants = Constants(strong_convexity=ones, smoothness=kappa * ones if smoothness else None)
    matrix = ((matrix + matrix.transpose(1, 2)) / 2).to(dtype)
    return CountedLinearization(Matrices(matrix, constants), Cost()), rhs.to(dtype)


@pytest.mark.parametrize("momentum", ["varying", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_textbook_iterates(momentum, steps):
    linearization, rhs = system()
    schedule = SCHEDULES["nesterov" if momentum == "constant" else "accelerated_gradient"]
    q = previous = torch.zeros_like(rhs)
    for k in range(steps):
        step, beta = schedule(1.0, 50.0, k)
        ahead = q + beta * (q - previous)
        q, previous = ahead + step * (rhs - linearization.hvp(ahead)), q
    linearization.cost.hvps = 0
    solution = AcceleratedGradient(momentum=momentum).solve(linearization, rhs, 0.0, max_iter=steps)
    assert (norm(solution.q - q) <= 1e-13 * norm(q)).all() and linearization.cost.hvps == 3 * steps
    assert (norm(rhs - linearization.hvp(solution.q) - solution.residual) <= 1e-13 * norm(rhs)).all()


@pytest.mark.parametrize("kappa", [1.0, 3.0, 100.0, 1e4])
def test_residual_bounds_of_accelerated_gradients(kappa):
    """On single eigenvalues, so that every polynomial is seen; the bound of the constant momentum is attained at mu."""
    eigenvalues = torch.cat([torch.logspace(0, math.log10(kappa), 200, dtype=F64).clamp(max=kappa), torch.ones(1)])
    constants = Constants(torch.ones(201, dtype=F64), torch.full((201,), kappa, dtype=F64))
    one = Matrices(eigenvalues[:, None, None], constants)
    rhs, root = torch.ones(201, 1, dtype=F64), math.sqrt(1 / kappa)
    for steps in (1, 2, 5, 20, 100):
        residual = Nesterov(max_iter=steps).solve(one, rhs, 0.0).residual_norm
        bound = (1 + steps * root) * (1 - root) ** steps
        assert (residual <= bound * (1 + 1e-9) + 1e-14).all()
        if bound > 1e-10:
            assert float(residual[-1]) == pytest.approx(bound, rel=1e-6)
        residual = AcceleratedGradient(max_iter=steps).solve(one, rhs, 0.0).residual_norm
        bound = math.sqrt(kappa * min((1 + root) * (1 - root) ** steps, 4 / (steps + 1) ** 2))
        assert (residual <= bound * (1 + 1e-9) + 1e-14).all()


@pytest.mark.parametrize("solver", [AcceleratedGradient, Nesterov])
def test_accelerated_gradients_reach_tolerances(solver, monkeypatch):
    linearization, rhs = system(200.0)
    solution = solver().solve(linearization, rhs, 1e-9 * norm(rhs))
    assert solution.converged.all() and (norm(rhs - linearization.hvp(solution.q)) <= 1.01e-9 * norm(rhs)).all()
    unknown, _ = system(200.0, smoothness=False)
    assert solver().solve(unknown, rhs, 1e-9 * norm(rhs)).converged.all()
    guess = lambda operator, like: torch.full((like.shape[0],), 11.0, dtype=like.dtype)  # noqa: E731
    monkeypatch.setattr("bilevel_imaging.linear_solvers._stationary.estimate_smoothness", guess)
    assert solver().solve(unknown, rhs, 1e-9 * norm(rhs)).converged.all()
    coarse, b = system(20.0, dtype=F32)
    floor = solver().solve(coarse, b, 0.0)
    assert set(floor.reason) == {"stagnated"} and (floor.residual_norm <= 1e-5 * norm(b)).all()
    with pytest.raises(ValueError, match="momentum"):
        AcceleratedGradient(momentum="none")
    linearization.constants = linearization.inside.constants = Constants()
    with pytest.raises(ValueError, match="strong convexity"):
        solver().solve(linearization, rhs, 1e-6)


@pytest.mark.parametrize("terms", [1, 2, 9])
@pytest.mark.parametrize("step", [None, 0.013])
def test_neumann_series(terms, step):
    linearization, rhs = system()
    size = 1 / 50 if step is None else step
    powers, expected, term = torch.eye(20, dtype=F64) - size * linearization.matrix, torch.zeros_like(rhs), rhs
    for _ in range(terms):
        expected, term = expected + size * term, torch.einsum("bij,bj->bi", powers, term)
    solution = Neumann(terms, step=step).solve(linearization, rhs, 0.0)
    assert (norm(solution.q - expected) <= 1e-13 * norm(expected)).all()
    assert linearization.cost.hvps == 3 * terms and solution.iterations.tolist() == [terms] * 3
    # the residual is that of q, and is the next power
    torch.testing.assert_close(solution.residual_norm, norm(rhs - linearization.hvp(solution.q)))
    assert (norm(solution.residual - term) <= 1e-13 * norm(rhs)).all()
    if step is None:
        assert (solution.residual_norm <= (1 - 1 / 50) ** terms * norm(rhs)).all()
    # twice K terms are K terms from where K terms have led
    twice = Neumann(terms, step=step).solve(linearization, rhs, 0.0, q0=solution.q)
    assert (norm(twice.q - Neumann(2 * terms, step=step).solve(linearization, rhs, 0.0).q) <= 1e-12 * norm(rhs)).all()
    shorter = Neumann(9).solve(linearization, rhs, 0.0, max_iter=1)
    assert torch.equal(shorter.q, JacobianFree().solve(linearization, rhs, 0.0).q)


def test_jacobian_free_and_recycled():
    linearization, rhs = system()
    q0 = torch.linalg.solve(linearization.matrix, rhs)
    free = JacobianFree().solve(linearization, rhs, 0.0, q0=q0)
    assert torch.equal(free.q, rhs * (1 / 50)) and free.iterations.tolist() == [1] * 3
    assert linearization.cost.hvps == 3
    recycled = Recycled().solve(linearization, rhs, 1e-9 * norm(rhs), q0=q0)
    assert torch.equal(recycled.q, q0) and recycled.converged.all() and recycled.iterations.tolist() == [0] * 3
    assert linearization.cost.hvps == 6
    nothing = Recycled().solve(linearization, rhs, torch.tensor([1.0, 1.0, 1.0], dtype=F64))
    assert torch.equal(nothing.q, torch.zeros_like(rhs)) and linearization.cost.hvps == 6
    torch.testing.assert_close(nothing.residual_norm, norm(rhs))
    assert nothing.converged.tolist() == [False, True, False]
    assert nothing.reason == ("max_iter", "converged", "max_iter")


@pytest.mark.parametrize("solver", [Neumann(3), JacobianFree(), Recycled()])
def test_a_broken_sample_harms_nobody(solver):
    linearization, rhs = system()
    q0 = 0.01 * rhs
    whole = solver.solve(linearization, rhs, 0.0, q0=q0)
    broken = rhs.clone()
    broken[1, 4] = math.nan
    solution = solver.solve(linearization, broken, 0.0, q0=q0)
    assert solution.reason == ("max_iter", "not finite", "max_iter") and math.isinf(solution.residual_norm[1])
    assert torch.equal(solution.q[::2], whole.q[::2]) and solution.q.isfinite().all()
    with pytest.raises(ValueError, match="residual_tol"):
        solver.solve(linearization, rhs, -1.0)
    with pytest.raises(ValueError, match="rhs"):
        solver.solve(linearization, rhs[:2], 0.0)


def test_misuse_of_truncated_solvers():
    with pytest.raises(ValueError, match="terms"):
        Neumann(0)
    for make_solver in (partial(Neumann, 2), JacobianFree):
        with pytest.raises(ValueError, match="step"):
            make_solver(step=0.0)
        unknown, rhs = system(smoothness=False)
        with pytest.raises(ValueError, match="smoothness"):
            make_solver().solve(unknown, rhs, 0.0)
        assert make_solver(step=0.01).solve(unknown, rhs, 0.0).q.isfinite().all()


# --- the lower-level solver with constant momentum


def test_lower_solver_with_constant_momentum():
    case = make("tv_isotropic", "denoising", batch=1)
    problem = case.problem
    points, inside = [], problem._grad
    problem._grad = lambda x: (points.append(x.clone()), inside(x))[1]
    solution = lower_solvers.AcceleratedGradient(momentum="constant").solve(problem, None, 1e-9)
    problem._grad = inside
    assert solution.converged.all()
    x = previous = problem.initial()
    c = problem.constants()
    for point in points[:40]:
        step, momentum = constant_schedule(c.strong_convexity, c.smoothness, 0)
        ahead = x + per_sample(momentum, x) * (x - previous)
        torch.testing.assert_close(point, ahead, rtol=1e-11, atol=1e-12)
        x, previous = ahead - per_sample(step, x) * problem.grad(ahead), x
    exact = bi.lower_solvers.NewtonCG().solve(problem, None, 1e-13).x
    assert (norm(solution.x - exact) <= 1e-9).all()
    with pytest.raises(ValueError, match="momentum"):
        lower_solvers.AcceleratedGradient(momentum="none")


def test_restarts_drop_a_constant_momentum_too():
    """With mu far below the curvature met."""
    x = torch.tensor([[1.0, 1.0]], dtype=F64)
    theta = torch.zeros(1, dtype=F64, requires_grad=True)
    hessian = torch.diag(torch.tensor([0.05, 1.0], dtype=F64))[None]
    problem = bi.QuadraticProblem(hessian, torch.zeros_like(x), torch.ones(1, 2, 1, dtype=F64), theta)
    problem._constants = replace(problem.constants(), strong_convexity=torch.tensor([1e-6], dtype=F64))
    plain = lower_solvers.AcceleratedGradient(momentum="constant").solve(problem, x, 1e-3)
    restarted = lower_solvers.AcceleratedGradient(momentum="constant", restart=True).solve(problem, x, 1e-3)
    assert restarted.converged.all() and 3 * int(restarted.iterations) < int(plain.iterations)


def test_rate_of_constant_momentum():
    case = make("tv_isotropic", "denoising")
    c = case.problem.constants()
    exact = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-13).x
    lowest, start = case.problem.value(exact), case.problem.initial()
    root = (c.strong_convexity / c.smoothness).sqrt()
    first = case.problem.value(start) - lowest + c.strong_convexity / 2 * norm(start - exact) ** 2
    for steps in (1, 5, 20):
        h = bi.unrolled(*arguments(case), method="nesterov", steps=steps)
        assert (case.problem.value(h.x) - lowest <= (1 - root) ** steps * first + 1e-13).all()


# --- the experiment


def test_experiment():
    record = equivalence.run(Workload(images=1, size=16, smoothing=0.1), steps=6)
    assert record == json.loads(json.dumps(record)) and set(record["methods"]) == set(SAME_METHOD)
    for found in record["methods"].values():
        assert len(found["difference"]) == 6 and max(found["difference"]) <= 1e-13
        for estimate in equivalence.ESTIMATES:
            errors, bounds = found[estimate]["error"], found[estimate]["bound"]
            assert all(e <= b + record["reference_relative_bound"] for e, b in zip(errors, bounds, strict=True))
    assert "heavy ball" in equivalence.table(record)
    assert len(equivalence.figure(record).axes) == 2
