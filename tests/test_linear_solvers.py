"""Linear solvers against direct solves, and every clause of their contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from deepinv.physics import Denoising
from scipy.sparse.linalg import cg as scipy_cg
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

import bilevel_imaging as bi
from bilevel_imaging.cost import Cost
from bilevel_imaging.derivatives import Constants, Linearization
from bilevel_imaging.energies.problem import CountedLinearization
from bilevel_imaging.linear_solvers import (
    LINEAR_SOLVERS,
    MINRES,
    Chebyshev,
    ConjugateGradient,
    DenseSolver,
    GradientDescent,
    HeavyBall,
    assemble_hessian,
)

F32, F64 = torch.float32, torch.float64
ITERATIVE = sorted(LINEAR_SOLVERS)


class Matrices(Linearization):
    """Hessians given as matrices ``(B, d, d)`` acting on images ``(B, 1, 1, d)``."""

    def __init__(self, matrix: Tensor, constants: Constants, *, can_subset: bool = True, jacobi: bool = False):
        self.matrix, self.constants = matrix, constants
        self.can_subset, self.jacobi = can_subset, jacobi
        self.grad = torch.zeros(matrix.shape[0], 1, 1, matrix.shape[2], dtype=matrix.dtype)

    def hvp(self, v: Tensor) -> Tensor:
        return torch.einsum("bij,bcwj->bcwi", self.matrix, v)

    def mixed_vjp(self, q: Tensor) -> dict[str, Tensor]:
        return {}

    def preconditioner(self):
        diagonal = self.matrix.diagonal(dim1=1, dim2=2)[:, None, None]
        return (lambda v: v / diagonal) if self.jacobi else None

    def subset(self, index: Tensor) -> Linearization | None:
        if not self.can_subset:
            return None
        constants = self.constants.subset(index)
        return Matrices(self.matrix[index], constants, can_subset=True, jacobi=self.jacobi)


def random_system(batch=3, size=30, kappa=100.0, seed=0, dtype=F64, smoothness=True, **options):
    """Counted linearization with eigenvalues spread geometrically over [1, kappa], and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(batch, size, size, generator=generator, dtype=F64)).Q
    eigenvalues = torch.logspace(0, math.log10(kappa), size, dtype=F64)
    matrix = basis @ torch.diag_embed(eigenvalues.expand(batch, size)) @ basis.transpose(1, 2)
    matrix = ((matrix + matrix.transpose(1, 2)) / 2).to(dtype)
    ones = torch.ones(batch, dtype=dtype)
    constants = Constants(strong_convexity=ones, smoothness=kappa * ones if smoothness else None)
    rhs = torch.randn(batch, 1, 1, size, generator=generator, dtype=F64).to(dtype)
    return CountedLinearization(Matrices(matrix, constants, **options), Cost()), rhs


def direct(linearization, rhs):
    solution = torch.linalg.solve(linearization.matrix.double(), rhs.double().flatten(1).unsqueeze(2))
    return solution.reshape(rhs.shape)


def true_residual(linearization, rhs, q):
    product = torch.einsum("bij,bcwj->bcwi", linearization.matrix.double(), q.double())
    return (rhs.double() - product).flatten(1).norm(dim=1)


def size_of(rhs):
    return rhs.double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", [*ITERATIVE, "dense"])
def test_agrees_with_direct_solve(name):
    solver = DenseSolver() if name == "dense" else LINEAR_SOLVERS[name]()
    linearization, rhs = random_system()
    before = rhs.clone()
    solution = solver.solve(linearization, rhs, 1e-9)
    assert solution.converged.all() and set(solution.reason) == {"converged"}
    assert torch.equal(rhs, before)
    error = (solution.q - direct(linearization, rhs)).flatten(1).norm(dim=1)
    assert (error <= 1.01e-9).all(), "smallest eigenvalue 1: the error is at most the residual"
    torch.testing.assert_close(
        solution.residual_norm, true_residual(linearization, rhs, solution.q), atol=1e-12, rtol=0
    )


def test_iterations_equal_scipy():
    linearization, rhs = random_system(batch=1)
    steps = []
    matrix, b = linearization.matrix[0].numpy(), rhs.flatten().numpy()
    scipy_cg(matrix, b, rtol=0, atol=1e-8, callback=lambda q: steps.append(q.copy()))
    solution = ConjugateGradient().solve(linearization, rhs, 1e-8)
    assert abs(int(solution.iterations) - len(steps)) <= 1
    shorter = ConjugateGradient().solve(linearization, rhs, 0.0, max_iter=7).q.flatten()
    torch.testing.assert_close(shorter, torch.from_numpy(steps[6]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kappa", [10.0, 1000.0])
def test_rates(kappa):
    """Iterations stay below what the residual bounds of the methods allow."""
    linearization, rhs = random_system(kappa=kappa, size=60)
    accuracy = 1e-6
    gd, hb = (kappa - 1) / (kappa + 1), (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    bounds = {
        "conjugate_gradient": lambda k: 2 * math.sqrt(kappa) * hb**k,
        "gradient_descent": lambda k: gd**k,
        "heavy_ball": lambda k: (1 + k * (1 + hb)) * hb**k,
        "minres": lambda k: 2 * hb**k / (1 + hb ** (2 * k)),
        "chebyshev": lambda k: 2 * hb**k / (1 + hb ** (2 * k)),
    }
    for name, bound in bounds.items():
        allowed = next(k for k in range(100000) if bound(k) <= accuracy)
        solution = LINEAR_SOLVERS[name]().solve(linearization, rhs, accuracy * size_of(rhs))
        assert solution.converged.all() and (solution.iterations <= allowed).all(), name
        assert (solution.iterations >= allowed // 10).all(), f"{name}: implausibly few iterations"


@pytest.mark.parametrize("steps", [1, 2, 17])
def test_textbook_recurrences(steps):
    """From q = 0 the iterates are those of the published recurrences (what unrolled differentiation computes)."""
    linearization, rhs = random_system(kappa=50.0)
    rhs[1] *= 1e-12
    gd = torch.zeros_like(rhs)
    hb, hb_old = torch.zeros_like(rhs), torch.zeros_like(rhs)
    root, alpha = math.sqrt(50.0), 2 / 51.0
    alpha_hb, beta = 4 / (root + 1) ** 2, ((root - 1) / (root + 1)) ** 2
    for _ in range(steps):
        gd = gd - alpha * (linearization.hvp(gd) - rhs)
        hb, hb_old = hb - alpha_hb * (linearization.hvp(hb) - rhs) + beta * (hb - hb_old), hb
    for solver, expected in ((GradientDescent(), gd), (HeavyBall(), hb)):
        solution = solver.solve(linearization, rhs, 0.0, max_iter=steps)
        assert solution.iterations.tolist() == [steps] * 3 and set(solution.reason) == {"max_iter"}
        error = (solution.q - expected).flatten(1).norm(dim=1)
        assert (error <= 1e-13 * expected.flatten(1).norm(dim=1)).all()


def eigenvalues_in(linearization, rhs):
    """Eigenvalues, eigenvectors and the coefficients of rhs."""
    values, vectors = torch.linalg.eigh(linearization.matrix)
    return values, vectors, vectors.transpose(1, 2) @ rhs.flatten(1).unsqueeze(2)


@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_chebyshev_residual_is_the_chebyshev_polynomial(steps):
    """r_k = T_k((L + mu - 2 H) / (L - mu)) b / T_k((L + mu) / (L - mu)), from the eigenvalues of H."""
    linearization, rhs = random_system(kappa=50.0)
    values, vectors, coefficients = eigenvalues_in(linearization, rhs)
    inside = torch.cos(steps * torch.arccos(((51 - 2 * values) / 49).clamp(-1, 1)))
    outside = math.cosh(steps * math.acosh(51 / 49))
    expected = (vectors @ (inside.unsqueeze(2) / outside * coefficients)).reshape(rhs.shape)
    solution = Chebyshev().solve(linearization, rhs, 0.0, max_iter=steps)
    product = torch.einsum("bij,bcwj->bcwi", linearization.matrix, solution.q)
    torch.testing.assert_close(rhs - product, expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(solution.residual_norm, size_of(expected), atol=1e-13, rtol=0)


def test_chebyshev_knows_its_iterations_beforehand():
    """The first k whose bound is below the tolerance, whatever the right-hand sides and the spectrum are."""
    for kappa, tol in ((30.0, 1e-3), (300.0, 1e-7)):
        q = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
        needed = next(k for k in range(10_000) if 2 * q**k / (1 + q ** (2 * k)) <= tol)
        for seed in (0, 1):
            linearization, rhs = random_system(kappa=kappa, seed=seed)
            solution = Chebyshev().solve(linearization, rhs, tol * size_of(rhs))
            assert solution.converged.all() and solution.iterations.tolist() == [needed] * 3
        # the bound is attained at the ends of [mu, L]
        _, vectors, _ = eigenvalues_in(linearization, rhs)
        solution = Chebyshev().solve(linearization, vectors[:, :, 0].reshape(rhs.shape), tol)
        attained = torch.full_like(solution.residual_norm, 2 * q**needed / (1 + q ** (2 * needed)))
        torch.testing.assert_close(solution.residual_norm, attained, rtol=1e-6, atol=0)


def test_chebyshev_on_a_multiple_of_the_identity():
    linearization, rhs = random_system(kappa=1.0)
    solution = Chebyshev().solve(linearization, rhs, 1e-12)
    assert solution.converged.all() and solution.iterations.tolist() == [1] * 3
    torch.testing.assert_close(solution.q, direct(linearization, rhs), atol=1e-13, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 13])
def test_minres_equals_scipy_and_minimizes_over_the_krylov_space(steps):
    linearization, rhs = random_system(batch=2, kappa=30.0)
    linearization.inside.matrix[1] -= 6 * torch.eye(30, dtype=F64)  # indefinite
    solution = MINRES().solve(linearization, rhs, 0.0, max_iter=steps)
    for i, (matrix, b) in enumerate(zip(linearization.matrix.numpy(), rhs.flatten(1).numpy(), strict=True)):
        iterates = []
        scipy_minres(matrix, b, rtol=0, maxiter=steps, callback=lambda q, keep=iterates: keep.append(q.copy()))
        torch.testing.assert_close(solution.q[i].flatten(), torch.from_numpy(iterates[-1]), atol=1e-10, rtol=1e-8)
        # K = H span{b, H b, ...}: what is left of b after projection on K
        vectors = [matrix @ b]
        for _ in range(steps - 1):
            following = matrix @ vectors[-1]
            basis = np.linalg.qr(np.stack(vectors, 1))[0]
            following -= basis @ (basis.T @ following)
            vectors.append(following / np.linalg.norm(following))
        basis = np.linalg.qr(np.stack(vectors, 1))[0]
        smallest = np.linalg.norm(b - basis @ (basis.T @ b))
        assert float(solution.residual_norm[i]) == pytest.approx(smallest, rel=1e-6)


def test_minres_residuals():
    """They never grow, and the recursed ones, norms and vectors, are those of the iterates."""
    linearization, rhs = random_system(batch=3, kappa=1000.0)
    linearization.inside.matrix[2] -= 100 * torch.eye(30, dtype=F64)
    last = size_of(rhs)
    for steps in range(1, 25):
        solution = MINRES()._solve(linearization, rhs, 0.0, max_iter=steps, check=False)
        true = true_residual(linearization, rhs, solution.q)
        torch.testing.assert_close(solution.residual_norm, true, atol=1e-11, rtol=1e-9)
        product = torch.einsum("bij,bcwj->bcwi", linearization.matrix, solution.q)
        torch.testing.assert_close(solution.residual, rhs - product, atol=1e-10, rtol=0)
        assert (true <= last * (1 + 1e-12)).all()
        last = true
    assert (last < 0.5 * size_of(rhs)).all()


def test_minres_on_indefinite_and_singular_hessians():
    linearization, rhs = random_system(batch=3)
    linearization.inside.matrix[0] -= 5 * torch.eye(30, dtype=F64)
    linearization.inside.matrix[1] = torch.diag((torch.arange(30) >= 10).double())
    linearization.inside.matrix[2] = 0
    solution = MINRES().solve(linearization, rhs, 1e-9)
    assert solution.converged.tolist() == [True, False, False] and solution.reason[2] == "stagnated"
    assert solution.q.isfinite().all() and solution.residual_norm.isfinite().all()
    torch.testing.assert_close(solution.residual_norm, true_residual(linearization, rhs, solution.q), atol=1e-9, rtol=0)
    # the least residual there is
    assert float(solution.residual_norm[1]) == pytest.approx(float(rhs[1].flatten()[:10].norm()), rel=1e-12)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("factor", [1e-12, 1e-30, 1e20])
def test_any_scale(name, dtype, factor):
    linearization, rhs = random_system(dtype=dtype)
    accuracy = 1e-4 if dtype == F32 else 1e-9
    scaled = rhs * factor
    solution = LINEAR_SOLVERS[name]().solve(linearization, scaled, (accuracy * size_of(scaled)).to(dtype))
    reference = LINEAR_SOLVERS[name]().solve(linearization, rhs, (accuracy * size_of(rhs)).to(dtype))
    assert solution.converged.all()
    assert (true_residual(linearization, scaled, solution.q) <= 1.01 * accuracy * size_of(scaled)).all()
    # the factor is no power of two: rounding differs
    assert ((solution.iterations - reference.iterations).abs() <= 3 + reference.iterations // 20).all()


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("power", [-90, 40])
def test_powers_of_two_change_no_bit(name, power):
    linearization, rhs = random_system()
    one = LINEAR_SOLVERS[name]().solve(linearization, rhs, 0.0, max_iter=12).q
    other = LINEAR_SOLVERS[name]().solve(linearization, rhs * 2.0**power, 0.0, max_iter=12).q
    assert torch.equal(one * 2.0**power, other)


@pytest.mark.parametrize("name", [*ITERATIVE, "dense"])
@pytest.mark.parametrize("can_subset", [True, False])
def test_zero_solved_and_broken_samples_beside_a_normal_one(name, can_subset):
    solver = DenseSolver() if name == "dense" else LINEAR_SOLVERS[name]()
    linearization, rhs = random_system(batch=6, can_subset=can_subset)
    alone, _ = random_system(batch=6)
    q0 = torch.zeros_like(rhs)
    rhs[0] = 0
    q0[1] = direct(linearization, rhs)[1]
    rhs[2, 0, 0, 3] = math.nan
    rhs[3, 0, 0, 0] = math.inf
    q0[4] = math.nan
    solution = solver.solve(linearization, rhs, 1e-8, q0=q0)
    assert solution.converged.tolist() == [True, True, False, False, True, True]
    assert solution.reason[2] == solution.reason[3] == "not finite"
    assert torch.equal(solution.q[0], torch.zeros_like(rhs[0]))
    assert solution.q.isfinite().all() and solution.residual_norm[2:4].isinf().all()
    if name != "dense":
        assert solution.iterations[:4].tolist() == [0, 0, 0, 0]
        assert torch.equal(solution.q[1], q0[1])
    reference = solver.solve(alone.subset(torch.tensor([4, 5])), rhs[4:], 1e-8)
    torch.testing.assert_close(solution.q[4:], reference.q, atol=1e-12, rtol=0)
    assert torch.equal(solution.iterations[4:], reference.iterations)


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("can_subset", [True, False])
def test_batch_is_one_by_one(name, can_subset):
    """Tolerances from 1e-1 to 1e-10, so that samples finish, are frozen and dropped at very different times."""
    linearization, rhs = random_system(batch=5, can_subset=can_subset)
    tol = torch.tensor([1e-1, 1e-10, 1e-3, 1e-1, 1e-6], dtype=F64)
    solution = LINEAR_SOLVERS[name]().solve(linearization, rhs, tol)
    assert solution.converged.all() and (true_residual(linearization, rhs, solution.q) <= tol).all()
    for i in range(5):
        one = Matrices(linearization.matrix[i : i + 1], linearization.constants.subset(torch.tensor([i])))
        single = LINEAR_SOLVERS[name]().solve(one, rhs[i : i + 1], float(tol[i]))
        torch.testing.assert_close(solution.q[i], single.q[0], atol=1e-12, rtol=0)
        assert int(solution.iterations[i]) == int(single.iterations)
        assert float(solution.residual_norm[i]) > 1e-4 * float(tol[i]), "went on after it was done"


@pytest.mark.parametrize("name", ITERATIVE)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_same_bits_alone_and_in_a_batch(name, dtype):
    generator = torch.Generator().manual_seed(0)
    y, rhs = torch.randn(2, 4, 1, 9, 10, generator=generator, dtype=F64).to(dtype)
    energy = bi.VariationalEnergy(bi.TotalVariation(0.3, 0.3))
    tol = torch.tensor([1e-4, 1e-1, 1e-2, 1e-3], dtype=dtype)
    together = LINEAR_SOLVERS[name]().solve(energy.bind(y, Denoising()).linearize(y), rhs, tol)
    assert together.converged.all()
    for i in range(4):
        part = slice(i, i + 1)
        alone = energy.bind(y[part], Denoising()).linearize(y[part])
        single = LINEAR_SOLVERS[name]().solve(alone, rhs[part], tol[part])
        assert torch.equal(single.q[0], together.q[i]) and int(single.iterations) == int(together.iterations[i])


def test_products_are_not_wasted():
    """k iterations from 0 cost k products; where the residual is recursed, checking it costs one more."""
    linearization, rhs = random_system(batch=1)
    extras = {"conjugate_gradient": 1, "gradient_descent": 0, "heavy_ball": 0, "minres": 1, "chebyshev": 0}
    for solver, extra in ((LINEAR_SOLVERS[name](), extra) for name, extra in extras.items()):
        linearization.cost.hvps = 0
        solution = solver.solve(linearization, rhs, 1e-6)
        assert linearization.cost.hvps == int(solution.iterations) + extra
    linearization.cost.hvps = 0
    solution = ConjugateGradient()._solve(linearization, rhs, 1e-6, check=False)
    assert linearization.cost.hvps == int(solution.iterations)
    linearization.cost.hvps = 0
    ConjugateGradient().solve(linearization, torch.zeros_like(rhs), 0.0)
    assert linearization.cost.hvps == 0


@pytest.mark.parametrize("name", LINEAR_SOLVERS)
def test_what_is_begun_is_checked_when_it_goes_on(name):
    linearization, rhs = random_system(batch=2)
    solver = LINEAR_SOLVERS[name]()
    begun = solver.begin(linearization, rhs, 0.1)
    assert begun.verified == (name != "conjugate_gradient")
    true = (rhs - linearization.hvp(begun.q)).flatten(1).norm(dim=1)
    assert bool(((begun.residual_norm - true).abs() <= 1e-10).all())
    again = solver.resume(linearization, rhs, begun, 1e-6)
    assert again.verified and bool(((rhs - linearization.hvp(again.q)).flatten(1).norm(dim=1) <= 1e-6).all())
    if begun.memory is not None:  # nothing was left to do
        assert solver.resume(linearization, rhs, begun, 1.0).verified == begun.verified


def test_finished_samples_are_dropped():
    linearization, rhs = random_system(batch=8)
    rhs[1:] = 0
    solution = ConjugateGradient().solve(linearization, rhs, 1e-8)
    assert linearization.cost.hvps == int(solution.iterations[0]) + 1


@pytest.mark.parametrize("name", ITERATIVE)
def test_warm_start(name):
    linearization, rhs = random_system()
    near = direct(linearization, rhs) + 1e-6
    before = near.clone()
    cold = LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8)
    warm = LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8, q0=near)
    assert warm.converged.all() and (warm.iterations < cold.iterations).all()
    assert torch.equal(near, before)
    # a start that is farther away than 0 is not used
    bad = LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8, q0=-1e6 * near)
    assert torch.equal(bad.q, cold.q)


def test_float32_residual_is_true_and_floor_is_reported():
    linearization, rhs = random_system(kappa=1e5, size=60, dtype=F32)
    # the limit is out of the way: what ends the solve is the floor
    solution = ConjugateGradient(max_iter=20_000).solve(linearization, rhs, 0.0)
    assert set(solution.reason) == {"stagnated"} and not solution.converged.any()
    true = true_residual(linearization, rhs, solution.q)
    floor = 4 * 1e5 * torch.finfo(F32).eps * size_of(solution.q)
    assert (true <= floor).all(), "stopped above the rounding floor"
    assert ((solution.residual_norm.double() - true).abs() <= floor).all()
    # recursion alone believes in a residual that is not there
    believed = ConjugateGradient()._solve(linearization, rhs, 1e-7, check=False).residual_norm.double()
    assert (believed < 0.01 * true).all()


@pytest.mark.parametrize("name", ["minres", "chebyshev"])
def test_restarts_end_at_the_floor(name):
    linearization, rhs = random_system(kappa=1e3, size=60, dtype=F32)
    solution = LINEAR_SOLVERS[name](max_iter=20_000).solve(linearization, rhs, 0.0)
    assert set(solution.reason) == {"stagnated"} and not solution.converged.any()
    true = true_residual(linearization, rhs, solution.q)
    floor = 4 * 1e3 * torch.finfo(F32).eps * size_of(solution.q)
    assert (true <= floor).all() and ((solution.residual_norm.double() - true).abs() <= floor).all()


@pytest.mark.parametrize("name", ["gradient_descent", "heavy_ball"])
def test_fixed_steps_stop_at_the_floor(name):
    linearization, rhs = random_system(kappa=20.0, dtype=F32)
    solution = LINEAR_SOLVERS[name]().solve(linearization, rhs, 0.0)
    assert set(solution.reason) == {"stagnated"}
    assert (true_residual(linearization, rhs, solution.q) <= 1e-5 * size_of(rhs)).all()
    assert (solution.iterations < 600).all()


def test_restarts_recover_from_drift():
    """Products that are off by 1e-3 for a while: the recursion believes it is done, the true residual does not."""
    linearization, rhs = random_system(batch=2)
    calls = []

    class Disturbed(Matrices):
        def hvp(self, v: Tensor) -> Tensor:
            calls.append(v.shape[0])
            return super().hvp(v) * (1 + 1e-3 * (len(calls) <= 20) * (-1) ** len(calls))

    disturbed = Disturbed(linearization.matrix, linearization.constants, can_subset=False)
    drifted = ConjugateGradient()._solve(disturbed, rhs, 1e-8, check=False)
    assert drifted.converged.all() and (true_residual(linearization, rhs, drifted.q) > 1e-6).all()
    calls.clear()
    solution = ConjugateGradient().solve(disturbed, rhs, 1e-8)
    assert solution.converged.all() and (solution.iterations > drifted.iterations).all()
    assert (true_residual(linearization, rhs, solution.q) <= 1.0001e-8).all()
    limit = int(drifted.iterations.max()) + 3
    calls.clear()
    limited = ConjugateGradient().solve(disturbed, rhs, 1e-8, max_iter=limit)
    assert (limited.iterations == limit).all() and set(limited.reason) == {"max_iter"}


@pytest.mark.parametrize("solver", [ConjugateGradient(), DenseSolver()])
def test_indefinite_hessian_is_reported(solver):
    linearization, rhs = random_system(batch=2)
    linearization.inside.matrix[0] -= 5 * torch.eye(30, dtype=F64)
    solution = solver.solve(linearization, rhs, 1e-9)
    assert solution.reason == ("not positive definite", "converged")
    assert solution.converged.tolist() == [False, True] and solution.q.isfinite().all()
    torch.testing.assert_close(solution.residual_norm, true_residual(linearization, rhs, solution.q), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ITERATIVE)
def test_broken_hessian_of_one_sample(name):
    linearization, rhs = random_system(batch=3)
    linearization.inside.matrix[1, 4, 4] = math.nan
    solution = LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8)
    assert solution.reason == ("converged", "not finite", "converged")
    assert solution.q.isfinite().all() and not solution.converged[1]


@pytest.mark.parametrize("name", ["gradient_descent", "heavy_ball", "chebyshev"])
def test_unknown_smoothness(name):
    linearization, rhs = random_system(smoothness=False, kappa=200.0)
    solution = LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8)
    assert solution.converged.all()


@pytest.mark.parametrize("name", ["gradient_descent", "heavy_ball", "chebyshev"])
def test_underestimated_smoothness_backs_off(name, monkeypatch):
    linearization, rhs = random_system(smoothness=False, kappa=200.0)
    guess = lambda operator, like: torch.full((like.shape[0],), 11.0, dtype=like.dtype)  # noqa: E731
    monkeypatch.setattr("bilevel_imaging.linear_solvers._stationary.estimate_smoothness", guess)
    assert LINEAR_SOLVERS[name]().solve(linearization, rhs, 1e-8).converged.all()


def test_preconditioner():
    """A diagonal scaling that spoils the condition number is undone by the diagonal preconditioner."""
    linearization, rhs = random_system(batch=4, kappa=10.0, jacobi=True)
    scaling = torch.logspace(0, 3, 30, dtype=F64)
    matrix = scaling[:, None] * linearization.inside.matrix * scaling
    linearization.inside.matrix = matrix
    rhs[3] = 0
    plain = ConjugateGradient().solve(linearization, rhs, 1e-8)
    auto = ConjugateGradient(preconditioner="auto").solve(linearization, rhs, 1e-8)
    given = ConjugateGradient(preconditioner=linearization.preconditioner()).solve(linearization, rhs, 1e-8)
    assert auto.converged.all() and given.converged.all()
    assert (2 * auto.iterations[:3] < plain.iterations[:3]).all()
    torch.testing.assert_close(auto.q, given.q, atol=1e-12, rtol=0)


def test_dense_assembles_the_hessian():
    linearization, _ = random_system(batch=2, size=7)
    torch.testing.assert_close(assemble_hessian(linearization), linearization.matrix)
    with pytest.raises(ValueError, match="at most 5"):
        DenseSolver(max_size=5).solve(linearization, linearization.grad, 0.0)


def test_misuse():
    linearization, rhs = random_system()
    solver = ConjugateGradient()
    with pytest.raises(ValueError, match="rhs"):
        solver.solve(linearization, rhs[:2], 1e-6)
    with pytest.raises(ValueError, match="q0"):
        solver.solve(linearization, rhs, 1e-6, q0=rhs.float())
    with pytest.raises(ValueError, match="residual_tol"):
        solver.solve(linearization, rhs, math.nan)
    with pytest.raises(ValueError, match="preconditioner"):
        ConjugateGradient(preconditioner="jacobi")
    linearization.constants = linearization.inside.constants = Constants()
    for name in (HeavyBall, Chebyshev):
        with pytest.raises(ValueError, match="strong convexity"):
            name().solve(linearization, rhs, 1e-6)


def test_autograd_state_is_left_alone():
    linearization, rhs = random_system()
    rhs.requires_grad_()
    q = ConjugateGradient().solve(linearization, rhs, 1e-6).q
    assert not q.requires_grad and torch.is_grad_enabled() and rhs.grad is None
