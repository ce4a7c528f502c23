"""Noise-conditional regularizers: derivatives against autograd, bounds against dense matrices, one sigma per image."""

from __future__ import annotations

import math
from pathlib import Path

import deepinv
import numpy as np
import pytest
import test_ridge
import torch
from cases import UserRegularizer
from hypothesis import given
from hypothesis import strategies as st
from test_ridge import hessian_and_columns, image
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.assembly import make_energy, make_regularizer
from bilevel_imaging.cli import read_config, train_main
from bilevel_imaging.config import RegularizerConfig
from bilevel_imaging.regularizers.noise_conditional import hat_functions
from bilevel_imaging.tensors import norm, per_sample

F64 = torch.float64
NODES = (0.05, 0.1, 0.2)
LEVELS = (0.02, 0.13, 0.4)  # below, between and above the nodes
INSIDE = {
    "fields_of_experts": lambda: test_ridge.model("smoothed_absolute"),
    "convex_ridge": lambda: test_ridge.model("spline"),
    "total_variation": lambda: bi.TotalVariation(0.05, 0.1),
    "anisotropic": lambda: bi.TotalVariation(0.05, 0.1, isotropic=False),
    "tikhonov": lambda: bi.Tikhonov(0.3, "gradient"),
    "sum": lambda: bi.Sum(bi.TotalVariation(0.05, 0.1), test_ridge.model("log_cosh")),
    "scaled_sum": lambda: bi.Scaled(bi.Sum(bi.TotalVariation(0.5, 0.1), bi.Tikhonov(0.2)), 0.2),
    "nothing_learned": lambda: bi.TotalVariation(0.05, 0.1, learn_weight=False, learn_smoothing=False),
    "user": lambda: UserRegularizer(0.05, 0.1),
}
BY_BLOCKS = ("fields_of_experts", "convex_ridge", "sum")
BY_COLUMNS = ("total_variation", "anisotropic", "tikhonov", "scaled_sum", "nothing_learned")


def model(name: str, seed: int = 0, **options) -> bi.NoiseConditional:
    """Away from the start, where w s = 1."""
    regularizer = bi.NoiseConditional(INSIDE[name](), NODES, reference=0.1, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (regularizer.log_weights, regularizer.log_scales):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=F64)
    return regularizer


def levels(batch: int = 3) -> Tensor:
    return torch.tensor(LEVELS[:batch], dtype=F64)


def problem_at(name: str, seed: int = 0, ridge: float = 0.1) -> tuple[bi.LowerLevelProblem, Tensor, bi.Regularizer]:
    regularizer = model(name, seed).at_noise_level(levels()[[0, 2]])
    y = image((2, 1, 6, 7), seed, 0.2)
    physics = deepinv.physics.Inpainting((1, 6, 7), mask=(image((1, 6, 7), 5) > -0.1).double())
    return bi.VariationalEnergy(regularizer, ridge=ridge).bind(y, physics), y, regularizer


# --- the model


@given(st.lists(st.floats(-5, 1), min_size=1, max_size=6, unique=True), st.floats(-7, 3))
def test_hat_functions_interpolate(nodes, point):
    nodes = sorted(nodes)
    if any(b - a < 1e-6 for a, b in zip(nodes, nodes[1:], strict=False)):
        return
    hats = hat_functions(torch.tensor(nodes, dtype=F64), torch.tensor([point, nodes[0]], dtype=F64))
    values = np.random.default_rng(0).normal(size=len(nodes))
    assert float(hats[0] @ torch.from_numpy(values)) == pytest.approx(np.interp(point, nodes, values), abs=1e-9)
    assert float(hats[0].sum()) == pytest.approx(1, abs=1e-12) and float(hats.min()) >= 0
    assert hats[1, 0] == 1 and float(hats.norm(dim=1).max()) <= 1 + 1e-12


def test_weights_and_scales_are_interpolated_and_beyond_the_nodes_proportional():
    regularizer = model("tikhonov")
    sigma = torch.tensor([0.001, 0.01, *NODES, 0.07, 0.5, 2.0], dtype=F64)
    with torch.no_grad():
        w, s, _ = regularizer.at_noise_level(sigma).factors(len(sigma))
    for found, stored, sign in ((w, regularizer.log_weights, 1), (s, regularizer.log_scales, -1)):
        torch.testing.assert_close(found[2:5].log(), stored)
        assert float(found[5].log()) == pytest.approx(
            np.interp(math.log(0.07), np.log(NODES), stored.detach().numpy()), abs=1e-12
        )
        assert float(found[1] / found[0]) == pytest.approx(10**sign)
        assert float(found[7] / found[6]) == pytest.approx(4**sign)


@pytest.mark.parametrize("sigma", [0.1, 0.03, 0.7])
def test_start_denoises_scaled_images_to_scaled_images(sigma):
    inside = INSIDE["convex_ridge"]()
    regularizer = bi.NoiseConditional(inside, NODES, reference=0.1)
    x, ratio = image((2, 1, 8, 9)), sigma / 0.1
    with torch.no_grad():
        at = regularizer.at_noise_level(sigma)
        torch.testing.assert_close(at.fn(ratio * x), ratio**2 * inside.fn(x))
        torch.testing.assert_close(at.grad(ratio * x), ratio * inside.grad(x))
        reference = regularizer.at_noise_level(torch.full((2,), 0.1, dtype=F64))
        torch.testing.assert_close(reference.grad(x), inside.grad(x), rtol=1e-13, atol=0)
    physics = deepinv.physics.Denoising()
    ours, _ = bi.reconstruct(ratio * x, physics, regularizer, 1e-9, noise_level=sigma)
    theirs, _ = bi.reconstruct(x, physics, inside, 1e-9)
    assert float((ours - ratio * theirs).norm()) < 2e-8


@pytest.mark.parametrize("name", INSIDE)
def test_products_match_autograd(name):
    regularizer = model(name).at_noise_level(levels())
    x, v, q = (image((3, 1, 9, 10), seed) for seed in range(3))
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(regularizer.fn(leaf).sum(), leaf, create_graph=True)
    at = regularizer.linearize(x)
    torch.testing.assert_close(regularizer.grad(x).detach(), grad.detach())
    torch.testing.assert_close(at.grad, grad.detach())
    torch.testing.assert_close(at.hvp(v), torch.autograd.grad(grad, leaf, v, retain_graph=True)[0])
    names = list(regularizer.trainable())
    assert names[:2] == ["log_weights", "log_scales"]
    products = torch.autograd.grad((grad * q).sum(), list(regularizer.trainable().values()))
    mixed = at.mixed_vjp(q)
    assert list(mixed) == names
    for parameter, product in zip(names, products, strict=True):
        torch.testing.assert_close(mixed[parameter], product)
    columns = at.mixed_columns()
    assert (columns is not None) == (name in BY_COLUMNS)
    if columns is not None:
        along = torch.einsum("bndhw,bdhw->n", columns, q)
        torch.testing.assert_close(along, torch.cat([p.flatten() for p in products]))


@pytest.mark.parametrize(("learned", "names"), [((True, False), ["log_weights"]), ((False, True), ["log_scales"])])
def test_only_what_is_learned_has_products_and_bounds(learned, names):
    regularizer = model("nothing_learned", learn_weights=learned[0], learn_scales=learned[1]).at_noise_level(0.07)
    x = image((2, 1, 5, 6))
    at, one = regularizer.linearize(x), torch.ones(2, dtype=F64)
    assert list(at.mixed_vjp(x)) == names and at.mixed_columns().shape[1] == 3
    assert at.local_change(x, one, one).slopes.shape == at.mixed_energy_norms().shape == (2, 3)
    assert at.mixed_block_norms(one).shape == (2, 1) and at.directional(x, one).mixed_components.shape == (2, 3)
    assert at.mixed_norm_bound().shape == (2,)


@pytest.mark.parametrize("name", ["convex_ridge", "scaled_sum"])
def test_a_batch_is_its_samples_one_by_one(name):
    regularizer, sigma, one = model(name), levels(), torch.ones(3, dtype=F64)
    whole = regularizer.at_noise_level(sigma)
    x, q = image((3, 1, 7, 8), 1), image((3, 1, 7, 8), 2)
    at = whole.linearize(x)

    def measured(at, x: Tensor, q: Tensor, one: Tensor) -> list[Tensor]:
        change, along, ball = at.local_change(q, one, 0.1 * one), at.directional(q, one), at.constants_on_ball(one)
        found = [at.grad, at.hvp(q), change.hessian, change.slopes, change.energy, along.hessian, along.mixed]
        found += [ball.mixed_lipschitz, ball.smoothness, at.constants.hessian_lipschitz, at.mixed_norm_bound()]
        return [t for t in [*found, at.relative_curvature(one, 0.1 * one)] if t is not None]

    together = measured(at, x, q, one)
    for i in range(3):
        index = torch.tensor([i])
        part = slice(i, i + 1)
        alone = regularizer.at_noise_level(sigma[part])
        with torch.no_grad():
            torch.testing.assert_close(whole.fn(x)[part], alone.fn(x[part]), rtol=1e-13, atol=0)
        for other in (alone.linearize(x[part]), at.subset(index), whole.subset(index).linearize(x[part])):
            for a, b in zip(together, measured(other, x[part], q[part], one[part]), strict=True):
                torch.testing.assert_close(a[part], b, rtol=1e-9, atol=1e-12)
    products = [at.subset(torch.tensor([i])).mixed_vjp(q[i : i + 1]) for i in range(3)]
    for parameter, product in at.mixed_vjp(q).items():
        torch.testing.assert_close(product, sum(p[parameter] for p in products))


def test_a_subset_of_problems_has_its_own_levels():
    problem, y, regularizer = problem_at("convex_ridge")
    part = problem.subset(torch.tensor([1]))
    assert list(part.theta) == list(problem.theta)
    with torch.no_grad():
        torch.testing.assert_close(part.grad(y[1:]), problem.grad(y)[1:])
        torch.testing.assert_close(part.value(y[1:]), problem.value(y)[1:])
    torch.testing.assert_close(part.constants().smoothness, problem.constants().smoothness[1:])
    assert regularizer.at_noise_level(0.1).subset(torch.tensor([0])).levels.dim() == 0


# --- bounds


def rescaled(inside: bi.Regularizer, factor: float, scale: float) -> bi.Regularizer:
    """factor / scale * R(scale x) with other parameters."""
    if isinstance(inside, bi.TotalVariation):
        weight, smoothing = (float(p.detach().exp()) for p in (inside.log_weight, inside.log_smoothing))
        return bi.TotalVariation(factor * weight, smoothing / scale, isotropic=inside.isotropic)
    return inside.rescaled(factor, scale)


@pytest.mark.parametrize("name", ["fields_of_experts", "convex_ridge", "total_variation", "anisotropic"])
@pytest.mark.parametrize("sigma", LEVELS)
def test_all_that_is_said_is_said_of_the_rescaled_regularizer(name, sigma):
    regularizer = model(name, learn_weights=False, learn_scales=False).at_noise_level(sigma)
    weight, scale = (float(f) for f in regularizer.factors(1)[:2])
    x, q, radius, mu = image((2, 1, 7, 8), 1), image((2, 1, 7, 8), 2), 0.07 * torch.ones(2, dtype=F64), 0.03
    mu = mu * torch.ones_like(radius)
    ours, theirs = regularizer.linearize(x), rescaled(regularizer.regularizer, weight, scale).linearize(x)

    def said(at) -> dict[str, Tensor | float | None]:
        change, along = at.local_change(q, radius, mu), at.directional(q, radius)
        ball = at.constants_on_ball(radius) or at.constants
        memory = at.newton_memory(cold=False)
        step = torch.tensor([0.5, 1.0], dtype=F64)
        model = at.newton_model(memory)
        return {
            "gradient": at.grad,
            "product": at.hvp(q),
            "norm": at.mixed_norm_bound(),
            "energy norms": at.mixed_energy_norms(),
            "block norms": at.mixed_block_norms(mu),
            "curvature": at.relative_curvature(radius, mu),
            "hessian": change.hessian,
            "slopes": change.slopes.expand(2, -1),
            "energy": change.energy,
            "length": at.length_scale,
            "diffusion": at.diffusion(),
            "spectrum": at.cosine_spectrum(),
            "model": model.hvp(q),
            "advanced": at.newton_model(model.advance(q, step)).hvp(q),
            **{f"along {n}": v for n, v in vars(along).items()},
            **{f"ball {n}": v for n, v in vars(ball).items() if n != "reason"},
            **{f"everywhere {n}": v for n, v in vars(at.constants).items() if n != "reason"},
        }

    expected = said(theirs)
    for key, value in said(ours).items():
        if value is None or expected[key] is None:
            assert value is expected[key], key
        else:
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-10, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", BY_BLOCKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_the_mixed_derivative(name, seed, monkeypatch):
    monkeypatch.setattr(test_ridge, "problem_at", problem_at)
    test_ridge.test_bounds_of_the_mixed_derivative(name, seed)


@pytest.mark.parametrize("name", ["fields_of_experts", "convex_ridge", "total_variation", "scaled_sum"])
@pytest.mark.parametrize("radius", [1e-3, 0.05, 1.0])
def test_changes_on_balls(name, radius, monkeypatch):
    monkeypatch.setattr(test_ridge, "problem_at", problem_at)
    test_ridge.test_changes_on_balls(name, radius)


@pytest.mark.parametrize("name", BY_COLUMNS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bounds_of_columns(name, seed):
    problem, x, _ = problem_at(name, seed)
    at = problem.linearize(x)
    columns, bounds = at.mixed_columns(), at.mixed_energy_norms()
    for sample in range(2):
        H, J = hessian_and_columns(problem, x, sample)
        torch.testing.assert_close(columns[sample].flatten(1).T, J)
        energies = (J * torch.linalg.solve(H, J)).sum(0).sqrt()
        assert bool((energies <= bounds[sample] * (1 + 1e-12)).all())
        assert bool((bounds[sample, 3:6] <= 30 * energies[3:6] + 1e-12).all())


@pytest.mark.parametrize("radius", [1e-3, 0.3])
def test_changes_of_weights_and_scales_along_q(radius):
    regularizer = model("nothing_learned").at_noise_level(levels()[:2])
    x, q, radii = image((2, 1, 6, 7), 1), image((2, 1, 6, 7), 2), torch.full((2,), radius, dtype=F64)
    at = regularizer.linearize(x)
    along, lipschitz = at.directional(q, radii), at.constants_on_ball(radii).mixed_lipschitz
    for e in (q, at.hvp(q), x, image(x.shape, 3)):
        e = radius * e / per_sample(norm(e), e)
        columns = regularizer.linearize(x + e).mixed_columns() - at.mixed_columns()
        change = torch.einsum("bndhw,bdhw->bn", columns, q).abs()
        assert bool((change <= along.mixed_components * radius + 1e-12).all())
        assert bool((change.norm(dim=1) <= along.mixed * radius + 1e-12).all())
        assert bool((torch.linalg.matrix_norm(columns.flatten(2), 2) <= lipschitz * radius + 1e-12).all())


def dense(product, like: Tensor) -> Tensor:
    """Symmetric matrices ``(B, N, N)`` of a product."""
    pixels = like[0].numel()
    columns = []
    for k in range(pixels):
        unit = torch.zeros_like(like).flatten(1)
        unit[:, k] = 1
        columns.append(product(unit.reshape(like.shape)).flatten(1))
    return torch.stack(columns, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fields_of_experts", "convex_ridge", "total_variation", "anisotropic"])
@pytest.mark.parametrize(("radius", "lowest", "extent"), [(1e-3, 0.1, 1), (0.3, 0.1, 1), (2.0, 0.1, 1), (5.0, 1e-3, 0)])
def test_slopes_of_weights_and_scales_for_the_smallest_energy(name, radius, lowest, extent):
    """DJ[e] in the dual norm of R'' + mu I, as if nothing else were in the energy."""
    regularizer = model(name, 2).at_noise_level(levels()[[0, 2]])
    x, radii = extent * image((2, 1, 6, 7), 2, 0.2), torch.full((2,), radius, dtype=F64)
    slopes = regularizer.linearize(x).local_change(image(x.shape, 3), radii, torch.full_like(radii, lowest)).slopes
    count = 1 if name in BY_BLOCKS else len(NODES)
    spread = regularizer.factors(2)[2].norm(dim=1)  # columns and blocks are hat functions times the two fields
    bounds = [slopes[:, k * count : (k + 1) * count].norm(dim=1) / spread for k in range(2)]

    def metric(at) -> Tensor:
        return dense(at.hvp, x) + lowest * torch.eye(x[0].numel(), dtype=F64)

    def length(e: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->b", e.flatten(1), matrix, e.flatten(1)).sqrt()

    for e in (image(x.shape, 7), image(x.shape, 8), *([x, -x] if extent else [])):
        e = e * per_sample(radius / length(e, metric(regularizer.linearize(x))), e)
        for t in (0.0, 0.5, 1.0):
            there, step = x + t * e, 1e-5 * min(1.0, 1 / radius)
            matrix = metric(regularizer.linearize(there))
            ahead, behind = (regularizer.linearize(there + sign * step * e) for sign in (1, -1))
            for field, bound in zip(("grad", "_scale_field"), bounds, strict=True):
                change = ((getattr(ahead, field) - getattr(behind, field)) / (2 * step)).flatten(1)
                dual = (change * torch.linalg.solve(matrix, change)).sum(1).sqrt()
                assert bool((dual <= 1.001 * bound * length(e, matrix) + 1e-7).all())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", [n for n in INSIDE if n != "user"])
def test_hypergradients_are_certified(name, dtype):
    regularizer, sigma = model(name), torch.tensor((0.03, 0.12, 0.3), dtype=F64)
    x_true = image((3, 1, 9, 9), 1)
    y = (x_true + per_sample(sigma, x_true) * image(x_true.shape, 2, 1.0)).to(dtype)
    energy = bi.VariationalEnergy(regularizer.at_noise_level(sigma))
    physics, loss = deepinv.physics.Denoising(), bi.SquaredError()
    exact = bi.hypergradient(
        energy.bind(y.double(), physics), loss, x_true.to(dtype).double(), error_tol=1e-12, residual_tol=1e-12
    )
    for accuracy in ({"relative": 0.5}, {"relative": 1e-3}, {"error_tol": 0.1, "residual_tol": 0.1}):
        h = bi.hypergradient(energy.bind(y, physics), loss, x_true.to(dtype), **accuracy)
        error = torch.cat([(h.grad[n] - exact.grad[n]).flatten() for n in h.grad]).norm()
        assert h.certified and error <= h.bound
        assert "relative" not in accuracy or h.relative_bound <= accuracy["relative"]
        assert h.loss_interval[0] <= exact.loss_interval[1] and exact.loss_interval[0] <= h.loss_interval[1]


def test_hypergradients_with_learned_data_weights_are_certified():
    sigma, x_true = levels()[:2], image((2, 1, 8, 8), 1)
    energy = bi.VariationalEnergy(model("total_variation").at_noise_level(sigma), data_weight=bi.energies.NoiseWeight())
    problem = energy.bind(x_true + 0.1 * image(x_true.shape, 2, 1.0), deepinv.physics.Denoising())
    exact = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=1e-12, residual_tol=1e-12)
    h = bi.hypergradient(problem, bi.SquaredError(), x_true, relative=0.1)
    assert h.certified and torch.cat([(h.grad[n] - exact.grad[n]).flatten() for n in h.grad]).norm() <= h.bound


@pytest.mark.parametrize("name", ["fields_of_experts", "total_variation"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_gradients_are_within_their_rounding_bound(name, offset):
    regularizer = model(name).at_noise_level(levels())
    y = offset + image((3, 1, 12, 12))
    single = bi.VariationalEnergy(regularizer).bind(y.float(), deepinv.physics.Denoising())
    x = (y + image(y.shape, 1)).float()
    with torch.no_grad():
        error = norm(single.grad(x).double() - single.double().grad(x.double()))
    assert bool((error <= single.gradient_rounding(x)).all())


# --- use


def test_saved_and_loaded(tmp_path):
    regularizer, x = model("convex_ridge"), image((3, 1, 12, 12))
    loaded = bi.load_regularizer(bi.save_regularizer(tmp_path / "regularizer.safetensors", regularizer))
    assert loaded.nodes == regularizer.nodes and loaded.levels is None
    with torch.no_grad():
        ours, theirs = (r.at_noise_level(levels()).grad(x) for r in (regularizer, loaded))
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_built_from_plain_values():
    options = {"regularizer": {"kind": "total_variation", "weight": 0.05}, "nodes": [0.1, 0.2], "learn_scales": False}
    regularizer = make_regularizer(RegularizerConfig("noise_conditional", options=options))
    assert list(regularizer.trainable()) == ["log_weights", "regularizer.log_weight", "regularizer.log_smoothing"]
    assert regularizer.arguments()["regularizer"]["kind"] == "total_variation"


def test_parameters_are_shared_with_every_level():
    regularizer = model("convex_ridge")
    at = regularizer.at_noise_level(levels())
    theta = bi.VariationalEnergy(at).theta
    assert list(theta) == list(bi.VariationalEnergy(regularizer).theta)
    assert all(p is theta[f"regularizer.{n}"] for n, p in regularizer.named_parameters())
    x = image((3, 1, 8, 8))
    with torch.no_grad():
        before = at.fn(x)
        regularizer.log_weights += 1
        torch.testing.assert_close(at.fn(x), math.e * before)


def test_wrong_use_is_named():
    inside = bi.TotalVariation()
    for nodes in ((), (0.2, 0.1), (0.0, 0.1), (0.1, math.inf), (math.nan,)):
        with pytest.raises(ValueError, match="nodes as increasing"):
            bi.NoiseConditional(inside, nodes)
    with pytest.raises(ValueError, match="reference"):
        bi.NoiseConditional(inside, reference=0.0)
    with pytest.raises(ValueError, match="a dict with its arguments"):
        bi.NoiseConditional({"kind": "unknown"})
    regularizer = bi.NoiseConditional(inside)
    for sigma in (0.0, -1.0, math.nan, math.inf, torch.ones(2, 1)):
        with pytest.raises(ValueError, match="one positive number"):
            regularizer.at_noise_level(sigma)
    y, physics = image((2, 1, 8, 8)), deepinv.physics.Denoising()
    with pytest.raises(ValueError, match=r"at_noise_level\(sigma\)"):
        bi.VariationalEnergy(regularizer).bind(y, physics)
    with pytest.raises(ValueError, match="noise_level=sigma"):
        bi.reconstruct(y, physics, regularizer)
    with pytest.raises(ValueError, match="one noise level per image, 2. Got 3"):
        bi.reconstruct(y, physics, regularizer, noise_level=levels())
    with pytest.raises(ValueError, match="no noise_level for TotalVariation"):
        bi.reconstruct(y, physics, inside, noise_level=0.1)


CONFIG = Path(__file__).resolve().parent.parent / "scripts" / "configs" / "convex_ridge_conditional.yaml"


def test_training_over_a_range_of_noise_levels(tmp_path):
    options = (
        "--data.train= --data.val= --regularizer.start= --data.patch_size=16 --data.max_images=2 --data.eval_size=24 "
        "--upper.minibatch=3 --upper.max_steps=3 --logging.tensorboard=false --logging.progress=false "
        "--logging.validate_images=1"
    ).split()
    small = '--regularizer.options={"regularizer": {"kind": "convex_ridge", "features": [3], "size": 3, "knots": 4}}'
    assert train_main([f"--config={CONFIG}", f"--output={tmp_path / 'run'}", small, *options]) == 0
    learned = bi.load_regularizer(tmp_path / "run" / "regularizer.safetensors")
    start = make_energy(read_config(tmp_path / "run")).regularizer
    assert not torch.equal(learned.log_weights, start.log_weights)
    assert not torch.equal(learned.log_scales, start.log_scales)
    y = image((2, 1, 8, 8))
    x, info = bi.reconstruct(
        y, deepinv.physics.Denoising(), learned, noise_level=torch.tensor([0.01, 0.2]), error_tol=1e-6
    )
    assert bool(info.converged.all()) and x.shape == y.shape
