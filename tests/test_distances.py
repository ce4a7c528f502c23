"""Every certificate of the distance to the minimizer against the true distance, and what each gains over G / mu."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import (
    CERTIFIED_REGULARIZERS,
    KINKED_REGULARIZERS,
    LINEAR_SOLVERS,
    PHYSICS,
    build,
    mostly_slow,
    product,
    reference_of,
)
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.certificates import distances
from bilevel_imaging.hypergradients import DISTANCE_CERTIFICATES
from bilevel_imaging.linear_solvers import assemble_hessian

F32, F64 = torch.float32, torch.float64


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


# --- the pure functions


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e100])
def test_kantorovich_is_the_smaller_root(scale):
    for eta, lipschitz in ((0.1, 0.0), (0.1, 1e-14), (0.1, 0.3), (0.1, 1.0)):
        step, residual, mu = 0.6 * eta * scale, 0.4 * eta * 0.2 * scale, 0.2
        t = float(distances.kantorovich(one(step), one(residual), one(mu), one(lipschitz / scale))) / scale
        assert t == pytest.approx(eta + lipschitz * t**2 / (2 * mu), rel=1e-12)
        assert eta * (1 - 1e-12) <= t <= 2 * eta * (1 + 1e-7)
        assert t * lipschitz <= mu * (1 + 1e-7)  # the smaller one
    assert float(distances.kantorovich(one(0.1), one(0.0), one(0.2), one(1.0001))) == math.inf
    assert float(distances.kantorovich(one(0.1), one(0.0), one(0.2), one(math.inf))) == math.inf
    assert float(distances.kantorovich_radius(one(0.1), one(0.2), one(0.5))) == pytest.approx(1.0)


def test_kantorovich_is_attained_in_one_dimension():
    """G(t) = -mu eta + mu t - L t^2 / 2 on t <= t_-: the Hessian falls as fast as L allows."""
    eta, mu, lipschitz = 0.3, 2.0, 3.0
    t = float(distances.kantorovich(one(eta), one(0.0), one(mu), one(lipschitz)))
    assert -mu * eta + mu * t - lipschitz * t**2 / 2 == pytest.approx(0, abs=1e-14)


def test_dual_gradient_norm_is_exact_for_any_step():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        root = torch.randn(6, 6, dtype=F64, generator=generator)
        H = root @ root.T + 0.1 * torch.eye(6, dtype=F64)
        G, s = torch.randn(2, 6, dtype=F64, generator=generator)
        r = -G - H @ s
        dual = torch.sqrt(r @ torch.linalg.solve(H, r))
        found = distances.dual_gradient_norm((-s @ G)[None], (s @ r)[None], dual[None])
        assert float(found) == pytest.approx(float(torch.sqrt(G @ torch.linalg.solve(H, G))), rel=1e-10)


def test_local_distance_for_an_exponential():
    """g(x) = exp(x) - x: D^3 g = D^2 g, so K = H^{-1/2}; the minimizer is 0."""
    for x in (-1e-9, -1e-3, -0.2, 1e-6, 1e-3, 0.1, 0.3):
        H, G = math.exp(x), math.expm1(x)
        s = -G / H
        energy = bi.certificates.energy_distance(one(abs(G) / H**0.5), one(1.1 / H**0.5))
        bound = float(distances.local_distance(energy, one(1.1 / H**0.5), one(abs(s)), one(0.0), one(H * 0.5)))
        assert abs(x) <= bound
        if abs(x) <= 1e-3:  # a mu that is half as large as it could be does not matter near the minimizer
            assert bound <= 1.002 * abs(x)
    inf = one(math.inf)
    assert float(distances.local_distance(inf, one(1.0), one(1.0), one(0.0), one(1.0))) == math.inf
    assert float(distances.local_distance(one(1.0), inf, one(1.0), one(0.0), one(1.0))) == math.inf


def test_mean_excess_from_above():
    for kappa in (1e-300, 1e-12, 1e-5, 9.99e-4, 1.01e-3, 0.1, 3.0):
        series = sum(kappa**k / math.factorial(k + 1) for k in range(1, 60))
        assert series * (1 - 1e-13) <= float(distances._mean_excess(one(kappa))) <= series * (1 + 1e-3)


# --- points of every kind, every model and operator


def points(case, sample_x: list[Tensor]):
    """The minimizer, disturbed at many scales in ways that suit or hurt, and points that solvers stop at."""
    exact = torch.stack(sample_x)
    generator = torch.Generator().manual_seed(5)
    for size in (0.0, 1e-12, 1e-8, 1e-5, 1e-3, 3e-2, 1.0):
        noise = torch.randn(exact.shape, dtype=F64, generator=generator)
        yield exact + size * noise
    lowest = torch.stack([torch.linalg.eigh(h)[1][:, 0] for h in assemble_hessian(case.problem.linearize(exact))])
    for size in (1e-6, 1e-3, 0.1):
        yield exact + size * lowest.reshape(exact.shape)
    for tol in (1.0, 1e-2):
        yield bi.lower_solvers.AcceleratedGradient().solve(case.problem, None, tol).x


@pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(user=False, kinked=True)))
def test_every_certificate_holds(regularizer, physics):
    case = build(regularizer, physics, size=(5, 6), weight=0.3)
    samples = [reference_of(case, i) for i in range(2)]
    exact = [torch.from_numpy(s.x.astype(float)).reshape(case.x_true.shape[1:]) for s in samples]
    finite = set()
    for x in points(case, exact):
        found = bi.distance_certificates(case.problem, x)
        assert tuple(found) == DISTANCE_CERTIFICATES
        for i, sample in enumerate(samples):
            true = float(np.linalg.norm((x[i].numpy().ravel() - sample.x).astype(float)))
            for name, bound in found.items():
                assert true <= float(bound[i]) + sample.x_uncertainty, name
                finite |= {name} if math.isfinite(float(bound[i])) else set()
            assert float(found["smallest"][i]) == min(float(b[i]) for b in found.values())
            if regularizer != "tikhonov_identity" and math.isfinite(float(found["metric"][i])):
                # elsewhere the metric has the whole of mu
                assert float(found["metric"][i]) <= float(found["gradient"][i]) * (1 + 1e-9)
    smooth = regularizer in CERTIFIED_REGULARIZERS
    assert {"gradient", "newton", "smallest"} <= finite and (not smooth or {"kantorovich", "local"} <= finite)


@pytest.mark.parametrize("physics", PHYSICS)
def test_near_the_minimizer_the_smallest_is_nearly_exact(physics):
    case = build("tv_isotropic", physics, size=(6, 6))
    samples = [reference_of(case, i) for i in range(2)]
    exact = torch.stack([torch.from_numpy(s.x.astype(float)).reshape(case.x_true.shape[1:]) for s in samples])
    x = exact + 1e-7 * torch.randn(exact.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = bi.distance_certificates(case.problem, x)
    true = (x - exact).flatten(1).norm(dim=1)
    for name in ("newton", "kantorovich", "local", "smallest"):
        assert bool((found[name] <= 1.1 * true).all()), name
    if physics != "denoising":  # where mu is much less than most eigenvalues, G / mu is far from it
        assert bool((found["gradient"] > 2 * true).all())
    assert bool((found["kantorovich"] < found["gradient"]).all())


@pytest.mark.parametrize("regularizer", ["tv_isotropic", "tv_anisotropic"])
def test_a_tiny_ridge_gains_orders_of_magnitude(regularizer):
    """Inpainting with ridge 1e-4: mu = 1e-4, and G / mu overestimates by about L / mu."""
    case = build(regularizer, "inpainting", size=(8, 9), ridge=1e-4)
    samples = [reference_of(case, i) for i in range(2)]
    for error_tol, largest in ((10.0, 6.0), (0.1, 1.1), (1e-2, 1.02)):
        x = bi.lower_solvers.LBFGS().solve(case.problem, None, error_tol).x
        found = bi.distance_certificates(case.problem, x)
        for i, sample in enumerate(samples):
            true = float(np.linalg.norm((x[i].numpy().ravel() - sample.x).astype(float)))
            assert true <= float(found["smallest"][i]) <= largest * true
            assert float(found["gradient"][i]) > 3000 * true and float(found["metric"][i]) > 3000 * true
            assert float(found["local"][i]) < 1e-2 * float(found["gradient"][i])


@pytest.mark.parametrize("regularizer", KINKED_REGULARIZERS)
def test_kinked_energies_use_the_ball(regularizer):
    """Where no kink is near, the Hessian is constant on the ball and Kantorovich gives ||s|| itself."""
    case = build(regularizer, "denoising", size=(5, 6), weight=0.3)
    samples = [reference_of(case, i) for i in range(2)]
    x = torch.stack([torch.from_numpy(s.x.astype(float)).reshape(case.x_true.shape[1:]) for s in samples])
    near = x + 1e-9 * torch.ones_like(x)
    found = bi.distance_certificates(case.problem, near)
    for name in ("kantorovich", "newton"):
        assert bool((found[name] <= 1.02e-9 * x[0].numel() ** 0.5).all()), name


# --- dtypes, batches, solvers, missing constants, misuse


@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur_fft"])
def test_float32_problems_are_evaluated_in_float64(physics):
    case = build("tv_isotropic", physics, dtype=F32, size=(6, 6))
    samples = [reference_of(case, i) for i in range(2)]
    x = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-4).x
    found = bi.distance_certificates(case.problem, x)
    for i, sample in enumerate(samples):
        true = float(np.linalg.norm((x[i].double().numpy().ravel() - sample.x).astype(float)))
        assert all(true <= float(b[i]) + sample.x_uncertainty and b.dtype == F64 for b in found.values())
        assert float(found["smallest"][i]) <= 2 * true + 1e-6


def test_a_sample_alone_gives_the_same():
    case = build("tv_isotropic", "inpainting", batch=3, size=(6, 6))
    scale = torch.tensor([1e-6, 1e-2, 1.0], dtype=F64).reshape(3, 1, 1, 1)
    x = case.x_true + scale
    together = bi.distance_certificates(case.problem, x)
    for i in range(3):
        alone = bi.distance_certificates(case.problem.subset(torch.tensor([i])), x[i : i + 1])
        for name, bound in together.items():
            assert float(alone[name]) == pytest.approx(float(bound[i]), rel=1e-6), name


@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
def test_any_solver_of_the_newton_system_cut_off_anywhere(linear):
    case = build("tv_isotropic", "blur_circular", size=(5, 5))
    samples = [reference_of(case, i) for i in range(2)]
    exact = torch.stack([torch.from_numpy(s.x.astype(float)).reshape(case.x_true.shape[1:]) for s in samples])
    x = exact + 1e-4 * torch.randn(exact.shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    true = (x - exact).flatten(1).norm(dim=1)
    for iterations in (0, 1, 4, 500):
        found = bi.distance_certificates(case.problem, x, linear=LINEAR_SOLVERS[linear](max_iter=iterations))
        assert all(bool((true <= bound).all()) for bound in found.values())


def test_unknown_constants_certify_nothing():
    user = build("user", "denoising", size=(4, 4))
    found = bi.distance_certificates(user.problem, user.x_true)
    assert all(bool(bound.isinf().all()) for bound in found.values())


def test_a_quadratic_problem_is_solved_by_one_newton_step():
    hessian = torch.diag(torch.tensor([1e-3, 1.0, 50.0], dtype=F64))[None]
    theta = torch.ones(1, dtype=F64, requires_grad=True)
    problem = bi.QuadraticProblem(hessian, torch.ones(1, 3, dtype=F64), torch.ones(1, 3, 1, dtype=F64), theta)
    x = problem.minimizer() + torch.tensor([[0.1, 0.2, 0.3]], dtype=F64)
    found = bi.distance_certificates(problem, x)
    true = 0.14**0.5
    assert float(found["gradient"]) > 1e4 * true and float(found["metric"]) == float(found["local"]) == math.inf
    for name in ("newton", "kantorovich", "smallest"):
        assert true <= float(found[name]) <= 1.02 * true


def test_misuse():
    case = build("tv_isotropic", "denoising", size=(4, 4))
    with pytest.raises(ValueError, match="Expected x of the problem's shape"):
        bi.distance_certificates(case.problem, case.x_true[:1])
    with pytest.raises(ValueError, match="Expected a finite x"):
        bi.distance_certificates(case.problem, case.x_true * math.nan)
