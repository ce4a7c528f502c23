"""Filters, potentials and ridge regularizers: derivatives against autograd, bounds against dense matrices."""

from __future__ import annotations

import copy

import deepinv
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import bilevel_imaging as bi
from bilevel_imaging.assembly import make_regularizer
from bilevel_imaging.config import RegularizerConfig
from bilevel_imaging.regularizers.filter_bank import BOUNDARIES, FilterBank, extend
from bilevel_imaging.regularizers.filter_chain import compose, jacobian_bound, normalize
from bilevel_imaging.regularizers.potentials import Profile
from bilevel_imaging.regularizers.ridge_linearization import RidgeLinearization
from bilevel_imaging.transforms import cosine_filter

MODELS = {
    "smoothed_absolute": lambda c=1: bi.FieldsOfExperts(4, 3, c, smoothing=0.05, weight=0.05, learn_weight=True),
    "log_cosh": lambda c=1: bi.FieldsOfExperts(4, 3, c, potential="log_cosh", smoothing=0.1, weight=0.05),
    "softplus": lambda c=1: bi.FieldsOfExperts(
        4, 3, c, potential="softplus", smoothing=0.1, weight=0.05, start="random", boundary="zero"
    ),
    "spline": lambda c=1: bi.ConvexRidge(
        (4,), 3, c, knots=8, level=0.05, curvature=1.0, learn_weight=True, learn_scale=True
    ),
    "shared_spline": lambda c=1: bi.ConvexRidge((4,), 5, c, knots=8, level=0.05, curvature=1.0, shared=True),
    "chain": lambda c=1: bi.ConvexRidge((2, 3, 3), 3, c, knots=8, level=0.05, curvature=1.0),
    "potentials_only": lambda c=1: bi.ConvexRidge(
        (4,), 3, c, knots=8, level=0.05, curvature=1.0, learn_filters=False, boundary="zero"
    ),
}


def model(name: str, channels: int = 1, seed: int = 0) -> bi.Regularizer:
    """Away from its start, where parameters are equal."""
    regularizer = MODELS[name](channels)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in regularizer.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) * (p.abs().mean() if p.dim() > 2 else 1)
    return regularizer


def image(shape: tuple[int, ...], seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(bank: FilterBank, shape: tuple[int, int, int]) -> Tensor:
    """W, ``(K, responses, pixels)``."""
    pixels = shape[0] * shape[1] * shape[2]
    with torch.no_grad():
        columns = bank.apply(torch.eye(pixels, dtype=torch.float64).reshape(-1, *shape))
    return columns.flatten(1, 2).permute(2, 1, 0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize(("channels", "planes"), [(1, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("size", [(13, 17), (16, 16), (9, 14), (18, 7)])
def test_filter_bank_is_a_convolution_and_its_adjoint(boundary, channels, planes, size):
    kernels = image((5, channels, 7, 7), 1)
    x, z = image((2, channels * planes, *size), 2), image((2, planes * size[0], size[1], 5), 3)
    bank = FilterBank(kernels, boundary, planes)
    extended = extend(x.reshape(-1, channels, *size), 3, boundary)
    reference = functional.conv2d(extended, kernels).permute(0, 2, 3, 1).reshape(z.shape)
    with torch.no_grad():
        torch.testing.assert_close(bank.apply(x), reference)
        assert torch.allclose((bank.apply(x) * z).sum(), (x * bank.adjoint(z)).sum())
        assert torch.allclose((bank.correlation(z, x) * kernels).sum(), (bank.apply(x) * z).sum())
        single = FilterBank(kernels.float(), boundary, planes)
        torch.testing.assert_close(single.apply(x.float()).double(), reference, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(single.adjoint(z.float()).double(), bank.adjoint(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bank.adjoint(z), bank.adjoint(z).detach())  # the differentiable path
    with torch.no_grad():
        torch.testing.assert_close(bank.adjoint(z), FilterBank(kernels, boundary, planes).adjoint(z))


def test_extension_is_that_of_the_cosine_transform():
    x = torch.arange(4.0).reshape(1, 1, 1, 4).expand(1, 1, 3, 4)
    assert extend(x, 2, "symmetric")[0, 0, 2].tolist() == [1, 0, 0, 1, 2, 3, 3, 2]
    with pytest.raises(ValueError, match="at least 4 x 4"):
        extend(x, 4, "symmetric")


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("shape", [(1, 9, 11), (2, 8, 8)])
def test_norm_bounds_of_filter_banks(boundary, shape):
    for seed in range(3):
        bank = FilterBank(image((4, shape[0], 3, 3), seed), boundary)
        weights = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        matrix = dense(bank, shape)
        largest = torch.linalg.eigvalsh(sum(w * m.T @ m for w, m in zip(weights, matrix, strict=True)))[-1]
        assert largest <= bank.squared_norm(weights) <= bank.extension**2 * shape[0] * 1.5 * largest
        rows = matrix.norm(dim=2).amax(1)
        assert bool((rows <= bank.row_norms() * (1 + 1e-12)).all())
        x, c = image((1, *shape), seed + 9), image((1, shape[0], 3, 3), seed + 5)
        with torch.no_grad():
            assert FilterBank(c, boundary).apply(x).norm() <= bank.patch_factor * c.norm() * x.norm()
            patches = bank.patch_deviations(x)
            centered = c - c.mean((2, 3), keepdim=True)
            assert bool((FilterBank(centered, boundary).apply(x)[..., 0].abs() <= c.norm() * patches + 1e-12).all())


def test_chain_is_one_convolution():
    layers = [image((2, 1, 3, 3), 1), image((4, 2, 5, 5), 2), image((3, 4, 3, 3), 3)]
    x = image((1, 1, 20, 20), 4)
    reference = x
    for layer in layers:
        reference = functional.conv2d(reference, layer)
    torch.testing.assert_close(functional.conv2d(x, compose(layers)), reference)


@pytest.mark.parametrize("seed", range(3))
def test_chain_jacobian_bound(seed):
    layers = [image((2, 1, 3, 3), seed), image((3, 2, 3, 3), seed + 7)]
    sizes = [layer.numel() for layer in layers]

    def effective(flat: Tensor) -> Tensor:
        parts = [p.reshape(layer.shape) for p, layer in zip(flat.split(sizes), layers, strict=True)]
        return normalize(compose(parts)).flatten()

    flat = torch.cat([layer.flatten() for layer in layers])
    jacobian = torch.autograd.functional.jacobian(effective, flat)
    norm = torch.linalg.matrix_norm(jacobian, 2)
    assert norm <= jacobian_bound(layers) <= 20 * norm
    kernels = effective(flat).reshape(3, 1, 5, 5)
    torch.testing.assert_close(kernels.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert float(kernels.mean((2, 3)).abs().max()) < 1e-15


def profile_of(name: str) -> Profile:
    with torch.no_grad():
        return model(name).profile(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("name", ["smoothed_absolute", "log_cosh", "softplus", "spline", "shared_spline"])
def test_potentials(name):
    profile = profile_of(name)
    count = len(profile.curvature_limit)
    t = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64).unsqueeze(1).expand(-1, count)
    value, (slope, curvature) = profile.value(t), profile.slope_and_curvature(t.clone())
    step = t[1, 0] - t[0, 0]
    torch.testing.assert_close(value.diff(dim=0) / step, (slope[1:] + slope[:-1]) / 2, rtol=0, atol=2e-5)
    # psi'' may bend at a knot between two points
    unsure = float(step * profile.third_limit.max())
    torch.testing.assert_close(slope.diff(dim=0) / step, (curvature[1:] + curvature[:-1]) / 2, rtol=0, atol=unsure)
    torch.testing.assert_close(profile.slope(t), slope)
    assert float(curvature.min()) >= 0
    assert bool((curvature.amax(0) <= profile.curvature_limit * (1 + 1e-12)).all())
    third = (curvature.diff(dim=0) / step).abs()
    assert bool((third.amax(0) <= profile.third_limit * (1 + 1e-9)).all())
    if name != "softplus":
        torch.testing.assert_close(slope, -slope.flip(0))


@given(
    st.sampled_from(["smoothed_absolute", "log_cosh", "softplus", "spline"]),
    st.floats(-1, 1),
    st.floats(1e-4, 0.5),
)
def test_change_of_potentials_on_intervals(name, center, reach):
    profile = profile_of(name)
    count = len(profile.curvature_limit)
    z = torch.full((1, count), center, dtype=torch.float64)
    third, lowest = profile.change(z, torch.full_like(z, reach))
    t = (center + reach * torch.linspace(-1, 1, 2001, dtype=torch.float64)).unsqueeze(1).expand(-1, count)
    _, curvature = profile.slope_and_curvature(t.clone())
    assert bool((curvature.amin(0) >= lowest[0] * (1 - 1e-9) - 1e-12).all())
    slopes = (curvature.diff(dim=0) / (t[1, 0] - t[0, 0])).abs().amax(0)
    assert bool((slopes <= third[0] * (1 + 1e-6) + 1e-8).all())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_products_match_autograd(name, channels):
    regularizer = model(name, channels)
    x, v, q = (image((2, channels, 9, 10), seed) for seed in range(3))
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(regularizer.fn(leaf).sum(), leaf, create_graph=True)
    linearization = regularizer.linearize(x)
    with torch.no_grad():
        torch.testing.assert_close(regularizer.fn(x), regularizer.fn(leaf).detach())
        torch.testing.assert_close(regularizer.grad(x), grad.detach())
    torch.testing.assert_close(regularizer.grad(x).detach(), grad.detach())
    torch.testing.assert_close(linearization.grad, grad.detach())
    torch.testing.assert_close(linearization.hvp(v), torch.autograd.grad(grad, leaf, v, retain_graph=True)[0])
    names = list(regularizer.trainable())
    products = torch.autograd.grad((grad * q).sum(), list(regularizer.trainable().values()))
    mixed = linearization.mixed_vjp(q)
    assert list(mixed) == names
    for parameter, product in zip(names, products, strict=True):
        torch.testing.assert_close(mixed[parameter], product)


def test_one_channel_filters_act_on_every_channel():
    regularizer = model("spline")
    x, q = image((2, 2, 8, 9), 1), image((2, 2, 8, 9), 2)
    both, parts = regularizer.linearize(x), [regularizer.linearize(x[:, k : k + 1]) for k in range(2)]
    torch.testing.assert_close(both.grad, torch.cat([part.grad for part in parts], 1))
    separate = [part.mixed_vjp(q[:, k : k + 1]) for k, part in enumerate(parts)]
    for name, product in both.mixed_vjp(q).items():
        torch.testing.assert_close(product, separate[0][name] + separate[1][name])
    with pytest.raises(ValueError, match="filters of 3 channels"):
        model("spline", 3).grad(x)


def test_parameters_changed_in_place_are_noticed():
    regularizer, x = model("smoothed_absolute"), image((1, 1, 8, 8))
    with torch.no_grad():
        before = regularizer.fn(x)
        regularizer.log_weights.data += 0.5
        assert not torch.allclose(regularizer.fn(x), before)
        twin = copy.deepcopy(regularizer)
        torch.testing.assert_close(twin.fn(x), regularizer.fn(x))


def problem_at(name: str, seed: int, ridge: float = 0.1) -> tuple[bi.LowerLevelProblem, Tensor, bi.Regularizer]:
    regularizer = model(name, seed=seed)
    y = image((2, 1, 6, 7), seed, 0.2)
    physics = deepinv.physics.Inpainting((1, 6, 7), mask=(image((1, 6, 7), 5) > -0.1).double())
    return bi.VariationalEnergy(regularizer, ridge=ridge).bind(y, physics), y, regularizer


def hessian_and_columns(problem: bi.LowerLevelProblem, x: Tensor, sample: int) -> tuple[Tensor, Tensor]:
    """H ``(N, N)`` and J ``(N, n)`` of one sample, from autograd through ``value``."""
    pixels = x[0].numel()
    point = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(problem.value(point).sum(), point, create_graph=True)
    rows, mixed = [], []
    for k in range(pixels):
        unit = torch.zeros_like(x)
        unit[sample].view(-1)[k] = 1
        products = torch.autograd.grad(grad, [point, *problem.theta.values()], unit, retain_graph=True)
        rows.append(products[0][sample].flatten())
        mixed.append(torch.cat([p.flatten() for p in products[1:]]))
    return torch.stack(rows), torch.stack(mixed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_the_mixed_derivative(name, seed):
    problem, x, _ = problem_at(name, seed)
    linearization = problem.linearize(x)
    mu = problem.constants().strong_convexity
    bound, blocks = linearization.mixed_norm_bound(), linearization.mixed_block_norms(mu)
    for sample in range(2):
        H, J = hessian_and_columns(problem, x, sample)
        assert torch.linalg.matrix_norm(J, 2) <= bound[sample]
        values, vectors = torch.linalg.eigh(H)
        energy = torch.linalg.matrix_norm(vectors @ torch.diag(values.rsqrt()) @ vectors.T @ J, 2)
        assert energy <= blocks[sample].norm() <= 500 * energy


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("radius", [1e-3, 0.05, 1.0])
def test_changes_on_balls(name, radius):
    problem, x, regularizer = problem_at(name, 3)
    linearization = problem.linearize(x)
    mu = problem.constants().strong_convexity
    q, u, v, e = (image(x.shape, seed, 1.0) for seed in (11, 12, 13, 14))
    radii = torch.full((2,), radius, dtype=torch.float64)
    e = radius * e / e.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    moved = problem.linearize(x + e)
    along = linearization.directional(q, radii)
    change = (moved.hvp(q) - linearization.hvp(q)).flatten(1).norm(dim=1)
    assert bool((change <= along.hessian * radius).all())
    for sample in range(2):
        only = torch.zeros_like(q)
        only[sample] = q[sample]
        after, before = moved.mixed_vjp(only), linearization.mixed_vjp(only)
        difference = torch.cat([(after[n] - before[n]).flatten() for n in after]).norm()
        assert difference <= along.mixed[sample] * radius
        ball = linearization.constants_on_ball(radii)
        assert difference <= ball.mixed_lipschitz[sample] * radius * q[sample].norm()
    assert bool((change <= ball.hessian_lipschitz * radius * q.flatten(1).norm(dim=1)).all())

    # in the norm of the Hessian: third derivatives by differences
    energy = (e * linearization.hvp(e)).flatten(1).sum(1).sqrt()
    e = e * (radius / energy).reshape(-1, 1, 1, 1)
    rate = linearization.relative_curvature(radii, mu)
    local = linearization.local_change(q, radii, mu)
    step = 1e-7  # the second derivative of a spline has a kink at 0
    for t in (0.0, 0.6):
        at = problem.linearize(x + t * e)
        ahead, behind = (problem.linearize(x + (t + s) * e) for s in (step, -step))
        third = (v * (ahead.hvp(v) - behind.hvp(v))).flatten(1).sum(1) / (2 * step)
        assert bool((third.abs() <= 1.001 * rate * radius * (v * at.hvp(v)).flatten(1).sum(1) + 1e-7).all())
        third = (u * (ahead.hvp(q) - behind.hvp(q))).flatten(1).sum(1) / (2 * step)
        size = (e * at.hvp(e)).flatten(1).sum(1).sqrt() * (u * at.hvp(u)).flatten(1).sum(1).sqrt()
        assert bool((third.abs() <= 1.001 * local.hessian * size + 1e-7).all())
        for sample in range(2):
            only = torch.zeros_like(u)
            only[sample] = u[sample]
            after, before = ahead.mixed_vjp(only), behind.mixed_vjp(only)
            slope = torch.cat([(after[n] - before[n]).flatten() for n in after]).norm() / (2 * step)
            assert slope <= 1.001 * local.slopes[sample].norm() * size[sample] + 1e-7
    inside = regularizer.linearize(x)
    energies = (q * inside.hvp(q)).flatten(1).sum(1) + mu * q.flatten(1).square().sum(1)
    assert bool((local.energy**2 >= energies * (1 - 1e-9)).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_hypergradients_are_certified(name, dtype):
    regularizer = model(name)
    x_true = image((2, 1, 10, 10), 1)
    y = (x_true + 0.1 * image(x_true.shape, 2, 1.0)).to(dtype)
    x_true = x_true.to(dtype)
    energy = bi.VariationalEnergy(regularizer)
    exact = bi.hypergradient(
        energy.bind(y.double(), deepinv.physics.Denoising()),
        bi.SquaredError(),
        x_true.double(),
        error_tol=1e-12,
        residual_tol=1e-12,
    )
    problem = energy.bind(y, deepinv.physics.Denoising())
    for accuracy in ({"relative": 0.5}, {"relative": 1e-3}, {"error_tol": 0.1, "residual_tol": 0.1}):
        h = bi.hypergradient(problem, bi.SquaredError(), x_true, **accuracy)
        error = torch.cat([(h.grad[n] - exact.grad[n]).flatten() for n in h.grad]).norm()
        assert h.certified and error <= h.bound
        if "relative" in accuracy:
            assert h.relative_bound <= accuracy["relative"]
        assert h.loss_interval[0] <= exact.loss_interval[1] and exact.loss_interval[0] <= h.loss_interval[1]


@pytest.mark.parametrize("name", ["smoothed_absolute", "chain"])
def test_saved_and_loaded(name, tmp_path):
    regularizer, x = model(name), image((1, 1, 12, 12))
    path = bi.save_regularizer(tmp_path / "regularizer.safetensors", regularizer)
    with torch.no_grad():
        torch.testing.assert_close(bi.load_regularizer(path).grad(x), regularizer.grad(x), rtol=0, atol=0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="Unknown potential 'huber'"):
        bi.FieldsOfExperts(potential="huber")
    with pytest.raises(ValueError, match="1 to 8 filters"):
        bi.FieldsOfExperts(9, 3)
    with pytest.raises(ValueError, match="odd filter size"):
        bi.ConvexRidge((8,), 4)
    with pytest.raises(ValueError, match="Unknown boundary"):
        bi.ConvexRidge((8,), 5, boundary="periodic")
    with pytest.raises(ValueError, match="features as a sequence of one or more positive integers"):
        bi.ConvexRidge(())


def test_cosine_spectrum_is_exact_for_symmetric_filters():
    kernels = image((3, 1, 5, 5), 1)
    kernels = kernels + kernels.flip(2)
    bank = FilterBank(kernels + kernels.flip(3), "symmetric")
    weights, v = torch.rand(2, 3, dtype=torch.float64), image((2, 1, 12, 15), 3)
    with torch.no_grad():
        product = bank.adjoint(bank.apply(v) * weights[:, None, None, :])
        torch.testing.assert_close(cosine_filter(v, bank.cosine_spectrum(weights, 12, 15)), product)


@pytest.mark.parametrize("physics", ["denoising", "inpainting", "blur"])
def test_preconditioner_is_positive_definite_and_its_bound_holds(physics):
    shape = (1, 8, 9)
    operator = {
        "denoising": deepinv.physics.Denoising(),
        "inpainting": deepinv.physics.Inpainting(shape, mask=(image(shape, 5) > -0.1).double()),
        "blur": deepinv.physics.BlurFFT(shape, filter=torch.ones(1, 1, 3, 3, dtype=torch.float64) / 9),
    }[physics]
    regularizer = model("spline")
    with torch.no_grad():
        regularizer.log_weight += 3.0
    problem = bi.VariationalEnergy(regularizer, ridge=0.01).bind(image((1, *shape), 1), operator)
    linearization = problem.linearize(image((1, *shape), 2))
    preconditioner = linearization.preconditioner()
    eye = torch.eye(72, dtype=torch.float64).reshape(-1, 1, *shape)
    P = torch.stack([preconditioner(e)[0].flatten() for e in eye])
    H = torch.stack([linearization.hvp(e)[0].flatten() for e in eye])
    torch.testing.assert_close(P, P.T)
    roots = torch.linalg.cholesky(P)
    values = torch.linalg.eigvalsh(roots.T @ H @ roots)
    assert values[0] >= preconditioner.lowest[0] > 0


@pytest.mark.parametrize("name", ["smoothed_absolute", "log_cosh", "spline"])
def test_newton_model(name):
    regularizer, x, v = model(name), image((2, 1, 9, 10), 1), image((2, 1, 9, 10), 2)
    linearization = regularizer.linearize(x)
    exact = linearization.newton_model(linearization.newton_memory(cold=False))
    torch.testing.assert_close(exact.hvp(v), linearization.hvp(v))
    majorizer = linearization.newton_model(linearization.newton_memory(cold=True))
    # psi(s) <= psi(t) + psi'(t) (s - t) + c (s - t)^2 / 2, as even potentials with falling second derivatives have it
    if name != "spline":
        step = (v * linearization.grad).flatten(1).sum(1) + 0.5 * (v * majorizer.hvp(v)).flatten(1).sum(1)
        with torch.no_grad():
            assert bool((regularizer.fn(x + v) <= regularizer.fn(x) + step + 1e-12).all())
    moved = majorizer.advance(v, torch.ones(2, dtype=torch.float64))
    assert bool((moved.abs() <= regularizer.profile(x).slope_limit.detach() * (1 + 1e-12)).all())
    assert model("softplus").linearize(x).newton_memory(cold=True) is None


def test_newton_model_and_preconditioner_save_work():
    x_true = bi.data.photographs(part="test")["camera"][:, 100:148, 200:248].unsqueeze(0)
    y = x_true + 0.1 * image(x_true.shape, 1, 1.0)
    regularizer = bi.FieldsOfExperts(24, 5, smoothing=0.01, weight=0.01)
    problem = bi.VariationalEnergy(regularizer).bind(y, deepinv.physics.Denoising())
    counts = []
    for plain in (False, True):
        problem.cost = type(problem.cost)()
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(RidgeLinearization, "newton_memory", lambda self, *, cold: None)
            solution = bi.lower_solvers.NewtonCG().solve(problem, None, 1e-6)
        assert bool(solution.converged.all())
        counts.append(problem.cost.gradients)
    assert counts[0] < 0.7 * counts[1]
    linearization, rhs = problem.linearize(solution.x), y - x_true
    plain, scaled = (
        bi.linear_solvers.ConjugateGradient(preconditioner=choice).solve(linearization, rhs, 1e-6)
        for choice in (None, "auto")
    )
    assert int(scaled.iterations) < 0.8 * int(plain.iterations)


@pytest.mark.parametrize("shared", [False, True])
def test_start_from_smaller_and_more_filters(shared):
    torch.manual_seed(3)
    small = bi.ConvexRidge([6], 3, start="random", seed=1, shared=shared, weight=0.7, scale=1.3)
    with torch.no_grad():
        small.log_curvatures += torch.randn_like(small.log_curvatures)
    x = torch.rand(2, 1, 12, 11, dtype=torch.float64)

    large = bi.ConvexRidge([6], 7, shared=shared)
    large.start_from(small)
    with torch.no_grad():
        torch.testing.assert_close(large.grad(x), small.grad(x), rtol=1e-12, atol=1e-14)

    fewer = bi.ConvexRidge([4], 5, shared=shared)
    fewer.start_from(small)
    kept = small.steepness()[0].argsort(descending=True, stable=True)[:4].sort().values
    torch.testing.assert_close(fewer.filters()[:, :, 1:4, 1:4], small.filters()[kept])
    assert float(fewer.filters()[:, :, 0].abs().max()) < 1e-15


def test_fields_of_experts_start_from_a_convex_ridge():
    source = bi.ConvexRidge([5], 5, weight=1.3)
    experts = bi.FieldsOfExperts(5, 5)
    experts.start_from(source)
    t = torch.tensor([-1e3, 0.0, 1e-7, 1e3])
    ours, theirs = experts.potentials(t)[1], source.potentials(t)[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(experts.filters(), source.filters())

    tilted = bi.FieldsOfExperts(5, 5, potential="softplus", smoothing=0.03, weight=0.2)
    copied = bi.FieldsOfExperts(5, 7, potential="softplus")
    copied.start_from(tilted)
    torch.testing.assert_close(copied.potentials(t)[1], tilted.potentials(t)[1])


@pytest.mark.parametrize(
    ("regularizer", "start", "message"),
    [
        (bi.ConvexRidge([4], 3), bi.ConvexRidge([4], 5), "size at most 3, not 4 of 1 and 5"),
        (bi.ConvexRidge([4], 3), bi.ConvexRidge([3], 3), "at least 4 filters"),
        (bi.ConvexRidge([4], 3, channels=3), bi.ConvexRidge([4], 3), "of 3 channels"),
        (bi.ConvexRidge([2, 4], 3), bi.ConvexRidge([4], 3), "a chain of filters"),
        (bi.ConvexRidge([4], 3, knots=9), bi.ConvexRidge([4], 3), "same knots"),
        (bi.ConvexRidge([4], 3), bi.FieldsOfExperts(4, 3), "expected a ConvexRidge"),
        (bi.FieldsOfExperts(4, 3), bi.FieldsOfExperts(4, 3, potential="softplus"), "penalize both signs"),
    ],
)
def test_starts_that_do_not_fit_are_named(regularizer, start, message):
    with pytest.raises(ValueError, match=message):
        regularizer.start_from(start)


@torch.no_grad()
def test_starts_at_another_scale(tmp_path):
    """regularizer.start_scale s: R(s x) / s; regularizer.start: of one noise level for all of them."""
    start, x = bi.ConvexRidge([4], 3, seed=3), image((2, 1, 8, 8))
    start.log_curvatures += torch.linspace(-1, 1, start.log_curvatures.numel()).reshape(start.log_curvatures.shape)
    file = str(bi.save_regularizer(tmp_path / "regularizer.safetensors", start))
    options = {"features": [4], "size": 3}
    scaled = make_regularizer(RegularizerConfig("convex_ridge", options=options, start=file, start_scale=2.5))
    torch.testing.assert_close(scaled.fn(x), start.fn(2.5 * x) / 2.5)
    inside = {"regularizer": {"kind": "convex_ridge", **options}}
    conditional = make_regularizer(RegularizerConfig("noise_conditional", options=inside, start=file))
    torch.testing.assert_close(conditional.at_noise_level(25 / 255).fn(x), start.fn(x))
    with pytest.raises(ValueError, match="expected a file in regularizer.start"):
        RegularizerConfig("convex_ridge", start_scale=2.0)
    file = str(bi.save_regularizer(tmp_path / "tv.safetensors", bi.TotalVariation()))
    with pytest.raises(ValueError, match="TotalVariation in .*tv.safetensors does not take it"):
        make_regularizer(RegularizerConfig("total_variation", start=file, start_scale=2.0))


@pytest.mark.parametrize("level", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["spline", "log_cosh", "softplus", "smoothed_absolute"])
def test_autograd_has_second_derivatives_of_flat_images(kind, level):
    """All filter responses are 0 there, where |t| has no derivative."""
    regularizer = bi.ConvexRidge((4,), 3) if kind == "spline" else bi.FieldsOfExperts(4, 3, potential=kind)
    x = torch.full((1, 1, 6, 6), level, dtype=torch.float64)
    v = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = regularizer.hvp(x, v)
    twice = torch.autograd.functional.hvp(lambda z: regularizer.fn(z).sum(), x, v)[1]
    leaf = x.clone().requires_grad_()
    once = torch.autograd.grad((regularizer.grad(leaf) * v).sum(), leaf)[0]
    step = 1e-7  # the second derivative of a spline has a kink at 0
    differences = (regularizer.grad(x + step * v) - regularizer.grad(x - step * v)).detach() / (2 * step)
    torch.testing.assert_close(expected, differences, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twice, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(once, expected, rtol=1e-10, atol=1e-12)
