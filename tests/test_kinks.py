"""Regularizers with kinks: their model, their constants on balls that no kink reaches, and what follows from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import KINKED_REGULARIZERS, KinkedReference, build, reference
from sweep import flat
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.regularizers import HuberTotalVariation, LinearSpline
from bilevel_imaging.tensors import inner, norm, per_sample

F32, F64 = torch.float32, torch.float64
kinked = pytest.mark.parametrize("regularizer", KINKED_REGULARIZERS)
separable = pytest.mark.parametrize("regularizer", ["huber_anisotropic", "linear_spline", "linear_spline_slopes"])


def draw(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(seed))


def dense(product, like: Tensor) -> Tensor:
    """The matrices of products ``(B, *image)``, ``(B, d, d)``."""
    d, batch = like[0].numel(), like.shape[0]
    columns = []
    for j in range(d):
        unit = torch.zeros(batch, d, dtype=like.dtype)
        unit[:, j] = 1
        columns.append(product(unit.reshape(like.shape)).flatten(1))
    return torch.stack(columns, 2)


def hostile_points(count: int, nu: float) -> Tensor:
    """Noise at the scale of nu and of 1, a ramp, an edge and a flat image, ``(5 * count, 1, 4, 5)``."""
    noise = torch.randn(count, 1, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(3))
    ramp = (torch.arange(20, dtype=F64).reshape(4, 5) * nu / 3).expand_as(noise)
    edge = (torch.arange(5, dtype=F64) > 2).to(F64).expand_as(noise) + 0.1 * nu * noise
    return torch.cat([nu * noise, noise, ramp + 0.01 * nu * noise, edge, torch.full_like(noise, 0.3)])


# --- the model


@kinked
@pytest.mark.parametrize("physics", ["denoising", "mri"])
@pytest.mark.parametrize("smoothing", [0.02, 0.3])
def test_against_the_independent_model(regularizer, physics, smoothing):
    case = build(regularizer, physics, channels=3, size=(4, 5), smoothing=smoothing)
    x = case.x_true + 0.05 * draw(case.x_true, 1)
    v = draw(x, 2)
    linearization, model = case.problem.linearize(x), KinkedReference(case, 1)
    xn, vn = (a[1].numpy().ravel().astype(np.longdouble) for a in (x, v))
    assert float(case.problem.value(x).detach()[1]) == pytest.approx(float(model.value(xn)), rel=1e-12)
    for ours, theirs in (
        (linearization.grad[1], model.gradient(xn)),
        (linearization.hvp(v)[1], model.product(xn, vn)),
        (linearization.mixed_columns()[1].flatten(1), model.columns(xn)),
    ):
        scale = float(np.abs(theirs).max())
        assert float(np.abs(ours.numpy().reshape(theirs.shape) - theirs).max()) <= 1e-12 * scale
    assert np.allclose(model.hessian(xn) @ vn.astype(float), model.product(xn, vn).astype(float), rtol=1e-9)


@kinked
def test_convex_along_segments(regularizer):
    model = KINKED_REGULARIZERS[regularizer](0.7, 0.1)
    x = hostile_points(20, 0.1)
    other = x.flip(0) + 0.1 * draw(x, 1)
    with torch.no_grad():
        ends, middle = 0.5 * (model.fn(x) + model.fn(other)), model.fn(0.5 * (x + other))
        assert bool((middle <= ends * (1 + 1e-14)).all()) and bool((middle < 0.999 * ends).any())
        assert bool((inner(model.grad(x) - model.grad(other), x - other) >= 0).all())


def test_one_slope_is_huber():
    spline = LinearSpline(0.3, 0.2, [1 / 0.2], learn_weight=True)
    huber = HuberTotalVariation(0.3, 0.2, isotropic=False)
    x, q = draw(torch.zeros(2, 3, 5, 6, dtype=F64), 1), draw(torch.zeros(2, 3, 5, 6, dtype=F64), 2)
    assert torch.allclose(spline.fn(x), huber.fn(x), rtol=1e-13)
    assert torch.allclose(spline.hvp(x, q), huber.hvp(x, q), atol=1e-13)
    # isotropic and anisotropic are the same on a single row
    one_row = x[..., :1, :]
    assert torch.allclose(HuberTotalVariation(0.3, 0.2).fn(one_row), huber.fn(one_row), rtol=1e-13)


def test_default_spline_follows_total_variation():
    x = 0.1 * draw(torch.zeros(1, 1, 6, 6, dtype=F64), 1)
    ours = LinearSpline(0.3, 0.05).grad(x)
    theirs = bi.TotalVariation(0.3, 0.05, isotropic=False).grad(x)
    assert bool((norm(ours - theirs) < 0.1 * norm(theirs)).all())


# --- constants


def moved(x: Tensor, radius: Tensor, seed: int) -> Tensor:
    """A point at that distance, ``(B,)``: half of the samples move in one pixel only, where differences change most."""
    e = draw(x, seed)
    e[::2] *= (draw(x, seed + 1).abs() == draw(x, seed + 1).abs().amax((1, 2, 3), keepdim=True))[::2]
    return x + e * per_sample(radius / norm(e), e)


@kinked
@pytest.mark.parametrize("nu", [1e-3, 0.1, 1.0])
def test_constants_on_balls_that_no_kink_reaches(regularizer, nu):
    model = KINKED_REGULARIZERS[regularizer](0.7, nu)
    x = hostile_points(6, nu)
    at = model.linearize(x)
    free = at.margin.clamp(min=0) / model.row_norm
    assert bool((free > 0).all())
    q = draw(x, 5)
    smooth = model.constants(x.shape).smoothness
    H = dense(at.hvp, x)
    tight_hessian, tight_mixed = [], []
    for k, fraction in enumerate((0.999, 0.999, 0.5, 0.01)):
        radius = fraction * free
        ball, along = at.constants_on_ball(radius), at.directional(q, radius)
        assert bool(ball.hessian_lipschitz.isfinite().all()) and bool(ball.mixed_lipschitz.isfinite().all())
        point = model.linearize(moved(x, radius, 10 * k))
        noise = 1e-13 * smooth + 1e-300
        change = torch.linalg.matrix_norm(dense(point.hvp, x) - H, ord=2)
        assert bool((change <= ball.hessian_lipschitz * radius * (1 + 1e-9) + noise).all())
        change_q = norm(point.hvp(q) - at.hvp(q))
        assert bool((change_q <= along.hessian * radius * (1 + 1e-9) + noise * norm(q)).all())
        columns = (point.mixed_columns() - at.mixed_columns()).flatten(2)
        mixed = torch.linalg.matrix_norm(columns, ord=2)
        rounding = 1e-14 * 0.7 * math.sqrt(2 * 40) * (1 + 1 / nu * x.abs().amax((1, 2, 3)))
        assert bool((mixed <= ball.mixed_lipschitz * radius * (1 + 1e-9) + rounding).all())
        each = (columns @ q.flatten(1).unsqueeze(2)).squeeze(2)
        bound = along.mixed_components * radius.unsqueeze(1) * (1 + 1e-9) + (rounding * norm(q)).unsqueeze(1)
        assert bool((each.abs() <= bound).all())
        assert bool((each.norm(dim=1) <= along.mixed * radius * (1 + 1e-9) + rounding * norm(q)).all())
        if fraction > 0.9:
            tight_hessian.append(float((change / (ball.hessian_lipschitz * radius).clamp(min=1e-300)).max()))
            tight_mixed.append(float((mixed / (ball.mixed_lipschitz * radius)).nan_to_num(0).max()))
    assert max(tight_mixed) > 0.3
    if regularizer in ("huber_isotropic", "huber_weight_only"):
        assert max(tight_hessian) > 0.01
    else:
        assert bool((ball.hessian_lipschitz == 0).all()) and bool((along.hessian == 0).all())


@separable
def test_derivatives_along_q_are_exact(regularizer):
    """J is affine on the ball: some direction attains the constant of every column."""
    model = KINKED_REGULARIZERS[regularizer](0.7, 0.1)
    x = hostile_points(4, 0.1)
    at, q = model.linearize(x), draw(x, 5)
    radius = 0.9 * at.margin / model.row_norm
    components = at.directional(q, radius).mixed_components
    # the direction that a difference quotient of <J_j, q> points to
    for j in range(components.shape[1]):
        step = 0.1 * radius.min()
        values = [inner(model.linearize(x + s * step * e).mixed_columns()[:, j], q)
                  for e in torch.eye(20, dtype=F64).reshape(20, 1, 4, 5) for s in (1, -1)]  # fmt: skip
        slope = (torch.stack(values[::2]) - torch.stack(values[1::2])) / (2 * step)
        assert torch.allclose(slope.norm(dim=0), components[:, j], rtol=1e-5, atol=1e-8)


@kinked
def test_samples_that_meet_a_kink_are_not_bounded(regularizer):
    case = build(regularizer, "denoising", size=(4, 5), smoothing=0.1, ridge=0.01, batch=3)
    x = case.x_true + 0.02 * draw(case.x_true, 1)
    linearization = case.problem.linearize(x)
    inside = linearization.inside.inside
    free = inside.margin / case.energy.regularizer.row_norm
    radius = free * torch.tensor([0.5, 1.001, 0.9], dtype=F64)
    ball, along = linearization.constants_on_ball(radius), linearization.directional(x, radius)
    for values in (ball.hessian_lipschitz, ball.mixed_lipschitz, along.hessian, along.mixed):
        assert values.isinf().tolist() == [False, True, False]
    assert along.mixed_components.isinf().all(1).tolist() == [False, True, False]
    whole = case.problem.constants()
    assert whole.hessian_lipschitz is None and "jumps" in whole.reason and ball.reason == ""
    assert torch.equal(ball.strong_convexity, whole.strong_convexity) and bool((whole.strong_convexity == 1.01).all())
    assert torch.equal(ball.smoothness, whole.smoothness)
    smooth = build("tv_isotropic", size=(4, 5), batch=3).problem
    assert smooth.linearize(x).constants_on_ball(radius) is None


@separable
@pytest.mark.parametrize("dtype", [F32, F64])
def test_margin_counts_rounding(regularizer, dtype):
    """Differences a few units of the last place from a kink, on both sides: no ball is free of it."""
    spacing = 0.1
    model = KINKED_REGULARIZERS[regularizer](0.7, spacing)
    x = torch.zeros(9, 1, 2, 2, dtype=dtype)
    kink = torch.tensor(spacing, dtype=F64)
    unit = torch.finfo(dtype).eps * spacing
    x[:, 0, 0, 1] = (kink + unit * torch.arange(-4, 5, dtype=F64)).to(dtype)
    x[:, 0, 1, 1] = x[:, 0, 0, 1]
    tiny = torch.full((9,), 1e-30, dtype=F64)
    assert bool(model.linearize(x).constants_on_ball(tiny).hessian_lipschitz.isinf().all())
    x[:, 0, :, 1] += 100 * unit
    assert bool((model.linearize(x).constants_on_ball(tiny).hessian_lipschitz == 0).all())


@kinked
@pytest.mark.parametrize("nu", [1e-3, 0.1])
def test_global_constants(regularizer, nu):
    model = KINKED_REGULARIZERS[regularizer](0.7, nu)
    x = hostile_points(40, nu)
    constants = model.constants(x.shape)
    at = model.linearize(x)
    columns = at.mixed_columns().flatten(2)
    assert bool((torch.linalg.matrix_norm(columns, ord=2) <= constants.mixed_norm).all())
    eigenvalues = torch.linalg.eigvalsh(dense(at.hvp, x))
    assert bool((eigenvalues[:, 0] >= -1e-12 * constants.smoothness).all())
    assert bool((eigenvalues[:, -1] <= constants.smoothness * (1 + 1e-12)).all())
    assert float((eigenvalues[:, -1] / constants.smoothness).max()) > 0.6
    if regularizer in ("huber_isotropic", "huber_anisotropic"):
        assert constants.mixed_lipschitz is None
        return
    for k, size in enumerate((0.1 * nu, nu, 10 * nu)):
        radius = torch.full((len(x),), size, dtype=F64)
        change = (model.linearize(moved(x, radius, 10 * k)).mixed_columns().flatten(2) - columns) / size
        assert bool((torch.linalg.matrix_norm(change, ord=2) <= constants.mixed_lipschitz * (1 + 1e-9)).all())


# --- what follows


@separable
@pytest.mark.parametrize("physics", ["denoising", "blur_circular", "mri"])
def test_one_newton_step_ends_at_the_minimizer(regularizer, physics):
    case = build(regularizer, physics, size=(5, 6), smoothing=0.1, batch=3)
    problem = case.problem
    mu = problem.constants().strong_convexity
    # far enough from the minimizer that only the Newton step explains its distance
    start = bi.lower_solvers.NewtonCG().solve(problem, None, 1e-12).x
    x = moved(start, torch.full_like(mu, 1e-7), 1)
    at = problem.linearize(x)
    ball = at.constants_on_ball(norm(at.grad) / mu)
    assert bool((ball.hessian_lipschitz == 0).all())
    step = torch.linalg.solve(dense(at.hvp, x), -at.grad.flatten(1).unsqueeze(2)).reshape(x.shape)
    for i in range(3):
        exact = KinkedReference(case, i)
        found = (x + step)[i].numpy().ravel().astype(np.longdouble)
        assert float(np.linalg.norm((found - exact.x).astype(float))) <= 1e-13
        assert float(np.linalg.norm((x[i].numpy().ravel() - exact.x).astype(float))) > 0.9e-7


@kinked
@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur_fft", "mri", "mri_weighted"])
def test_hypergradients_against_the_reference(regularizer, physics):
    case = build(regularizer, physics, size=(5, 6))
    true, slack, loss, _, _ = reference(case)
    h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, error_tol=1e-12, residual_tol=1e-12)
    assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= 1e-9 * h.norm + slack
    assert h.loss == pytest.approx(loss, rel=1e-11)
    assert {n: g.shape for n, g in h.grad.items()} == {n: p.shape for n, p in case.problem.theta.items()}


@kinked
def test_saved_and_loaded(regularizer, tmp_path):
    model = KINKED_REGULARIZERS[regularizer](0.3, 0.07)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    again = bi.load_regularizer(bi.save_regularizer(tmp_path / "r.safetensors", model))
    x = draw(torch.zeros(1, 1, 5, 5, dtype=F64), 1)
    assert type(again) is type(model) and torch.equal(again.fn(x), model.fn(x))
    assert getattr(again, "spacing", None) == getattr(model, "spacing", None)


def test_points_that_are_not_finite_do_not_crash():
    for name in KINKED_REGULARIZERS:
        x = torch.full((1, 1, 3, 3), math.nan, dtype=F64)
        at = KINKED_REGULARIZERS[name](0.1, 0.1).linearize(x)
        assert bool(at.grad.isnan().any())
        assert bool(at.constants_on_ball(torch.ones(1, dtype=F64)).hessian_lipschitz.isinf().all())


def test_misuse():
    for bad, match in (
        (lambda: HuberTotalVariation(-1.0), "weight"),
        (lambda: HuberTotalVariation(0.1, math.inf), "smoothing"),
        (lambda: LinearSpline(0.0), "weight"),
        (lambda: LinearSpline(0.1, 0.0), "spacing"),
        (lambda: LinearSpline(0.1, 0.1, []), "slopes"),
        (lambda: LinearSpline(0.1, 0.1, [1.0, -1.0]), "slopes"),
        (lambda: LinearSpline(0.1, 0.1, [[1.0]]), "slopes"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
