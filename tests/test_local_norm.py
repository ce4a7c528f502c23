"""Energy norms: how the Hessian changes relative to itself, norms of J without solves, Gauss-Radau, resumed solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import CERTIFIED_REGULARIZERS, PHYSICS, build

import bilevel_imaging as bi
from bilevel_imaging import certificates
from bilevel_imaging.linear_solvers import ConjugateGradient, assemble_hessian
from bilevel_imaging.native import library

SMOOTH = [name for name in CERTIFIED_REGULARIZERS if name.startswith(("tv", "tikhonov"))]


def problem_at(regularizer: str, physics: str = "denoising", *, seed: int = 0, smoothing: float = 0.05, **kwargs):
    """A problem, a point that is not its minimizer, mu, and the dense Hessian there (one sample)."""
    channels = 2 if physics.startswith("mri") else 1
    case = build(
        regularizer, physics, batch=1, channels=channels, size=(5, 6), smoothing=smoothing, seed=seed, **kwargs
    )
    generator = torch.Generator().manual_seed(seed)
    x = case.x_true + 0.1 * torch.randn(case.x_true.shape, generator=generator, dtype=torch.float64)
    linearization = case.problem.linearize(x)
    mu = case.problem.constants().strong_convexity.double()
    return case, x, linearization, mu, assemble_hessian(linearization)[0].numpy()


def directions(x: torch.Tensor, count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for k in range(count):
        d = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        if k % 3 == 0:  # concentrated at few pixels: where single roots can change a lot
            d = d * (torch.rand(x.shape, generator=generator) < 0.1)
            d.flatten()[k % d.numel()] = 1.0
        yield d


def relative_norm(change: np.ndarray, hessian: np.ndarray) -> float:
    """Largest |<u, change u>| / <u, hessian u>."""
    factor = np.linalg.inv(np.linalg.cholesky(hessian))
    return float(np.abs(np.linalg.eigvalsh(factor @ change @ factor.T)).max())


@pytest.mark.slow
@pytest.mark.parametrize("regularizer", SMOOTH)
@pytest.mark.parametrize("radius", [1e-3, 0.05, 0.5])
def test_relative_curvature_bounds_the_change_of_the_hessian(regularizer, radius):
    case, x, linearization, mu, hessian = problem_at(regularizer)
    r = torch.tensor([radius], dtype=torch.float64)
    curvature = float(linearization.relative_curvature(r, mu))
    for d in directions(x, 12, 1):
        size = float(d.flatten().numpy() @ hessian @ d.flatten().numpy()) ** 0.5
        e = radius / size * d
        for t in (0.0, 0.4, 1.0):
            step = 1e-4
            ends = [assemble_hessian(case.problem.linearize(x + (t + s) * e))[0].numpy() for s in (-step, step)]
            here = assemble_hessian(case.problem.linearize(x + t * e))[0].numpy()
            measured = relative_norm((ends[1] - ends[0]) / (2 * step), here)
            assert measured <= curvature * radius * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize("regularizer", SMOOTH)
def test_relative_curvature_is_attained_up_to_a_small_factor(regularizer):
    if regularizer.startswith("tikhonov"):
        pytest.skip("the Hessian is constant")
    _, x, linearization, mu, hessian = problem_at(regularizer)
    r = torch.tensor([1e-4], dtype=torch.float64)
    curvature = float(linearization.relative_curvature(r, mu))
    factor = np.linalg.inv(np.linalg.cholesky(hessian))
    inverse = factor.T @ factor
    best = 0.0
    for i in range(x.numel()):
        for j in (i, min(i + 1, x.numel() - 1)):
            d = inverse[:, i] - (inverse[:, j] if j != i else 0)
            e = torch.tensor(d / np.sqrt(d @ hessian @ d)).reshape(x.shape)
            if not bool(e.isfinite().all()):
                continue
            step = 1e-5
            case = build(regularizer, "denoising", batch=1, channels=1, size=(5, 6), smoothing=0.05)
            ends = [assemble_hessian(case.problem.linearize(x + s * e))[0].numpy() for s in (-step, step)]
            best = max(best, relative_norm((ends[1] - ends[0]) / (2 * step), hessian))
    assert best <= curvature * (1 + 1e-3) and best >= curvature / 8


@pytest.mark.parametrize("regularizer", SMOOTH)
@pytest.mark.parametrize("radius", [1e-3, 0.1])
def test_local_change_bounds_the_changes_along_q(regularizer, radius):
    case, x, linearization, mu, hessian = problem_at(regularizer, seed=3)
    q = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    change = linearization.local_change(q, torch.tensor([radius], dtype=torch.float64), mu)
    for d in directions(x, 9, 4):
        e = radius / float(d.flatten().numpy() @ hessian @ d.flatten().numpy()) ** 0.5 * d
        for t in (0.0, 1.0):
            step = 1e-4
            at = case.problem.linearize(x + t * e)
            here = assemble_hessian(at)[0].numpy()
            ends = [case.problem.linearize(x + (t + s) * e) for s in (-step, step)]
            length = float(e.flatten().numpy() @ here @ e.flatten().numpy()) ** 0.5
            third = ((ends[1].hvp(q) - ends[0].hvp(q)) / (2 * step)).flatten().numpy()
            dual = float(third @ np.linalg.solve(here, third)) ** 0.5
            assert dual <= float(change.hessian) * length * (1 + 1e-3) + 1e-7
            columns = [end.mixed_columns() for end in ends]
            mixed = ((columns[1] - columns[0]) / (2 * step))[0].flatten(1).numpy()
            energy = linearization if t == 0 else at
            part = energy.local_change(q, torch.tensor([1e-9], dtype=torch.float64), mu).energy
            for j, slope in enumerate(change.slopes.tolist()):
                measured = abs(float(mixed[j] @ q.flatten().numpy()))
                assert measured <= slope * length * float(part) * (1 + 1e-3) + 1e-7


@pytest.mark.parametrize("physics", [*PHYSICS])
@pytest.mark.parametrize("regularizer", SMOOTH)
def test_mixed_energy_norms_need_no_solve_and_bound(regularizer, physics):
    if physics == "blur_fft_color":
        pytest.skip("a color kernel")
    _, _, linearization, _, hessian = problem_at(regularizer, physics)
    norms = linearization.mixed_energy_norms()[0].numpy()
    columns = linearization.mixed_columns()[0].flatten(1).numpy()
    true = np.sqrt(np.einsum("nd,nd->n", columns, np.linalg.solve(hessian, columns.T).T))
    assert (true <= norms * (1 + 1e-12)).all()


@pytest.mark.parametrize("smoothing", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("regularizer", [name for name in SMOOTH if name.startswith("tv")])
def test_split_energy_norms_bound_and_gain(regularizer, smoothing):
    _, _, linearization, mu, hessian = problem_at(regularizer, smoothing=smoothing)
    columns = linearization.mixed_columns()[0].flatten(1).numpy()
    true = np.sqrt(np.einsum("nd,nd->n", columns, np.linalg.solve(hessian, columns.T).T))
    inside = linearization.inside.inside
    split = inside.split_energy_norms(mu)[0].numpy()
    assert (true <= split).all()
    # nothing more is lost than with the whole field measured by W^-1, or by 1 / mu
    whole = np.minimum(inside.mixed_energy_norms()[0].numpy(), np.linalg.norm(columns, axis=1) / float(mu) ** 0.5)
    assert (split <= 2**0.5 * whole * (1 + 1e-3)).all()
    assert (linearization.mixed_energy_norms()[0].numpy() <= whole * (1 + 1e-3)).all()


@pytest.mark.slow
@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur_fft", "mri"])
def test_energy_distance_holds_where_it_applies_and_beats_the_gradient_norm(physics):
    applied, gains = 0, []
    for regularizer in ("tv_isotropic", "tv_anisotropic"):
        for tol in (1e-2, 1e-3, 1e-4, 1e-6):
            case, _, _, mu, _ = problem_at(regularizer, physics)
            exact = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-11).x
            x = bi.lower_solvers.LBFGS().solve(case.problem, None, tol).x
            linearization = case.problem.linearize(x)
            hessian = assemble_hessian(linearization)[0].numpy()
            g = linearization.grad.flatten().numpy()
            dual = torch.tensor([float(g @ np.linalg.solve(hessian, g)) ** 0.5], dtype=torch.float64)
            curvature = linearization.relative_curvature(certificates.TRIAL_FACTOR * dual, mu)
            bound = float(certificates.energy_distance(dual, curvature))
            e = (exact - x).flatten().numpy()
            true = float(e @ hessian @ e) ** 0.5
            assert true <= bound * (1 + 1e-6) + 1e-9
            if bound < float("inf"):
                applied += 1
                assert bound <= 2 * true + 1e-9
                gains.append(float(np.linalg.norm(g)) / float(mu) / (bound / float(mu) ** 0.5))
    assert applied >= 4 and max(gains) > 1


@pytest.mark.slow
@pytest.mark.parametrize("preconditioner", [None, "auto"])
@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur_fft", "weighting"])
def test_gauss_radau_bounds_the_energy_norm(physics, preconditioner):
    case = build("tv_isotropic", physics, batch=3, channels=1, size=(7, 6), smoothing=0.02)
    linearization = case.problem.linearize(case.x_true)
    rhs = torch.randn(case.x_true.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = assemble_hessian(linearization)
    finite = 0
    for k in range(1, 45):
        solution = ConjugateGradient(max_iter=k, preconditioner=preconditioner).solve(linearization, rhs, 0.0)
        r = (rhs - linearization.hvp(solution.q)).flatten(1)
        true = torch.linalg.solve(hessian, r.unsqueeze(2)).squeeze(2)
        true = (r * true).sum(1).clamp(min=0).sqrt()
        assert (true <= solution.energy_norm * (1 + 1e-8) + 1e-12).all()
        finite += int(solution.energy_norm.isfinite().sum())
    assert (finite > 0) == (preconditioner is None or linearization.preconditioner() is None)


def test_a_resumed_solve_is_the_uninterrupted_one():
    case = build("tv_isotropic", "denoising", batch=4, channels=1, size=(9, 8), smoothing=0.01, weight=0.3)
    linearization = case.problem.linearize(case.x_true)
    rhs = torch.randn(case.x_true.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rhs = rhs * torch.tensor([1.0, 1e-3, 1e2, 1.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    solver = ConjugateGradient()
    tol = 0.3 * rhs.flatten(1).norm(dim=1) * torch.tensor([1.0, 0.1, 10.0, 1.0], dtype=torch.float64)
    first = solver.solve(linearization, rhs, tol)
    before = case.problem.cost.hvps
    resumed = solver.resume(linearization, rhs, first, 0.05 * tol)
    spent = case.problem.cost.hvps - before
    whole = solver.solve(linearization, rhs, 0.05 * tol)
    assert torch.equal(resumed.iterations, whole.iterations) and bool(resumed.converged.all())
    assert bool((whole.iterations > first.iterations).all())
    torch.testing.assert_close(resumed.q, whole.q, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(resumed.energy_norm, whole.energy_norm, rtol=1e-6, atol=0)
    assert spent < 4 * (whole.iterations.max() + 1)


@pytest.mark.parametrize("physics", ["inpainting", "blur_fft"])
def test_the_automatic_preconditioner_is_positive_definite_and_saves_iterations(physics, monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: (None, "off"))  # compiled convolutions do without one
    case = build("tv_isotropic", physics, batch=1, channels=1, size=(24, 24), weight=0.3, smoothing=0.005, ridge=1e-3)
    x = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-6).x
    linearization = case.problem.linearize(x)
    apply = linearization.preconditioner()
    units = torch.eye(576, dtype=torch.float64).reshape(576, 1, 24, 24)
    matrix = torch.cat([apply(unit.unsqueeze(0)).flatten(1) for unit in units])
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0
    rhs = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    plain = ConjugateGradient().solve(linearization, rhs, 1e-6).iterations
    preconditioned = ConjugateGradient(preconditioner="auto").solve(linearization, rhs, 1e-6).iterations
    assert int(preconditioned) < 0.7 * int(plain)
