"""Every certificate against the true error, and the pure functions against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from cases import (
    CERTIFIED_REGULARIZERS,
    LINEAR_SOLVERS,
    LOWER_SOLVERS,
    Reference,
    build,
    mostly_slow,
    product,
    reference,
)
from sweep import endings, flat, summarize, sweep
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging import certificates
from bilevel_imaging.certificates import Measurements
from bilevel_imaging.hypergradients import loss_interval
from bilevel_imaging.tensors import norm

F64 = torch.float64
certified_pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(user=False)))
STAGES = ((1.0, 1.0), (1e-2, 1e-1), (1e-4, 1e-6), (1e-8, 1e-8))


# --- the randomized sweep


def test_sweep_finds_no_violation():
    outcomes = sweep(16, seed=11)
    assert [(o.violations, o.setting) for o in outcomes if o.violations] == []
    assert sum(o.checks for o in outcomes) > 200
    assert {"classical", "directional", "metric"} <= set(summarize(outcomes)["tv_isotropic"])


def test_a_relative_goal_is_reached_or_the_reason_is_given_in_words():
    outcomes = sweep(12, seed=1, relative=0.1)  # a thousand: python tests/sweep.py --relative 0.1 --cases 1000
    assert [(o.violations, o.setting) for o in outcomes if o.violations] == []
    ends = endings(outcomes)
    assert sum(ends.values()) == 12 and ends[""] >= 8 and len(ends) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [100, 500, 900])
def test_long_sweep_finds_no_violation(seed):
    outcomes = sweep(50, seed=seed)  # thousands: python tests/sweep.py --cases 2000
    assert [(o.violations, o.setting) for o in outcomes if o.violations] == []


# --- every pair of models and operators, every certificate


@certified_pairs
def test_every_certificate_holds_at_every_accuracy(regularizer, physics):
    case = build(regularizer, physics, channels=1, size=(6, 7), weight=0.3)
    true, slack, loss, loss_slack, samples = reference(case)
    for error_tol, residual_tol in STAGES:
        accuracy = {"error_tol": error_tol, "residual_tol": residual_tol}
        found = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **accuracy)
        for certificate in bi.hypergradients.CERTIFICATES:
            if certificate == "metric" and case.problem.metric() is None:
                continue
            # all certificates of the same two solutions: nothing is left to be solved
            again = {**accuracy, "x0": found.x, "q0": found.q, "certificate": certificate}
            h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **again)
            errors = np.abs((flat(h.grad) - true).astype(float))
            assert h.certified or (certificate == "local" and "too far" in h.reason)
            assert np.linalg.norm(errors) <= h.bound + slack
            assert all(np.linalg.norm(errors) <= bound + slack for bound in h.bounds.values())
            if h.component_bounds is not None:
                assert (errors <= flat(h.component_bounds).astype(float) + slack).all()
            assert h.loss_interval[0] - loss_slack <= loss <= h.loss_interval[1] + loss_slack
            assert sum(h.terms.values()) == pytest.approx(h.bound, rel=1e-12)
            assert set(h.terms) == {"lower", "linear", "remainder", "rounding"}
            assert all(term >= 0 for term in h.terms.values())
            assert h.bound <= float(h.sample_bounds.mean()) * (1 + 1e-12)
            for i, sample in enumerate(samples):
                moved = (h.x[i].numpy().ravel() - sample.x).astype(float)
                assert np.linalg.norm(moved) <= float(h.lower.distance_bound[i]) + sample.x_uncertainty
    assert h.relative_bound < 1e-3 or physics.startswith("blur_fft")


@pytest.mark.parametrize(("lower", "linear"), mostly_slow(itertools.product(LOWER_SOLVERS, LINEAR_SOLVERS)))
@pytest.mark.parametrize("regularizer", ["tv_isotropic", "tikhonov_gradient"])
def test_certificates_hold_for_every_pair_of_solvers_cut_off_anywhere(lower, linear, regularizer):
    case = build(regularizer, "blur_circular", size=(6, 6), weight=0.3)
    true, slack, loss, loss_slack, _ = reference(case)
    bounds = []
    for iterations in (0, 1, 3, 10, 1000):
        h = bi.hypergradient(
            case.problem, bi.SquaredError(), case.x_true,
            lower=LOWER_SOLVERS[lower](max_iter=iterations), linear=LINEAR_SOLVERS[linear](max_iter=iterations),
            error_tol=1e-7, residual_tol=1e-7,
        )  # fmt: skip
        assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= h.bound + slack
        assert h.loss_interval[0] - loss_slack <= loss <= h.loss_interval[1] + loss_slack
        bounds.append(h.bound)
    assert bounds[-1] < 1e-3 * bounds[0]


@pytest.mark.parametrize("regularizer", CERTIFIED_REGULARIZERS)
def test_loss_intervals_with_any_adjoint(regularizer):
    case = build(regularizer, "denoising", size=(6, 6), batch=3)
    samples = [Reference(case, i) for i in range(3)]
    generator = torch.Generator().manual_seed(0)
    exact = torch.stack([torch.from_numpy(s.x.astype(float)).reshape(case.x_true.shape[1:]) for s in samples])
    adjoint = torch.stack([torch.from_numpy(s.q.astype(float)).reshape(case.x_true.shape[1:]) for s in samples])
    for size in (0.0, 1e-6, 1e-3, 0.1):
        noise = size * torch.randn(exact.shape, dtype=F64, generator=generator)
        widths = []
        for q in (None, torch.zeros_like(adjoint), adjoint, adjoint + 0.1 * noise, 5 * adjoint, 10 * noise):
            value, low, high = loss_interval(case.problem, bi.SquaredError(), case.x_true, exact + noise, q)
            for i, sample in enumerate(samples):
                assert low[i] - sample.loss_uncertainty <= sample.loss <= high[i] + sample.loss_uncertainty
                assert low[i] <= value[i] <= high[i]
            widths.append(float((high - low).mean()))
        if size == 1e-6:  # the corrected value is second order, the plain one first
            assert widths[2] < 0.2 * widths[0]


# --- the pure functions on the first experiment of the paper


def paper_problem() -> tuple[bi.QuadraticProblem, Tensor, Tensor]:
    """min ||C theta + D x - e||^2 below, ||A x - b||^2 above, with the random numbers of the paper."""
    rng = np.random.RandomState(0)
    rows, n = 1000, 10
    A = rng.rand(rows, n)
    b = A @ rng.rand(n) + 0.01 * rng.randn(rows)
    C, D = rng.rand(rows, n), rng.rand(rows, n)
    e = C @ rng.rand(n) + D @ rng.rand(n) + 0.01 * rng.randn(rows)
    assert A[0, 0] == pytest.approx(0.5488135039) and b[0] == pytest.approx(2.4831349925)
    assert e[0] == pytest.approx(6.0998427739)
    A, b, C, D, e = (torch.from_numpy(a) for a in (A, b, C, D, e))
    theta = torch.ones(n, dtype=F64, requires_grad=True)
    problem = bi.QuadraticProblem((2 * D.T @ D)[None], (2 * D.T @ e)[None], (2 * D.T @ C)[None], theta)
    return problem, A, b


class LeastSquares:
    """f(x) = ||A x - b||^2."""

    convex = True

    def __init__(self, A: Tensor, b: Tensor):
        self.A, self.b = A, b
        self.smoothness = float(2 * torch.linalg.matrix_norm(A, ord=2) ** 2) * (1 + 1e-12)

    def __call__(self, x: Tensor, x_true: Tensor) -> Tensor:
        return (x @ self.A.T - self.b).square().sum(1)

    def grad(self, x: Tensor, x_true: Tensor) -> Tensor:
        return 2 * (x @ self.A.T - self.b) @ self.A


def test_reference_numbers_of_the_quadratic_problem():
    problem, A, b = paper_problem()
    constants, loss = problem.constants(), LeastSquares(A, b)
    assert float(constants.smoothness) == pytest.approx(5108.127832, rel=1e-9)
    assert float(constants.strong_convexity) == pytest.approx(145.602732, rel=1e-8)
    assert loss.smoothness == pytest.approx(5100.0924, rel=1e-8)
    assert float(constants.mixed_norm) == pytest.approx(4964.883491, rel=1e-9)
    assert float(constants.hessian_lipschitz) == float(constants.mixed_lipschitz) == 0
    x = problem.minimizer()
    assert float(x.norm()) == pytest.approx(0.90649040, rel=1e-7)
    zeros = torch.zeros_like(x)
    assert float(loss(x, zeros)) == pytest.approx(3109.26038718, rel=1e-10)
    assert float(loss.grad(x, zeros).norm()) == pytest.approx(5452.99254665, rel=1e-10)
    h = bi.hypergradient(problem, loss, zeros, error_tol=1e-10, residual_tol=1e-7)
    assert h.norm == pytest.approx(5322.44724438, rel=1e-10)
    assert h.loss == pytest.approx(3109.26038718, rel=1e-10)


def test_classical_and_directional_bounds_by_hand():
    problem, A, b = paper_problem()
    loss = LeastSquares(A, b)
    # theory 3: ||h - grad F|| <= ||J||/mu R + L_f ||J|| / mu eps for a quadratic, both certificates alike
    generator = torch.Generator().manual_seed(0)
    H, J = problem.hessian[0], problem.mixed[0]
    x_star = problem.minimizer()[0]
    q_star = torch.linalg.solve(H, loss.grad(x_star[None], x_star[None])[0])
    exact = -J.T @ q_star
    for size in (1e-8, 1e-3, 1.0):
        x = x_star + size * torch.randn(10, dtype=F64, generator=generator)
        q = q_star + size * torch.randn(10, dtype=F64, generator=generator)
        gradient = H @ (x - x_star)
        residual = loss.grad(x[None], x[None])[0] - H @ q
        mu, J_norm = 145.602732, 4964.883491
        m = Measurements(
            distance=certificates.distance(gradient.norm(), torch.tensor(mu, dtype=F64))[None],
            residual_norm=residual.norm()[None],
            strong_convexity=torch.tensor([mu], dtype=F64),
            mixed_norm=torch.tensor([J_norm], dtype=F64),
            mixed_lipschitz=torch.zeros(1, dtype=F64),
            loss_smoothness=torch.tensor([5100.0924], dtype=F64),
        )
        zero = torch.zeros(1, dtype=F64)
        classical = certificates.classical(m, loss.grad(x[None], x[None]).norm()[None], zero)
        by_hand = J_norm * float(residual.norm()) / mu + 5100.0924 * J_norm / mu * float(gradient.norm()) / mu
        assert float(classical.total) == pytest.approx(by_hand, rel=1e-12)
        assert float(certificates.directional(m, zero, zero).total) == pytest.approx(by_hand, rel=1e-12)
        assert float((-J.T @ q - exact).norm()) <= by_hand
        interval = certificates.corrected_value_interval(
            loss(x[None], x[None]) - q @ gradient, m.distance, m.residual_norm, m.loss_smoothness, zero, True
        )
        true = float(loss(x_star[None], x_star[None]))
        assert float(interval[0]) - 1e-9 * true <= true <= float(interval[1]) + 1e-9 * true


def test_all_terms_of_the_bounds_by_hand():
    one = torch.ones(1, dtype=F64)
    m = Measurements(
        distance=0.1 * one, residual_norm=0.2 * one, strong_convexity=0.5 * one, mixed_norm=3 * one,
        mixed_lipschitz=4 * one, loss_smoothness=2 * one,
    )  # fmt: skip
    c = certificates.classical(m, 7 * one, 5 * one)
    assert float(c.linear) == pytest.approx(3 * 0.2 / 0.5)
    assert float(c.lower) == pytest.approx((2 * 3 / 0.5 + 4 * 7 / 0.5 + 5 * 7 * 3 / 0.25) * 0.1)
    assert float(c.remainder) == pytest.approx(4 * 2 / 0.5 * 0.01)
    d = certificates.directional(m, 6 * one, 1.5 * one)
    rho = (0.2 + (2 + 6) * 0.1) / 0.5
    assert float(d.total) == pytest.approx((3 + 4 * 0.1) * rho + 1.5 * 0.1)
    # in the metric M = mu I the metric bound is the directional one
    root = math.sqrt(0.5)
    e = certificates.metric(m, 0.1 * root * one, 0.2 / root * one, 3 / root * one, 0.5 * one, 6 * one, 1.5 * one)
    assert float(e.total) == pytest.approx(float(d.total))
    low, high = certificates.corrected_value_interval(10 * one, 0.1 * one, 0.2 * one, 2 * one, 6 * one, False)
    assert float(high) - 10 == pytest.approx(0.5 * 8 * 0.01 + 0.02) and float(low) + float(high) == pytest.approx(20)
    low, _ = certificates.corrected_value_interval(10 * one, 0.1 * one, 0.2 * one, 2 * one, 6 * one, True)
    assert 10 - float(low) == pytest.approx(0.5 * 6 * 0.01 + 0.02)


@pytest.mark.parametrize("m_scale", [1e-3, 24.0])
@pytest.mark.parametrize("c_scale", [1e-4, 50.0])
def test_bounds_scale_as_the_problem_does(m_scale, c_scale):
    """Scaling the energy by m changes neither h nor its bound; scaling the loss by c scales both by c."""

    class Scaled(LeastSquares):
        def __init__(self, inside: LeastSquares):
            self.inside, self.smoothness = inside, c_scale * inside.smoothness

        def __call__(self, x, x_true):
            return c_scale * self.inside(x, x_true)

        def grad(self, x, x_true):
            return c_scale * self.inside.grad(x, x_true)

    problem, A, b = paper_problem()
    loss = LeastSquares(A, b)
    scaled = bi.QuadraticProblem(
        m_scale * problem.hessian, m_scale * problem.b, m_scale * problem.mixed, problem.theta["theta"]
    )
    zeros = torch.zeros(1, 10, dtype=F64)
    # solvers are exact here: the same number of iterations at any scale
    settings = {
        "lower": bi.lower_solvers.HeavyBall(max_iter=40),
        "linear": bi.linear_solvers.ConjugateGradient(max_iter=5),
    }
    h = bi.hypergradient(problem, loss, zeros, error_tol=0.0, residual_tol=0.0, **settings)
    s = bi.hypergradient(scaled, Scaled(loss), zeros, error_tol=0.0, residual_tol=0.0, **settings)
    assert np.allclose(flat(s.grad).astype(float), c_scale * flat(h.grad).astype(float), rtol=1e-9)
    assert s.bound == pytest.approx(c_scale * h.bound, rel=1e-6)
    assert s.loss_interval[1] == pytest.approx(c_scale * h.loss_interval[1], rel=1e-9)


# --- what a solver says by itself


@pytest.mark.parametrize("solver", LOWER_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["noisy", *(pytest.param(k, marks=pytest.mark.slow) for k in ("flat", "saturated"))])
def test_distance_bound_of_every_lower_solver(solver, dtype, kind):
    for regularizer, weight in (("tv_isotropic", 0.1), ("tikhonov_gradient", 1e-3), ("tikhonov_identity", 1e-3)):
        case = build(regularizer, "denoising", dtype=dtype, kind=kind, size=(6, 6), weight=weight)
        samples = [Reference(case, i) for i in range(2)]
        for error_tol, max_iter in ((1.0, 5), (1e-3, 200), (0.0, 300)):
            solution = LOWER_SOLVERS[solver]().solve(case.problem, None, error_tol, max_iter=max_iter)
            for i, sample in enumerate(samples):
                moved = (solution.x[i].double().numpy().ravel() - sample.x).astype(float)
                assert np.linalg.norm(moved) <= float(solution.distance_bound[i]) + sample.x_uncertainty
                if bool(solution.converged[i]):
                    assert float(solution.distance_bound[i]) <= error_tol * (1 + 1e-6)


def test_true_residual_of_float32_data():
    case = build("tv_isotropic", "denoising", dtype=torch.float32)
    h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, relative=1e-2)
    exact = case.problem.double()
    x = h.x.double()
    residual = norm(x - case.x_true.double() - exact.linearize(x).hvp(h.q.double()))
    # the x and q returned are rounded to float32; the residual of the pair itself can be larger by that much
    size = exact.constants().smoothness * norm(h.q.double()) + norm(x)
    assert bool((residual <= h.linear.residual_norm + 1e-6 * size).all())


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12])
def test_float32_bounds_scale_with_the_loss(factor):
    """A loss in other units: estimate, bound and interval are those of the old units, times the factor."""

    class Scaled(bi.SquaredError):
        smoothness = factor

        def __call__(self, x, x_true):
            return factor * super().__call__(x, x_true)

        def grad(self, x, x_true):
            return factor * super().grad(x, x_true)

    case = build("tv_isotropic", "denoising", size=(12, 12), weight=0.1, dtype=torch.float32)
    plain = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, error_tol=1e-3, residual_tol=1e-3)
    other = bi.hypergradient(case.problem, Scaled(), case.x_true, error_tol=1e-3, residual_tol=factor * 1e-3)
    assert plain.certified and plain.bound > 0
    assert other.bound / factor == pytest.approx(plain.bound, rel=1e-2)
