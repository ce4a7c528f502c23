"""Second-order total variation, sums and multiples, input-convex networks: the model, its constants, certificates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import test_energies
import test_local_norm
import torch
from cases import COMPOSED_REGULARIZERS, UserRegularizer, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.assembly import make_regularizer
from bilevel_imaging.config import RegularizerConfig
from bilevel_imaging.export import load_regularizer, save_regularizer
from bilevel_imaging.linear_solvers import assemble_hessian
from bilevel_imaging.regularizers import HuberTotalVariation
from bilevel_imaging.regularizers.input_convex_bounds import NetworkBounds, kernel_norm, positive_norm
from bilevel_imaging.regularizers.second_order_total_variation_differences import (
    ROW_NORM,
    second_differences,
    second_differences_adjoint,
    squared_norm_bound,
    weighted_bound,
)
from bilevel_imaging.tensors import entries, inner, norm, per_sample

F32, F64 = torch.float32, torch.float64
composed = pytest.mark.parametrize("regularizer", COMPOSED_REGULARIZERS)
every = pytest.mark.parametrize("regularizer", [*COMPOSED_REGULARIZERS, "input_convex"])
SIZES = [(4, 5), (1, 6), (5, 1), (1, 1), (2, 2), (3, 2)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def hypergradient(case, **accuracy) -> bi.Hypergradient:
    return bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **accuracy)


# --- second differences


def second_difference_matrix(height: int, width: int) -> np.ndarray:
    """B entry by entry, ``(3, pixels, pixels)``."""
    matrix = np.zeros((3, height, width, height, width))
    for i in range(height):
        for j in range(width):
            if 0 < j < width - 1:
                matrix[0, i, j, i, j - 1 : j + 2] = 1, -2, 1
            if i < height - 1 and j < width - 1:
                matrix[1, i, j, i : i + 2, j : j + 2] = 2**0.5 * np.array([[1, -1], [-1, 1]])
            if 0 < i < height - 1:
                matrix[2, i, j, i - 1 : i + 2, j] = 1, -2, 1
    return matrix.reshape(3, height * width, height * width)


@pytest.mark.parametrize("size", SIZES)
def test_second_differences_against_their_matrix(size):
    B = torch.from_numpy(second_difference_matrix(*size))
    pixels = B.shape[-1]
    x, p = draw((2, 3, *size), 1), draw((3, 2, 3, *size), 2)
    for sign, matrix in ((-1, B), (1, B.abs())):
        z = torch.einsum("kij,bcj->kbci", matrix, x.flatten(2)).reshape(p.shape)
        torch.testing.assert_close(second_differences(x, sign), z, rtol=1e-14, atol=1e-14)
        adjoint = torch.einsum("kij,kbci->bcj", matrix, p.flatten(3)).reshape(x.shape)
        torch.testing.assert_close(second_differences_adjoint(p, sign), adjoint, rtol=1e-14, atol=1e-14)
    norm2 = float(torch.linalg.matrix_norm(B.reshape(-1, pixels), 2)) ** 2
    assert norm2 <= squared_norm_bound(*size) * (1 + 1e-12)
    rows = torch.linalg.matrix_norm(B.transpose(0, 1), 2).max()
    assert float(rows) <= ROW_NORM * (1 + 1e-12)
    c = draw((3, 2, 1, *size), 3).abs()
    largest = [
        torch.linalg.eigvalsh(sum(b.T @ (w.flatten()[:, None] * b) for b, w in zip(B, c[:, k], strict=True)))[-1]
        for k in range(2)
    ]
    assert bool((weighted_bound(c) >= torch.stack(largest) * (1 - 1e-12)).all())


def test_norms_of_second_differences_are_nearly_attained():
    B = torch.from_numpy(second_difference_matrix(12, 13))
    assert float(torch.linalg.matrix_norm(B.reshape(-1, 156), 2)) ** 2 >= 0.85 * squared_norm_bound(12, 13)
    assert float(torch.linalg.matrix_norm(B.transpose(0, 1), 2).max()) == pytest.approx(ROW_NORM, rel=1e-12)
    ones = torch.ones((3, 1, 1, 12, 13), dtype=F64)
    assert float(weighted_bound(ones)) == pytest.approx(64, rel=1e-9)  # of the operator on large images


@pytest.mark.parametrize("size", SIZES)
def test_second_order_model_against_dense_matrices(size):
    model = bi.SecondOrderTotalVariation(0.7, 0.2)
    x, v = draw((2, 2, *size), 1), draw((2, 2, *size), 2)
    B, at = second_difference_matrix(*size), model.linearize(x)
    for sample in range(2):
        value, gradient, product, smoothing, diagonal = 0.0, [], [], [], []
        for channel in range(2):
            xc, vc = (a[sample, channel].numpy().ravel() for a in (x, v))
            z, dv = B @ xc, B @ vc
            s = np.sqrt((z**2).sum(0) + 0.04)
            value += 0.7 * s.sum()
            gradient.append(0.7 * np.einsum("kij,ki->j", B, z / s))
            smoothing.append(0.7 * np.einsum("kij,ki->j", B, -0.04 * z / s**3))
            weights = [np.eye(3) / t - np.outer(a, a) / t**3 for a, t in zip(z.T, s, strict=True)]
            H = 0.7 * np.einsum("kij,ikl,lim->jm", B, np.array(weights), B)
            product.append(H @ vc)
            diagonal.append(H.diagonal())
            assert np.allclose(H @ vc, 0.7 * np.einsum("kij,ki->j", B, dv / s - z * (z * dv).sum(0) / s**3))
        assert float(model.fn(x).detach()[sample]) == pytest.approx(value, rel=1e-13)
        for ours, theirs in (
            (at.grad, gradient),
            (at.hvp(v), product),
            (at.mixed_columns()[:, 0], gradient),
            (at.mixed_columns()[:, 1], smoothing),
            (at.hessian_diagonal(), diagonal),
        ):
            assert np.allclose(ours[sample].flatten(1).numpy(), np.array(theirs), rtol=1e-10, atol=1e-13)


def test_affine_images_cost_least():
    model = bi.SecondOrderTotalVariation(0.7, 0.1)
    rows, columns = torch.arange(6, dtype=F64)[:, None], torch.arange(7, dtype=F64)
    affine = (0.3 + 0.2 * rows - 0.1 * columns).expand(1, 1, 6, 7)
    assert float(model.fn(affine).detach()) == pytest.approx(0.7 * 0.1 * 42, rel=1e-12)
    assert float(norm(model.grad(affine).detach())) < 1e-12
    assert float(norm(bi.TotalVariation(0.7, 0.1).grad(affine).detach())) > 0.1
    # with the gradient term alone a ramp becomes a staircase; denoised with second order it stays one
    y = affine + 0.1 * draw((1, 1, 6, 7), 0)
    first, second = (bi.VariationalEnergy(r) for r in (bi.TotalVariation(1.0, 1e-3), model))
    errors = []
    for energy in (first, second):
        problem = energy.bind(y, build().physics)
        errors.append(float(norm(bi.lower_solvers.NewtonCG().solve(problem, None, 1e-8).x - affine)))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("smoothing", [1e-2, 1e-4])
def test_newton_is_fast_for_little_smoothing(smoothing):
    for name in ("second_order_tv", "sum_of_orders"):
        case = build(name, size=(16, 16), smoothing=smoothing)
        solution = bi.lower_solvers.NewtonCG().solve(case.problem, None, 1e-9)
        assert bool(solution.converged.all()) and int(solution.iterations.max()) <= 60


# --- constants under the attacks that total variation passes


@pytest.mark.slow
@composed
@pytest.mark.parametrize("nu", [0.01, 1.0])
def test_directional_constants_survive_gradient_ascent(regularizer, nu):
    test_energies.test_directional_constants_survive_gradient_ascent(regularizer, nu)


@composed
def test_global_lipschitz_constants_survive_alternating_ascent(regularizer):
    test_energies.test_global_lipschitz_constants_survive_alternating_ascent(regularizer, 0.1)


@pytest.mark.slow
@composed
@pytest.mark.parametrize("radius", [1e-3, 0.5])
def test_relative_curvature_bounds_the_change_of_the_hessian(regularizer, radius):
    test_local_norm.test_relative_curvature_bounds_the_change_of_the_hessian(regularizer, radius)


@composed
@pytest.mark.parametrize("radius", [1e-3, 0.1])
def test_local_change_bounds_the_changes_along_q(regularizer, radius):
    test_local_norm.test_local_change_bounds_the_changes_along_q(regularizer, radius)


@pytest.mark.parametrize("regularizer", ["second_order_tv", "sum_of_orders"])
def test_relative_curvature_is_attained_up_to_a_small_factor(regularizer):
    case, x, at, mu, hessian = test_local_norm.problem_at(regularizer)
    curvature = float(at.relative_curvature(torch.tensor([1e-4], dtype=F64), mu))
    best, step = 0.0, 1e-5
    for b in second_difference_matrix(5, 6).reshape(-1, 30):
        d = np.linalg.solve(hessian, b)  # what changes one second difference most
        if not d.any():
            continue
        e = torch.from_numpy(d / np.sqrt(d @ hessian @ d)).reshape(x.shape)
        ends = [assemble_hessian(case.problem.linearize(x + s * e))[0].numpy() for s in (-step, step)]
        best = max(best, test_local_norm.relative_norm((ends[1] - ends[0]) / (2 * step), hessian))
    assert curvature / 8 <= best <= curvature * (1 + 1e-3)


@composed
@pytest.mark.parametrize("physics", ["denoising", "inpainting", "mri"])
def test_mixed_energy_norms_need_no_solve_and_bound(regularizer, physics):
    test_local_norm.test_mixed_energy_norms_need_no_solve_and_bound(regularizer, physics)


@every
def test_the_spectrum_is_enclosed(regularizer):
    case = build(regularizer, channels=2, size=(4, 5), smoothing=0.05, ridge=0.03)
    constants = case.problem.constants()
    for x in (torch.zeros_like(case.x_true), case.x_true, case.x_true + draw(case.x_true.shape, 1)):
        eigenvalues = torch.linalg.eigvalsh(assemble_hessian(case.problem.linearize(x)))
        assert bool((constants.strong_convexity <= eigenvalues[:, 0] * (1 + 1e-11)).all())
        assert bool((constants.smoothness >= eigenvalues[:, -1] * (1 - 1e-11)).all())


@pytest.mark.slow
@every
@pytest.mark.parametrize("physics", ["denoising", "blur_fft"])
def test_float32_gradients_are_within_their_rounding_bound(regularizer, physics):
    test_energies.test_float32_gradients_are_within_their_rounding_bound(regularizer, physics)


# --- certificates


@every
@pytest.mark.parametrize(
    "physics", ["denoising", *(pytest.param(p, marks=pytest.mark.slow) for p in ("inpainting", "blur_circular"))]
)
def test_certified_hypergradients_hold(regularizer, physics):
    case = build(regularizer, physics, size=(6, 6), smoothing=0.1)
    best = hypergradient(case, error_tol=1e-12, residual_tol=1e-12)
    assert best.certified and best.bound < 1e-6 * best.norm
    for accuracy in (
        {"relative": 0.1},
        {"error_tol": 1e-2, "residual_tol": 1e-2},
        {"error_tol": 1e-4, "residual_tol": 1e-3, "certificate": "classical"},
        {"error_tol": 1e-4, "residual_tol": 1e-3, "certificate": "directional"},
        {"error_tol": 1e-3, "residual_tol": 1e-3, "certificate": "polished"},
    ):
        h = hypergradient(case, **accuracy)
        assert h.certified, h.reason
        error = float((entries(h.grad) - entries(best.grad)).norm())
        assert error <= h.bound + best.bound, accuracy
        assert h.loss_interval[0] <= best.loss_interval[1] and h.loss_interval[1] >= best.loss_interval[0]
        if "relative" in accuracy:
            assert h.relative_bound <= 0.1


@every
def test_a_batch_is_its_samples_one_by_one(regularizer):
    case = build(regularizer, batch=3, channels=2, size=(6, 7))
    accuracy = {"error_tol": 1e-12, "residual_tol": 1e-12}
    whole = entries(hypergradient(case, **accuracy).grad)
    alone = []
    for i in range(3):
        problem = case.energy.bind(case.y[i : i + 1], case.physics)
        alone.append(entries(bi.hypergradient(problem, bi.SquaredError(), case.x_true[i : i + 1], **accuracy).grad))
        values = case.energy.regularizer.fn(case.y)[i : i + 1]
        torch.testing.assert_close(case.energy.regularizer.fn(case.y[i : i + 1]), values, rtol=1e-13, atol=0)
    torch.testing.assert_close(whole, torch.stack(alone).mean(0), rtol=1e-9, atol=1e-11)


# --- sums and multiples


def test_a_multiple_is_the_weight_of_total_variation():
    x, q = draw((2, 1, 5, 6), 1), draw((2, 1, 5, 6), 2)
    own = bi.TotalVariation(0.3, 0.1)
    multiple = bi.Scaled(bi.TotalVariation(1.0, 0.1, learn_weight=False), 0.3)
    torch.testing.assert_close(multiple.fn(x), own.fn(x), rtol=1e-14, atol=0)
    a, b = multiple.linearize(x), own.linearize(x)
    radius, mu = torch.tensor([0.03, 0.2], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    along, local = (at.directional(q, radius) for at in (a, b)), (at.local_change(q, radius, mu) for at in (a, b))
    for ours, theirs in (
        (a.grad, b.grad),
        (a.hvp(q), b.hvp(q)),
        (a.mixed_columns(), b.mixed_columns()),
        (a.hessian_diagonal(), b.hessian_diagonal()),
        (a.diffusion(), b.diffusion()),
        (a.relative_curvature(radius, mu), b.relative_curvature(radius, mu)),
        (a.mixed_energy_norms()[:, 1], b.mixed_energy_norms()[:, 1]),
        *zip(*((d.hessian, d.mixed, d.mixed_components) for d in along), strict=True),
        *zip(*((c.hessian, c.slopes, c.energy) for c in local), strict=True),
        *zip(*(list(m.constants(x.shape).__dict__.values())[:3] for m in (multiple, own)), strict=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert a.weight_column == b.weight_column == 0 and a.length_scale == b.length_scale
    memory = 0.3 * draw((2, 2, 1, 5, 6), 3).clamp(-1, 1)
    models = a.newton_model(memory), b.newton_model(memory)
    torch.testing.assert_close(models[0].hvp(q), models[1].hvp(q), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(models[0].diffusion(), models[1].diffusion(), rtol=1e-12, atol=1e-14)


def test_a_sum_of_two_total_variations_is_one():
    x, q = draw((2, 1, 5, 6), 1), draw((2, 1, 5, 6), 2)
    one, two = bi.TotalVariation(0.5, 0.1), bi.Sum(bi.TotalVariation(0.2, 0.1), bi.TotalVariation(0.3, 0.1))
    a, b = two.linearize(x), one.linearize(x)
    radius, mu = torch.tensor([0.03, 0.2], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    for ours, theirs in (
        (two.fn(x), one.fn(x)),
        (a.hvp(q), b.hvp(q)),
        (a.directional(q, radius).hessian, b.directional(q, radius).hessian),
        (a.local_change(q, radius, mu).energy, b.local_change(q, radius, mu).energy),
        (a.diffusion(), b.diffusion()),
        (a.mixed_columns()[:, [0, 1]].sum(1) + a.mixed_columns()[:, [2, 3]].sum(1), b.mixed_columns().sum(1)),
        (two.constants(x.shape).hessian_lipschitz, one.constants(x.shape).hessian_lipschitz),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    assert a.weight_column is None
    # relative to the whole Hessian the sum changes no faster than its parts do relative to their own and half of mu
    ratio = a.relative_curvature(radius, mu) / b.relative_curvature(radius, mu)
    assert bool((ratio >= 1 - 1e-9).all()) and bool((ratio <= 2).all())


def test_newton_models_of_the_parts_are_used_together():
    x, q = draw((2, 1, 5, 6), 1), draw((2, 1, 5, 6), 2)
    tv, second, quadratic = bi.TotalVariation(0.5, 0.1), bi.SecondOrderTotalVariation(0.3, 0.1), bi.Tikhonov(0.2)
    parts = [r.linearize(x) for r in (tv, quadratic, second)]
    at = bi.Sum(tv, quadratic, second).linearize(x)
    memory = at.newton_memory(cold=True)
    memories = [parts[0].newton_memory(cold=True), parts[2].newton_memory(cold=True)]
    for _ in range(2):
        models = [parts[0].newton_model(memories[0]), parts[2].newton_model(memories[1])]
        model = at.newton_model(memory)
        expected = models[0].hvp(q) + models[1].hvp(q) + parts[1].hvp(q)
        torch.testing.assert_close(model.hvp(q), expected, rtol=1e-12, atol=1e-14)
        step = torch.tensor([1.0, 0.5], dtype=F64)
        memory = model.advance(q, step)
        memories = [m.advance(q, step) for m in models]
        torch.testing.assert_close(memory, torch.cat([m.flatten(1) for m in memories], 1), rtol=1e-12, atol=1e-14)
    assert bi.Sum(bi.Tikhonov(0.2), bi.Tikhonov(0.1, "gradient")).linearize(x).newton_memory(cold=True) is None


def test_parts_without_columns_or_with_kinks_are_certified():
    for regularizer in (
        bi.Sum(bi.TotalVariation(0.1, 0.1), bi.InputConvex(1, (2,), 3)),
        bi.Scaled(bi.InputConvex(1, (2, 2), 3)),
        bi.Sum(bi.TotalVariation(0.1, 0.1), bi.Scaled(bi.FieldsOfExperts(2, 3, weight=0.1, smoothing=0.1), 0.5)),
        bi.Scaled(bi.FieldsOfExperts(2, 3, weight=0.1, smoothing=0.1).requires_grad_(False), 0.5),
    ):
        case = build(size=(6, 6))
        case.problem = bi.VariationalEnergy(regularizer).bind(case.y, case.physics)
        best = hypergradient(case, error_tol=1e-12, residual_tol=1e-12)
        h = hypergradient(case, relative=0.1)
        assert h.certified and list(h.grad) == list(case.problem.theta)
        assert float((entries(h.grad) - entries(best.grad)).norm()) <= h.bound + best.bound
        assert best.bound < 1e-3 * h.bound
    kinked = bi.Sum(HuberTotalVariation(0.1, 0.1, isotropic=False), bi.Tikhonov(0.1, "gradient"))
    assert kinked.constants((2, 1, 6, 6)).hessian_lipschitz is None
    assert "HuberTotalVariation: " in kinked.constants((2, 1, 6, 6)).reason
    case.problem = bi.VariationalEnergy(bi.Scaled(kinked, 2.0)).bind(case.y, case.physics)
    best = hypergradient(case, error_tol=1e-12, residual_tol=1e-12)
    assert best.certified and best.bound < 1e-6 * best.norm


def test_what_a_part_does_not_know_the_sum_does_not_know():
    model = bi.Scaled(bi.Sum(bi.TotalVariation(0.1, 0.1), UserRegularizer()), 0.5)
    case = build(size=(5, 6))
    case.problem = bi.VariationalEnergy(model).bind(case.y, case.physics)
    h = hypergradient(case, error_tol=1e-8, residual_tol=1e-8)
    assert not h.certified and "UserRegularizer" in h.reason
    inside = case.problem.linearize(case.y).inside.inside
    assert not hasattr(inside, "hessian_diagonal") and inside.diffusion() is None
    radius = torch.tensor([0.1, 0.1], dtype=F64)
    assert inside.relative_curvature(radius, radius) is None and inside.directional(case.y, radius) is None
    assert inside.mixed_columns() is None and inside.subset(torch.tensor([0])) is None


def test_plain_values_build_the_same_and_files_keep_it(tmp_path):
    second = {"kind": "second_order_total_variation", "weight": 0.2, "learn_smoothing": False}
    nested = {"kind": "scaled", "regularizer": {"kind": "tikhonov", "operator": "gradient"}, "weight": 0.4}
    network = {"kind": "input_convex", "features": [2, 3], "kernel_size": 3, "strong": 0.1}
    model = bi.Sum(bi.TotalVariation(0.3), parts=[second, nested, network])
    names = [name for name, _ in model.named_parameters()][:6]
    assert names[:2] == ["parts.0.log_weight", "parts.0.log_smoothing"]
    assert "parts.2.regularizer.log_weight" in names and list(model.trainable())[2] == "parts.1.log_weight"
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * draw(tuple(p.shape), 1)
    x = draw((2, 1, 6, 5), 2)
    for regularizer in (model, bi.Scaled(model, 2.0), *model.regularizers):
        loaded = load_regularizer(save_regularizer(tmp_path / "r.safetensors", regularizer))
        assert type(loaded) is type(regularizer) and loaded.metadata["arguments"] == regularizer.arguments()
        assert torch.equal(loaded.fn(x), regularizer.fn(x)) and torch.equal(loaded.grad(x), regularizer.grad(x))


def test_settings_of_a_run_build_sums():
    parts = [{"kind": "total_variation", "weight": 0.2}, {"kind": "second_order_total_variation"}]
    model = make_regularizer(RegularizerConfig("sum", options={"parts": parts}))
    assert isinstance(model, bi.Sum) and len(model.trainable()) == 4
    assert float(model.parts[0].log_weight.detach().exp()) == pytest.approx(0.2)
    scaled = RegularizerConfig("scaled", 0.3, options={"regularizer": {"kind": "sum", "parts": parts}})
    assert float(make_regularizer(scaled).log_weight.detach().exp()) == pytest.approx(0.3)


def test_parts_that_make_no_sense_are_refused():
    tv = bi.TotalVariation()
    for build_bad, words in (
        (lambda: bi.Sum(), "at least one"),
        (lambda: bi.Sum(tv, 3.0), "Regularizer, or a dict"),
        (lambda: bi.Sum(parts=[{"kind": "unknown"}]), "total_variation"),
        (lambda: bi.Sum(parts=[{"kind": "tikhonov", "colour": 1}]), "arguments of tikhonov"),
        (lambda: bi.Sum(tv, tv), "shared"),
        (lambda: bi.Scaled(tv, -1.0), "weight"),
        (lambda: bi.Sum(UserRegularizer()).arguments(), "UserRegularizer"),
        (lambda: bi.SecondOrderTotalVariation(0.0), "weight"),
        (lambda: bi.InputConvex(1, ()), "features"),
        (lambda: bi.InputConvex(1, (2,), 4), "kernel_size"),
        (lambda: bi.InputConvex(1, strong=-1.0), "strong"),
        (lambda: bi.InputConvex(1, beta=0.0), "beta"),
        (lambda: bi.InputConvex(3).fn(torch.zeros(2, 1, 4, 4)), r"\(B, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=words):
            build_bad()


# --- input-convex networks


def network(channels: int = 1, features: tuple[int, ...] = (3, 2), seed: int = 0, **arguments) -> bi.InputConvex:
    """One with kernels of all sizes, as after learning."""
    model = bi.InputConvex(channels, features, 3, weight=2.0, seed=seed, **arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.7 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return model


def jacobian(model: bi.InputConvex, x: Tensor) -> Tensor:
    """J of every sample, ``(B, d, n)``, column by column of J^T."""
    at, d = model.linearize(x[:1]), x[0].numel()
    rows = []
    for sample in x:
        at = model.linearize(sample.unsqueeze(0))
        unit = torch.eye(d, dtype=F64).reshape(d, 1, *x.shape[1:])
        rows.append(torch.stack([entries(at.mixed_vjp(e)) for e in unit]))
    return torch.stack(rows)


@given(seed=st.integers(0, 2**31), beta=st.floats(0.1, 50.0), t=st.floats(0.0, 1.0), size=st.floats(0.01, 10.0))
@settings(max_examples=40, deadline=None)
def test_networks_are_convex_along_segments(seed, beta, t, size):
    generator = torch.Generator().manual_seed(seed)
    model = bi.InputConvex(2, (3, 2, 2), 3, beta=beta, seed=seed)
    with torch.no_grad():
        for p in model.parameters():  # whatever an optimizer makes of them
            p += 3 * torch.randn(p.shape, dtype=p.dtype, generator=generator)
        a, b = size * torch.randn((2, 4, 2, 5, 4), dtype=F64, generator=generator)
        ends, between = (1 - t) * model.fn(a) + t * model.fn(b), model.fn((1 - t) * a + t * b)
    assert between.shape == (4,) and bool((between <= ends + 1e-12 * ends.abs()).all())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_networks_give_one_value_per_image(channels, batch):
    model = network(channels)
    x = draw((batch, channels, 5, 6), 1)
    values = model.fn(x)
    assert values.shape == (batch,)
    torch.testing.assert_close(values, torch.cat([model.fn(a.unsqueeze(0)) for a in x]), rtol=1e-13, atol=0)
    assert torch.equal(network(channels).fn(x), values) and not torch.equal(network(channels, seed=1).fn(x), values)


def test_a_network_by_hand():
    model = bi.InputConvex(1, (1, 1), 1, beta=2.0, strong=0.5)
    with torch.no_grad():
        for p, value in zip(model.parameters(), (0.3, 1.5, -0.7, 0.2, 0.1, -0.4), strict=True):
            p.fill_(value)
    x = 0.8

    def sigma(t: float) -> float:
        return math.log1p(math.exp(2 * t)) / 2

    positive = [math.log1p(math.exp(stored)) for stored in (0.3, 0.2)]
    first = sigma(1.5 * x + 0.1)
    expected = positive[0] * sigma(positive[1] * first - 0.7 * x - 0.4) + 0.25 * x**2
    assert float(model.fn(torch.full((1, 1, 1, 1), x, dtype=F64)).detach()) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_norms_of_convolutions(channels, size):
    kernel = draw((4, channels, size, size), size)
    units = torch.eye(channels * 64, dtype=F64).reshape(-1, channels, 8, 8)
    for bound, k in ((kernel_norm(kernel), kernel), (positive_norm(kernel.abs()), kernel.abs())):
        true = float(torch.linalg.matrix_norm(torch.conv2d(units, k, padding=size // 2).flatten(1), 2))
        assert true <= bound * (1 + 1e-12) and bound <= 1.35 * true
    assert kernel_norm(kernel) <= positive_norm(kernel.abs()) * (1 + 1e-12)


@pytest.mark.parametrize("features", [(3,), (3, 2), (2, 3, 2)])
def test_network_constants_survive_gradient_ascent(features):
    model = network(1, features, beta=4.0)
    problem, x = test_energies.Alone(model), 0.5 * draw((6, 1, 4, 4), 1)
    constants = model.constants(x.shape)
    q, e = draw(x.shape, 2), 0.01 * draw(x.shape, 3)
    q = q / per_sample(norm(q), q)
    found = test_energies.ascend(
        lambda x, q, e: test_energies.ratio(problem, x, e, q / per_sample(norm(q), q), "hessian"),
        [x, q, e], lambda *v: list(v), steps=60,
    )  # fmt: skip
    assert bool((found <= constants.hessian_lipschitz).all())
    assert float((found / constants.hessian_lipschitz).max()) > 1e-3  # an attack that comes near nothing proves nothing
    radius = torch.full((6,), 0.3, dtype=F64)
    along = model.linearize(x).directional(q, radius)
    assert not along.hessian.requires_grad and not model.linearize(x).hvp(q).requires_grad
    assert bool((along.hessian <= 3 * constants.hessian_lipschitz).all())
    found = test_energies.ascend(
        lambda e: test_energies.ratio(problem, x, e, q, "hessian"), [e], lambda e: [e], steps=40
    )
    assert bool((found <= along.hessian).all()) and float((found / along.hessian).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("features", [(3,), (3, 2), (2, 3, 2)])
@pytest.mark.parametrize("frozen", [(), ("hidden_kernels", "output"), ("input_kernels", "biases")])
def test_mixed_derivative_of_networks_on_balls(features, frozen):
    model = network(1, features, beta=4.0)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
    if not model.trainable():
        return
    x = 0.5 * draw((4, 1, 4, 4), 1)
    at = model.linearize(x)
    J = jacobian(model, x)
    norms, bound = torch.linalg.matrix_norm(J, 2), at.mixed_norm_bound()
    assert bool((norms <= bound).all()) and bool((bound <= 100 * norms).all())
    best = torch.zeros(4, dtype=F64)
    for size in (1e-3, 0.1, 1.0):
        radius = torch.full((4,), size, dtype=F64)
        slope = at.constants_on_ball(radius).mixed_lipschitz
        assert at.constants_on_ball(radius).reason == "" and model.constants(x.shape).mixed_lipschitz is None
        for seed in range(3):
            a, b = (e * per_sample(radius / norm(e), e) for e in (draw(x.shape, seed), draw(x.shape, 10 + seed)))
            change = torch.linalg.matrix_norm(jacobian(model, x + a) - jacobian(model, x + b), 2) / norm(a - b)
            assert bool((change <= slope).all())
            best = torch.maximum(best, change / slope)
            q = draw(x.shape, 20 + seed)
            along = torch.einsum("bdn,bd->bn", jacobian(model, x + a) - J, q.flatten(1)).norm(dim=1) / norm(a)
            assert bool((along <= at.directional(q, radius).mixed).all())
    assert float(best.max()) > 1e-3


def test_network_constants_follow_the_kernels():
    model = network(1, (2, 2))
    before = model.bounds()
    assert isinstance(before, NetworkBounds)
    with torch.no_grad():
        model.output += 1.0
        grown = model.constants((1, 1, 4, 4))
    assert float(grown.smoothness) > before.smoothness and float(grown.strong_convexity) == 0
    assert float(network(1, (2, 2), strong=0.3).constants((1, 1, 4, 4)).strong_convexity) == 0.3


def test_network_slopes_along_a_line_are_increasing():
    """Monotone gradients, in float32 as in float64, and the same numbers from parameters of either dtype."""
    model = network(2, (3, 2))
    x, d = draw((4, 2, 5, 5), 1), draw((4, 2, 5, 5), 2)
    for dtype in (F32, F64):
        slopes = torch.stack([inner(model.grad((x + t * d).to(dtype)), d.to(dtype)) for t in np.linspace(-1, 1, 9)])
        assert bool((slopes.diff(dim=0) > 0).all()) and slopes.dtype == dtype
    close = model.grad(x.float()).double() - model.grad(x)
    assert bool((norm(close) <= 4 * torch.finfo(F32).eps * model.gradient_scale(x)).all())
