"""Norms of J from columns and from random products, against singular values; certificates that rest on them."""

from __future__ import annotations

import math
from dataclasses import replace

import deepinv
import numpy as np
import pytest
import torch
from cases import build, reference
from sweep import flat
from torch import Tensor, nn

import bilevel_imaging as bi
from bilevel_imaging.certificates import operator_norms
from bilevel_imaging.derivatives import Constants
from bilevel_imaging.hypergradients import average
from bilevel_imaging.hypergradients.loss import LossOracle
from bilevel_imaging.hypergradients.mixed_operators import mixed_operators, randomized_mixed_norms
from bilevel_imaging.hypergradients.point import Point

F32, F64 = torch.float32, torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(rows: int, columns: int, seed: int = 0, decay: float = 0.0) -> Tensor:
    """Singular values (1 + i)^-decay."""
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=F64, generator=generator(seed)))
    v, _ = torch.linalg.qr(torch.randn(columns, columns, dtype=F64, generator=generator(seed + 1)))
    rank = min(rows, columns)
    return u[:, :rank] * torch.arange(1, rank + 1, dtype=F64) ** -decay @ v[:, :rank].T


def bound_of(J: Tensor, seed: int = 0, **settings) -> operator_norms.RandomizedNorm:
    like = torch.empty(J.shape[0], dtype=J.dtype)
    return operator_norms.randomized_norm(
        lambda c: J @ c, lambda v: J.T @ v, like, generator=generator(seed), **settings
    )


# --- from columns


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1.0, 1e180])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_columns_give_the_largest_singular_value_at_any_scale(n, scale):
    columns = scale * torch.randn(3, n, 2, 4, 4, dtype=F64, generator=generator(n))
    columns[1] *= 1e-9
    true = np.linalg.norm(columns.flatten(2).numpy() / scale, 2, axis=(1, 2))
    found = operator_norms.from_columns(columns).numpy() / scale
    assert (found >= true).all()
    np.testing.assert_allclose(found, true, rtol=1e-9)


def test_columns_that_are_zero_missing_or_float32():
    assert operator_norms.from_columns(torch.zeros(2, 3, 1, 4, 4)).tolist() == [0, 0]
    assert operator_norms.from_columns(torch.zeros(2, 0, 1, 4, 4)).tolist() == [0, 0]
    tiny = torch.full((1, 2, 4), 1e-30, dtype=F32)
    found = operator_norms.from_columns(tiny)
    assert found.dtype == F64 and float(found) == pytest.approx(8**0.5 * 1e-30, rel=1e-6)


# --- from random products


@pytest.mark.parametrize("shape", [(30, 5), (5, 30), (20, 20)])
@pytest.mark.parametrize("scale", [1e-250, 1e-40, 1.0, 1e200])
def test_the_bound_holds_and_is_close_at_any_scale(shape, scale):
    J = scale * matrix(*shape, decay=0.5)
    found = bound_of(J)
    assert 1 <= found.bound / scale <= 2 and found.failure_probability <= 1e-6
    assert found.products == 2 * 3 * 10


def test_higher_powers_overestimate_less():
    J = matrix(60, 40, decay=0.3)
    over = {p: np.mean([bound_of(J, seed, power=p).bound for seed in range(20)]) for p in (1, 3, 6)}
    assert 2.0 < over[1] < 3.2 and 1.2 < over[3] < 1.5 and 1.08 < over[6] < 1.25
    # a larger factor needs fewer probes and gives a wider bound
    few, many = bound_of(J, factor=100.0), bound_of(J, factor=2.0)
    assert few.products < many.products and few.bound > many.bound


@pytest.mark.parametrize("rank_one", [True, False])
def test_it_fails_no_more_often_than_it_says(rank_one):
    """On matrices of rank one the statement is sharp: the rate of failures is nearly the one declared."""
    J = matrix(15, 8, decay=1.0)
    if rank_one:
        J = torch.outer(J[:, 0], J[0])
    true = float(torch.linalg.matrix_norm(J, ord=2))
    draws = 3000
    found = [bound_of(J, seed, power=2, factor=4.0, failure_probability=0.25) for seed in range(draws)]
    declared = found[0].failure_probability
    assert declared == 0.25
    rate = sum(f.bound < true for f in found) / draws
    assert rate <= declared + 3 * math.sqrt(declared / draws)
    assert rate > (0.8 * declared if rank_one else 0)


def test_a_power_iteration_is_no_bound():
    """The same products without the factor: always below the norm, which is why the factor is there."""
    J = matrix(30, 10, decay=0.3)
    below = 0
    for seed in range(20):
        v = torch.randn(30, dtype=F64, generator=generator(seed))
        for _ in range(3):
            v = J @ (J.T @ v)
            v = v / v.norm()
        below += float((J.T @ v).norm()) < 0.999
        assert bound_of(J, seed).bound >= 1
    assert below == 20


def test_zero_dicts_and_products_that_are_not_finite():
    like = torch.empty(4, dtype=F64)
    assert bound_of(torch.zeros(4, 3, dtype=F64)).bound == 0
    J = matrix(4, 5)

    def apply(c):
        return J @ torch.cat([c["a"], c["b"].flatten()])

    def adjoint(v):
        return {"a": (J.T @ v)[:1], "b": (J.T @ v)[1:].reshape(2, 2)}

    by_name = operator_norms.randomized_norm(apply, adjoint, like, generator=generator(0))
    assert by_name.bound == pytest.approx(bound_of(J).bound, rel=1e-12)
    for bad in (math.nan, math.inf):
        found = operator_norms.randomized_norm(lambda c: c, lambda v, b=bad: b * v, like, generator=generator(0))
        assert found.bound == math.inf


def test_probe_counts():
    assert operator_norms.probe_count(1e-6, 4.0) == 10
    for factor in (1.5, 2.0, 4.0, 10.0):
        for wanted in (0.5, 0.25, 0.1, 1e-3, 1e-6, 1e-12):
            count = operator_norms.probe_count(wanted, factor)
            assert factor**-count <= wanted and (count == 1 or factor ** -(count - 1) > wanted)


@pytest.mark.parametrize("bad", [{"power": 0}, {"factor": 1.0}, {"failure_probability": 0.0}])
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match="Expected power"):
        bound_of(matrix(3, 3), **bad)


# --- J of a problem by autograd


@pytest.mark.parametrize(("regularizer", "physics"), [("tv_isotropic", "blur_fft"), ("user", "denoising")])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_mixed_operators_are_those_of_the_sample(regularizer, physics, whole_batch, monkeypatch):
    case = build(regularizer, physics, batch=3, size=(4, 5))
    problem, x = case.problem, case.x_true + 0.1
    if whole_batch:  # problems that can't be restricted to one sample
        monkeypatch.setattr(type(problem), "subset", lambda self, index: None)
    theta = list(problem.theta.values())
    for sample in range(3):
        apply, adjoint = mixed_operators(problem, x, sample)
        rows = []
        for pixel in range(x[0].numel()):
            gradient = problem.grad(x)[sample].flatten()[pixel]
            rows.append(torch.stack(torch.autograd.grad(gradient, theta, allow_unused=True)))
        J = torch.stack(rows)
        v = torch.randn(x.shape[1:], dtype=F64, generator=generator(sample))
        c = {name: torch.randn((), dtype=F64, generator=generator(i)) for i, name in enumerate(problem.theta)}
        torch.testing.assert_close(torch.stack(list(adjoint(v).values())), J.T @ v.flatten())
        torch.testing.assert_close(apply(c).flatten(), J @ torch.stack(list(c.values())))
        assert apply(c).shape == x.shape[1:]


def test_randomized_mixed_norms_bound_each_sample_alone_or_in_a_batch():
    case = build("tv_isotropic", "inpainting", batch=3, size=(5, 5))
    x = case.x_true + torch.tensor([0.0, 0.5, 2.0], dtype=F64).reshape(3, 1, 1, 1) * case.y
    lin = case.problem.linearize(x)
    bounds, failure = randomized_mixed_norms(case.problem, lin, x)
    true = np.linalg.norm(lin.mixed_columns().flatten(2).numpy(), 2, axis=(1, 2))
    assert (true <= bounds.numpy()).all() and (bounds.numpy() <= 2 * true).all()
    assert failure <= 3e-6
    for i in range(3):
        single = case.problem.subset(torch.tensor([i]))
        alone, _ = randomized_mixed_norms(single, single.linearize(x[i : i + 1]), x[i : i + 1])
        assert float(alone) == pytest.approx(float(bounds[i]), rel=1e-12)


# --- certificates that rest on it


class PixelWeights(bi.Regularizer):
    """1/2 sum_i exp(theta_i) x_i^2: as many parameters as pixels, and only ``fn`` and the constants are declared."""

    def __init__(self, log_weights: Tensor):
        super().__init__()
        self.log_weights = nn.Parameter(log_weights)

    def fn(self, x: Tensor, *args, **kwargs) -> Tensor:
        return 0.5 * (self.log_weights.exp().to(x.dtype) * x.square()).flatten(1).sum(1)

    def constants(self, shape) -> Constants:
        low, high = (
            float(e) * f for e, f in zip(self.log_weights.detach().exp().aminmax(), (0.999, 1.001), strict=True)
        )
        bounds = (low, high, 0.0, None, high)
        return Constants(*(None if b is None else torch.full((shape[0],), b, dtype=F64) for b in bounds))


class Detached(PixelWeights):
    """A closed form that autograd can't see through: its J would look like 0."""

    def grad(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.log_weights.detach().exp() * x

    def linearize(self, x: Tensor):
        return PixelWeights(self.log_weights.detach()).linearize(x)


def pixel_weights(dtype: torch.dtype = F64, batch: int = 2, kind: type = PixelWeights):
    """(problem, x_true, exact hypergradient)."""
    theta = torch.randn(3, 4, dtype=F64, generator=generator(0)) - 1
    y = torch.randn(batch, 1, 3, 4, dtype=F64, generator=generator(1)).to(dtype)
    x_true = torch.randn(batch, 1, 3, 4, dtype=F64, generator=generator(2)).to(dtype)
    problem = bi.VariationalEnergy(kind(theta)).bind(y, deepinv.physics.Denoising())
    w = theta.exp()
    x = y.double() / (1 + w)
    return problem, x_true, (-(x - x_true.double()) * w * x / (1 + w)).mean((0, 1))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_hypergradient_with_many_parameters_is_certified(dtype):
    problem, x_true, true = pixel_weights(dtype)
    for accuracy in ({"relative": 0.1}, {"error_tol": 1e-2, "residual_tol": 1e-2}, {"error_tol": 1e-6}):
        h = bi.hypergradient(problem, bi.SquaredError(), x_true, **accuracy)
        error = float((h.grad["regularizer.log_weights"] - true).norm())
        assert h.certified and error <= h.bound < math.inf and h.component_bounds is None
        assert 0 < h.failure_probability <= 30 * 2 * 1e-6
    polished = bi.hypergradient(problem, bi.SquaredError(), x_true, error_tol=1e-2, certificate="polished")
    assert float((polished.grad["regularizer.log_weights"] - true).norm()) <= polished.bound
    both = average([h, polished], [2, 2])
    assert both.failure_probability == h.failure_probability + polished.failure_probability


def test_the_norm_used_is_within_a_factor_of_the_true_one():
    problem, x_true, _ = pixel_weights(batch=3)
    x = problem.initial() + 0.1
    point = Point(problem, LossOracle(bi.SquaredError(), x_true, problem.shape), x)
    true = (problem.regularizer.log_weights.detach().exp() * x).abs().flatten(1).amax(1)
    assert bool((true <= point.mixed_norm).all()) and bool((point.mixed_norm <= 2 * true).all())
    assert point.failures == [pytest.approx(3 * 4.0**-10)]


def test_a_gradient_without_a_graph_is_not_certified():
    problem, x_true, _ = pixel_weights(kind=Detached)
    with pytest.raises(ValueError, match="differentiable in theta"):
        mixed_operators(problem, x_true)
    bounds, _ = randomized_mixed_norms(problem, problem.linearize(x_true), x_true)
    assert bool(bounds.isinf().all())


def test_a_mixed_product_that_contradicts_autograd_is_not_certified(monkeypatch):
    problem, x_true, _ = pixel_weights()
    linearization = problem.linearize(x_true)
    true = linearization.mixed_vjp
    monkeypatch.setattr(linearization, "mixed_vjp", lambda q: {n: 1.001 * g for n, g in true(q).items()}, raising=False)
    bounds, failure = randomized_mixed_norms(problem, linearization, x_true)
    assert bool(bounds.isinf().all()) and failure == 0


def test_hidden_columns_of_total_variation(monkeypatch):
    """The certificate without columns still holds, and loses no more than the overestimate of ||J||."""
    case = build("tv_isotropic", "denoising", size=(6, 6), weight=0.3)
    true, slack, _, _, _ = reference(case)
    settings = {"error_tol": 1e-4, "residual_tol": 1e-4, "certificate": "directional"}
    known = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **settings)
    assert known.failure_probability == 0
    kind = type(case.energy.regularizer.linearize(case.x_true))
    monkeypatch.setattr(kind, "mixed_columns", lambda self: None)
    a_priori = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **settings)
    assert a_priori.certified and a_priori.failure_probability == 0
    constants = bi.TotalVariation.constants
    monkeypatch.setattr(bi.TotalVariation, "constants", lambda *a: replace(constants(*a), mixed_norm=None))
    hidden = bi.hypergradient(case.problem, bi.SquaredError(), case.x_true, **settings)
    assert np.linalg.norm((flat(hidden.grad) - true).astype(float)) <= hidden.bound + slack
    # without columns there are no bounds by components, which make the bound of the mean smaller
    assert known.bounds["directional"] * (1 - 1e-9) <= hidden.bound <= 2 * known.bounds["directional"]
    assert hidden.bound < a_priori.bound
    assert 0 < hidden.failure_probability <= 2e-6
