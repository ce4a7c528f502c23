"""Hypergradients against differences, unrolling and the equivalence theorem; the differentiable layer; misuse."""

from __future__ import annotations

import math
import warnings

import deepinv
import numpy as np
import pytest
import torch
from cases import CERTIFIED_REGULARIZERS, LINEAR_SOLVERS, LOWER_SOLVERS, Case, build, mostly_slow, product, reference
from sweep import flat

import bilevel_imaging as bi
from bilevel_imaging.errors import NotCertifiedWarning

F32, F64 = torch.float32, torch.float64
pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product()))
certified_pairs = pytest.mark.parametrize(("regularizer", "physics"), mostly_slow(product(user=False)))


def estimate(case: Case, **settings) -> bi.Hypergradient:
    return bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **settings)


def loss_at(case: Case, near: torch.Tensor, name: str, change: float) -> float:
    """F with one parameter changed, from a solve to rounding that starts at the minimizer without the change."""
    parameter = case.problem.theta[name]
    with torch.no_grad():
        parameter += change
        x = bi.lower_solvers.NewtonCG().solve(case.problem, near, 1e-13).x
        parameter -= change
    return 0.5 * float((x - case.x_true).square().sum()) / len(x)


# --- values


@pairs
def test_central_differences(regularizer, physics):
    case = build(regularizer, physics, size=(6, 7), smoothing=0.3)
    h = estimate(case, error_tol=1e-12, residual_tol=1e-12)
    size = h.norm
    for name in case.problem.theta:
        # Richardson: the error is of the fourth order in the step
        slopes = [(loss_at(case, h.x, name, t) - loss_at(case, h.x, name, -t)) / (2 * t) for t in (1e-3, 2e-3)]
        slope = (4 * slopes[0] - slopes[1]) / 3
        assert abs(float(h.grad[name]) - slope) <= 1e-6 * size
    assert list(h.grad) == list(case.problem.theta)
    assert all(h.grad[n].shape == p.shape for n, p in case.problem.theta.items())


@certified_pairs
@pytest.mark.parametrize("channels", [1, 3])
def test_against_the_reference(regularizer, physics, channels):
    case = build(regularizer, physics, channels=channels, size=(5, 6))
    true, slack, loss, _, _ = reference(case)
    h = estimate(case, error_tol=1e-12, residual_tol=1e-12)
    assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= 1e-9 * h.norm + slack
    assert h.loss == pytest.approx(loss, rel=1e-11)


@certified_pairs
def test_a_batch_is_its_samples_one_by_one(regularizer, physics):
    case = build(regularizer, physics, batch=3, size=(6, 7))
    whole = estimate(case, error_tol=1e-13, residual_tol=1e-13)
    alone = []
    for i in range(3):
        problem = case.energy.bind(case.y[i : i + 1], case.physics)
        alone.append(
            bi.hypergradient(problem, bi.SquaredError(), case.x_true[i : i + 1], error_tol=1e-13, residual_tol=1e-13)
        )
    mean = np.mean([flat(h.grad) for h in alone], axis=0)
    assert np.allclose(flat(whole.grad).astype(float), mean.astype(float), rtol=1e-11, atol=1e-12)
    assert whole.loss == pytest.approx(np.mean([h.loss for h in alone]), rel=1e-12)
    joined = bi.hypergradients.average(alone, [1, 1, 1])
    assert np.allclose(flat(joined.grad).astype(float), flat(whole.grad).astype(float), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("lower", LOWER_SOLVERS)
@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
def test_every_pair_of_solvers_gives_the_same_hypergradient(lower, linear):
    case = build("tv_isotropic", "denoising", size=(6, 6), smoothing=0.1)
    settings = {"lower": LOWER_SOLVERS[lower](), "linear": LINEAR_SOLVERS[linear](), "error_tol": 1e-9}
    h = estimate(case, residual_tol=1e-9, **settings)
    best = estimate(case, error_tol=1e-12, residual_tol=1e-12)
    assert np.linalg.norm((flat(h.grad) - flat(best.grad)).astype(float)) <= h.bound + best.bound
    assert h.bound < 1e-5 and bool(h.lower.converged.all()) and bool(h.linear.converged.all())


# --- unrolling


@pytest.mark.parametrize("method", bi.hypergradients.UNROLLED_METHODS)
@pytest.mark.parametrize("regularizer", ["tv_isotropic", "tikhonov_gradient"])
def test_unrolling_tends_to_the_implicit_hypergradient(method, regularizer):
    case = build(regularizer, "denoising", size=(6, 6), smoothing=0.3)
    exact = flat(estimate(case, error_tol=1e-12, residual_tol=1e-12).grad)
    errors = []
    for steps in (5, 20, 150):
        h = bi.unrolled(case.problem, bi.SquaredError(), case.x_true, method=method, steps=steps)
        errors.append(float(np.linalg.norm((flat(h.grad) - exact).astype(float))))
        assert not h.certified and "not certified" in h.reason
    assert errors[2] < 1e-9 * float(np.linalg.norm(exact.astype(float))) + 1e-10 and errors[2] < errors[0]
    kept = bi.unrolled(case.problem, bi.SquaredError(), case.x_true, method=method, steps=20)
    recomputed = bi.unrolled(case.problem, bi.SquaredError(), case.x_true, method=method, steps=20, segment=6)
    assert np.allclose(flat(kept.grad).astype(float), flat(recomputed.grad).astype(float), rtol=1e-12)


@pytest.mark.parametrize("method", ["gradient_descent", "heavy_ball"])
@pytest.mark.parametrize("steps", [1, 3, 17])
def test_frozen_derivatives_are_the_linear_solver(method, steps):
    """Reverse mode with all derivatives frozen at x_K equals K iterations of the same method on H q = grad f."""
    case = build("tv_anisotropic", "denoising", size=(6, 6), batch=2)
    problem = case.problem
    x = bi.lower_solvers.GradientDescent(max_iter=steps).solve(problem, None, 0.0).x
    linearization = problem.linearize(x)
    constants = problem.constants()
    mu, L = float(constants.strong_convexity[0]), float(constants.smoothness[0])
    step, momentum = 2 / (L + mu), 0.0
    if method == "heavy_ball":
        roots = math.sqrt(L) + math.sqrt(mu)
        step, momentum = 4 / roots**2, ((math.sqrt(L) - math.sqrt(mu)) / roots) ** 2
    # x_{k+1} = (1 + beta) x_k - beta x_{k-1} - alpha G(x_k), reversed; J enters at every step
    rhs = x - case.x_true
    following, current = torch.zeros_like(rhs), rhs
    frozen = {n: torch.zeros_like(p) for n, p in problem.theta.items()}
    for _ in range(steps):
        for name, g in linearization.mixed_vjp(current).items():
            frozen[name] = frozen[name] - step * g / len(x)
        new = (1 + momentum) * current - step * linearization.hvp(current) - momentum * following
        following, current = current, new
    solver = LINEAR_SOLVERS[method](max_iter=steps)
    q = solver.solve(linearization, rhs, 0.0).q
    product_q = linearization.mixed_vjp(q)
    for name in frozen:
        assert float(frozen[name].detach()) == pytest.approx(-float(product_q[name].detach()) / len(x), rel=1e-10)


# --- accuracy on demand


@certified_pairs
@pytest.mark.parametrize("dtype", [F32, F64])
def test_relative_mode_ends_certified_or_says_why(regularizer, physics, dtype):
    case = build(regularizer, physics, dtype=dtype, size=(6, 7))
    true, slack, *_ = reference(case)
    for relative in (0.5, 0.1, 1e-3):
        h = estimate(case, relative=relative)
        assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= h.bound + slack
        if h.relative_bound <= relative * (1 + 1e-6):
            assert h.certified and h.reason == ""
        else:
            assert "instead of" in h.reason and ("floor" in h.reason or "progress" in h.reason or "rounds" in h.reason)
        if not physics.startswith("blur_fft"):  # a float32 filter allows only so much
            assert h.reason == "", h.reason
    assert estimate(case, bound_tol=0.05 * h.norm).bound <= 0.05 * h.norm * (1 + 1e-6) or physics.startswith("blur_fft")


def test_more_cannot_be_had_than_the_dtype_holds():
    case = build("tv_isotropic", "denoising", size=(6, 6))
    h = estimate(case, relative=1e-16)
    assert h.certified and math.isfinite(h.bound) and "instead of" in h.reason


def photograph(size: int, dtype: torch.dtype) -> Case:
    return build("tv_isotropic", "denoising", dtype=dtype, size=(size, size), batch=1, weight=0.1, smoothing=0.01)


@pytest.fixture(scope="module")
def truth() -> dict[torch.dtype, bi.Hypergradient]:
    """The float64 hypergradient of both data, certified to far less than anything compared with it."""
    result = {}
    for dtype in (F32, F64):
        case = photograph(64, dtype)
        problem = case.problem.double()
        result[dtype] = bi.hypergradient(
            problem, bi.SquaredError(), case.x_true.double(), error_tol=1e-11, residual_tol=1e-11,
            certificate="polished",
        )  # fmt: skip
        assert result[dtype].relative_bound < 1e-5
    return result


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("error_tol", [1e-2, 1e-3, 1e-5])
def test_polished_certificate_is_nearly_exact(truth, dtype, error_tol):
    case = photograph(64, dtype)
    true, uncertain = flat(truth[dtype].grad), truth[dtype].bound
    h = estimate(case, error_tol=error_tol, residual_tol=error_tol, certificate="polished")
    size = float(np.linalg.norm(true.astype(float)))
    assert h.certificate == "polished" and h.relative_bound <= 1e-2
    assert np.linalg.norm((flat(h.grad) - true).astype(float)) <= h.bound + uncertain
    first, bound = h.before_polish
    error = float(np.linalg.norm((flat(first) - true).astype(float)))
    assert error <= bound + uncertain
    if error < 0.1 * size and error > 10 * uncertain:
        assert bound <= 3 * error


# --- the layer


@pytest.mark.parametrize(
    "physics", ["denoising", *(pytest.param(p, marks=pytest.mark.slow) for p in ("inpainting", "blur_circular"))]
)
def test_gradcheck_of_the_layer(physics):
    case = build("tv_isotropic", physics, size=(3, 4), smoothing=0.5, ridge=0.2)
    layer = bi.BilevelReconstructor(case.energy, error_tol=1e-13)
    y = case.y.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda y: layer(y, case.physics), (y,), eps=1e-5, atol=1e-6, rtol=1e-5)
    # theta: the vector-Jacobian products against differences, for a few cotangents
    for seed in range(3):
        cotangent = torch.randn(case.x_true.shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
        case.energy.zero_grad()
        (layer(case.y, case.physics) * cotangent).sum().backward()
        for p in case.problem.theta.values():
            values = []
            for sign in (1, -1):
                p.data += sign * 1e-5
                values.append(float((layer(case.y, case.physics) * cotangent).sum().detach()))
                p.data -= sign * 1e-5
            assert float(p.grad) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_any_loss_and_an_optimizer_step():
    case = build("tv_isotropic", "denoising", size=(8, 8), weight=0.5)
    layer = bi.BilevelReconstructor(case.energy)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        x = layer(case.y, case.physics)
        loss = torch.nn.functional.smooth_l1_loss(x, case.x_true, beta=0.05) + 0.01 * x.std()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        certificate = layer.certificate
        assert certificate.certified and certificate.backward_bound < 1e-4 and certificate.reason == ""
        assert bool((certificate.distance_bound < 1e-8).all())
    assert losses[-1] < losses[0]
    assert isinstance(layer, deepinv.models.Reconstructor)
    # without anything to differentiate it is a plain reconstruction
    with torch.no_grad():
        assert not layer(case.y, case.physics).requires_grad


@pytest.mark.parametrize("regularizer", CERTIFIED_REGULARIZERS)
@pytest.mark.parametrize("dtype", [F32, pytest.param(F64, marks=pytest.mark.slow)])
def test_backward_bound_of_the_layer_holds(regularizer, dtype):
    for physics in ("denoising", "blur_circular"):
        case = build(regularizer, physics, dtype=dtype, size=(6, 6))
        cotangent = torch.randn(case.x_true.shape, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)

        def gradient(module, y, c, case=case):
            case.energy.zero_grad()
            module(y, case.physics).backward(c)
            return flat({n: p.grad for n, p in case.energy.named_parameters() if p.requires_grad})

        exact = bi.BilevelReconstructor(case.energy)
        expected = gradient(exact, case.y.double(), cotangent.double())
        for tol in (1e-2, 1e-5, None):
            layer = bi.BilevelReconstructor(case.energy, error_tol=tol)
            error = float(np.linalg.norm((gradient(layer, case.y, cotangent) - expected).astype(float)))
            assert error <= layer.certificate.backward_bound + exact.certificate.backward_bound


def test_uncertified_backward_warns_once():
    case = build("user", "denoising")
    layer = bi.BilevelReconstructor(case.energy, error_tol=1e-6)
    with pytest.warns(NotCertifiedWarning, match="not certified.*UserRegularizer"):
        layer(case.y, case.physics).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(case.y, case.physics).sum().backward()
    assert not layer.certificate.certified and math.isinf(layer.certificate.backward_bound)
    assert layer.certificate.reason.startswith("not certified")


# --- losses without constants, misuse


def test_a_plain_function_as_loss_is_not_certified():
    case = build("tv_isotropic", "denoising")
    h = bi.hypergradient(
        case.problem, lambda x, t: 0.5 * (x - t).square().flatten(1).sum(1), case.x_true,
        error_tol=1e-11, residual_tol=1e-11,
    )  # fmt: skip
    same = estimate(case, error_tol=1e-11, residual_tol=1e-11)
    assert not h.certified and "smoothness" in h.reason and math.isinf(h.bound)
    assert np.allclose(flat(h.grad).astype(float), flat(same.grad).astype(float), rtol=1e-8)
    assert h.loss_interval == (-math.inf, math.inf)
    assert not bi.hypergradient(
        case.problem, lambda x, t: (x - t).abs().flatten(1).sum(1), case.x_true, relative=0.1
    ).certified


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "exactly one of"),
        ({"relative": 0.1, "error_tol": 0.1}, "exactly one of"),
        ({"relative": 0.1, "bound_tol": 0.1}, "exactly one of"),
        ({"relative": 0.0}, "relative as a positive"),
        ({"relative": math.nan}, "relative as a positive"),
        ({"bound_tol": -1.0}, "bound_tol as a positive"),
        ({"error_tol": -1.0}, "error_tol >= 0"),
        ({"error_tol": math.nan}, "error_tol >= 0"),
        ({"residual_tol": -1.0}, "residual_tol >= 0"),
        ({"error_tol": torch.ones(3)}, "one value per sample"),
        ({"error_tol": 0.1, "certificate": "magic"}, "Unknown certificate"),
        ({"error_tol": 0.1, "x0": torch.zeros(1, 1, 2, 2)}, "x0"),
        ({"error_tol": 0.1, "q0": torch.zeros(1, 1, 2, 2)}, "q0"),
    ],
)
def test_arguments_that_make_no_sense(settings, match):
    with pytest.raises(ValueError, match=match):
        estimate(build("tv_isotropic", "denoising"), **settings)


def test_more_misuse():
    case = build("tv_isotropic", "denoising")
    settings = {"error_tol": 0.1, "residual_tol": 0.1}
    with pytest.raises(ValueError, match="x_true"):
        bi.hypergradient(case.problem, bi.SquaredError(), case.x_true[:1], **settings)
    with pytest.raises(ValueError, match="finite"):
        bi.hypergradient(case.problem, bi.SquaredError(), case.x_true * math.nan, **settings)
    with pytest.raises(ValueError, match="one value per sample"):
        bi.hypergradient(case.problem, lambda x, t: (x - t).square().sum(), case.x_true, **settings)
    blur = build("tv_isotropic", "blur_reflect")
    with pytest.raises(ValueError, match="metric"):
        estimate(blur, certificate="metric", **settings)
    frozen = bi.VariationalEnergy(bi.TotalVariation(learn_weight=False, learn_smoothing=False))
    with pytest.raises(ValueError, match="learnable"):
        bi.hypergradient(frozen.bind(case.y, case.physics), bi.SquaredError(), case.x_true, **settings)
    with pytest.raises(ValueError, match="method"):
        bi.unrolled(case.problem, bi.SquaredError(), case.x_true, method="newton")
    with pytest.raises(ValueError, match="steps"):
        bi.unrolled(case.problem, bi.SquaredError(), case.x_true, steps=0)
    with pytest.raises(ValueError, match="constants"):
        user = build("user", "denoising")
        bi.unrolled(user.problem, bi.SquaredError(), user.x_true)


def test_nothing_of_the_caller_changes():
    case = build("tv_isotropic", "denoising")
    before = [a.clone() for a in (case.y, case.x_true)]
    theta = {n: p.detach().clone() for n, p in case.problem.theta.items()}
    x0, q0 = case.y.clone(), torch.ones_like(case.y)
    estimate(case, error_tol=1e-3, residual_tol=1e-3, x0=x0, q0=q0)
    bi.unrolled(case.problem, bi.SquaredError(), case.x_true, steps=3)
    assert torch.equal(x0, case.y) and torch.equal(q0, torch.ones_like(q0))
    assert all(torch.equal(a, b) for a, b in zip((case.y, case.x_true), before, strict=True))
    assert all(torch.equal(p, theta[n]) and p.grad is None for n, p in case.problem.theta.items())
    assert torch.is_grad_enabled()


def test_cost_counts_what_was_done():
    case = build("tv_isotropic", "denoising", batch=3)
    h = estimate(case, error_tol=1e-6, residual_tol=1e-6)
    assert h.cost.gradients > 0 and h.cost.hvps >= int(h.linear.iterations.sum()) and h.cost.seconds > 0
    again = estimate(case, error_tol=1e-6, residual_tol=1e-6, x0=h.x, q0=h.q)
    assert again.cost.hvps < h.cost.hvps


@pytest.mark.parametrize(
    "physics", ["denoising", "inpainting", "blur_fft", pytest.param("mri", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("error_tol", [0.3, 1e-2])
def test_polished_errors_are_known_from_both_sides(physics, error_tol):
    channels = 2 if physics == "mri" else 1
    case = build("tv_isotropic", physics, channels=channels, size=(9, 8), weight=0.2, smoothing=0.02)
    true, slack, *_ = reference(case)
    h = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, error_tol=error_tol, certificate="polished")
    assert h.certified and h.verified_by is not None

    def error(grad):
        return float(np.linalg.norm((flat(grad) - true).astype(float)))

    better, its_bound = h.verified_by
    assert error(better) <= its_bound + slack < error(h.grad)
    assert error(h.grad) <= h.bound + slack and h.bound <= 3 * error(h.grad)
    first, first_bound = h.before_polish
    assert error(first) <= first_bound + slack and first_bound <= 1.5 * error(first)
    assert h.relative_bound <= 1e-2


def test_averages_of_polished_estimates_keep_their_tight_bounds():
    cases = [build("tv_isotropic", "denoising", channels=1, size=(8, 9), seed=k) for k in (1, 2)]
    parts = [
        bi.hypergradient(c.problem, bi.SquaredError(), c.x_true, error_tol=0.1, certificate="polished") for c in cases
    ]
    mean = bi.hypergradients.average(parts, [2, 2])
    true = np.mean([reference(c)[0] for c in cases], axis=0)
    for grad, bound in ((mean.grad, mean.bound), mean.before_polish, mean.verified_by):
        error = float(np.linalg.norm((flat(grad) - true).astype(float)))
        assert error <= bound
    assert mean.bound <= np.mean([p.bound for p in parts]) and mean.verified_by[1] < mean.bound
