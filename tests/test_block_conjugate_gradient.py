"""Block conjugate gradients against direct solves: columns of every scale, dependent columns, zeros."""

from __future__ import annotations

import math

import deepinv
import pytest
import torch
from test_linear_solvers import random_system
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.linear_solvers import BlockConjugateGradient, ConjugateGradient
from bilevel_imaging.linear_solvers._block_algebra import combine, gram, orthonormalize, product

F32, F64 = torch.float32, torch.float64


def block_system(batch=3, columns=3, size=60, kappa=1000.0, dtype=F64, **options):
    linearization, _ = random_system(batch=batch, size=size, kappa=kappa, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(5)
    rhs = torch.randn(batch, columns, 1, 1, size, generator=generator, dtype=F64).to(dtype)
    return linearization, rhs


def sizes(rhs: Tensor) -> Tensor:
    return rhs.double().flatten(2).norm(dim=2)


def true_residuals(linearization, rhs, q) -> Tensor:
    product = torch.einsum("bij,bkcwj->bkcwi", linearization.matrix.double(), q.double())
    return sizes(rhs.double() - product)


def direct(linearization, rhs) -> Tensor:
    flat = rhs.double().flatten(2).transpose(1, 2)
    return torch.linalg.solve(linearization.matrix.double(), flat).transpose(1, 2).reshape(rhs.shape)


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
@pytest.mark.parametrize("can_subset", [True, False])
def test_agrees_with_direct_solve(columns, can_subset):
    linearization, rhs = block_system(columns=columns, can_subset=can_subset)
    before = rhs.clone()
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-9)
    assert solution.converged.all() and set(solution.reason) == {"converged"} and torch.equal(rhs, before)
    assert (sizes(solution.q - direct(linearization, rhs)) <= 1.01e-9).all()
    torch.testing.assert_close(
        solution.residual_norm, true_residuals(linearization, rhs, solution.q), atol=1e-12, rtol=0
    )


def test_one_column_is_conjugate_gradients():
    linearization, rhs = block_system(columns=1)
    for steps in (1, 5, 12):
        block = BlockConjugateGradient().solve(linearization, rhs, 0.0, max_iter=steps)
        plain = ConjugateGradient().solve(linearization, rhs[:, 0], 0.0, max_iter=steps)
        torch.testing.assert_close(block.q[:, 0], plain.q, atol=1e-10, rtol=0)
        assert block.iterations.tolist() == [steps] * 3 and set(block.reason) == {"max_iter"}


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_energy_is_minimal_over_the_block_krylov_space(steps):
    linearization, rhs = block_system(batch=2, columns=2)
    q = BlockConjugateGradient().solve(linearization, rhs, 0.0, max_iter=steps).q.flatten(2)
    for matrix, b, found in zip(linearization.matrix, rhs.flatten(2), q, strict=True):
        block = b.T
        space = [block]
        for _ in range(steps - 1):
            space.append(torch.linalg.qr(matrix @ space[-1]).Q)
        basis = torch.linalg.qr(torch.cat(space, 1)).Q
        expected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ block)
        torch.testing.assert_close(found.T, expected, atol=1e-10, rtol=0)


def test_fewer_iterations_than_separate_solves():
    linearization, rhs = block_system(columns=3, size=200, kappa=1e4)
    tol = 1e-8 * sizes(rhs)
    block = BlockConjugateGradient().solve(linearization, rhs, tol)
    separate = [ConjugateGradient().solve(linearization, rhs[:, j], tol[:, j]).iterations for j in range(3)]
    assert block.converged.all() and (block.iterations < 0.7 * torch.stack(separate).amin(0)).all()


def test_columns_of_any_scale_dependent_columns_and_zeros():
    linearization, rhs = block_system(batch=5)
    rhs[0, 1] = 0
    rhs[1] *= torch.tensor([1e-150, 1e100, 1.0], dtype=F64).reshape(3, 1, 1, 1)
    rhs[2, 2] = 3e-20 * rhs[2, 0]
    rhs[3, 1] = rhs[3, 0] * (1 + 1e-12 * rhs[3, 2])  # nearly dependent
    rhs[4, 0] = rhs[4, 1] = rhs[4, 2]
    tol = 1e-10 * sizes(rhs)
    solution = BlockConjugateGradient().solve(linearization, rhs, tol)
    assert solution.converged.all() and torch.equal(solution.q[0, 1], torch.zeros_like(rhs[0, 1]))
    assert (true_residuals(linearization, rhs, solution.q) <= 1.001 * tol).all()
    relative = sizes(solution.q - direct(linearization, rhs)) / sizes(direct(linearization, rhs)).clamp(min=1e-300)
    assert (relative <= 1e-7).all()


def test_products_are_not_spent_on_directions_that_vanish():
    """k products per iteration and column, none for zero and dependent columns."""
    linearization, rhs = block_system(batch=1)
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-8)
    assert linearization.cost.hvps == 3 * int(solution.iterations) + 3
    linearization.cost.hvps = 0
    rhs[0, 1], rhs[0, 2] = 0, 2 * rhs[0, 0]
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-8)
    assert linearization.cost.hvps == int(solution.iterations) + 2
    linearization.cost.hvps = 0
    solution = BlockConjugateGradient().solve(linearization, torch.zeros_like(rhs), 0.0)
    assert linearization.cost.hvps == 0 and solution.converged.all()


def test_krylov_space_that_is_exhausted():
    """Three distinct eigenvalues: 3 iterations at most, whatever the columns."""
    linearization, rhs = block_system(columns=2, size=30)
    linearization.inside.matrix = torch.diag_embed(torch.tensor([1.0, 7.0, 50.0], dtype=F64).repeat(10).expand(3, 30))
    rhs[:, 1, ..., 3:] = 0  # spans its space in 3, the sum of all three directions
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-10)
    assert solution.converged.all() and (solution.iterations <= 4).all()


@pytest.mark.parametrize("can_subset", [True, False])
def test_batch_is_one_by_one(can_subset):
    linearization, rhs = block_system(batch=4, columns=2, can_subset=can_subset)
    tol = torch.tensor([[1e-1, 1e-2], [1e-10, 1e-1], [1e-3, 1e-3], [1e-1, 1e-1]], dtype=F64)
    rhs[3] = 0
    together = BlockConjugateGradient().solve(linearization, rhs, tol)
    assert together.converged.all() and (true_residuals(linearization, rhs, together.q) <= tol).all()
    whole, _ = block_system(batch=4, columns=2)
    for i in range(4):
        single = BlockConjugateGradient().solve(whole.subset(torch.tensor([i])), rhs[i : i + 1], tol[i : i + 1])
        torch.testing.assert_close(together.q[i], single.q[0], atol=1e-12, rtol=0)
        assert int(together.iterations[i]) == int(single.iterations)


def test_same_bits_alone_and_in_a_batch():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 1, 9, 10, generator=generator, dtype=F64)
    energy = bi.VariationalEnergy(bi.TotalVariation(0.3, 0.1))
    problem = energy.bind(y, deepinv.physics.Denoising())
    rhs = torch.randn(3, 2, 1, 9, 10, generator=generator, dtype=F64)
    tol = torch.tensor([[1e-9] * 2, [1e-2] * 2, [1e-5] * 2], dtype=F64)
    together = BlockConjugateGradient().solve(problem.linearize(y), rhs, tol)
    for i in range(3):
        alone = energy.bind(y[i : i + 1], deepinv.physics.Denoising()).linearize(y[i : i + 1])
        single = BlockConjugateGradient().solve(alone, rhs[i : i + 1], tol[i : i + 1])
        assert torch.equal(single.q[0], together.q[i]) and int(single.iterations) == int(together.iterations[i])


def test_float32_floor_is_reported():
    linearization, rhs = block_system(columns=2, dtype=F32)
    solution = BlockConjugateGradient(max_iter=20_000).solve(linearization, rhs, 0.0)
    assert set(solution.reason) == {"stagnated"} and not solution.converged.any()
    true, floor = true_residuals(linearization, rhs, solution.q), 4e3 * torch.finfo(F32).eps * sizes(solution.q)
    assert (true <= floor).all() and ((solution.residual_norm.double() - true).abs() <= floor).all()


def test_broken_samples_beside_normal_ones():
    linearization, rhs = block_system(batch=5, columns=2, size=30)
    reference = BlockConjugateGradient().solve(linearization, rhs, 1e-9)
    linearization.inside.matrix[1, 4, 4] = math.nan
    linearization.inside.matrix[2] -= 500 * torch.eye(30, dtype=F64)
    rhs[3, 1, ..., 7] = math.inf
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-9)
    assert solution.reason == ("converged", "not finite", "not positive definite", "not finite", "converged")
    assert solution.converged.tolist() == [[True] * 2, [False] * 2, [False] * 2, [True, False], [True] * 2]
    assert solution.q.isfinite().all() and solution.residual_norm[3].isinf().tolist() == [False, True]
    for i in (0, 4):
        torch.testing.assert_close(solution.q[i], reference.q[i], atol=1e-12, rtol=0)
    true = true_residuals(linearization, rhs, solution.q)
    torch.testing.assert_close(solution.residual_norm[2], true[2], atol=1e-9, rtol=0)


def test_singular_hessian_is_reported():
    linearization, rhs = block_system(batch=2, columns=2, size=30)
    linearization.inside.matrix[0] = 0
    solution = BlockConjugateGradient().solve(linearization, rhs, 1e-9)
    assert solution.reason == ("not positive definite", "converged") and not solution.q[0].any()


def test_limit_returns_true_residuals():
    linearization, rhs = block_system()
    for steps in (0, 1, 4):
        solution = BlockConjugateGradient(max_iter=steps).solve(linearization, rhs, 1e-9)
        assert set(solution.reason) == {"max_iter"} and solution.iterations.tolist() == [steps] * 3
        torch.testing.assert_close(
            solution.residual_norm, true_residuals(linearization, rhs, solution.q), atol=1e-11, rtol=0
        )


def test_small_algebra():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 4, 1, 5, 6, generator=generator, dtype=F64)
    vectors[0, 2] = vectors[0, 0] - 2 * vectors[0, 1]
    vectors[1, 1] = 1e-8 * vectors[1, 1] + vectors[1, 0]
    w, upper = orthonormalize(vectors, sizes(vectors))
    torch.testing.assert_close(combine(w, upper), vectors, atol=1e-13, rtol=0)
    expected = torch.eye(4, dtype=F64).repeat(2, 1, 1)
    expected[0, 2, 2] = 0
    torch.testing.assert_close(gram(w, w), expected, atol=1e-14, rtol=0)
    assert torch.equal(upper, upper.triu()) and not upper[0, 2].any() and not w[0, 2].any()
    a, b = torch.randn(2, 2, 3, 3, generator=generator, dtype=F64)
    torch.testing.assert_close(product(a, b), a @ b, atol=1e-14, rtol=0)


def test_misuse():
    linearization, rhs = block_system()
    solver = BlockConjugateGradient()
    for bad in (rhs[:2], rhs[:, 0], rhs[:, :0], rhs.float()):
        with pytest.raises(ValueError, match="Expected rhs"):
            solver.solve(linearization, bad, 1e-6)
    for tol in (-1.0, math.nan, torch.ones(3, dtype=F64)):
        with pytest.raises(ValueError, match="residual_tol"):
            solver.solve(linearization, rhs, tol)
    with pytest.raises(ValueError, match="max_iter"):
        BlockConjugateGradient(max_iter=-1)
